"""Runs one op on any executor, and holds it to the contract's small print: no byte outside its outputs changes.

Every operand lies between guard bytes in one region; outputs and workspace are poisoned (all bits set: NaN, -1) before
the call; afterwards guards and inputs must be what they were.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from parcnn.ops.base import PACKED, Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvUnpool, ConvWgrad
from parcnn.ops.norm import BatchNormDgrad
from parcnn.ops.pool import PoolDgrad
from parcnn.ops.program import Call, Executor, Program, Slot

ALIGNMENT = 256  # of every tensor, as the plan places them
GUARD_BYTE = 0xA5
DTYPES = {"f32": np.float32, "f64": np.float64, "bf16": np.uint16, "i32": np.int32, "u32": np.uint32, "u8": np.uint8}
DTYPE_NAMES = {np.dtype(v): k for k, v in DTYPES.items()}


def run_op(
    executor: Executor,
    op: Op,
    arrays: Sequence[np.ndarray],
    *,
    alias: Sequence[tuple[int, int]] = (),
    poison: bool = True,
    steps: int = 1,
) -> tuple[np.ndarray, ...]:
    """Run `op` on `arrays`; return its outputs, then the inputs that it overwrites (in the order of op.overwritten).

    Packed pool indices come and go unpacked: uint8 in the tensor's shape. `alias` holds pairs (output, input) that
    share memory, out of op.inplace(). A changed guard or input (one that the op does not own) fails the test.
    """
    assert set(alias) <= set(op.inplace()), f"{op.name} does not allow {alias} in place"
    specs = tuple(_input_spec(op, i, a) for i, a in enumerate(arrays))
    place = _Placer()
    inputs = tuple(place(spec, f"input {i}") for i, spec in enumerate(specs))
    shared = dict(alias)
    outputs = tuple(
        Slot(spec, "arena", inputs[shared[i]].offset, f"output {i}") if i in shared else place(spec, f"output {i}")
        for i, spec in enumerate(op.infer(*specs))
    )
    output_specs = tuple(s.spec for s in outputs)
    scratch_bytes = executor.workspace_bytes(op, specs, output_specs)
    workspace = place(Spec((scratch_bytes,), "u8"), "workspace") if scratch_bytes else None

    before = np.full(place.total, GUARD_BYTE, np.uint8)
    for slot in (*outputs, *((workspace,) if workspace else ())):
        before[slot.offset : slot.end] = 0xFF if poison else 0
    for slot, array in zip(inputs, arrays, strict=True):
        before[slot.offset : slot.end] = _to_bytes(slot.spec, array)

    region = executor.region("arena", place.total)
    region.write(before)
    call = Call(op, inputs, outputs, workspace, layer="test")
    program = executor.load(Program(op.name, (call,), {"arena": place.total}, replay=False), {"arena": region})
    program.run(steps)
    executor.synchronize()
    after = region.read(Spec((place.total,), "u8"))

    may_change = np.zeros(place.total, bool)
    for slot in call.written:
        may_change[slot.offset : slot.end] = True
    changed = np.flatnonzero((before != after) & ~may_change)
    if changed.size:
        culprit = next((s.label for s in inputs if s.offset <= changed[0] < s.end), "guard bytes")
        raise AssertionError(f"{op} changed {changed.size} bytes it does not own, first at {changed[0]} in {culprit}")
    results = (*outputs, *(inputs[i] for i in op.overwritten))
    return tuple(_from_bytes(s.spec, after[s.offset : s.end]) for s in results)


class _Placer:
    """Gives out aligned places with guard bytes before, between and after them."""

    def __init__(self) -> None:
        self.total = ALIGNMENT

    def __call__(self, spec: Spec, label: str) -> Slot:
        slot = Slot(spec, "arena", self.total, label)
        self.total = (slot.end + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT + ALIGNMENT
        return slot


def _input_spec(op: Op, position: int, array: np.ndarray) -> Spec:
    if isinstance(op, ConvDgrad | ConvWgrad) and op.pool == "max" and position == 2:
        return Spec(array.shape, "u2")
    if isinstance(op, ConvUnpool) and op.pool == "max" and position == 1:
        return Spec(array.shape, "u2")
    if isinstance(op, BatchNormDgrad) and op.window and position == 6:
        return Spec(array.shape, op.window.index_dtype(array.shape[-1]))
    if isinstance(op, PoolDgrad) and position == 1:
        return Spec(array.shape, op.index_dtype(array.shape[-1]))
    return Spec(array.shape, DTYPE_NAMES[array.dtype])


def _to_bytes(spec: Spec, array: np.ndarray) -> np.ndarray:
    if spec.dtype in PACKED:
        array = pack(array, PACKED[spec.dtype])
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _from_bytes(spec: Spec, data: np.ndarray) -> np.ndarray:
    if spec.dtype in PACKED:
        return unpack(data, spec.shape, PACKED[spec.dtype])
    return data.copy().view(DTYPES[spec.dtype]).reshape(spec.shape)


def pack(indices: np.ndarray, each: int) -> np.ndarray:
    """Indices (..., C) as bytes (..., ceil(C/each)): with bits = 8/each, channel c is in bits bits*(c%each) of byte c//each."""
    packed = np.zeros((*indices.shape[:-1], -(-indices.shape[-1] // each)), np.uint8)
    for c in range(indices.shape[-1]):
        packed[..., c // each] |= indices[..., c].astype(np.uint8) << (8 // each * (c % each))
    return packed


def unpack(packed: np.ndarray, shape: tuple[int, ...], each: int) -> np.ndarray:
    """The way back: uint8 in `shape`."""
    data, bits = packed.reshape(*shape[:-1], -(-shape[-1] // each)), 8 // each
    parts = [data[..., c // each] >> (bits * (c % each)) & (2**bits - 1) for c in range(shape[-1])]
    return np.stack(parts, axis=-1)
