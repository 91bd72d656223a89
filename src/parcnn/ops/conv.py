"""Convolution (cross-correlation, torch's convention): fprop with a fused epilogue, dgrad, wgrad, and the error's way back
through the pool. A Linear is a 1x1 one.

    y[n,p,q,k] = b[k] + sum_{r,s,c} x[n, p*stride+r*dilation-top, q*stride+s*dilation-left, c] * w[k,r,s,c]

Epilogue of fprop: activation, then 2x2 stride-2 pooling over (p,q) whose floor drops an odd last row or column: those
outputs are never computed. Max-pooling also gives the winner's position in its window, 0..3 (row-major, the first of
equals wins), as 2-bit indices; backward needs nothing else of the tensor before the pool. Where a pooled value is NaN, the
index names one of the window's elements, which one is not specified. fprop may pool by another `window`: indices are then
those of a pool on its own (`PoolWindow.index_dtype`), and backward first takes the error back through the window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from parcnn.ops.base import Emit, Grads, Op, Spec, Value, accumulator, image_of
from parcnn.ops.pointwise import ActDgrad
from parcnn.ops.pool import PoolWindow


@dataclass(frozen=True)
class ConvGeometry(Op):
    """Attributes that fprop, dgrad and wgrad share."""

    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right; the last two may be negative: cropped
    dilation: tuple[int, int] = (1, 1)
    pool: str | None = None  # None, 'max' or 'avg': 2x2, stride 2, floor
    groups: int = 1  # filter k sees the C/groups channels of its group, k // (K/groups)

    def output_hw(self, h: int, w: int, r: int, s: int) -> tuple[int, int]:
        """Convolution outputs (p, q), before the pool, for an image (h, w) and a filter (r, s)."""
        p = (h + self.pad[0] + self.pad[2] - self.dilation[0] * (r - 1) - 1) // self.stride[0] + 1
        q = (w + self.pad[1] + self.pad[3] - self.dilation[1] * (s - 1) - 1) // self.stride[1] + 1
        return p, q

    def pooled_hw(self, h: int, w: int, r: int, s: int) -> tuple[int, int]:
        """Outputs (p, q) after the pool."""
        p, q = self.output_hw(h, w, r, s)
        return (p // 2, q // 2) if self.pool else (p, q)

    def before_pool(self, h: int, w: int, r: int, s: int) -> Self:
        """The geometry without its pool: its outputs are those that the pool's windows cover, whole windows of 2x2."""
        (p, q), (top, left, bottom, right) = self.output_hw(h, w, r, s), self.pad
        return replace(
            self, pool=None, pad=(top, left, bottom - p % 2 * self.stride[0], right - q % 2 * self.stride[1])
        )

    def conv_flops(self, dy: Spec, w: Spec) -> int:
        """2*N*P*Q*K*R*S*C over the outputs that are computed (those that the pool's floor drops are not)."""
        _, r, s, c = w.shape
        return 2 * dy.size * r * s * c * (4 if self.pool else 1)


@dataclass(frozen=True)
class ConvFprop(ConvGeometry):
    """inputs: x (N,H,W,C), w (K,R,S,C/groups), b (K) if `bias`; outputs: y (N,P,Q,K), if `has_indices` idx (N,P,Q,K) u2, and
    if `moments`, for a batch norm behind it, moments (2,K): each channel's mean over all pixels of y as it is stored, and
    the sum of squared deviations from it.

    `add`: y = act(conv + b + addend); the addend (N,P,Q,K) is the last input. There is then one group and no pool.

    `keep`: what the activation is taken of, (N,P,Q,K), is the last output: the derivatives of gelu and silu follow from it.
    There is then one group, and neither a pool nor moments nor an addend.
    """

    bias: bool = False
    act: str | None = None
    window: PoolWindow | None = None  # the pool's, of kind `pool`, where it is not 2x2, stride 2, floor
    moments: bool = False
    add: bool = False
    keep: bool = False
    indices: bool = (
        True  # False: nobody reads those of a 2x2 maximum, and there is no gradient (`plan.fuse.drop_unread`)
    )

    @property
    def has_indices(self) -> bool:
        """Whether it says which elements of the pool's windows won."""
        return self.pool == "max" and (self.indices or self.window is not None)

    def pooled_hw(self, h: int, w: int, r: int, s: int) -> tuple[int, int]:
        """Outputs (p, q) after the pool."""
        return self.window.output_hw(*self.output_hw(h, w, r, s)) if self.window else super().pooled_hw(h, w, r, s)

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        x, w = inputs[:2]
        (n, h, wd, _), (k, r, s, _) = x.shape, w.shape
        p, q = self.pooled_hw(h, wd, r, s)
        y = Spec((n, p, q, k), x.dtype)
        idx = [Spec(y.shape, self.window.index_dtype(k) if self.window else "u2")] * self.has_indices
        return y, *idx, *[Spec((2, k), accumulator(x.dtype))] * self.moments, *[y] * self.keep

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        x, w = inputs[:2]
        dy, y = dys[0], outputs[0]
        if dy is None:
            return (None,) * len(inputs)
        if self.act:
            (dy,) = emit(ActDgrad(kind=self.act), dy, outputs[-1] if self.keep else y)
        pool, idx = self.pool, outputs[1:2] if self.pool == "max" else ()
        if self.window:
            (dy,) = emit(self.window.backward(self.output_hw(*image_of(x), *image_of(w))), dy, *idx)
            pool, idx = None, ()
        geometry: dict[str, Any] = {
            "stride": self.stride,
            "pad": self.pad,
            "dilation": self.dilation,
            "pool": pool,
            "groups": self.groups,
        }
        (dx,) = emit(ConvDgrad(**geometry, image=image_of(x)), dy, w, *idx)
        dw_db = emit(ConvWgrad(**geometry, bias=self.bias, filter=image_of(w)), x, dy, *idx)
        return dx, *dw_db, *[dy] * self.add

    def inplace(self) -> tuple[tuple[int, int], ...]:
        return ((0, 2 + self.bias),) if self.add else ()  # an element of the addend is read for its own output

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        if self.window is None:
            return self.conv_flops(outputs[0], inputs[1])
        x, w = inputs[0].shape, inputs[1].shape
        p, q = self.window.covered_hw(*self.output_hw(*x[1:3], *w[1:3]))
        return 2 * x[0] * p * q * w[0] * w[1] * w[2] * w[3]


