"""Pooling on its own: windows of any size, stride and padding, and adaptive average pooling.

An activation before a maximum belongs to the pool, so that nothing of the size before the pool is kept for backward: not the
activation's output, but the pooled one, or (GELU, SiLU) the winners' inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from parcnn.ops.base import FROM_OUTPUT, Emit, Grads, Op, Spec, Value, image_of
from parcnn.ops.pointwise import ActDgrad


@dataclass(frozen=True)
class PoolWindow(Op):
    """Window of a pool. `kind`: 'max' (padding counts as -inf) or 'avg'.

    Average: the divisor is `divisor` if given; else, with `count_include_pad`, the window's overlap with the padded image;
    else its overlap with the image (torch.nn.AvgPool2d's rule).
    """

    kind: str = "max"
    kernel: tuple[int, int] = (2, 2)
    stride: tuple[int, int] = (2, 2)
    pad: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int | None = None

    @property
    def window(self) -> PoolWindow:
        """The window alone."""
        return PoolWindow(**{f.name: getattr(self, f.name) for f in fields(PoolWindow)})

    @property
    def may_miss(self) -> bool:
        """Whether a window may lie wholly in the padding (pads are at most half a kernel: only taps apart can)."""
        return self.dilation != (1, 1) and any(self.pad)

    def covered_hw(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns of an image (h, w) that lie in some window."""
        rows, columns = (
            len(
                {
                    o * self.stride[a] - self.pad[a] + tap * self.dilation[a]
                    for o in range(out)
                    for tap in range(self.kernel[a])
                }
                & set(range((h, w)[a]))
            )
            for a, out in enumerate(self.output_hw(h, w))
        )
        return rows, columns

    def output_hw(self, h: int, w: int) -> tuple[int, int]:
        """Outputs for an image (h, w); with ceil_mode a window may hang over the end but must start inside (torch's rule)."""
        return self._extent(h, 0), self._extent(w, 1)

    def _extent(self, size: int, axis: int) -> int:
        stride, pad = self.stride[axis], self.pad[axis]
        span = size + 2 * pad - self.dilation[axis] * (self.kernel[axis] - 1) - 1
        out = (span + (stride - 1 if self.ceil_mode else 0)) // stride + 1
        return out - 1 if self.ceil_mode and (out - 1) * stride >= size + pad else out

    def backward(self, image: tuple[int, int]) -> PoolDgrad:
        """The op that takes the error of this window's outputs back to an image."""
        return PoolDgrad(**{f.name: getattr(self, f.name) for f in fields(PoolWindow)}, image=image)

    def index_dtype(self, channels: int) -> str:
        """Type of max-pool indices, the position in the window, row-major: 2 or 4 bits for windows of up to 4 or 16, where
        channels come in fours; else a byte, or an int."""
        taps = self.kernel[0] * self.kernel[1]
        if taps <= 16 and channels % 4 == 0:
            return "u2" if taps <= 4 else "u4"
        return "u8" if taps <= 256 else "i32"


@dataclass(frozen=True)
class PoolFprop(PoolWindow):
    """input: x (N,H,W,C); outputs: y (N,P,Q,C), the pool of act(x), and for 'max' idx (N,P,Q,C), the winner's position in its
    window (the first of equals; NaN wins), and if `keep` the winner's x (N,P,Q,C).

    `act` goes with 'max' only. A monotone one is applied to the maximum: where it makes different values equal, the largest
    of them wins, not the first.
    """

    act: str | None = None
    keep: bool = False  # for backward, of activations whose derivative does not follow from their output

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        n, h, w, c = inputs[0].shape
        y = Spec((n, *self.output_hw(h, w), c), inputs[0].dtype)
        return (y, Spec(y.shape, self.index_dtype(c)), *[y] * self.keep) if self.kind == "max" else (y,)

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        dy = dys[0]
        if dy is None:
            return (None,)
        if self.act:
            (dy,) = emit(ActDgrad(kind=self.act), dy, outputs[0] if self.act in FROM_OUTPUT else outputs[2])
        return emit(self.backward(image_of(inputs[0])), dy, *outputs[1:2])

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return outputs[0].size * self.kernel[0] * self.kernel[1]


@dataclass(frozen=True)
class PoolDgrad(PoolWindow):
    """inputs: dy (N,P,Q,C), idx for 'max'; output: dx (N,H,W,C). A gather over the windows that cover a pixel."""

    image: tuple[int, int] = (0, 0)

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        n, _, _, c = inputs[0].shape
        return (Spec((n, *self.image, c), inputs[0].dtype),)

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return inputs[0].size * (self.kernel[0] * self.kernel[1] if self.kind == "avg" else 1)


@dataclass(frozen=True)
class AdaptiveAvgFprop(Op):
    """input: x (N,H,W,C); output: y (N,P,Q,C). Window i spans floor(i*H/P) .. ceil((i+1)*H/P) (torch's rule)."""

    out: tuple[int, int] = (1, 1)

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        n, _, _, c = inputs[0].shape
        return (Spec((n, *self.out, c), inputs[0].dtype),)

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        return (None,) if dys[0] is None else emit(AdaptiveAvgDgrad(image=image_of(inputs[0])), dys[0])

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return inputs[0].size


@dataclass(frozen=True)
class AdaptiveAvgDgrad(Op):
    """input: dy (N,P,Q,C); output: dx (N,H,W,C)."""

    image: tuple[int, int] = (1, 1)

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        n, _, _, c = inputs[0].shape
        return (Spec((n, *self.image, c), inputs[0].dtype),)

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return outputs[0].size
