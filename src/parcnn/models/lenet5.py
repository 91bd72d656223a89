"""LeNet-5 in its modern form: ReLU and max-pooling (after LeCun et al. 1998, "Gradient-based learning applied to document
recognition")."""

from __future__ import annotations

from parcnn import nn
from parcnn.nn import functional as F
from parcnn.plan.trace import Tensor


class LeNet5(nn.Module):
    """(N, in_channels, 28, 28) -> (N, num_classes): convolutions of 6 and 16 channels, 5x5, then 120-84-num_classes."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)
