"""Kernels of a graph that start before those that they come after are complete: which do, and that no bit changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import parcnn
from parcnn import data, models, optim
from parcnn.cuda.compiler import Compiler
from parcnn.cuda.device import SHARED_BYTES, is_available
from parcnn.cuda.driver import BoundLaunch
from parcnn.cuda.executor import STEPS_PER_GRAPH, CudaExecutor
from parcnn.cuda.launch import Kernel, LaunchError
from parcnn.cuda.null import NullDriver
from parcnn.ops.base import Spec
from parcnn.ops.program import Call, Program, Slot
from parcnn.train import Trainer
from tests.cuda import toy
from tests.cuda.toy import Mix, ScaleAdd, Stamp
from tests.cuda.toy_programs import X, call, load, program

WITHOUT_WAIT = tuple(arch for arch in SHARED_BYTES if int(arch[3:].rstrip("a")) < 90)

# Which kernels wait

HOISTED = """
struct Item { const int *__restrict__ at; };
#define WAIT asm volatile("griddepcontrol.wait;" ::: "memory")
extern "C" __global__ void waits(float *x) { WAIT; x[threadIdx.x] += 1.f; }
extern "C" __global__ void shares(float *x) {
    __shared__ float s[32];
    s[threadIdx.x % 32] = threadIdx.x;
    WAIT;
    x[threadIdx.x] += s[(threadIdx.x + 1) % 32];
}
extern "C" __global__ void none(float *x) { x[threadIdx.x] += 1.f; }
extern "C" __global__ void loads(float *x) { float v = x[1]; WAIT; x[threadIdx.x] = v; }
extern "C" __global__ void stores(float *x) { x[1] = 2.f; WAIT; x[threadIdx.x] += 1.f; }
extern "C" __global__ void copies(float *x) {
    __shared__ float s[32];
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"((unsigned)__cvta_generic_to_shared(s)), "l"(x));
    WAIT;
    x[threadIdx.x] = s[threadIdx.x % 32];
}
"""


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100", "sm_120"])
def test_a_kernel_waits_that_touches_global_memory_only_after_its_wait(arch: str, tmp_path: Path) -> None:
    (tmp_path / "some.cu").write_text(HOISTED)
    cubins = Compiler(arch, tmp_path, None).compile([Kernel("some.cu", "waits")])
    (cubin,) = cubins.values()
    assert {name for name, info in cubin.kernels.items() if info.awaits_predecessors} == {"waits", "shares"}


# What the executor submits


def words(count: int, index: int) -> Slot:
    return Slot(Spec((count,), "u32"), "arena", index * 4 * LARGE, f"words {index}")


LARGE, SMALL = 300_000, 700
# Each overwrites what one before it reads; small grids and ones of many waves take turns.
CHAIN = (
    (0, LARGE, 1, SMALL),
    (1, SMALL, 2, LARGE),
    (2, LARGE, 0, LARGE),
    (0, LARGE, 2, SMALL),
    (2, SMALL, 1, SMALL),
    (1, SMALL, 2, SMALL),
    (2, SMALL, 1, LARGE),
    (1, LARGE, 0, SMALL),
    (0, LARGE, 1, SMALL),
    (1, LARGE, 0, LARGE),
)


def chain() -> Program:
    calls = [
        Call(Mix(count, 7919 * (i + 1)), (words(n, source),), (words(count, target),), layer=f"mix {i}")
        for i, (source, n, target, count) in enumerate(CHAIN)
    ]
    return program(*calls)


def mixed(x: np.ndarray, steps: int) -> np.ndarray:
    """The three tensors after some steps of the chain."""
    tensors = x.copy()
    for _ in range(steps):
        for i, (source, n, target, count) in enumerate(CHAIN):
            read = (np.arange(count) + 7919 * (i + 1)) % n
            tensors[target, :count] = tensors[source, read] * np.uint32(1664525) + np.arange(count, dtype=np.uint32)
    return tensors


def executor(arch: str = "sm_90a", overlap: bool = True) -> CudaExecutor:
    return CudaExecutor(NullDriver(arch), registry=toy.REGISTRY, overlap=overlap)


@pytest.mark.parametrize(
    ("arch", "overlap", "early"), [("sm_90a", True, 10), ("sm_120", True, 10), ("sm_89", True, 0), ("sm_90a", False, 0)]
)
def test_kernels_that_wait_start_early_in_graphs(arch: str, overlap: bool, early: int) -> None:
    null = executor(arch, overlap)
    loaded, _ = load(null, chain())
    loaded.run()
    assert null.driver.counters.early_starts == 0
    loaded.run(3)
    assert null.driver.counters.early_starts == early
    loaded.run(STEPS_PER_GRAPH)
    assert null.driver.counters.early_starts == early * (1 + STEPS_PER_GRAPH)


def test_a_kernel_that_does_not_wait_does_not_start_early() -> None:
    null = executor()
    loaded, _ = load(null, program(call(ScaleAdd(), 0, 1), call(ScaleAdd(), 1, 2)))
    loaded.run(2)
    assert null.driver.counters.captures == 1
    assert null.driver.counters.early_starts == 0


def test_the_null_driver_refuses_an_early_start_without_a_wait() -> None:
    class Hasty(NullDriver):
        def launch(self, bound: BoundLaunch, stream: object) -> None:
            super().launch(replace(bound, starts_early=True), stream)

    loaded, _ = load(CudaExecutor(Hasty(), registry=toy.REGISTRY), program(call(ScaleAdd(), 0, 1)))
    with pytest.raises(LaunchError, match="starts early, and does not wait"):
        loaded.run()


# On a GPU


@pytest.fixture(scope="module")
def real() -> dict[bool, CudaExecutor]:
    """Executors on the toy kernels, with and without overlap."""
    if not is_available():
        pytest.skip("no NVIDIA GPU")
    return {overlap: CudaExecutor(registry=toy.REGISTRY, overlap=overlap) for overlap in (True, False)}


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [True, False])
def test_a_kernel_starts_while_the_one_before_it_runs_and_waits_for_its_end(
    real: dict[bool, CudaExecutor], overlap: bool
) -> None:
    if real[overlap].device.arch in WITHOUT_WAIT:
        pytest.skip("kernels cannot wait")
    first, second = (Slot(Spec((3,), "u32"), "arena", 512 * i) for i in (1, 2))
    toy_program = program(
        Call(Stamp(300_000), (Slot(X, "arena"),), (first,)), Call(Stamp(), (first,), (second,)), arena=8192
    )
    loaded, regions = load(real[overlap], toy_program)
    loaded.run(2)
    times = [regions["arena"].read(slot.spec, slot.offset).astype(np.int64) for slot in (first, second)]
    start, waited, _ = (times[1] - times[0][2] + 2**31) % 2**32 - 2**31  # after the first one's end
    assert waited >= 0
    assert (start < -200_000) == overlap


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [True, False])
def test_long_chains_give_the_same_bits(real: dict[bool, CudaExecutor], overlap: bool) -> None:
    x = np.random.default_rng(5).integers(0, 2**32, (3, LARGE), np.uint32)
    loaded, regions = load(real[overlap], chain())
    tensors = Spec(x.shape, "u32")
    regions["arena"].write(x)
    loaded.run(1 + STEPS_PER_GRAPH + 2)
    np.testing.assert_array_equal(regions["arena"].read(tensors), mixed(x, 1 + STEPS_PER_GRAPH + 2))
    # Thousands of replays against launches one by one, in pieces that leave no fault the time to be overwritten.
    eager, eager_regions = load(real[overlap], replace(chain(), replay=False))
    for _ in range(40):
        eager_regions["arena"].write(regions["arena"].read(tensors))
        for each in (loaded, eager):
            each.run(5 * STEPS_PER_GRAPH)
        np.testing.assert_array_equal(regions["arena"].read(tensors), eager_regions["arena"].read(tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("network", "shape", "batch"), [("lenet5", (1, 28, 28), 64), ("cifarnet", (3, 32, 32), 32)])
def test_training_gives_the_same_bits(
    cuda: CudaExecutor, network: str, shape: tuple[int, ...], batch: int, precision: str
) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40 * batch + 9, *shape), np.uint8)
    noise = data.from_arrays(images, random.integers(0, 10, len(images)), name="noise")
    states = []
    for device in (cuda, CudaExecutor(overlap=False)):
        parcnn.manual_seed(3)
        model = models.create(network, in_channels=shape[0])
        run = Trainer(
            model, optim.SGD(0.01, momentum=0.9), device=device, precision=precision, batch_size=batch
        )  # fmt: skip
        losses = run.fit(noise, 4).losses
        assert np.isfinite(losses).all()
        states.append({**model.state_dict(), "losses": losses})
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name], err_msg=name)
