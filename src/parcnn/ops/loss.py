"""Losses. Forward and backward are one op: with `train` it also gives dL/d(prediction), so no upstream gradient is read."""

from __future__ import annotations

from dataclasses import dataclass

from parcnn.ops.base import Emit, Grads, Op, Spec, Value, accumulator


@dataclass(frozen=True)
class CrossEntropy(Op):
    """Mean over the batch of -sum_c t_c * log softmax(logits)_c, t = (1-eps)*onehot(label) + eps/classes.

    inputs: logits (N,C), labels (N) i32; outputs: loss (1), correct (1) i32 (rows whose first largest logit is the label),
    and with `train` dlogits (N,C) = (softmax - t)/N. Sums run in a fixed order. A label outside 0..C-1 makes the loss NaN.
    """

    label_smoothing: float = 0.0
    train: bool = True

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        logits = inputs[0]
        outputs = (Spec((1,), accumulator(logits.dtype)), Spec((1,), "i32"))
        return (*outputs, logits) if self.train else outputs

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        return outputs[2], None

    def inplace(self) -> tuple[tuple[int, int], ...]:
        return ((2, 0),) if self.train else ()

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return 5 * inputs[0].size


@dataclass(frozen=True)
class MeanSquaredError(Op):
    """Mean over all elements of (pred-target)^2. inputs: pred (N,F), target (N,F); outputs: loss (1), with `train` dpred."""

    train: bool = True

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        loss = Spec((1,), accumulator(inputs[0].dtype))
        return (loss, inputs[0]) if self.train else (loss,)

    def grad(self, emit: Emit, inputs: tuple[Value, ...], outputs: tuple[Value, ...], dys: Grads) -> Grads:
        return outputs[1], None

    def inplace(self) -> tuple[tuple[int, int], ...]:
        return ((1, 0),) if self.train else ()

    def flops(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return 3 * inputs[0].size
