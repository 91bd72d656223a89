"""Holds kernels to the float64 CPU executor, on the host's emulation and, with the marker `gpu`, on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from parcnn.cpu import CpuExecutor
from parcnn.cuda.kernels import Registry
from parcnn.cuda.launch import Kernel, Launch, Launcher
from parcnn.ops.base import Op, Spec
from parcnn.ops.program import Call, Executor
from tests.cuda.bf16 import from_bits, to_bits, values_of
from tests.cuda.host_emulation import runner
from tests.op_runner import DTYPE_NAMES, run_op

EPS = float(np.finfo(np.float32).eps)
WHERE = ("ascending", "descending", pytest.param("gpu", marks=pytest.mark.gpu))


class CheckedEmulation(runner.EmulationExecutor):
    """The emulation, which also holds every launch to a device's limits and to the family's list of variants."""

    def launches(self, call: Call) -> list[Launch]:
        launches = super().launches(call)
        variants = set(self.family(call.op).variants())
        for launch in launches:
            assert launch.kernel in variants, f"{launch.kernel} is not among the family's variants"
            assert 0 < launch.grid[0] < 2**31
            assert all(0 < extent < 2**16 for extent in launch.grid[1:]), launch.grid
            assert 0 < np.prod(launch.block) <= 1024
        return launches


MakeExecutor = Callable[[Sequence[Launcher]], Executor]


def makers(emulated: Callable[[Launcher], Launcher] = lambda launcher: launcher) -> Callable[..., MakeExecutor]:
    """A fixture that makes an executor which runs the given launchers; in the emulation, what `emulated` makes of each."""

    @pytest.fixture(params=WHERE, name="make")
    def fixture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MakeExecutor:
        if request.param == "gpu":
            cuda = request.getfixturevalue("cuda")

            def on_device(launchers: Sequence[Launcher]) -> Executor:
                monkeypatch.setattr(cuda, "registry", Registry(launchers, runner.KERNELS))
                return cuda

            return on_device
        if not runner.available():
            pytest.skip("the emulation needs g++")
        return lambda launchers: CheckedEmulation(
            list(map(emulated, launchers)), descending=request.param == "descending"
        )

    return fixture


def places(names: str, cases: Sequence[tuple[Any, ...]], emulated: Callable[..., bool]) -> pytest.MarkDecorator:
    """Cases for a fixture `make` of `makers`: on the device all, in the emulation, whose compiler takes its time, some."""
    on_device = [("gpu", *case) for case in cases]
    on_host = [(order, *case) for case in cases if emulated(*case) for order in ("ascending", "descending")]
    return pytest.mark.parametrize(
        ("make", *names.split()),
        [
            pytest.param(*case, marks=[pytest.mark.gpu] * (case[0] == "gpu"), id=" ".join(map(str, case)))
            for case in on_host + on_device
        ],
        indirect=["make"],
    )


def emulates(make: MakeExecutor) -> bool:
    """Whether it makes executors of the emulation."""
    return isinstance(make([]), runner.EmulationExecutor)


def listing(kernels: Iterable[Kernel]) -> Callable[[Any], Any]:
    """What makes of a family one that lists others' kernels, too, which it launches."""
    names, added = ("OPS", "supports", "workspace_bytes", "launches"), list(kernels)

    def of(family: Any) -> Any:
        methods = {name: getattr(family, name) for name in names}
        return SimpleNamespace(**methods, variants=lambda: [*family.variants(), *added])

    return of


def executors(family: ModuleType) -> Callable[..., Executor]:
    """A fixture: the emulation with threads in either order, and the device."""

    @pytest.fixture(params=WHERE, name="executor")
    def fixture(request: pytest.FixtureRequest) -> Executor:
        if request.param == "gpu":
            return request.getfixturevalue("cuda")
        if not runner.available():
            pytest.skip("the emulation needs g++")
        return CheckedEmulation([family], descending=request.param == "descending")

    return fixture


@pytest.fixture(name="random")
def random_fixture(request: pytest.FixtureRequest) -> np.random.Generator:
    """The same numbers wherever a case runs: the seed is the test's name without its executor."""
    return np.random.default_rng(sum(map(ord, request.function.__name__)))


def on_cpu(op: Op, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """What the CPU executor makes of it, in the precision of the arrays."""
    executor = CpuExecutor(threads=1)
    results = run_op(executor, op, arrays)
    executor.close()
    return results


def check(
    executor: Executor,
    op: Op,
    arrays: Sequence[np.ndarray],
    *,
    alias: Sequence[tuple[int, int]] = (),
    ulps: float = 4.0,
) -> tuple[np.ndarray, ...]:
    """Run op; its floats may err at most twice as much as the float32 CPU executor's, and `ulps` of the largest element.

    A bf16 result must be one that a float within these bounds rounds to. Integers must be equal, and NaN and infinities
    where they are in float64. Tensors of bf16 come and go as bit patterns. Returns what the kernels gave.
    """
    assert not isinstance(executor, runner.EmulationExecutor) or executor.can_fuse(op, specs_of(arrays))
    wide = [a.astype(np.float64) if a.dtype == np.float32 else values_of(a) for a in arrays]
    exact = on_cpu(op, wide)
    single = on_cpu(op, [a.astype(np.float32) if a.dtype == np.float64 else a for a in wide])
    got = run_op(executor, op, arrays, alias=alias)
    assert len(got) == len(exact)
    for i, (result, true, cpu) in enumerate(zip(got, exact, single, strict=True)):
        where = f"{op} output {i}"
        assert result.shape == true.shape
        if true.dtype.kind != "f":
            np.testing.assert_array_equal(result, true, err_msg=where)
            continue
        finite = np.isfinite(true)
        np.testing.assert_array_equal(values_of(result)[~finite], true[~finite].astype(np.float32), err_msg=where)
        if not finite.any():
            continue
        allowed = 2 * np.abs(cpu[finite] - true[finite]).max() + ulps * EPS * np.abs(true[finite]).max()
        if result.dtype == np.uint16:
            values = from_bits(result[finite])
            lowest, highest = (from_bits(to_bits(true[finite] + d)) for d in (-allowed, allowed))
            wrong = ~((lowest <= values) & (values <= highest))  # NaN is wrong, too
            assert not wrong.any(), f"{where}: {wrong.sum()} wrong, {values[wrong][:3]} for {true[finite][wrong][:3]}"
            continue
        assert np.isfinite(result[finite]).all(), f"{where}: not finite"
        error = np.abs(result[finite] - true[finite]).max()
        assert error <= allowed, f"{where}: error {error:.3g}, allowed {allowed:.3g}"
    return got


def specs_of(arrays: Sequence[np.ndarray]) -> tuple[Spec, ...]:
    """Specs of plain arrays."""
    return tuple(Spec(a.shape, DTYPE_NAMES[a.dtype]) for a in arrays)


def normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Standard normal float32."""
    return random.standard_normal(shape).astype(np.float32)
