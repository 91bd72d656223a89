"""Element by element: activations, sums, dropout, changes of the element type."""

from __future__ import annotations

from dataclasses import dataclass

from parcnn.ops.base import FROM_OUTPUT, Emit, Grads, Op, Spec, Value


@dataclass(frozen=True)
class Act(Op):
    """y = act(x); kinds: relu, gelu (erf), gelu_tanh, silu, tanh, sigmoid. NaN goes through."""

    kind: str = "relu"

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return (inputs[0],)

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        if dys[0] is None:
            return (None,)
        return emit(ActDgrad(kind=self.kind), dys[0], outputs[0] if self.kind in FROM_OUTPUT else inputs[0])

    def inplace(self) -> tuple[tuple[int, int], ...]:
        return ((0, 0),)

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return outputs[0].size


@dataclass(frozen=True)
class ActDgrad(Op):
    """dx = dy * act'(saved). inputs: dy, saved (the output for relu, tanh, sigmoid; the input for gelu, silu)."""

    kind: str = "relu"

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return (inputs[0],)

    def inplace(self) -> tuple[tuple[int, int], ...]:
        return ((0, 0), (0, 1))

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return outputs[0].size


@dataclass(frozen=True)
class Add(Op):
    """y = act(a + b), shapes equal."""

    act: str | None = None

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return (inputs[0],)

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        dy = dys[0]
        if dy is not None and self.act:
            (dy,) = emit(ActDgrad(kind=self.act), dy, outputs[0])
        return dy, dy

    def inplace(self) -> tuple[tuple[int, int], ...]:
        return ((0, 0), (0, 1))

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return outputs[0].size


@dataclass(frozen=True)
class Dropout(Op):
    """y = x * keep / (1 - p). inputs: x, state. No mask is stored: backward is the same op on dy.

    keep[i] = word[i % 4] >= p * 2**32, where word = philox4x32(counter = (i // 4, stream, state[1], 0), key = state[3:5]) and
    i counts the physical elements (`parcnn.ops.philox`), channels of zeros (`parcnn.plan.channels`) among them.
    """

    p: float = 0.5
    stream: int = 0  # tells the dropout layers of a model apart

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return (inputs[0],)

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        return (None, None) if dys[0] is None else (*emit(self, dys[0], inputs[1]), None)

    def inplace(self) -> tuple[tuple[int, int], ...]:
        return ((0, 0),)

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return outputs[0].size


@dataclass(frozen=True)
class Cast(Op):
    """y = x in `dtype`, rounded to nearest even. inputs: any number; outputs: one each."""

    dtype: str = "f32"

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return tuple(Spec(x.shape, self.dtype) for x in inputs)

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        """A gradient comes in the type that its op sums in; where that is the input's, it is what is wanted."""
        return tuple(
            dy if dy is None or dy.dtype == x.dtype else emit(Cast(dtype=x.dtype), dy)[0]
            for x, dy in zip(inputs, dys, strict=True)
        )
