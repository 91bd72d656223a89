"""The executor itself: threads, memory, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from parcnn.cpu import CpuExecutor, peak_gflops
from parcnn.errors import ArgumentError, UnsupportedError
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.norm import BatchNormDgrad, BatchNormTrain
from parcnn.ops.pointwise import Act
from parcnn.ops.program import Call, Program, Slot
from tests.op_runner import run_op


def float32(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def test_the_number_of_threads_changes_no_bit(random: np.random.Generator) -> None:
    x, w, b = float32(random, 150, 12, 12, 6), float32(random, 16, 5, 5, 6), float32(random, 16)
    dy, idx = float32(random, 150, 4, 4, 16), random.integers(0, 4, (150, 4, 4, 16)).astype(np.uint8)
    gamma, rows = float32(random, 6), float32(random, 6)
    problems: list[tuple[Op, list[np.ndarray]]] = [
        (ConvFprop(pool="max", bias=True, act="relu"), [x, w, b]),
        (ConvDgrad(pool="max", image=(12, 12)), [dy, w, idx]),
        (ConvWgrad(pool="max", filter=(5, 5), bias=True), [x, dy, idx]),
        (BatchNormTrain(), [x, gamma, rows, rows, rows]),
        (BatchNormDgrad("relu"), [x, x, gamma, rows, rows, rows]),
        (Act("gelu"), [x]),
    ]
    executors = [CpuExecutor(threads) for threads in (1, 2, 3)]
    for op, arrays in problems:
        sequential, *others = (run_op(executor, op, arrays) for executor in executors)
        for other in others:
            for a, b_ in zip(sequential, other, strict=True):
                np.testing.assert_array_equal(a.view(np.uint8), b_.view(np.uint8))
    for executor in executors:
        executor.close()


def test_blas_gets_its_threads_back(cpu: CpuExecutor, random: np.random.Generator) -> None:
    before = [library["num_threads"] for library in threadpool_info()]
    run_op(cpu, Act("relu"), [float32(random, 3, 3)])
    assert [library["num_threads"] for library in threadpool_info()] == before


def test_regions_are_zeroed_aligned_and_readable(cpu: CpuExecutor) -> None:
    region = cpu.region("persistent", 1000)
    assert not region.read(Spec((1000,), "u8")).any()
    assert region.memory.ctypes.data % 64 == 0
    region.write(np.arange(6, dtype=np.float32).reshape(2, 3), 64)
    read = region.read(Spec((2, 3)), 64)
    np.testing.assert_array_equal(read, [[0, 1, 2], [3, 4, 5]])
    region.write(np.zeros(6, np.float32), 64)
    assert read[1, 2] == 5  # a copy
    region.write(np.array([[0xE4, 0x03]], np.uint8), 128)
    np.testing.assert_array_equal(region.read(Spec((1, 5), "u2"), 128), [[0xE4, 0x03]])


def test_what_it_says_of_itself(cpu: CpuExecutor) -> None:
    x, w = Spec((8, 28, 28, 1)), Spec((6, 5, 5, 1))
    op = ConvFprop(pool="max", act="gelu", bias=True)
    inputs = (x, w, Spec((6,)))
    assert cpu.can_fuse(op, inputs)
    assert cpu.kernel_name(op, inputs, op.infer(*inputs)) == "numpy im2col+gemm pool as filters"
    linear = (Spec((8, 5, 5, 16)), Spec((120, 5, 5, 16)))
    assert cpu.kernel_name(ConvFprop(), linear, ConvFprop().infer(*linear)) == "numpy gemm"
    assert cpu.kernel_name(Act(), (x,), (x,)) == "numpy"
    available = cpu.available_bytes()
    assert available is None or available > 2**20


def test_what_it_refuses(cpu: CpuExecutor) -> None:
    spec = Spec((2, 3))
    call = Call(Act("relu"), (Slot(spec, "arena"),), (Slot(spec, "arena", 64),))
    program = Program("eval", (call,), {"arena": 128})
    with pytest.raises(ArgumentError, match=r"region 'arena'[\s\S]*at least 128 bytes[\s\S]*64 bytes"):
        cpu.load(program, {"arena": cpu.region("arena", 64)})
    with pytest.raises(ArgumentError, match="region 'arena'"):
        cpu.load(program, {})
    unknown = Call(Op(), (), (), layer="block3")
    with pytest.raises(UnsupportedError, match="block3"):
        cpu.load(Program("eval", (unknown,), {}), {})
    conv = Call(
        ConvFprop(), (Slot(Spec((1, 4, 4, 2)), "arena"), Slot(Spec((2, 3, 3, 2)), "arena", 128)),
        (Slot(Spec((1, 2, 2, 2)), "arena", 512),),
    )  # fmt: skip
    with pytest.raises(ArgumentError, match="workspace too small"):
        cpu.load(Program("eval", (conv,), {"arena": 1024}), {"arena": cpu.region("arena", 1024)})
    with pytest.raises(ArgumentError, match="threads"):
        CpuExecutor(threads=0)


def test_peak_is_plausible() -> None:
    assert 1 < peak_gflops(size=512, repeats=2) < 1000
