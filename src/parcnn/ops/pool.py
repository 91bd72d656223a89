"""Pooling on its own: windows of any size, stride and padding, and adaptive average pooling."""

from __future__ import annotations

from dataclasses import dataclass, fields

from parcnn.ops.base import Emit, Grads, Op, Spec, Value, image_of


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

    def output_hw(self, h: int, w: int) -> tuple[int, int]:
        """Outputs for an image (h, w); with ceil_mode a window may hang over the end but must start inside (torch's rule)."""
        return self._extent(h, 0), self._extent(w, 1)

    def _extent(self, size: int, axis: int) -> int:
        stride, pad = self.stride[axis], self.pad[axis]
        span = size + 2 * pad - self.dilation[axis] * (self.kernel[axis] - 1) - 1
        out = (span + (stride - 1 if self.ceil_mode else 0)) // stride + 1
        return out - 1 if self.ceil_mode and (out - 1) * stride >= size + pad else out

    @property
    def index_dtype(self) -> str:
        """Type of max-pool indices: the position in the window, row-major."""
        return "u8" if self.kernel[0] * self.kernel[1] <= 256 else "i32"


@dataclass(frozen=True)
class PoolFprop(PoolWindow):
    """input: x (N,H,W,C); outputs: y (N,P,Q,C), and for 'max' idx (N,P,Q,C), the winner's position in its window
    (the first of equals; NaN wins)."""

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        n, h, w, c = inputs[0].shape
        y = Spec((n, *self.output_hw(h, w), c), inputs[0].dtype)
        return (y, Spec(y.shape, self.index_dtype)) if self.kind == "max" else (y,)

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        if dys[0] is None:
            return (None,)
        attributes = {f.name: getattr(self, f.name) for f in fields(PoolWindow)}
        return emit(PoolDgrad(**attributes, image=image_of(inputs[0])), dys[0], *outputs[1:])

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
