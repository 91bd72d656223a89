"""Moving elements: concatenation along channels, more channels and fewer, and the two orders of a flattened image."""

from __future__ import annotations

from dataclasses import dataclass

from parcnn.ops.base import Emit, Grads, Op, Spec, Value


@dataclass(frozen=True)
class View(Op):
    """The same bytes under another shape. No executor ever sees it: its output lies where its input does."""

    shape: tuple[int, ...] = ()

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return (Spec(self.shape, inputs[0].dtype),)

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        return (None,) if dys[0] is None else emit(View(shape=inputs[0].shape), dys[0])


@dataclass(frozen=True)
class Cat(Op):
    """Concatenate along the last (channel) axis. inputs: any number; output: y."""

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return (Spec((*inputs[0].shape[:-1], sum(x.shape[-1] for x in inputs)), inputs[0].dtype),)

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        if dys[0] is None:
            return (None,) * len(inputs)
        grads: list[Value | None] = []
        start = 0
        for x in inputs:
            stop = start + x.shape[-1]
            grads += emit(ChannelSlice(start=start, stop=stop), dys[0])
            start = stop
        return tuple(grads)


@dataclass(frozen=True)
class ChannelSlice(Op):
    """y = x[..., start:stop]."""

    start: int = 0
    stop: int = 0

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return (Spec((*inputs[0].shape[:-1], self.stop - self.start), inputs[0].dtype),)

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        """Of the first channels; those behind them are zeros (`parcnn.plan.channels`), and so is their error."""
        if self.start:
            raise NotImplementedError("a slice from the middle has no gradient")
        return (None,) if dys[0] is None else emit(ChannelPad(inputs[0].shape[-1]), dys[0])

    def bytes(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return 2 * outputs[0].nbytes


@dataclass(frozen=True)
class ChannelPad(Op):
    """y[..., :C] = x, zeros behind it. input: x (..., C); output: y (..., channels)."""

    channels: int = 0

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return (Spec((*inputs[0].shape[:-1], self.channels), inputs[0].dtype),)

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        return (None,) if dys[0] is None else emit(ChannelSlice(0, inputs[0].shape[-1]), dys[0])


@dataclass(frozen=True)
class ToChannelsFirst(Op):
    """(N,H,W,C) -> (N, C*H*W), the order in which users see a flattened image."""

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        n, h, w, c = inputs[0].shape
        return (Spec((n, c * h * w), inputs[0].dtype),)

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        return (None,) if dys[0] is None else emit(ToChannelsLast(image=inputs[0].shape[1:]), dys[0])


@dataclass(frozen=True)
class ToChannelsLast(Op):
    """(N, C*H*W) -> (N,H,W,C), the way back; `image` is (H, W, C)."""

    image: tuple[int, ...] = (1, 1, 1)

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return (Spec((inputs[0].shape[0], *self.image), inputs[0].dtype),)

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        return (None,) if dys[0] is None else emit(ToChannelsFirst(), dys[0])
