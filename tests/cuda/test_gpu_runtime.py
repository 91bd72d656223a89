"""The executor on a real GPU: copies, streams, graphs, and how the process ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from parcnn.cuda.executor import STEPS_PER_GRAPH, CudaExecutor
from parcnn.errors import DeviceError, OutOfMemoryError
from parcnn.ops.base import Spec
from tests.cuda.toy import REGISTRY, ScaleAdd, SlowIncrement
from tests.cuda.toy_programs import PITCH, SIZE, X, call, diamond, diamond_result, load, logging_program, program

pytestmark = pytest.mark.gpu

SPIN_NS = 20_000_000
SPIN_S = SPIN_NS / 1e9


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(3).integers(-1000, 1000, SIZE).astype(np.float32)  # whole numbers: every sum is exact


def elapsed_s(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def test_the_device_says_what_it_is(cuda_toy: CudaExecutor) -> None:
    device = cuda_toy.device
    assert device.arch.startswith("sm_")
    assert device.name
    assert device.sm_count > 0
    assert 48 * 1024 < device.shared_bytes_per_block <= 256 * 1024
    assert cuda_toy.available_bytes() <= device.total_bytes
    assert "." in device.driver
    assert device.cuda.count(".") == 1


@pytest.mark.parametrize("nbytes", [1, 12_345, 64 << 20])
def test_what_is_written_is_read(cuda_toy: CudaExecutor, nbytes: int) -> None:
    region = cuda_toy.region("x", nbytes + 7)
    assert not region.read(Spec((nbytes + 7,), "u8")).any()
    data = np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)
    region.write(data, 7)
    np.testing.assert_array_equal(region.read(Spec((nbytes,), "u8"), 7), data)
    assert not region.read(Spec((7,), "u8")).any()


def test_asynchronous_copies_arrive(cuda_toy: CudaExecutor) -> None:
    nbytes = 16 << 20
    region = cuda_toy.region("images", nbytes)
    source = cuda_toy.pinned((nbytes,), np.uint8)
    source[:] = np.random.default_rng(1).integers(0, 256, nbytes, dtype=np.uint8)
    written = region.write_async(source)
    read = region.read_async(Spec((nbytes,), "u8"))  # ordered after the write
    np.testing.assert_array_equal(read.wait(), source)
    assert written.ready()
    pageable = np.ascontiguousarray(source[::-1])
    region.write_async(pageable)
    np.testing.assert_array_equal(region.read(Spec((nbytes,), "u8")), pageable)


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("runs", [(1, 2, STEPS_PER_GRAPH, 3, 4 * STEPS_PER_GRAPH + 5), (200,)])
def test_every_step_is_run_once_and_in_order(cuda_toy: CudaExecutor, replay: bool, runs: tuple[int, ...]) -> None:
    total = sum(runs)
    loaded, regions = load(cuda_toy, logging_program(total + 1, replay))
    for steps in runs:
        loaded.run(steps)
    log = regions["losses"].read(Spec((total + 1,)))
    np.testing.assert_array_equal(log, [*range(1, total + 1), 0])
    assert regions["state"].read(Spec((8,), "i32"))[0] == total


@pytest.mark.parametrize("spin_ns", [0, 300_000])
def test_replayed_steps_equal_eager_ones_over_streams(cuda_toy: CudaExecutor, x: np.ndarray, spin_ns: int) -> None:
    results = []
    for replay in (False, True):
        loaded, regions = load(cuda_toy, diamond(spin_ns, replay=replay))
        for steps in (1, 1, STEPS_PER_GRAPH, 1):
            arena = np.full(regions["arena"].nbytes // 4, np.nan, np.float32)
            arena[:SIZE] = x
            regions["arena"].write(arena)
            loaded.run(steps)
            results.append(regions["arena"].read(X, 5 * PITCH))
    for result in results:
        np.testing.assert_array_equal(result, diamond_result(x))


@pytest.mark.parametrize("replay", [False, True])
def test_side_streams_run_beside_the_main_one(cuda_toy: CudaExecutor, replay: bool) -> None:
    """Three kernels that take a while, two of them side by side: the time of two."""
    loaded, _ = load(cuda_toy, diamond(SPIN_NS, replay=replay))

    def one_step() -> None:
        loaded.run()
        cuda_toy.synchronize()

    one_step()
    one_step()
    best = min(elapsed_s(one_step) for _ in range(3))
    assert 1.9 * SPIN_S < best < 2.6 * SPIN_S


@pytest.mark.parametrize("replay", [False, True])
def test_steps_are_submitted_without_waiting(cuda_toy: CudaExecutor, replay: bool) -> None:
    loaded, _ = load(cuda_toy, program(call(SlowIncrement(SPIN_NS), 0, 1), replay=replay))
    loaded.run(2)
    cuda_toy.synchronize()
    assert elapsed_s(lambda: loaded.run(2)) < SPIN_S
    assert elapsed_s(cuda_toy.synchronize) > SPIN_S


def test_an_asynchronous_read_does_not_wait_and_sees_the_steps_so_far(cuda_toy: CudaExecutor, x: np.ndarray) -> None:
    loaded, regions = load(cuda_toy, program(call(SlowIncrement(SPIN_NS), 0, 1)))
    loaded.run(2)
    regions["arena"].read_async(X, PITCH).wait()  # the page-locked buffer is there from now on
    regions["arena"].write(x)
    loaded.run(2)
    start = time.perf_counter()
    reading = regions["arena"].read_async(X, PITCH)
    assert not reading.ready()
    assert time.perf_counter() - start < SPIN_S
    np.testing.assert_array_equal(reading.wait(), x + 1)
    assert reading.ready()


def test_an_asynchronous_write_comes_between_the_steps_before_and_after_it(
    cuda_toy: CudaExecutor, x: np.ndarray
) -> None:
    """Steps read x at their very end: a write that did not wait for them would show in their results."""
    log = program(call(SlowIncrement(SPIN_NS), 0, 1), call(ScaleAdd(), 1, 2))
    loaded, regions = load(cuda_toy, log)
    other, other_regions = load(cuda_toy, log)
    arena = regions["arena"]
    for each in (loaded, other):
        each.run(2)
    arena.write(x)
    source = cuda_toy.pinned((SIZE,), np.float32)
    source[:] = -x
    loaded.run()
    before = arena.read_async(X, 2 * PITCH)
    written = arena.write_async(source)
    assert not written.ready()
    loaded.run()
    np.testing.assert_array_equal(before.wait(), x + 1)
    np.testing.assert_array_equal(arena.read(X, 2 * PITCH), 1 - x)
    # While a program of another region runs, the write goes ahead.
    other.run(3)
    written = arena.write_async(source)
    assert elapsed_s(written.wait) < 2 * SPIN_S
    assert not other_regions["arena"].read_async(X, 0).ready()
    cuda_toy.synchronize()


def test_much_shared_memory(cuda_toy: CudaExecutor, x: np.ndarray) -> None:
    most = cuda_toy.device.shared_bytes_per_block
    loaded, regions = load(cuda_toy, program(call(SlowIncrement(shared_bytes=most), 0, 1)))
    regions["arena"].write(x)
    loaded.run(3)
    np.testing.assert_array_equal(regions["arena"].read(X, PITCH), x + 1)


def test_memory_that_there_is_not(cuda_toy: CudaExecutor, x: np.ndarray) -> None:
    before = cuda_toy.allocated_bytes
    with pytest.raises(OutOfMemoryError, match=r"region 'arena'(?s:.)*1,099,511,627,776 bytes"):
        cuda_toy.region("arena", 1 << 40)
    assert cuda_toy.allocated_bytes == before
    region = cuda_toy.region("x", x.nbytes)  # and all goes on
    region.write(x)
    np.testing.assert_array_equal(region.read(X), x)


def test_regions_take_the_memory_that_they_say(cuda_toy: CudaExecutor) -> None:
    nbytes, tolerance = 512 << 20, 64 << 20
    cuda_toy.synchronize()
    before = cuda_toy.available_bytes()
    region = cuda_toy.region("x", nbytes)
    assert abs(before - cuda_toy.available_bytes() - nbytes) < tolerance
    region.free()
    assert abs(before - cuda_toy.available_bytes()) < tolerance


def test_dropped_programs_leave_nothing(cuda_toy: CudaExecutor) -> None:
    def load_and_drop() -> None:
        loaded, _ = load(cuda_toy, diamond())
        loaded.run(2 * STEPS_PER_GRAPH + 2)

    load_and_drop()
    cuda_toy.synchronize()
    allocated, available = cuda_toy.allocated_bytes, cuda_toy.available_bytes()
    for _ in range(100):
        load_and_drop()
    cuda_toy.synchronize()
    assert cuda_toy.allocated_bytes == allocated
    assert available - cuda_toy.available_bytes() < 64 << 20


def test_executors_of_a_process_share_the_context(cuda_toy: CudaExecutor, x: np.ndarray) -> None:
    other = CudaExecutor(registry=REGISTRY, memory_limit=1 << 20)
    loaded, regions = load(other, diamond())
    regions["arena"].write(x)
    loaded.run(3)
    mine, _ = load(cuda_toy, diamond())
    mine.run(3)
    np.testing.assert_array_equal(regions["arena"].read(X, 5 * PITCH), diamond_result(x))
    other.close()
    mine.run(3)
    cuda_toy.synchronize()


# How a process ends

SETUP = """
import threading, sys
import numpy as np
from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.launch import Launch
from parcnn.errors import DeviceError
from tests.cuda.toy import REGISTRY, Custom, kernel
from tests.cuda.toy_programs import *
def start():
    executor = CudaExecutor(registry=REGISTRY)
    loaded, regions = load(executor, diamond(1_000_000))
    loaded.run(20)
    return executor, loaded, regions
