"""What a user would take instead of our convolutions: PyTorch's, by cuDNN, and the fused block by PyTorch's compiler.

Channels last, cudnn.benchmark, no TF32; every call is captured in a CUDA graph and runs on copies of its operands that
take turns, as ours do (`parcnn.bench.repeated`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from parcnn.bench.layer import IMAGE_CHANNELS, Layer

# How cuDNN chooses an algorithm: its trials are mostly better, and once took one of half the speed for a first layer.
CUDNN_CHOICES = ("benchmark", "heuristic")
# What users call torch.compile's modes, and what they are called where the caller captures the graph.
COMPILE_MODES = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}
_WARM_UP = 3


@dataclass(frozen=True)
class Peer:
    """A graph of `sets * turns` calls, and the bytes that one of them keeps for backward beyond input and output."""

    run: Callable[[int], None]
    kept_bytes: int | None = None


def version() -> str:
    """'PyTorch 2.11.0, cuDNN 91900'."""
    import torch

    return f"PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"


class TorchLayer:
    """A layer's tensors in PyTorch, as many copies as `sets`; `turns`: how often each is used in a graph."""

    def __init__(self, layer: Layer, precision: str, sets: int, turns: int) -> None:
        import torch

        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self.layer, self.sets, self.turns = layer, sets, turns
        self._dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        self.x = self._random(layer.n, layer.c, layer.h, layer.w)
        self.w = self._random(layer.k, layer.c // layer.groups, layer.r, layer.r)
        self.b = [torch.randn(layer.k, device="cuda", dtype=self._dtype) for _ in range(sets)]

    def _random(self, *shape: int) -> list[Any]:
        """A tensor for each set, channels last."""
        import torch

        drawn = (torch.randn(*shape, device="cuda", dtype=self._dtype) for _ in range(self.sets))
        return [each.to(memory_format=torch.channels_last) for each in drawn]

    @functools.cached_property
    def dy(self) -> list[Any]:
        """Gradients of the convolution's output."""
        return self._random(self.layer.n, self.layer.k, *self.layer.outputs)

    def convolution(self, direction: str, choice: str = "benchmark") -> Peer:
        """cuDNN's 'fprop', 'dgrad' or 'wgrad', by the algorithm that its 'benchmark' or its 'heuristic' chooses."""
        import torch

        torch.backends.cudnn.benchmark = choice == "benchmark"
        try:
            return self._convolution(direction)
        finally:
            torch.backends.cudnn.benchmark = True

    def _convolution(self, direction: str) -> Peer:
        import torch
        from torch.nn import functional

        layer = self.layer
        plain = {"stride": layer.stride, "padding": layer.pad, "groups": layer.groups}
        if direction == "fprop":
            return Peer(self._graph(lambda i: functional.conv2d(self.x[i], self.w[i], None, **plain)))
        wanted = [direction == "dgrad", direction == "wgrad", False]
        sizes = [[layer.stride] * 2, [layer.pad] * 2, [1, 1], False, [0, 0], layer.groups, wanted]
        backward = torch.ops.aten.convolution_backward
        return Peer(self._graph(lambda i: backward(self.dy[i], self.x[i], self.w[i], None, *sizes)))

    def block(self, direction: str, mode: str) -> Peer:
        """Bias + convolution + ReLU + 2x2 max-pool, 'fused_pool_fwd' or 'fused_pool_train', 'eager' or of COMPILE_MODES."""
        import torch
        from torch.nn import functional

        layer = self.layer

        def block(x: Any, w: Any, b: Any) -> Any:
            y = functional.conv2d(x, w, b, stride=layer.stride, padding=layer.pad, groups=layer.groups)
            return functional.max_pool2d(functional.relu(y), 2)

        run = block
        if mode in COMPILE_MODES:
            torch._dynamo.reset()
            run = torch.compile(block, dynamic=False, mode=COMPILE_MODES[mode])
        if direction == "fused_pool_fwd":
            with torch.no_grad():
                return Peer(self._graph(lambda i: run(self.x[i], self.w[i], self.b[i])))
        operands = list(zip(self.x, self.w, self.b, strict=True))
        for x, w, b in operands:
            x.requires_grad_(layer.c > IMAGE_CHANNELS), w.requires_grad_(), b.requires_grad_()
        dy = [torch.randn_like(run(*operands[0])).detach() for _ in operands]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = run(*operands[0])
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
        del y

        def train(i: int) -> object:
            wanted = [each for each in operands[i] if each.requires_grad]
            y = run(*operands[i])
            return y.detach(), torch.autograd.grad(y, wanted, dy[i])

        result = Peer(self._graph(train), kept)
        for each in (*self.x, *self.w, *self.b):
            each.requires_grad_(False)
        return result

    def _graph(self, call: Callable[[int], object]) -> Callable[[int], None]:
        """Replays of `turns * sets` calls; `call` takes the number of a set.

        Results live until their set comes again, as ours do: an allocator that gave each call the same memory would find
        it in L2.
        """
        import torch

        results: list[object] = [None] * self.sets
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(max(_WARM_UP, self.sets)):
                results[i % self.sets] = call(i % self.sets)
        results = [None] * self.sets
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # of what cuDNN's own trials left
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(self.turns * self.sets):
                results[i % self.sets] = call(i % self.sets)
        return _Replay(graph, call)


@dataclass(frozen=True)
class _Replay:
    """A captured graph, and the call whose tensors it reads: they must live as long."""

    graph: Any
    call: Callable[[int], object]

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self.graph.replay()
