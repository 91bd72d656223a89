"""Batch normalisation over all axes but the channel (Ioffe & Szegedy 2015; torch.nn.BatchNorm2d's conventions)."""

from __future__ import annotations

from dataclasses import dataclass

from parcnn.ops.base import Emit, Grads, Op, Spec, Value, accumulator, image_of
from parcnn.ops.pointwise import ActDgrad
from parcnn.ops.pool import PoolWindow


@dataclass(frozen=True)
class BatchNormTrain(Op):
    """y = act((x - mean) * rstd * gamma + beta) with the batch's statistics; act(... + beta + addend) if `add`.

    inputs: x (..., C), gamma (C), beta (C), running_mean (C), running_var (C), if `moments`, those of x (2, C), as
    ConvFprop gives them: statistics then need no pass over x; if `add`, the addend (shape of x), the last; outputs: y,
    mean (C), rstd (C), both in the tensor's float type. running = (1-momentum)*running + momentum*batch, with the unbiased
    variance (n/(n-1)). `act`: None or 'relu'.

    `window`: a maximum is taken of what y would be, and the outputs are y and idx of that (`PoolFprop`), mean, rstd. Not with
    `add`.
    """

    eps: float = 1e-5
    momentum: float = 0.1
    act: str | None = None
    moments: bool = False
    window: PoolWindow | None = None
    add: bool = False

    @property
    def overwritten(self) -> tuple[int, ...]:
        return 3, 4

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        x = inputs[0]
        stat = Spec((x.shape[-1],), accumulator(x.dtype))
        if self.window is None:
            return x, stat, stat
        n, h, w, c = x.shape
        y = Spec((n, *self.window.output_hw(h, w), c), x.dtype)
        return y, Spec(y.shape, self.window.index_dtype(c)), stat, stat

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        if dys[0] is None:
            return (None,) * len(inputs)
        (x, gamma, beta), dy, act = inputs[:3], dys[0], self.act
        if self.window:
            if act:
                (dy,) = emit(ActDgrad(act), dy, outputs[0])
            (dy,), act = emit(self.window.backward(image_of(x)), dy, outputs[1]), None
        elif self.add and act:
            (dy,), act = emit(ActDgrad(act), dy, outputs[0]), None
        # dx has the moments' part in it.
        dx, dgamma, dbeta = emit(BatchNormDgrad(act=act), dy, x, gamma, beta, *outputs[-2:])
        return dx, dgamma, dbeta, *[None] * (2 + self.moments), *[dy] * self.add

    def inplace(self) -> tuple[tuple[int, int], ...]:
        return ((0, 5 + self.moments),) if self.add else ()  # an element of the addend is read for its own output

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return (5 + self.add) * inputs[0].size

    def bytes(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        statistics = 0 if self.moments else inputs[0].nbytes  # need a pass of their own
        return super().bytes(inputs, outputs) + statistics


@dataclass(frozen=True)
class BatchNormInfer(Op):
    """y = act((x - running_mean) / sqrt(running_var + eps) * gamma + beta), or act(... + beta + addend) if `add`.

    inputs: x (..., C), gamma, beta, running_mean, running_var (C), if `add`, the addend (shape of x); output: y.
    """

    eps: float = 1e-5
    act: str | None = None
    add: bool = False

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return (inputs[0],)

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        """With frozen statistics the layer is an affine map of its input."""
        dy, act = dys[0], self.act
        if dy is None:
            return (None,) * len(inputs)
        if self.add and act:
            (dy,), act = emit(ActDgrad(act), dy, outputs[0]), None
        dx, dgamma, dbeta = emit(BatchNormInferDgrad(eps=self.eps, act=act), dy, inputs[0], *inputs[1:5])
        return dx, dgamma, dbeta, None, None, *[dy] * self.add

    def inplace(self) -> tuple[tuple[int, int], ...]:
        return ((0, 0), (0, 5)) if self.add else ((0, 0),)

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return (2 + self.add) * inputs[0].size


@dataclass(frozen=True)
class BatchNormDgrad(Op):
    """inputs: dy, x (..., C), gamma, beta, mean, rstd (C), idx if `window`; outputs: dx, dgamma (C), dbeta (C). If `sums`,
    dgamma and dbeta are inputs, too, the last, and the only output is dx: another call has taken them (`ConvDgrad`).

    With xhat = (x-mean)*rstd and dz = dy * act'(gamma*xhat+beta), both recomputed here:
    dbeta = sum dz, dgamma = sum dz*xhat, dx = gamma*rstd*(dz - (dbeta + xhat*dgamma)/n).

    Behind a maximum over `window`, dy and idx are those of its outputs (N,P,Q,C): each error goes to its winner on the way.
    """

    act: str | None = None
    window: PoolWindow | None = None
    sums: bool = False

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        stat = Spec((inputs[1].shape[-1],), accumulator(inputs[1].dtype))
        return inputs[1], *[stat] * (0 if self.sums else 2)

    def inplace(self) -> tuple[tuple[int, int], ...]:
        # The sums are complete before dx is written; each dx element reads only its own x, and without a window its own dy.
        return ((0, 1),) if self.window else ((0, 0), (0, 1))

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return 10 * inputs[1].size

    def bytes(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        twice = () if self.sums else (*inputs[:2], *inputs[6:])
        return super().bytes(inputs, outputs) + sum(s.nbytes for s in twice)


@dataclass(frozen=True)
class BatchNormInferDgrad(Op):
    """inputs: dy, x, gamma, beta, running_mean, running_var; outputs: dx = dz*gamma*rstd, dgamma, dbeta (frozen statistics)."""

    eps: float = 1e-5
    act: str | None = None

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        stat = Spec((inputs[1].shape[-1],), accumulator(inputs[1].dtype))
        return inputs[0], stat, stat

    def inplace(self) -> tuple[tuple[int, int], ...]:
        return ((0, 0), (0, 1))

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return 7 * inputs[0].size
