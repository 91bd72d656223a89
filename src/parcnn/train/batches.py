"""A data set within an executor's reach: put there once, or streamed through a ring of two halves where it does not fit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from parcnn.ops.base import Spec
from parcnn.ops.feed import STATE
from parcnn.ops.philox import split_seed
from parcnn.ops.program import Executor, Region
from parcnn.plan.build import Feed


class DeviceData:
    """Images and targets of a data set on a device.

    images: (N,C,H,W) or (N,F), uint8 or float; targets: (N) int or (N,F) float. `limit_bytes`: what it may take there
    (None: everything). Resident data is sent once; otherwise batches go through a ring, one half being filled while the
    other is read.
    """

    def __init__(
        self,
        executor: Executor,
        images: np.ndarray,
        targets: np.ndarray,
        batch: int,
        limit_bytes: int | None,
        dtype: str,
    ) -> None:
        self.executor, self.batch = executor, batch
        float_type = np.dtype(np.float64 if dtype == "f64" else np.float32)
        self.images = images if images.dtype == np.uint8 else images.astype(float_type, copy=False)
        self.targets = targets.astype(np.int32 if targets.dtype.kind in "iu" else float_type, copy=False)
        self.count = len(images)
        sample_bytes = (self.images.nbytes + self.targets.nbytes) // max(self.count, 1)
        self.resident = limit_bytes is None or sample_bytes * self.count <= limit_bytes
        if self.resident:
            self.rows = self.count
        else:  # two halves of whole batches
            half = max(1, min(64, int(limit_bytes or 0) // (2 * sample_bytes * batch))) * batch
            self.rows = 2 * half
        image_shape = self.images.shape[1:]
        physical = (*image_shape[1:], image_shape[0]) if len(image_shape) == 3 else image_shape
        image_type = "u8" if self.images.dtype == np.uint8 else dtype
        self.image_spec = Spec((self.rows, *physical), image_type)
        self.target_spec = Spec(
            (self.rows, *self.targets.shape[1:]), "i32" if self.targets.dtype == np.int32 else dtype
        )
        self.regions: dict[str, Region] = {
            "images": executor.region("images", self.image_spec.nbytes),
            "targets": executor.region("targets", self.target_spec.nbytes),
        }
        if self.resident:
            self._write(np.arange(self.count), 0)

    def feed(
        self, mean: tuple[float, ...], std: tuple[float, ...], order: int, flip: bool = False, shift_px: int = 0
    ) -> Feed:
        """How batches are made of this data: normalised by mean and std (of pixels in 0..1, or of the floats as they are)."""
        unit = 255.0 if self.image_spec.dtype == "u8" else 1.0
        return Feed(
            sample=tuple(self.images.shape[1:]),
            images=self.image_spec,
            targets=self.target_spec,
            order=order,
            steps=-(-order // self.batch),
            scale=tuple(1 / (unit * s) for s in std),
            shift=tuple(-m / s for m, s in zip(mean, std, strict=True)),
            flip=flip,
            shift_px=shift_px,
        )

    def positions(self, order: np.ndarray) -> np.ndarray:
        """Rows of the device's images, in the order in which samples are visited."""
        return order.astype(np.int32) if self.resident else (np.arange(len(order)) % self.rows).astype(np.int32)

    def stretches(self, order: np.ndarray, first: int) -> Iterator[int]:
        """Steps that may be submitted before the next stretch, from step `first` on, with their samples in place."""
        steps = -(-len(order) // self.batch)
        if self.resident:
            yield steps - first
            return
        half = self.rows // 2
        per_half = half // self.batch
        step = first
        while step < steps:
            start = step // per_half * half
            if step == first or step % per_half == 0:
                self._write(order[start : start + half], start % self.rows)
            stop = min(steps, (step // per_half + 1) * per_half)
            yield stop - step
            step = stop

    def _write(self, samples: np.ndarray, row: int) -> None:
        """Send samples to rows `row`, `row` + 1, ... in pieces, NHWC."""
        image_bytes = self.image_spec.nbytes // self.rows
        target_bytes = self.target_spec.nbytes // self.rows
        for begin in range(0, len(samples), 4096):
            piece = samples[begin : begin + 4096]
            images = self.images[piece]
            if images.ndim == 4:
                images = images.transpose(0, 2, 3, 1)
            at = row + begin
            self.regions["images"].write(np.ascontiguousarray(images), at * image_bytes)
            self.regions["targets"].write(np.ascontiguousarray(self.targets[piece]), at * target_bytes)

    def free(self) -> None:
        """Give the memory back."""
        for region in self.regions.values():
            region.free()


def state_words(step: int, trained: int, batch: int, seed: int) -> np.ndarray:
    """The state of `parcnn.ops.feed` at the start of step `step` of a pass, after `trained` training steps."""
    low, high = split_seed(seed)
    words = np.array([step, trained, step * batch, low, high, 0, 0, 0], np.uint32).view(np.int32)
    return words.reshape(STATE.shape)
