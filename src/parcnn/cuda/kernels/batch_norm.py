"""Launcher of batch normalisation: one launch for few rows, else passes over the tensor and a merge of partial sums."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from parcnn.cuda.kernels.common import lanes_for, refuse_dtype, vector_width
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Pointer, Struct
from parcnn.ops.base import Op, Spec
from parcnn.ops.norm import BatchNormDgrad, BatchNormInfer, BatchNormInferDgrad, BatchNormTrain
from parcnn.ops.program import Call, Slot

OPS = (BatchNormTrain, BatchNormInfer, BatchNormDgrad, BatchNormInferDgrad)

UNROLL = 4  # rows that a thread has in flight
THREADS = 256
MOMENTS_THREADS = 512
MERGE_CHANNELS = 32  # of a block that merges partial results
MERGE_THREADS = 512
LANES = 32  # most threads along channels
BLOCKS_PER_SM = 2  # that sum: as many as are resident at once
WRITING_BLOCKS_PER_SM = 8
# Up to so many rows one block reads a column of channels on its own: a pass of several blocks needs two launches more.
SINGLE_ROWS = 4096
SINGLE_THREADS = 512
# Fewest and most floats of a row that such a block takes: a 32-byte sector, and a 128-byte line.
SINGLE_CHANNELS = (8, 32)

ENTRIES = (
    "batch_norm_moments",
    "batch_norm_merge_moments",
    "batch_norm_normalise",
    "batch_norm_train_single",
    "batch_norm_gradients",
    "batch_norm_sum_gradients",
    "batch_norm_dgrad",
    "batch_norm_dgrad_single",
)


@dataclass(frozen=True)
class Geometry:
    """How a pass over x (rows, channels) is divided."""

    rows: int
    channels: int
    width: int  # floats of one access
    lanes_log2: int  # threads along channels
    threads: int
    row_blocks: int

    @property
    def tile_rows(self) -> int:
        return (self.threads >> self.lanes_log2) * UNROLL

    @property
    def grid(self) -> tuple[int, int, int]:
        return -(-(self.channels // self.width) >> self.lanes_log2), self.row_blocks, 1

    @property
    def shape(self) -> Struct:
        """The kernels' `Shape`."""
        return Struct((np.int32(self.rows), np.int32(self.channels), np.int32(self.lanes_log2)))

    def launch(self, entry: str, *args: Argument) -> Launch:
        """A launch of this geometry."""
        return Launch(_kernel(entry, self.width), self.grid, (self.threads, 1, 1), args)


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None, or why these kernels do not run `op`."""
    rows = inputs[0].size // inputs[0].shape[-1]
    return refuse_dtype(*inputs) or (None if rows < 2**31 else f"rows must be fewer than 2**31, there are {rows}")


def workspace_bytes(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
    """Two partial results a channel from each block that sums."""
    x = inputs[0]
    if isinstance(op, BatchNormInfer):
        return 0
    if isinstance(op, BatchNormInferDgrad):
        row_blocks = _frozen(x, device).row_blocks
        return 0 if row_blocks == 1 else _partial_bytes(row_blocks, x)
    if _is_single(x):
        return 0
    threads = MOMENTS_THREADS if isinstance(op, BatchNormTrain) else THREADS
    return _partial_bytes(_pass(x, threads, BLOCKS_PER_SM, device).row_blocks, x)


def launches(call: Call, device: Device) -> list[Launch]:
    """One launch for inference and for few rows, else three: sum, merge, write."""
    op = call.op
    if isinstance(op, BatchNormTrain):
        return _train(op, call, device)
    if isinstance(op, BatchNormInfer):
        geometry = _pass(call.inputs[0].spec, THREADS, WRITING_BLOCKS_PER_SM, device)
        args: tuple[Argument, ...] = (
            *call.inputs,
            call.outputs[0],
            geometry.shape,
            np.float32(op.eps),
            np.int32(True),
            _relu(op),
        )
        return [geometry.launch("batch_norm_normalise", *args)]
    if isinstance(op, BatchNormDgrad):
        return _dgrad(op, call, device)
    if isinstance(op, BatchNormInferDgrad):
        return _infer_dgrad(op, call, device)
    raise TypeError(op.name)


def variants() -> Iterable[Kernel]:
    """Every kernel that launches() may name."""
    return (_kernel(entry, width) for entry in ENTRIES for width in (1, 4))


def _train(op: BatchNormTrain, call: Call, device: Device) -> list[Launch]:
    x, gamma, beta, running_mean, running_var = call.inputs
    y, mean, rstd = call.outputs
    statistics = Struct((running_mean, running_var, mean, rstd, np.float32(op.eps), np.float32(op.momentum)))
    if _is_single(x.spec):
        single = _single(x.spec, device)
        args = (x, gamma, beta, y, statistics, single.shape, _relu(op))
        return [single.launch("batch_norm_train_single", *args)]
    moments = _pass(x.spec, MOMENTS_THREADS, BLOCKS_PER_SM, device)
    numbers = (np.int32(v) for v in (moments.row_blocks, moments.tile_rows, moments.rows, moments.channels))
    normalise = _pass(x.spec, THREADS, WRITING_BLOCKS_PER_SM, device)
    not_variance = (np.float32(0.0), np.int32(False))
    return [
        moments.launch("batch_norm_moments", x, call.workspace, moments.shape),
        _merge("batch_norm_merge_moments", moments, 1, call.workspace, statistics, *numbers),
        normalise.launch(
            "batch_norm_normalise", x, gamma, beta, mean, rstd, y, normalise.shape, *not_variance, _relu(op)
        ),
    ]


def _dgrad(op: BatchNormDgrad, call: Call, device: Device) -> list[Launch]:
    x = call.inputs[1]
    dx, dgamma, dbeta = call.outputs
    if _is_single(x.spec):
        single = _single(x.spec, device)
        return [single.launch("batch_norm_dgrad_single", *call.inputs, dx, dgamma, dbeta, single.shape, _relu(op))]
    sums = _pass(x.spec, THREADS, BLOCKS_PER_SM, device)
    partials = _partials(call.workspace, sums)
    write = _pass(x.spec, THREADS, WRITING_BLOCKS_PER_SM, device)
    numbers = (np.float32(0.0), np.int32(False), _relu(op))
    return [
        sums.launch("batch_norm_gradients", *call.inputs, None, *partials, sums.shape, *numbers),
        _sum_gradients(sums, partials, dgamma, dbeta),
        write.launch("batch_norm_dgrad", *call.inputs, dgamma, dbeta, dx, write.shape, _relu(op)),
    ]


def _infer_dgrad(op: BatchNormInferDgrad, call: Call, device: Device) -> list[Launch]:
    dx, dgamma, dbeta = call.outputs
    geometry = _frozen(call.inputs[1].spec, device)
    numbers = (np.float32(op.eps), np.int32(True), _relu(op))
    if geometry.row_blocks == 1:
        return [geometry.launch("batch_norm_gradients", *call.inputs, dx, dgamma, dbeta, geometry.shape, *numbers)]
    partials = _partials(call.workspace, geometry)
    return [
        geometry.launch("batch_norm_gradients", *call.inputs, dx, *partials, geometry.shape, *numbers),
        _sum_gradients(geometry, partials, dgamma, dbeta),
    ]


def _sum_gradients(sums: Geometry, partials: tuple[Argument, Argument], dgamma: Slot, dbeta: Slot) -> Launch:
    numbers = (np.int32(sums.row_blocks), np.int32(sums.channels))
    return _merge("batch_norm_sum_gradients", sums, 2, *partials, dgamma, dbeta, *numbers)


def _merge(entry: str, geometry: Geometry, results: int, *args: Argument) -> Launch:
    """The launch that merges what the blocks of a pass left."""
    grid = (-(-geometry.channels // MERGE_CHANNELS), results, 1)
    return Launch(_kernel(entry, geometry.width), grid, (MERGE_THREADS, 1, 1), args)


def _kernel(entry: str, width: int) -> Kernel:
    return Kernel("batch_norm.cu", entry, (("VEC", width),))


def _relu(op: BatchNormTrain | BatchNormInfer | BatchNormDgrad | BatchNormInferDgrad) -> np.int32:
    return np.int32(op.act == "relu")


def _partials(workspace: Slot | None, geometry: Geometry) -> tuple[Argument, Argument]:
    """The two halves of the workspace."""
    half = 4 * geometry.row_blocks * geometry.channels
    return (None, None) if workspace is None else (Pointer(workspace, 0, half), Pointer(workspace, half, half))


def _partial_bytes(row_blocks: int, x: Spec) -> int:
    return 2 * 4 * row_blocks * x.shape[-1]


def _is_single(x: Spec) -> bool:
    return x.size // x.shape[-1] <= SINGLE_ROWS


def _single(x: Spec, device: Device) -> Geometry:
    """One block for all rows of a few channels: wider runs where the blocks still fill the device."""
    channels = x.shape[-1]
    width = vector_width(channels)
    least, most = SINGLE_CHANNELS
    run = most if -(-channels // most) >= device.sm_count else least
    lanes_log2 = lanes_for(channels // width, run // width)
    return Geometry(x.size // channels, channels, width, lanes_log2, SINGLE_THREADS, 1)


def _frozen(x: Spec, device: Device) -> Geometry:
    """The one pass of the gradients with frozen statistics."""
    return _single(x, device) if _is_single(x) else _pass(x, THREADS, BLOCKS_PER_SM, device)


def _pass(x: Spec, threads: int, blocks_per_sm: int, device: Device) -> Geometry:
    """All blocks share the rows of each group of channels."""
    channels = x.shape[-1]
    rows, width = x.size // channels, vector_width(channels)
    lanes_log2 = lanes_for(channels // width, LANES)
    tiles = -(-rows // ((threads >> lanes_log2) * UNROLL))
    groups = -(-(channels // width) >> lanes_log2)
    return Geometry(
        rows, channels, width, lanes_log2, threads, min(tiles, max(1, blocks_per_sm * device.sm_count // groups))
    )