"""


def run_process(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run(
        [sys.executable, "-c", SETUP + code], capture_output=True, text=True, timeout=120, env=environment, check=False
    )


@pytest.mark.usefixtures("cuda_toy")
@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("kept = start()", 0),
        ("executor, loaded, regions = start(); executor.close()", 0),
        ("start()", 0),
        ("kept = start(); transfer = kept[2]['arena'].read_async(X)", 0),
        ("kept = start(); cycle = [kept]; cycle.append(cycle)", 0),
        ("kept = [start(), start()]; del kept[0]", 0),
        ("kept = start(); sys.exit(3)", 3),
        ("kept = start(); raise KeyboardInterrupt", -2),
    ],
)
def test_a_process_ends_cleanly(code: str, status: int) -> None:
    done = run_process(code)
    assert done.returncode == status, done.stderr
    assert "PyCUDA" not in done.stderr
    if status >= 0:
        assert done.stderr == ""


@pytest.mark.usefixtures("cuda_toy")
def test_a_fault_of_a_kernel_is_an_error_and_the_process_still_ends() -> None:
    done = run_process(
        "executor = CudaExecutor(registry=REGISTRY)\n"
        "bad = Launch(kernel('fault'), (1, 1, 1), (1, 1, 1))\n"
        "loaded, _ = load(executor, program(call(Custom((bad,)), 0, 1)))\n"
        "try:\n"
        "    loaded.run(); executor.synchronize()\n"
        "except DeviceError as fault:\n"
        "    print('typed:', fault)\n"
    )
    assert done.stdout.startswith("typed:"), done.stderr
    assert "illegal" in done.stdout
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("cuda_toy")
def test_the_context_belongs_to_the_main_thread() -> None:
    done = run_process(
        "def work():\n"
        "    try:\n"
        "        start()\n"
        "    except DeviceError as fault:\n"
        "        print(fault)\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()\n"
    )
    assert "must be in the main thread" in done.stdout
    assert (done.returncode, done.stderr) == (0, "")


def test_a_gpu_that_does_not_exist(cuda_toy: CudaExecutor) -> None:
    with pytest.raises(DeviceError, match="no such GPU"):
        CudaExecutor(device=1000)
