"""The executor itself: threads, memory, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from parcnn.cpu import CpuExecutor, peak_gflops
from parcnn.errors import ArgumentError, OutOfMemoryError, UnsupportedError
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.norm import BatchNormDgrad, BatchNormTrain
from parcnn.ops.pointwise import Act, Dropout
from parcnn.ops.pool import PoolFprop, PoolWindow
from parcnn.ops.program import Call, Program, Slot
from tests.op_runner import run_op


def float32(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def problems(random: np.random.Generator) -> dict[str, tuple[Op, list[np.ndarray]]]:
    """Ops with enough work for several threads; their pieces do not come out even."""
    x, w, b = float32(random, 401, 14, 14, 6), float32(random, 16, 5, 5, 6), float32(random, 16)
    dy, idx = float32(random, 401, 5, 5, 16), random.integers(0, 4, (401, 5, 5, 16)).astype(np.uint8)
    first, few = float32(random, 301, 28, 28, 1), float32(random, 6, 5, 5, 1)
    deep, many = float32(random, 37, 8, 8, 96), float32(random, 160, 3, 3, 96)
    error, wide = float32(random, 37, 8, 8, 160), float32(random, 37, 8, 8, 160)
    rows, tall = float32(random, 1001, 5, 5, 32), float32(random, 300, 5, 5, 32)
    deep_idx = random.integers(0, 4, (37, 4, 4, 160)).astype(np.uint8)
    gamma, images = float32(random, 64), float32(random, 20, 40, 40, 64)
    image_idx = random.integers(0, 4, (20, 20, 20, 64)).astype(np.uint8)
    large = float32(random, 600, 100, 100)
    pad, pool = (1, 1, 1, 1), {"pool": "max"}
    return {
        "few filters, pooled": (ConvFprop((1, 1), (2, 2, 2, 2), bias=True, act="relu", **pool), [first, few, b[:6]]),
        "pooled": (ConvFprop(bias=True, act="tanh", **pool), [x, w, b]),
        "pooled dgrad": (ConvDgrad(image=(14, 14), **pool), [dy, w, idx]),
        "pooled wgrad": (ConvWgrad(filter=(5, 5), bias=True, **pool), [x, dy, idx]),
        "padded": (ConvFprop(pad=pad), [deep, many]),
        "padded dgrad": (ConvDgrad(pad=pad, image=(8, 8)), [error, many]),
        "dgrad with a stride": (
            ConvDgrad((2, 2), pad, image=(16, 16), act="relu"),
            [error, many, float32(random, 37, 16, 16, 96)],
        ),
        "wgrad cut by channels": (ConvWgrad(pad=pad, filter=(3, 3), bias=True), [deep, error]),
        "pooled wgrad cut by channels": (ConvWgrad(pad=pad, filter=(3, 3), **pool), [deep, wide[:, :4, :4], deep_idx]),
        "linear": (ConvFprop(bias=True), [rows, tall, float32(random, 300)]),
        "linear dgrad": (ConvDgrad(image=(5, 5)), [float32(random, 1001, 1, 1, 300), tall]),
        "linear wgrad": (ConvWgrad(filter=(5, 5), bias=True), [rows, float32(random, 1001, 1, 1, 300)]),
        "grouped wgrad": (ConvWgrad(pad=pad, filter=(3, 3), groups=4), [deep, error]),
        "batch norm": (BatchNormTrain(act="relu"), [images, gamma, gamma, gamma, gamma]),
        "batch norm dgrad": (BatchNormDgrad("relu"), [images, images, gamma, gamma, gamma, abs(gamma)]),
        "batch norm dgrad, pooled": (
            BatchNormDgrad(window=PoolWindow()),
            [images[:, ::2, ::2], images, gamma, gamma, gamma, abs(gamma), image_idx],
        ),
        "max pool": (PoolFprop(kernel=(3, 3), stride=(2, 2)), [images]),
        "activation": (Act("gelu"), [large]),
        "dropout": (Dropout(p=0.3), [large, np.array([0, 5, 0, 7, 9, 0, 0, 0], np.int32)]),
    }


def test_the_number_of_threads_changes_no_bit(random: np.random.Generator) -> None:
    sequential, *others = executors = [CpuExecutor(threads) for threads in (1, 2, 3, 16)]
    for name, (op, arrays) in problems(random).items():
        expected = run_op(sequential, op, arrays)
        for other in others:
            for a, b in zip(expected, run_op(other, op, arrays), strict=True):
                assert a.tobytes() == b.tobytes(), f"{name}: {other.threads} threads"
    for executor in executors:
        executor.close()


def test_little_work_is_done_by_the_calling_thread(random: np.random.Generator) -> None:
    one, many = CpuExecutor(1), CpuExecutor(16)

    def workspace(executor: CpuExecutor, images: int) -> int:
        op, inputs = ConvFprop(pool="max"), (Spec((images, 14, 14, 6)), Spec((16, 5, 5, 6)))
        return executor.workspace_bytes(op, inputs, op.infer(*inputs))

    assert workspace(many, 8) == workspace(one, 8)
    assert workspace(many, 800) > 2 * workspace(one, 800)


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


def test_a_region_that_no_machine_has() -> None:
    with pytest.raises(OutOfMemoryError, match=r"(?s)region 'arena'.*smaller batch"):
        CpuExecutor(threads=1).region("arena", 1 << 60)