@dataclass(frozen=True)
class ConvDgrad(ConvGeometry):
    """dL/dx. inputs: dy (N,P,Q,K), w (K,R,S,C/groups), idx if max-pooled, saved if `act`, addend if `add`; output: dx
    (N,H,W,C).

    dy is the *pooled* error where `pool` is set; it is routed by idx on the fly. Epilogue:
    dx = (dgrad + addend) * act'(saved), `saved` being what `ActDgrad` takes of the activation below (shape of dx).

    `sums`: below is a batch norm in training, of `act` None or 'relu'. Then x (shape of dx), gamma, beta, mean, rstd (C) of it
    stand in place of `saved`, from which its output follows, and dx is dz, the error before its activation. More outputs:
    dgamma, dbeta (C), `BatchNormDgrad`'s, of dz as it is stored.
    """

    image: tuple[int, int] = (0, 0)  # H, W
    act: str | None = None
    add: bool = False
    sums: bool = False

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        dy, w = inputs[:2]
        c = w.shape[3] * self.groups
        dx = Spec((dy.shape[0], *self.image, c), dy.dtype)
        return dx, *[Spec((c,), accumulator(dy.dtype))] * (2 * self.sums)

    def operands(self, inputs: tuple[object, ...]) -> dict[str, object]:
        """The inputs by name: dy, w, and idx, saved or the batch norm's, addend where the op has them."""
        below = ["x", "gamma", "beta", "mean", "rstd"] if self.sums else ["saved"] * (self.act is not None)
        names = ["dy", "w"] + ["idx"] * (self.pool == "max") + below + ["addend"] * self.add
        return dict(zip(names, inputs, strict=True))

    def inplace(self) -> tuple[tuple[int, int], ...]:
        # Each dx element reads only its own element of saved and addend. (The batch norm's x is read once more after it.)
        first = 2 + (self.pool == "max") + 5 * self.sums
        return tuple((0, i) for i in range(first, first + (self.act is not None and not self.sums) + self.add))

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return self.conv_flops(inputs[0], inputs[1])


@dataclass(frozen=True)
class ConvWgrad(ConvGeometry):
    """dL/dw and dL/db. inputs: x (N,H,W,C), dy (N,P,Q,K) (pooled error where `pool`), idx if max-pooled;
    outputs: dw (K,R,S,C/groups), db (K) if `bias`. Sums over pixels run in a fixed order. Of bf16 tensors the gradients are
    f32, as the weights are that they update."""

    side_branch: ClassVar[bool] = True
    filter: tuple[int, int] = (1, 1)  # R, S
    bias: bool = False

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        x, dy = inputs[:2]
        dtype = accumulator(x.dtype)
        dw = Spec((dy.shape[3], *self.filter, x.shape[3] // self.groups), dtype)
        return (dw, Spec((dy.shape[3],), dtype)) if self.bias else (dw,)

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return self.conv_flops(inputs[1], outputs[0])


@dataclass(frozen=True)
class ConvUnpool(Op):
    """The error signal before a convolution's 2x2 pool. inputs: dy (N,P,Q,K), the pooled error, idx if the pool is a maximum,
    saved if `act`; output: (N,2P,2Q,K): each window's error at its winner, or a quarter of it at all four.

    With `act` the error is that of the activation's output, `saved` (shape of dy): dy * act'(saved) is what is spread.
    What reads the result is `ConvGeometry.before_pool`.
    """

    pool: str = "max"
    act: str | None = None

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        n, p, q, k = inputs[0].shape
        return (Spec((n, 2 * p, 2 * q, k), inputs[0].dtype),)
