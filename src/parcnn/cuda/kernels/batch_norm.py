"""Launcher of batch normalisation: one launch that keeps the rows, or one that sums and one that merges and writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from parcnn.cuda.kernels.common import ELEMENTS, VECTOR_WIDTHS, fast_div, lanes_for, vector_width
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Pointer, Struct
from parcnn.ops.base import ITEM_BYTES, Op, Spec, accumulator
from parcnn.ops.norm import BatchNormDgrad, BatchNormInfer, BatchNormInferDgrad, BatchNormTrain
from parcnn.ops.program import Call, Slot

OPS = (BatchNormTrain, BatchNormInfer, BatchNormDgrad, BatchNormInferDgrad)

WARP = 32
GROUP = 32  # channels of a block, at most, but in one launch
UNROLL = {"f32": 4, "bf16": 8}  # rows of a tile that a thread has
# Channels of an access, at most, but in one launch: of bf16, eight more often need more registers than they save accesses
# (512x16x16x64, H200: 22 us forward, of four 20 us).
WIDEST = 4
# The passes that sum have one block a multiprocessor, so that few partial results are to be merged by each block of the
# passes that write, all of which are resident at once (their registers allow no more).
MOMENTS_THREADS, GRADIENT_THREADS, LEAST_SUM_THREADS = 1024, 512, 256
WRITE_THREADS = 256
TRAIN_BLOCKS_PER_SM, DGRAD_BLOCKS_PER_SM = {"f32": 4, "bf16": 3}, {"f32": 3, "bf16": 3}
ADD_BLOCKS_PER_SM = {"f32": 3, "bf16": 2}  # in training, with an addend
# One launch, for few rows: longer columns of a few channels come slower from memory than whole rows come twice (64x2048x7x7,
# f32, H200: 37 us against 27). Bytes of a block's channels, from a line to a sector: the longest run wins whose rows fit into
# shared memory and whose blocks leave few multiprocessors idle.
SINGLE_MOST_ROWS = 512
SINGLE_LEAST_ROWS = 4  # of a thread
SINGLE_THREADS = {"f32": 1024, "bf16": 512}
SINGLE_RUNS_BYTES = (128, 64, 32)
SINGLE_FEWEST_BLOCKS = 0.75  # a multiprocessor
# Down to here the convolution's own moments, and its input gradient's sums, were measured to gain (H200, convolution and norm
# with a pass of its own, or with moments: 4 MB, 17.9 and 16.7 us; 13 MB, 97 and 95; 103 MB, 183 and 153; input gradient and
# norm with a pass of its own, or with sums: 4 MB, 19.7 and 14.7 us; of fifteen layers one lost, 1 %).
SUMS_LEAST_BYTES = 4 << 20
# In training an addend gains up to here (H200, bf16, norm and sum apart, or together: 6 MB 11.5 and 9.5 us, 25 MB 32.6 and
# 29.8; 98 MB 128 and 141, 392 MB 533 and 544: two blocks an SM are too few for three tensors).
ADD_MOST_BYTES = 32 << 20
FROZEN_FEW_ROWS = 1024  # one launch of the gradients with frozen statistics
SUM_CHANNELS, SUM_THREADS = 8, 512  # of batch_norm_sum_gradients
MAX_GRID_Y = 65535

# In the order of batch_norm.cu's macros; each has a cubin of its own, which is soon there.
ENTRIES = (
    "batch_norm_moments",
    "batch_norm_train",
    "batch_norm_train_single",
    "batch_norm_infer",
    "batch_norm_gradients",
    "batch_norm_sum_gradients",
    "batch_norm_dgrad",
    "batch_norm_dgrad_single",
)
ADDING = ("batch_norm_train", "batch_norm_train_single", "batch_norm_infer")  # those that there are with an addend, too


@dataclass(frozen=True)
class Geometry:
    """How a pass over x (rows, channels) is divided."""

    rows: int
    channels: int
    dtype: str
    width: int  # channels of one access
    lanes_log2: int  # threads along channels
    threads: int
    unroll: int  # rows of a tile that a thread has
    row_blocks: int = 1

    @property
    def tile_rows(self) -> int:
        return (self.threads >> self.lanes_log2) * self.unroll

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.tile_rows)

    @property
    def run(self) -> int:
        """Channels of a block."""
        return self.width << self.lanes_log2

    @property
    def groups(self) -> int:
        """Blocks along channels."""
        return -(-(self.channels // self.width) >> self.lanes_log2)

    @property
    def shape(self) -> Struct:
        """The kernels' `Shape`."""
        return Struct(tuple(np.int32(v) for v in (self.rows, self.channels, self.lanes_log2, self.tiles)))

    @property
    def split(self) -> Struct:
        """The kernels' `Split`."""
        return Struct((fast_div(self.row_blocks), np.int32(self.tiles), np.int32(self.tile_rows)))

    def single_bytes(self, tensors: int) -> int:
        """Shared memory of one launch: the rows of the tensors, and scratch of three sums (float)."""
        kept = ITEM_BYTES[self.dtype] * tensors * self.tiles * self.threads
        return self.width * (kept + 4 * 3 * (self.threads // WARP << self.lanes_log2))

    def launch(self, entry: str, *args: Argument, shared_bytes: int = 0, add: bool = False) -> Launch:
        """A launch of this geometry."""
        grid = (self.groups, self.row_blocks, 1)
        return Launch(_kernel(entry, self.dtype, self.width, add), grid, (self.threads, 1, 1), args, shared_bytes)


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None, or why these kernels do not run `op`."""
    if isinstance(op, BatchNormTrain | BatchNormDgrad) and op.window:
        return "there must be no pool behind the norm"
    dtype, rows = inputs[0].dtype, inputs[0].size // inputs[0].shape[-1]
    tensors, parameters = inputs[:2], inputs[2:]
    if isinstance(op, BatchNormTrain | BatchNormInfer):
        end = len(inputs) - op.add
        tensors, parameters = (*inputs[:1], *inputs[end:]), inputs[1:end]
    if dtype not in ELEMENTS or any(t.dtype != dtype for t in tensors):
        return f"tensors must be all {' or all '.join(ELEMENTS)}, they are {', '.join(t.dtype for t in tensors)}"
    for t in parameters:
        if t.dtype != accumulator(dtype):
            return f"parameters and statistics must be {accumulator(dtype)}, one is {t.dtype}"
    return None if rows < 2**31 else f"rows must be fewer than 2**31, there are {rows}"


def gains(op: Op, inputs: tuple[Spec, ...]) -> bool:
    """Whether moments or sums that a convolution takes, or an addend, where the op wants such, save more than they cost."""
    x = inputs[0]
    if isinstance(op, BatchNormTrain) and op.add and x.nbytes > ADD_MOST_BYTES:
        return False
    wants = op.moments if isinstance(op, BatchNormTrain) else isinstance(op, BatchNormDgrad) and op.sums
    return not wants or (x.size // x.shape[-1] > SINGLE_MOST_ROWS and x.nbytes >= SUMS_LEAST_BYTES)


def workspace_bytes(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
    """Two partial results a channel from each block that sums."""
    x = inputs[0]
    if isinstance(op, BatchNormTrain):
        return 0 if op.moments or _single(x, 1, device) else partial_bytes(moments_geometry(x, device))
    if isinstance(op, BatchNormDgrad):
        return 0 if op.sums or _single(x, 2, device) else partial_bytes(_sums(x, GRADIENT_THREADS, device))
    if isinstance(op, BatchNormInferDgrad):
        geometry = _frozen(x, device)
        return 0 if geometry.row_blocks == 1 else partial_bytes(geometry)
    return 0


def launches(call: Call, device: Device) -> list[Launch]:
    """One launch for inference, for few rows and where moments or sums are given, else two: sum, then merge and write."""
    op = call.op
    if isinstance(op, BatchNormTrain):
        return _train(op, call, device)
    if isinstance(op, BatchNormInfer):
        geometry = _infer(call.inputs[0].spec)
        addend = call.inputs[5] if op.add else None
        args = (*call.inputs[:5], addend, call.outputs[0], geometry.shape, np.float32(op.eps), _relu(op))
        return [geometry.launch("batch_norm_infer", *args, add=op.add)]
    if isinstance(op, BatchNormDgrad):
        return _dgrad(op, call, device)
    if isinstance(op, BatchNormInferDgrad):
        return _infer_dgrad(op, call, device)
    raise TypeError(op.name)


def variants() -> Iterable[Kernel]:
    """Every kernel that launches() may name."""
    return (
        _kernel(entry, dtype, width, add)
        for dtype in ELEMENTS
        for width in VECTOR_WIDTHS[dtype]
        for entry in ENTRIES
        if width <= WIDEST or entry.endswith("_single")
        for add in ((False, True) if entry in ADDING else (False,))
    )


def _train(op: BatchNormTrain, call: Call, device: Device) -> list[Launch]:
    x, gamma, beta, running_mean, running_var, *rest = call.inputs
    y, mean, rstd = call.outputs
    addend = rest.pop() if op.add else None
    statistics = Struct((running_mean, running_var, mean, rstd, np.float32(op.eps), np.float32(op.momentum)))
    args: tuple[Argument, ...]
    write = _write(x.spec, ADD_BLOCKS_PER_SM if op.add else TRAIN_BLOCKS_PER_SM, device)
    if op.moments:  # as if one block had left the partial results
        one = replace(write, row_blocks=1).split
        args = (x, gamma, beta, *rest, addend, y, statistics, one, write.shape, _relu(op))
        return [write.launch("batch_norm_train", *args, add=op.add)]
    single = _single(x.spec, 1 + op.add, device)
    if single:
        args = (x, gamma, beta, addend, y, statistics, single.shape, _relu(op))
        shared_bytes = single.single_bytes(1 + op.add)
        return [single.launch("batch_norm_train_single", *args, shared_bytes=shared_bytes, add=op.add)]
    sums = moments_geometry(x.spec, device)
    args = (x, gamma, beta, call.workspace, addend, y, statistics, sums.split, write.shape, _relu(op))
    return [
        sums.launch("batch_norm_moments", x, call.workspace, sums.split, sums.shape),
        write.launch("batch_norm_train", *args, add=op.add),
    ]


def _dgrad(op: BatchNormDgrad, call: Call, device: Device) -> list[Launch]:
    x = call.inputs[1].spec
    args: tuple[Argument, ...]
    write = _write(x, DGRAD_BLOCKS_PER_SM, device)
    if op.sums:  # as if one block had left the partial results
        args = (*call.inputs, call.outputs[0], None, None, np.int32(1), write.shape, _relu(op))
        return [write.launch("batch_norm_dgrad", *args)]
    single = _single(x, 2, device)
    if single:
        args = (*call.inputs, *call.outputs, single.shape, _relu(op))
        return [single.launch("batch_norm_dgrad_single", *args, shared_bytes=single.single_bytes(2))]
    sums = _sums(x, GRADIENT_THREADS, device)
    halves = partials(call.workspace, sums)
    numbers = (np.float32(0.0), np.int32(False), _relu(op))
    args = (*call.inputs, *halves, *call.outputs, np.int32(sums.row_blocks), write.shape, _relu(op))
    return [
        sums.launch("batch_norm_gradients", *call.inputs, None, *halves, sums.shape, *numbers),
        write.launch("batch_norm_dgrad", *args),
    ]


def _infer_dgrad(op: BatchNormInferDgrad, call: Call, device: Device) -> list[Launch]:
    dx, dgamma, dbeta = call.outputs
    geometry = _frozen(call.inputs[1].spec, device)
    numbers = (np.float32(op.eps), np.int32(True), _relu(op))
    if geometry.row_blocks == 1:
        return [geometry.launch("batch_norm_gradients", *call.inputs, dx, dgamma, dbeta, geometry.shape, *numbers)]
    halves = partials(call.workspace, geometry)
    return [
        geometry.launch("batch_norm_gradients", *call.inputs, dx, *halves, geometry.shape, *numbers),
        sum_gradients(geometry.dtype, geometry.width, *halves, dgamma, dbeta, geometry.row_blocks, geometry.channels),
    ]


def sum_gradients(
    dtype: str, width: int, dgammas: Argument, dbetas: Argument, dgamma: Slot, dbeta: Slot, rows: int, channels: int
) -> Launch:
    """The launch that adds `rows` of partial sums (rows, channels)."""
    kernel, grid = _kernel("batch_norm_sum_gradients", dtype, width), (-(-channels // SUM_CHANNELS), 2, 1)
    return Launch(
        kernel, grid, (SUM_THREADS, 1, 1), (dgammas, dbetas, dgamma, dbeta, np.int32(rows), np.int32(channels))
    )


def _kernel(entry: str, dtype: str, width: int, add: bool = False) -> Kernel:
    macros = (("ELEMENT", ELEMENTS[dtype]), ("VEC", width), ("ENTRY", ENTRIES.index(entry)))
    return Kernel("batch_norm.cu", entry, (*macros, ("ADDEND", 1)) if add else macros)


def _relu(op: BatchNormTrain | BatchNormInfer | BatchNormDgrad | BatchNormInferDgrad) -> np.int32:
    return np.int32(op.act == "relu")


def partials(workspace: Slot | None, geometry: Geometry) -> tuple[Argument, Argument]:
    """The two halves of the workspace: what the blocks of a pass leave of two sums."""
    half = 4 * geometry.row_blocks * geometry.channels
    return (None, None) if workspace is None else (Pointer(workspace, 0, half), Pointer(workspace, half, half))


def partial_bytes(geometry: Geometry) -> int:
    """Both together."""
    return 2 * 4 * geometry.row_blocks * geometry.channels


def _geometry(x: Spec, run: int, threads: int, widest: int = WIDEST) -> Geometry:
    """Blocks of `threads` threads for runs of `run` channels, or of all where they are fewer, at most `widest` an access."""
    channels = x.shape[-1]
    width = min(widest, vector_width(channels, dtype=x.dtype))
    lanes_log2 = lanes_for(channels // width, min(WARP, run // width))
    return Geometry(x.size // channels, channels, x.dtype, width, lanes_log2, threads, UNROLL[x.dtype])


def _single(x: Spec, tensors: int, device: Device) -> Geometry | None:
    """One block for all rows of a few channels of that many tensors; None where two launches are better."""
    if x.size // x.shape[-1] > SINGLE_MOST_ROWS:
        return None
    for run_bytes in SINGLE_RUNS_BYTES:
        run = run_bytes // ITEM_BYTES[x.dtype]
        geometry = replace(_geometry(x, run, WARP, widest=run), unroll=1)
        most = lanes_for(-(-(geometry.rows << geometry.lanes_log2) // SINGLE_LEAST_ROWS), SINGLE_THREADS[x.dtype])
        geometry = replace(geometry, threads=max(WARP, geometry.run, 1 << most))
        fits = geometry.single_bytes(tensors) <= device.shared_bytes_per_block
        if fits and geometry.groups >= SINGLE_FEWEST_BLOCKS * device.sm_count:
            break
    return geometry  # of the shortest run, if none broke off: its rows fit everywhere


def _sums(x: Spec, threads: int, device: Device) -> Geometry:
    """A pass that sums: blocks of `threads` threads, of fewer where they would leave multiprocessors idle."""
    geometry = _geometry(x, GROUP, threads)
    while geometry.threads > LEAST_SUM_THREADS and geometry.tiles * geometry.groups < device.sm_count:
        geometry = replace(geometry, threads=geometry.threads // 2)
    return replace(geometry, row_blocks=min(geometry.tiles, max(1, device.sm_count // geometry.groups)))


def moments_geometry(x: Spec, device: Device) -> Geometry:
    """The pass that leaves partial moments."""
    return _sums(x, MOMENTS_THREADS, device)


def _frozen(x: Spec, device: Device) -> Geometry:
    """The one pass of the gradients with frozen statistics."""
    if x.size // x.shape[-1] <= FROZEN_FEW_ROWS:
        return _geometry(x, SINGLE_RUNS_BYTES[-1] // ITEM_BYTES[x.dtype], GRADIENT_THREADS)
    return _sums(x, GRADIENT_THREADS, device)


def _write(x: Spec, blocks_per_sm: Mapping[str, int], device: Device) -> Geometry:
    """A pass that merges partial results and writes."""
    geometry = _geometry(x, GROUP, WRITE_THREADS)
    blocks = max(1, blocks_per_sm[x.dtype] * device.sm_count // geometry.groups)
    return replace(geometry, row_blocks=min(geometry.tiles, blocks, MAX_GRID_Y))


def _infer(x: Spec) -> Geometry:
    """A pass that only writes: a block for each tile."""
    geometry = _geometry(x, GROUP, WRITE_THREADS)
    return replace(geometry, row_blocks=min(geometry.tiles, MAX_GRID_Y))
