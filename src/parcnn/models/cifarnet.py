"""A small, fast network for 32x32 colour images, of the kind that the CIFAR-10 speedruns use (Page 2018; Jordan 2024)."""

from __future__ import annotations

from parcnn import nn
from parcnn.nn import functional as F
from parcnn.plan.trace import Tensor


class Block(nn.Module):
    """conv 3x3 -> max-pool 2x2 -> batch norm -> ReLU -> conv 3x3 -> batch norm -> ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.pool(self.conv1(x))))
        return F.relu(self.norm2(self.conv2(x)))


class CifarNet(nn.Module):
    """(N, in_channels, H, W), H and W at least 8 -> (N, num_classes): three blocks, global max-pool, linear."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, widths: tuple[int, ...] = (64, 128, 256)) -> None:
        super().__init__()
        inputs = (in_channels, *widths[:-1])
        self.blocks = nn.Sequential(*(Block(i, o) for i, o in zip(inputs, widths, strict=True)))
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(x)).flatten(1))
