"""A data set within an executor's reach: put there once, or streamed through two banks where it does not fit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from parcnn.ops.base import Spec
from parcnn.ops.feed import STATE
from parcnn.ops.philox import split_seed
from parcnn.ops.program import Executor, Region, Transfer
from parcnn.plan.build import Feed

PIECE = 4096  # samples turned to NHWC and sent at a time
STREAMED_BATCHES = 64  # most batches in one of two banks: enough to hide the copy's start, little memory


class DeviceData:
    """Images and targets of a data set on a device.

    images: (N,C,H,W) or (N,F), uint8 or float; targets: (N) int or (N,F) float. `limit_bytes`: what it may take there
    (None: everything). Resident data is sent once and is one bank of memory. Otherwise there are two banks: while steps
    read one, the samples of the next steps are copied to the other from pinned memory.
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
        if limit_bytes is None or self.resident:
            self.rows = self.count
        else:
            self.rows = batch * max(1, min(STREAMED_BATCHES, limit_bytes // (2 * sample_bytes * batch)))
        shape = self.images.shape[1:]
        physical = (*shape[1:], shape[0]) if len(shape) == 3 else shape
        image_type = "u8" if self.images.dtype == np.uint8 else dtype
        target_type = "i32" if self.targets.dtype == np.int32 else dtype
        self.image_spec = Spec((self.rows, *physical), image_type)
        self.target_spec = Spec((self.rows, *self.targets.shape[1:]), target_type)
        specs = {"images": self.image_spec, "targets": self.target_spec}
        self.banks: list[dict[str, Region]] = [
            {name: executor.region(name, spec.nbytes) for name, spec in specs.items()}
            for _ in range(1 if self.resident else 2)
        ]
        if self.resident:
            for begin in range(0, self.count, PIECE):
                self._send(np.arange(begin, min(begin + PIECE, self.count)), begin)
        else:
            self._staging = [
                (
                    executor.pinned(self.image_spec.shape, self.images.dtype),
                    executor.pinned(self.target_spec.shape, self.targets.dtype),
                )
                for _ in self.banks
            ]
            self._transfers: dict[int, tuple[Transfer, Transfer]] = {}

    def feed(
        self, mean: tuple[float, ...], std: tuple[float, ...], order: int, flip: bool = False, shift_px: int = 0
    ) -> Feed:
        """How batches are made of this data: normalised by mean and std (of pixels in 0..1; of floats as they are)."""
        if len(set(mean)) == len(set(std)) == 1:
            mean, std = mean[:1], std[:1]  # one entry serves all channels, however many
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
        """Rows of the bank in which the samples are, in the order in which they are visited."""
        return order.astype(np.int32) if self.resident else (np.arange(len(order)) % self.rows).astype(np.int32)

    def stretches(self, order: np.ndarray, first: int) -> Iterator[tuple[int, int]]:
        """From step `first` on: (bank, steps) that can run on what lies in the bank. The next bank is filled meanwhile."""
        steps = -(-len(order) // self.batch)
        if self.resident:
            yield 0, steps - first
            return
        per_bank = self.rows // self.batch
        chunk = first // per_bank
        self._stage(order, chunk)
        while chunk * per_bank < steps:
            self._stage(order, chunk + 1)
            yield chunk % 2, min(steps, (chunk + 1) * per_bank) - max(first, chunk * per_bank)
            chunk += 1

    def _stage(self, order: np.ndarray, chunk: int) -> None:
        """Start the copy of a chunk's samples to its bank, behind the steps that still read it."""
        samples = order[chunk * self.rows : (chunk + 1) * self.rows]
        images, targets = self._staging[chunk % 2]
        for transfer in self._transfers.pop(chunk % 2, ()):
            transfer.wait()  # the pinned memory is free again
        if len(samples):
            np.take(_channels_last(self.images), samples, axis=0, out=images[: len(samples)])
            np.take(self.targets, samples, axis=0, out=targets[: len(samples)])
            bank = self.banks[chunk % 2]
            self._transfers[chunk % 2] = (bank["images"].write_async(images), bank["targets"].write_async(targets))

    def _send(self, samples: np.ndarray, row: int) -> None:
        """Copy samples to rows `row`, `row` + 1, ... of the resident bank."""
        images, targets = _channels_last(self.images[samples]), self.targets[samples]
        self.banks[0]["images"].write(np.ascontiguousarray(images), row * (self.image_spec.nbytes // self.rows))
        self.banks[0]["targets"].write(np.ascontiguousarray(targets), row * (self.target_spec.nbytes // self.rows))

    def free(self) -> None:
        """Give the memory back."""
        for bank in self.banks:
            for region in bank.values():
                region.free()


def _channels_last(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 2, 3, 1) if images.ndim == 4 else images


def state_words(step: int, trained: int, batch: int, seed: int) -> np.ndarray:
    """The state of `parcnn.ops.feed` at the start of step `step` of a pass, after `trained` training steps."""
    low, high = split_seed(seed)
    words = np.array([step, trained, step * batch, low, high, 0, 0, 0], np.uint32).view(np.int32)
    return words.reshape(STATE.shape)
