"""Groups of matrix products against NumPy's, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from parcnn.cpu import CpuExecutor
from parcnn.errors import ShapeError
from parcnn.ops.base import Spec
from parcnn.ops.matmul import MatMul
from tests.op_runner import run_op

SIZES = [(5, 7, 3), (300, 20, 150), (1, 1, 1)]  # M, N, K; the second in several blocks of rows


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("beta", [0.0, -0.4])
def test_products(
    cpu: CpuExecutor, random: np.random.Generator, transpose_a: bool, transpose_b: bool, beta: float
) -> None:
    op = MatMul(len(SIZES), transpose_a, transpose_b, 1.5, beta)
    a = [random.standard_normal((k, m) if transpose_a else (m, k)) for m, _, k in SIZES]
    b = [random.standard_normal((n, k) if transpose_b else (k, n)) for _, n, k in SIZES]
    c = [random.standard_normal((m, n)) for m, n, _ in SIZES] if beta else []
    results = run_op(cpu, op, [*a, *b, *c])
    for i, got in enumerate(results):
        true = 1.5 * (a[i].T if transpose_a else a[i]) @ (b[i].T if transpose_b else b[i])
        np.testing.assert_allclose(got, true + beta * c[i] if beta else true, rtol=1e-12, atol=1e-13)


def test_one_matrix_as_all_operands(cpu: CpuExecutor, random: np.random.Generator) -> None:
    a = random.standard_normal((130, 130))
    (got,) = run_op(cpu, MatMul(transpose_b=True, alpha=2, beta=3), [a, a, a])
    np.testing.assert_allclose(got, 2 * a @ a.T + 3 * a, rtol=1e-12, atol=1e-12)


def test_every_number_of_threads_gives_the_same_bits(random: np.random.Generator) -> None:
    arrays = [random.standard_normal(shape).astype(np.float32) for shape in ((700, 600), (600, 500), (700, 500))]
    results = []
    for threads in (1, 2, 3):
        executor = CpuExecutor(threads)
        results += run_op(executor, MatMul(beta=0.5), arrays)
        executor.close()
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_flops() -> None:
    a, b = Spec((5, 3)), Spec((7, 3))
    assert MatMul(transpose_b=True).flops((a, b), ()) == 2 * 5 * 7 * 3
    assert MatMul(transpose_b=True, symmetric=True).flops((a, a), ()) == 6 * 5 * 3


@pytest.mark.parametrize("shapes", [[(3, 4), (5, 6)], [(3, 4), (4, 5), (3, 4)], [(3, 4)], [(2, 3, 4), (4, 5)]], ids=str)
def test_operands_that_do_not_fit(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ShapeError, match="mat_mul"):
        MatMul(beta=float(len(shapes) == 3)).infer(*map(Spec, shapes))


def test_what_is_symmetric_is_square() -> None:
    with pytest.raises(ShapeError, match="M = N"):
        MatMul(symmetric=True).infer(Spec((3, 4)), Spec((4, 5)))
