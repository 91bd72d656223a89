"""The borders of a step: taking a batch out of the resident data set, keeping results, moving on.

state is int32[8] in device memory, so that a captured step stays valid:
[0] step in this pass (row of hyper and of the logs)   [1] step since training began   [2] first sample of the batch in
`order`   [3], [4] random key, low and high word   [5..7] unused.
"""

from __future__ import annotations

from dataclasses import dataclass

from parcnn.ops.base import Op, Spec, accumulator

STATE = Spec((8,), "i32")


@dataclass(frozen=True)
class GatherBatch(Op):
    """x[i] = images[order[state[2]+i]] * scale[c] + shift[c], labels likewise.

    inputs: images (M,H,W,C) u8 or float, targets (M) i32 or (M,F) float, order (T) i32, state; outputs: x (batch,H,W,C) in
    `dtype`, batch targets. scale and shift have one entry a channel. Augmentation, from
    word = philox4x32(counter = (state[2]+i, 0x41554721, state[1], 0), key = state[3:5]): `flip` mirrors left-right where
    word[0] has its lowest bit; `shift_px` moves the image by word[1] % (2s+1) - s rows and word[2] % (2s+1) - s columns, zeros
    (after normalisation) where nothing was.
    """

    batch: int = 1
    dtype: str = "f32"
    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)
    flip: bool = False
    shift_px: int = 0

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        images, targets = inputs[:2]
        target_dtype = "i32" if targets.dtype == "i32" else accumulator(self.dtype)
        return Spec((self.batch, *images.shape[1:]), self.dtype), Spec((self.batch, *targets.shape[1:]), target_dtype)

    def bytes(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        per_sample = sum(s.nbytes // s.shape[0] for s in inputs[:2])
        return self.batch * per_sample + sum(s.nbytes for s in outputs)


@dataclass(frozen=True)
class EndStep(Op):
    """losses[state[0]] = loss; corrects[state[0]] = correct; state[0] += 1; state[1] += `train`; state[2] += batch.

    inputs: state, then with `loss`: losses (steps), loss (1); with `correct`: corrects (steps) i32, correct (1) i32.
    """

    batch: int = 1
    train: bool = True
    loss: bool = True
    correct: bool = True

    @property
    def overwritten(self) -> tuple[int, ...]:
        return (0,) + (1,) * self.loss + (1 + 2 * self.loss,) * self.correct

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return ()


@dataclass(frozen=True)
class WriteOutput(Op):
    """out[state[2]+i] = y[i]. inputs: y (batch, ...), state, out (M, ...)."""

    @property
    def overwritten(self) -> tuple[int, ...]:
        return (2,)

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return ()

    def bytes(self, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return 2 * inputs[0].nbytes
