"""Groups of matrix products, fp32 and bf16: on the host's emulation, the null driver and the device.

Small integers have exact sums, so the kernels must give the oracle's very bits. Elsewhere a sum of K terms and one more errs by
(K + 3) 2**-24 of their magnitudes, and a bf16 result by 2**-8 of itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import REGISTRY, Registry, gemm, gemm_mma
from parcnn.cuda.kernels.conv_common import Forced
from parcnn.cuda.launch import Device, Kernel, Launcher
from parcnn.ops.base import Op, Spec
from parcnn.ops.matmul import MatMul
from parcnn.ops.program import Call, Executor, Slot
from parcnn.ops.update import MAX_GROUP
from tests.cuda.bf16 import from_bits, stored, to_bits, values_of
from tests.cuda.compare import on_cpu
from tests.cuda.host_emulation import runner
from tests.op_runner import run_op

H200 = Device("H200", "sm_90a", 132)
DTYPES = ("f32", "bf16")
MakeExecutor = Callable[..., Executor]
Sizes = list[tuple[int, int, int]]  # M, N, K of each product

# Together they have rows of whole vectors and rows of none, tiles cut on every side, and reductions of several stages.
GROUPS: dict[str, Sizes] = {
    "one number": [(1, 1, 1)],
    "primes": [(7, 13, 5), (67, 71, 73), (1, 3, 131)],
    "eights": [(24, 40, 88), (72, 8, 200), (136, 136, 8)],
    "a Gram matrix": [(64, 64, 216)],
    "pairs": [(66, 70, 34)],
}
groups = pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
transposes = pytest.mark.parametrize(("transpose_a", "transpose_b"), gemm.TRANSPOSES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def ternary(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(-1, 2, shape).astype(np.float64)


def normal(*shape: int) -> np.ndarray:
    return from_bits(to_bits(np.random.default_rng(sum(shape)).standard_normal(shape)))


def operands_of(op: MatMul, sizes: Sizes, tensor: Callable[..., np.ndarray]) -> list[np.ndarray]:
    a = [tensor(*((k, m) if op.transpose_a else (m, k))) for m, _, k in sizes]
    b = [tensor(*((n, k) if op.transpose_b else (k, n))) for _, n, k in sizes]
    return [*a, *b, *([tensor(m, n) for m, n, _ in sizes] if op.beta else [])]


@pytest.fixture
def emulated() -> MakeExecutor:
    """Makes executors on the host's emulation, with twins of the tensor cores' instructions."""
    if not runner.available():
        pytest.skip("the emulation needs g++")
    return lambda *launchers: runner.EmulationExecutor(launchers, sm_count=4)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MakeExecutor:
    """Makes an executor that runs the given launchers."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    cuda = request.getfixturevalue("cuda")

    def on_device(*launchers: Launcher) -> Executor:
        monkeypatch.setattr(cuda, "registry", Registry(launchers, REGISTRY.folder))
        return cuda

    return on_device


def family_of(dtype: str) -> Any:
    return gemm_mma if dtype == "bf16" else gemm


def check_exact(executor: Executor, op: MatMul, sizes: Sizes, dtype: str, where: object = "") -> None:
    operands = operands_of(op, sizes, ternary)
    results = run_op(executor, op, [stored(a, dtype) for a in operands])
    for got, true in zip(results, on_cpu(op, operands), strict=True):
        np.testing.assert_array_equal(values_of(got), values_of(stored(true, dtype)), err_msg=f"{where} {op}")


@dtypes
@transposes
@groups
def test_integers_are_exact(make: MakeExecutor, sizes: Sizes, dtype: str, transpose_a: int, transpose_b: int) -> None:
    family = family_of(dtype)
    for alpha, beta in ((1.0, 0.0), (2.0, -3.0)):
        op = MatMul(len(sizes), bool(transpose_a), bool(transpose_b), alpha, beta)
        check_exact(make(family), op, sizes, dtype)


@dtypes
@groups
def test_floats_are_close(make: MakeExecutor, sizes: Sizes, dtype: str) -> None:
    op = MatMul(len(sizes), transpose_b=True, alpha=0.3, beta=-1.7)
    operands = operands_of(op, sizes, normal)
    positive = MatMul(len(sizes), transpose_b=True, alpha=0.3, beta=1.7)
    magnitudes = on_cpu(positive, [np.abs(a) for a in operands])
    results = run_op(make(family_of(dtype)), op, [stored(a, dtype) for a in operands])
    for got, true, magnitude, (_, _, k) in zip(results, on_cpu(op, operands), magnitudes, sizes, strict=True):
        allowed = (k + 3) * 2.0**-24 * magnitude + (2.0**-8 * np.abs(true) if dtype == "bf16" else 0)
        assert (np.abs(values_of(got) - true) <= allowed).all()


@dtypes
def test_a_tensor_may_be_several_operands(make: MakeExecutor, dtype: str) -> None:
    """The polynomial of a Newton-Schulz step: one matrix is A, B and C."""
    op = MatMul(transpose_b=True, alpha=2.0, beta=-3.0)
    a = ternary(40, 40)
    a = stored(a + a.T, dtype)
    (got,) = run_op(make(family_of(dtype)), op, [a, a, a])
    exact = values_of(a)
    np.testing.assert_array_equal(values_of(got), values_of(stored(2 * exact @ exact - 3 * exact, dtype)))


