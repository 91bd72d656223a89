"""Every op that has a kernel, on the null driver: its launches fit the compiled kernels, the device and the plan's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import REGISTRY
from parcnn.ops.base import Op
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvUnpool, ConvWgrad
from parcnn.ops.feed import EndStep, GatherBatch, WriteOutput
from parcnn.ops.loss import CrossEntropy, MeanSquaredError
from parcnn.ops.matmul import MatMul
from parcnn.ops.muon import MuonDirection, MuonUpdate
from parcnn.ops.norm import BatchNormDgrad, BatchNormInfer, BatchNormInferDgrad, BatchNormTrain
from parcnn.ops.pointwise import Act, ActDgrad, Add, Cast, Dropout
from parcnn.ops.pool import AdaptiveAvgDgrad, AdaptiveAvgFprop, PoolDgrad, PoolFprop, PoolWindow
from parcnn.ops.shape import Cat, ChannelPad, ChannelSlice, ToChannelsFirst, ToChannelsLast
from parcnn.ops.update import AdamUpdate, SgdUpdate
from tests.op_runner import run_op


def f32(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def i32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


def bf16(*shape: int) -> np.ndarray:
    return np.full(shape, 0x3F80, np.uint16)


def u8(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint8)


Tensors = Callable[..., np.ndarray]


def convolutions(n: int, h: int, c: int, k: int, r: int, pool: str | None) -> Iterator[tuple[Op, list[np.ndarray]]]:
    """fprop, dgrad and wgrad of one convolution with padding 1 and, behind it, a pool."""
    geometry = {"pad": (1, 1, 1, 1), "pool": pool}
    x, w, b = f32(n, h, h, c), f32(k, r, r, c), f32(k)
    p, q = ConvFprop(**geometry).pooled_hw(h, h, r, r)
    dy, idx = f32(n, p, q, k), [u8(n, p, q, k)] * (pool == "max")
    yield ConvFprop(**geometry, bias=True, act="relu"), [x, w, b]
    yield ConvFprop(**geometry), [x, w]
    yield ConvDgrad(**geometry, image=(h, h)), [dy, w, *idx]
    yield ConvDgrad(**geometry, image=(h, h), act="relu", add=True), [dy, w, *idx, x, x]
    yield ConvWgrad(**geometry, filter=(r, r), bias=True), [x, dy, *idx]
    yield ConvWgrad(**geometry, filter=(r, r)), [x, dy, *idx]


def grouped(
    make: Tensors, h: int, c: int, k: int, r: int, groups: int, stride: int
) -> Iterator[tuple[Op, list[np.ndarray]]]:
    """fprop, dgrad and wgrad of a convolution in groups of two images, with padding 1."""
    geometry = {"stride": (stride, stride), "pad": (1, 1, 1, 1), "groups": groups}
    x, w, b = make(2, h, h, c), make(k, r, r, c // groups), f32(k)
    dy = make(2, *ConvFprop(**geometry).output_hw(h, h, r, r), k)
    yield ConvFprop(**geometry, bias=True, act="relu"), [x, w, b]
    yield ConvDgrad(**geometry, image=(h, h), act="relu", add=True), [dy, w, x, x]
    yield ConvWgrad(**geometry, filter=(r, r), bias=True), [x, dy]


CHANNELS = [f32(65)] * 4
CHANNELS_68 = [f32(68)] * 4
CASES: list[tuple[Op, list[np.ndarray]]] = [
    *convolutions(3, 17, 3, 24, 3, "max"),
    *convolutions(1, 1, 65, 7, 3, None),
    *convolutions(130, 8, 64, 128, 3, "avg"),
    *convolutions(64, 28, 1, 6, 5, "max"),
    *(case for make in (f32, bf16) for case in grouped(make, 9, 130, 130, 3, 130, 1)),
    *(case for make in (f32, bf16) for case in grouped(make, 14, 12, 24, 5, 12, 2)),
    *(case for make in (f32, bf16) for case in grouped(make, 30, 48, 96, 3, 4, 2)),
    *grouped(bf16, 31, 24, 24, 5, 24, 2),
    *grouped(bf16, 16, 20, 20, 7, 20, 1),
    (ConvFprop(bias=True), [f32(70, 1, 1, 400), f32(120, 1, 1, 400), f32(120)]),
    (ConvUnpool(act="relu"), [bf16(3, 7, 5, 72), u8(3, 7, 5, 72), bf16(3, 7, 5, 72)]),
    (ConvUnpool("avg"), [bf16(3, 7, 5, 72)]),
    (ConvUnpool(act="relu"), [f32(3, 7, 5, 12), u8(3, 7, 5, 12), f32(3, 7, 5, 12)]),
    (PoolFprop(), [f32(2, 7, 5, 65)]),
    (PoolFprop(kind="avg", kernel=(3, 2), stride=(2, 1), pad=(1, 0)), [f32(2, 7, 5, 65)]),
    (PoolDgrad(image=(7, 5)), [f32(2, 3, 2, 65), u8(2, 3, 2, 65)]),
    (PoolDgrad(kind="avg", image=(7, 5)), [f32(2, 3, 2, 65)]),
    *(
        (op, [bf16(2, 7, 5, c)])
        for op in (PoolFprop(), AdaptiveAvgFprop(), AdaptiveAvgFprop((3, 2)))
        for c in (64, 65, 84)
    ),
    (PoolDgrad(image=(7, 5)), [bf16(2, 3, 2, 64), u8(2, 3, 2, 64)]),
    (PoolDgrad(kernel=(3, 3), stride=(2, 2), pad=(1, 1), image=(7, 5)), [bf16(2, 4, 3, 64), u8(2, 4, 3, 64)]),
    (PoolDgrad(kind="avg", image=(7, 5)), [bf16(2, 3, 2, 84)]),
    (AdaptiveAvgDgrad(image=(7, 5)), [bf16(2, 1, 1, 65)]),
    (AdaptiveAvgFprop(), [f32(2, 7, 5, 65)]),
    (AdaptiveAvgDgrad(image=(7, 5)), [f32(2, 1, 1, 65)]),
    *((Act(kind), [f32(3, 5, 7)]) for kind in ("relu", "gelu", "silu", "tanh", "sigmoid")),
    (ActDgrad("gelu"), [f32(3, 5, 7), f32(3, 5, 7)]),
    (Add(), [f32(3, 5, 7), f32(3, 5, 7)]),
    (Add(act="relu"), [f32(3, 5, 7), f32(3, 5, 7)]),
    (Dropout(0.3), [f32(3, 5, 7), i32(8)]),
    (Act("gelu"), [bf16(3, 5, 7)]),
    (ActDgrad("relu"), [bf16(3, 5, 7), bf16(3, 5, 7)]),
    (Add(act="relu"), [bf16(64, 16, 16, 65), bf16(64, 16, 16, 65)]),
    (Dropout(0.3), [bf16(3, 5, 7), i32(8)]),
    (Cast("bf16"), [f32(n, 3) for n in range(1, 70)]),
    (Cast("f32"), [bf16(5, 7), bf16(4097)]),
    (BatchNormTrain(act="relu"), [f32(3, 5, 5, 65), *CHANNELS]),
    (BatchNormTrain(), [f32(512, 16, 16, 65), *CHANNELS]),
    (BatchNormTrain(add=True), [f32(3, 5, 5, 65), *CHANNELS, f32(3, 5, 5, 65)]),
    (BatchNormTrain(act="relu", add=True), [bf16(512, 16, 16, 65), *CHANNELS, bf16(512, 16, 16, 65)]),
    (BatchNormInfer(), [f32(3, 5, 5, 65), *CHANNELS]),
    (BatchNormInfer(add=True), [f32(3, 5, 5, 65), *CHANNELS, f32(3, 5, 5, 65)]),
    (BatchNormDgrad(), [f32(3, 5, 5, 65), f32(3, 5, 5, 65), *CHANNELS]),
    (BatchNormDgrad(sums=True), [f32(3, 5, 5, 65), f32(3, 5, 5, 65), *CHANNELS, f32(65), f32(65)]),
    *(
        (BatchNormDgrad(window=PoolWindow()), [make(3, 2, 2, 68), make(3, 5, 5, 68), *CHANNELS_68, u8(3, 2, 2, 68)])
        for make in (f32, bf16)
    ),
    (BatchNormInferDgrad(), [f32(3, 5, 5, 65), f32(3, 5, 5, 65), *CHANNELS]),
    (Cat(), [f32(2, 3, 5), f32(2, 3, 1), f32(2, 3, 24)]),
    (ChannelSlice(1, 4), [f32(2, 3, 5)]),
    (ToChannelsFirst(), [f32(2, 3, 5, 7)]),
    (ToChannelsLast((3, 5, 7)), [f32(2, 105)]),
    (Cat(), [bf16(2, 3, 5), bf16(2, 3, 1), bf16(2, 3, 24)]),
    (ChannelSlice(8, 16), [bf16(2, 3, 24)]),
    (ChannelPad(8), [f32(2, 3, 5)]),
    (ChannelPad(16), [bf16(2, 3, 10)]),
    (ToChannelsFirst(), [bf16(2, 4, 4, 16)]),
    (ToChannelsLast((3, 5, 7)), [bf16(2, 105)]),
    (CrossEntropy(), [f32(33, 10), i32(33)]),
    (CrossEntropy(), [bf16(33, 10), i32(33)]),
    (CrossEntropy(), [bf16(4097, 1000), i32(4097)]),
    (MeanSquaredError(), [bf16(33, 7), f32(33, 7)]),
    (CrossEntropy(train=False), [f32(4097, 1000), i32(4097)]),
    (MeanSquaredError(), [f32(33, 7), f32(33, 7)]),
    (SgdUpdate(count=2, momentum=0.9), [f32(4, 4), i32(8), *[f32(5, 3), f32(7)] * 3]),
    (AdamUpdate(count=1), [f32(4, 4), i32(8), *[f32(5, 3)] * 4]),
    (MatMul(2, transpose_b=True), [f32(5, 7), f32(64, 216), f32(9, 7), f32(64, 216)]),
    (MatMul(transpose_b=True, symmetric=True), [bf16(200, 72), bf16(200, 72)]),
    (MatMul(beta=0.5), [bf16(64, 72), bf16(72, 2304), bf16(64, 2304)]),
    (MuonDirection(2, dtype="bf16"), [*[f32(64, 3, 3, 3), f32(10, 84)] * 2]),
    (MuonUpdate(2), [f32(4, 4), i32(8), f32(64, 3, 3, 3), f32(10, 84), bf16(32, 64), bf16(16, 88)]),
    (MuonUpdate(renormalize=True), [f32(4, 4), i32(8), f32(84, 10), f32(16, 88)]),
    (GatherBatch(batch=5, scale=(1.0,) * 3, shift=(0.0,) * 3), [u8(9, 4, 4, 3), i32(9), i32(20), i32(8)]),
    (GatherBatch(batch=5, dtype="bf16", flip=True), [f32(9, 4, 4, 3), f32(9, 2), i32(20), i32(8)]),
    (EndStep(batch=5), [i32(8), f32(4), f32(1), i32(4), i32(1)]),
    (WriteOutput(), [f32(5, 10), i32(8), f32(20, 10)]),
    (WriteOutput(), [bf16(5, 10), i32(8), bf16(20, 10)]),
]


@pytest.fixture(scope="module", params=["sm_90a", "sm_89"])  # the most shared memory, and the least
def null_of(request: pytest.FixtureRequest) -> CudaExecutor:
    return CudaExecutor.null(request.param)


@pytest.mark.parametrize(("op", "arrays"), CASES, ids=lambda v: v.name if isinstance(v, Op) else "")
def test_launches_are_right(null_of: CudaExecutor, op: Op, arrays: list[np.ndarray]) -> None:
    before = null_of.driver.counters.launches
    run_op(null_of, op, arrays)
    assert null_of.driver.counters.launches > before


def test_every_op_with_a_kernel_is_among_the_cases() -> None:
    assert {type(op) for op, _ in CASES} == set(REGISTRY.ops)
