"""Launcher of gemm.cu: groups of fp32 matrix products; and what it shares with `gemm_mma`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import ceil

import numpy as np

from parcnn.cuda.kernels.common import refuse_dtype, refuse_size
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Struct
from parcnn.ops.base import Op, Spec
from parcnn.ops.matmul import MatMul
from parcnn.ops.program import Call
from parcnn.ops.update import MAX_GROUP

OPS: tuple[type[Op], ...] = (MatMul,)
SOURCE = "gemm.cu"
THREADS, TILE = 256, 64
TRANSPOSES = ((0, 0), (0, 1), (1, 0), (1, 1))


def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
    """None, or why the kernel does not run `op`."""
    return refuse(op, inputs, "f32")


def workspace_bytes(op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...], device: Device) -> int:
    """None is needed."""
    return 0


def launches(call: Call, device: Device) -> list[Launch]:
    """One launch."""
    op, sizes = sizes_of(call.op, call.input_specs)
    vec = 4 if rows_are_multiples(call, 4) else 1
    table, tiles = group(op, call, sizes, TILE, TILE)
    args = (table, np.float32(op.alpha), np.float32(op.beta), np.int32(op.symmetric))
    return [Launch(_kernel(int(op.transpose_a), int(op.transpose_b), vec), (tiles, 1, 1), (THREADS, 1, 1), args)]


def variants() -> Iterable[Kernel]:
    """Every kernel that launches() may name."""
    yield from (_kernel(a, b, vec) for a, b in TRANSPOSES for vec in (4, 1))


def _kernel(transpose_a: int, transpose_b: int, vec: int) -> Kernel:
    return Kernel(SOURCE, "gemm", (("TRANSPOSE_A", transpose_a), ("TRANSPOSE_B", transpose_b), ("VEC", vec)))


def refuse(op: Op, inputs: tuple[Spec, ...], dtype: str) -> str | None:
    """Why kernels for matrices of `dtype` do not run `op`; None where they do."""
    if not isinstance(op, MatMul):
        return f"{op.name} is not a product of matrices"
    if op.count > MAX_GROUP:
        return f"a group has at most {MAX_GROUP} products, this one {op.count}"
    return refuse_dtype(*inputs, among=(dtype,)) or refuse_size(*inputs, *op.infer(*inputs))


def sizes_of(op: Op, inputs: Sequence[Spec]) -> tuple[MatMul, tuple[tuple[int, int, int], ...]]:
    """The op, and (M, N, K) of each of its products."""
    if not isinstance(op, MatMul):
        raise TypeError(f"{op.name} is not a product of matrices")
    return op, op.sizes(*inputs)


def rows_are_multiples(call: Call, width: int) -> bool:
    """Whether rows of A and B can be loaded by `width` elements."""
    count = len(call.outputs)
    return not any(slot.spec.shape[1] % width for slot in call.inputs[: 2 * count])


def tiles_of(op: MatMul, m: int, n: int, tile_m: int, tile_n: int) -> int:
    """Tiles of a D that are computed."""
    rows, columns = ceil(m / tile_m), ceil(n / tile_n)
    return rows * (rows + 1) // 2 if op.symmetric else rows * columns


def group(
    op: MatMul, call: Call, sizes: Sequence[tuple[int, int, int]], tile_m: int, tile_n: int
) -> tuple[Struct, int]:
    """`Group` of gemm.cuh, and how many tiles there are in all."""
    matrices: list[Argument] = []
    for i in range(MAX_GROUP):
        own = (*call.inputs[i :: op.count], call.outputs[i]) if i < op.count else ()
        a, b, c, d = own if len(own) == 4 else (*own[:2], None, own[2]) if own else (None,) * 4
        matrices.append(Struct((a, b, c, d)))
    ends = list(accumulate(tiles_of(op, m, n, tile_m, tile_n) for m, n, _ in sizes))
    rest = MAX_GROUP - op.count
    numbers = [[*(size[side] for size in sizes), *[0] * rest] for side in range(3)]
    numbers.append([*ends, *[2**31 - 1] * rest])
    return Struct((Struct(tuple(matrices)), *(Struct(tuple(np.int32(v) for v in row)) for row in numbers))), ends[-1]