@dtypes
@transposes
def test_symmetric_results_are_computed_by_halves(
    make: MakeExecutor, dtype: str, transpose_a: int, transpose_b: int
) -> None:
    """Several tiles along each side, in the emulation of the smallest tile."""
    if transpose_a == transpose_b:
        pytest.skip("no matrix times its transpose")
    sides = [(200, 40), (67, 24), (8, 8)]
    a = [ternary(k, m) if transpose_a else ternary(m, k) for m, k in sides]
    c = [ternary(m, m) for m, _ in sides]
    c = [each + each.T for each in c]
    op = MatMul(3, bool(transpose_a), bool(transpose_b), 2.0, -1.0, symmetric=True)
    arrays = [stored(each, dtype) for each in (*a, *a, *c)]
    tiles = gemm_mma.candidates(call_of(op, [(m, m, k) for m, k in sides]), H200) if dtype == "bf16" else [None]
    for tile in tiles:
        executor = make(Forced(gemm_mma, tile) if tile else gemm)
        if isinstance(executor, runner.EmulationExecutor) and tile and tile.bm > 64:
            continue
        results = run_op(executor, op, arrays)
        for got, true in zip(results, on_cpu(op, [*a, *a, *c]), strict=True):
            np.testing.assert_array_equal(values_of(got), values_of(stored(true, dtype)), err_msg=str(tile))


@dtypes
def test_not_a_number_and_infinity_pass(make: MakeExecutor, dtype: str) -> None:
    a, b = ternary(9, 16), np.ones((16, 8))
    a[2, 3], a[4, 5], a[6, 1:3] = np.nan, np.inf, (np.inf, -np.inf)
    (got,) = run_op(make(family_of(dtype)), MatMul(), [stored(a, dtype), stored(b, dtype)])
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(values_of(got), values_of(stored(a @ b, dtype)))


def call_of(op: MatMul, sizes: Sizes, dtype: str = "bf16") -> Call:
    inputs = tuple(Spec(a.shape, dtype) for a in operands_of(op, sizes, ternary))
    return Call(op, tuple(Slot(s, "arena") for s in inputs), tuple(Slot(s, "arena") for s in op.infer(*inputs)))


@transposes
def test_every_tile_is_exact(make: MakeExecutor, transpose_a: int, transpose_b: int) -> None:
    """The largest takes the emulation too long."""
    for sizes in ([(136, 72, 200), (8, 264, 72)], [(67, 71, 73)]):
        op = MatMul(len(sizes), bool(transpose_a), bool(transpose_b), 1.0, 1.0)
        for tile in gemm_mma.candidates(call_of(op, sizes), H200):
            executor = make(Forced(gemm_mma, tile))
            if isinstance(executor, runner.EmulationExecutor) and tile.bm * tile.bn > 64 * 64:
                continue
            check_exact(executor, op, sizes, "bf16", tile)


# Without a GPU


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
@dtypes
@groups
def test_launches_are_right(arch: str, dtype: str, sizes: Sizes) -> None:
    executor = CudaExecutor.null(arch)
    for op in (MatMul(len(sizes), transpose_b=True), MatMul(len(sizes), beta=1.0)):
        run_op(executor, op, [stored(a, dtype) for a in operands_of(op, sizes, ternary)])
    executor.close()


def test_every_variant_is_reached_and_listed() -> None:
    reached: dict[Any, set[Kernel]] = {gemm: set(), gemm_mma: set()}
    for a, b in gemm.TRANSPOSES:
        for sizes in GROUPS.values():
            op = MatMul(len(sizes), bool(a), bool(b))
            call = call_of(op, sizes)
            for tile in gemm_mma.candidates(call, H200):
                reached[gemm_mma] |= {launch.kernel for launch in gemm_mma.launches(call, H200, tile)}
            reached[gemm] |= {launch.kernel for launch in gemm.launches(call_of(op, sizes, "f32"), H200)}
    assert all(set(family.variants()) == kernels for family, kernels in reached.items())


def test_the_choice_fills_the_device() -> None:
    """One small product takes small tiles, many large ones large tiles."""
    small = gemm_mma.candidates(call_of(MatMul(transpose_b=True), [(256, 256, 2304)]), H200)[0]
    large = gemm_mma.candidates(call_of(MatMul(4), [(2048, 2304, 1024)] * 4), H200)[0]
    assert small.bm * small.bn <= 32 * 64
    assert large.bm * large.bn >= 128 * 128


def test_what_it_refuses() -> None:
    a = Spec((8, 8), "bf16")
    refused: list[tuple[Any, Op, tuple[Spec, ...], str]] = [
        (gemm, MatMul(), (a, a), "f32"),
        (gemm_mma, MatMul(), (Spec((8, 8)),) * 2, "bf16"),
        (gemm_mma, MatMul(), (a, Spec((8, 8))), "bf16 and f32"),
        (gemm_mma, MatMul(MAX_GROUP + 1), (a,) * 2 * (MAX_GROUP + 1), str(MAX_GROUP)),
        (gemm_mma, MatMul(), (Spec((2**16, 8), "bf16"), Spec((8, 2**16), "bf16")), "2**31"),
    ]
    for family, op, inputs, reason in refused:
        assert reason in (family.supports(op, inputs) or "supported")
