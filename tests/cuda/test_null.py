"""The null driver finds every kind of wrong launch: each test breaks one rule of a program that is otherwise right."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.launch import Argument, Kernel, Launch, LaunchError, Pointer, Struct
from parcnn.cuda.null import NullDriver
from parcnn.errors import DeviceError
from parcnn.ops.base import Spec
from parcnn.ops.program import Call
from tests.cuda.toy import REGISTRY, Custom, kernel
from tests.cuda.toy_programs import SIZE, X, call, diamond, load, logging_program, program, tensor

GOOD = Launch(
    kernel("slow_increment"),
    grid=(4, 1, 1),
    block=(256, 1, 1),
    args=(tensor(1), tensor(0), np.int32(SIZE), np.uint32(0)),
    shared_bytes=1024,
)


def run(executor: CudaExecutor, *launches: Launch) -> None:
    loaded, _ = load(executor, program(call(Custom(tuple(launches)), 0, 1)))
    loaded.run()


def with_args(*args: Argument) -> Launch:
    return replace(GOOD, args=args)


def test_the_launch_that_the_others_break_is_right(null_toy: CudaExecutor) -> None:
    run(null_toy, GOOD)
    assert null_toy.driver.counters.launches == 1


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ((0, 1, 1), (256, 1, 1)),
        ((1, 65536, 1), (256, 1, 1)),
        ((1, 1, 65536), (256, 1, 1)),
        ((2**31, 1, 1), (256, 1, 1)),
        ((1, 1, 1), (1, 1, 128)),
        ((1, 1, 1), (0, 1, 1)),
        ((1, 1, 1), (1, 2048, 1)),
    ],
)
def test_grid_and_block_have_limits(null_toy: CudaExecutor, grid: tuple, block: tuple) -> None:
    with pytest.raises(LaunchError, match="out of range"):
        run(null_toy, replace(GOOD, grid=grid, block=block))


def test_the_largest_grid_is_allowed(null_toy: CudaExecutor) -> None:
    run(null_toy, replace(GOOD, grid=(2**31 - 1, 65535, 65535)))


@pytest.mark.parametrize("block", [(257, 1, 1), (16, 16, 2)])
def test_a_block_keeps_to_the_kernels_launch_bounds(null_toy: CudaExecutor, block: tuple) -> None:
    with pytest.raises(LaunchError, match="more threads than the kernel allows"):
        run(null_toy, replace(GOOD, block=block))


def test_shared_memory_has_the_devices_limit(null_toy: CudaExecutor) -> None:
    most = null_toy.device.shared_bytes_per_block
    run(null_toy, replace(GOOD, shared_bytes=most))
    with pytest.raises(LaunchError, match="too much shared memory"):
        run(null_toy, replace(GOOD, shared_bytes=most + 1))


def test_the_shared_limit_is_the_architectures() -> None:
    ada = CudaExecutor.null("sm_89", registry=REGISTRY)
    with pytest.raises(LaunchError, match=r"101376 bytes a block on sm_89"):
        run(ada, replace(GOOD, shared_bytes=100 * 1024))


def test_shared_memory_beyond_48_kib_needs_opt_in(null_toy: CudaExecutor) -> None:
    """The executor gives it; a driver whose function was prepared with less refuses."""

    class Forgetful(NullDriver):
        def function(self, module, info, dynamic_shared_bytes):
            return super().function(module, info, 0)

    launch = replace(GOOD, shared_bytes=64 * 1024)
    run(null_toy, launch)
    with pytest.raises(LaunchError, match="not told of so much dynamic shared memory"):
        run(CudaExecutor(Forgetful(), registry=REGISTRY), launch)


@pytest.mark.parametrize("args", [GOOD.args[:3], (*GOOD.args, np.int32(0)), ()])
def test_the_number_of_arguments(null_toy: CudaExecutor, args: Sequence[Argument]) -> None:
    with pytest.raises(LaunchError, match=r"slow_increment: wrong number of arguments\n  expected: 4"):
        run(null_toy, with_args(*args))


@pytest.mark.parametrize(
    ("position", "value"),
    [(0, np.int32(0)), (2, np.int64(5)), (2, tensor(0)), (3, Struct((np.int32(1), np.int32(2)))), (2, None)],
)
def test_the_size_of_an_argument(null_toy: CudaExecutor, position: int, value: Argument) -> None:
    args = list(GOOD.args)
    args[position] = value
    with pytest.raises(LaunchError, match=f"argument {position} has the wrong size"):
        run(null_toy, with_args(*args))


@pytest.mark.parametrize("value", [5, 1.0, "x", (1, 2)])
def test_an_argument_without_a_c_type(null_toy: CudaExecutor, value: object) -> None:
    with pytest.raises(LaunchError, match="has no C type"):
        run(null_toy, with_args(*GOOD.args[:2], value, GOOD.args[3]))  # type: ignore[arg-type]


def test_a_pointer_may_reach_to_its_tensors_end(null_toy: CudaExecutor) -> None:
    run(null_toy, with_args(tensor(1), Pointer(tensor(0), 8, X.nbytes - 8), *GOOD.args[2:]))


@pytest.mark.parametrize(
    "pointer",
    [Pointer(tensor(0), 0, X.nbytes + 1), Pointer(tensor(0), 8, X.nbytes), Pointer(tensor(0), -4, 4)],
)
def test_a_pointer_out_of_its_tensor(null_toy: CudaExecutor, pointer: Pointer) -> None:
    with pytest.raises(LaunchError, match=r"reaches out of its tensor tensor 0"):
        run(null_toy, with_args(tensor(1), pointer, *GOOD.args[2:]))


def test_a_pointer_to_a_tensor_of_another_call(null_toy: CudaExecutor) -> None:
    foreign = with_args(tensor(1), tensor(2), *GOOD.args[2:])
    toy = program(call(Custom((GOOD,)), 0, 1), call(Custom((foreign,)), 0, 1), arena=3 * 4096 + X.nbytes)
    loaded, _ = load(null_toy, toy)
    with pytest.raises(LaunchError, match="not the call's"):
        loaded.run()


def test_a_pointer_is_checked_inside_a_struct_too(null_toy: CudaExecutor) -> None:
    past_the_end = Struct(
        (Struct((Pointer(tensor(0), 4), np.int32(SIZE), np.float32(1))), Pointer(tensor(1), X.nbytes, 1))
    )
    launch = Launch(kernel("scale_add"), (4, 1, 1), (256, 1, 1), (tensor(1), past_the_end, np.int32(SIZE), np.int64(0)))
    with pytest.raises(LaunchError, match="reaches out of its tensor tensor 1"):
        run(null_toy, launch)


def test_a_kernel_without_parameters(null_toy: CudaExecutor) -> None:
    run(null_toy, Launch(kernel("no_parameters"), (1, 1, 1), (1024, 1, 1)))
    with pytest.raises(LaunchError, match="wrong number of arguments"):
        run(null_toy, Launch(kernel("no_parameters"), (1, 1, 1), (1, 1, 1), (np.int32(1),)))


def test_too_many_registers_for_a_block(null_toy: CudaExecutor, tmp_path) -> None:
    """Without launch bounds a kernel may take registers that 1024 threads do not have."""
    (tmp_path / "fat.cu").write_text(
        'extern "C" __global__ void fat(float *y, const float *x, int n, unsigned u) { float a[100];\n#pragma unroll\n'
        "for (int i = 0; i < 100; i++) a[i] = x[i * n + threadIdx.x];\n__syncthreads();\n#pragma unroll\n"
        "for (int i = 0; i < 100; i++) y[i * n + threadIdx.x] = a[i] * a[(i * 7 + 3) % 100]; }\n"
    )
    fat = replace(GOOD, kernel=Kernel(str(tmp_path / "fat.cu"), "fat"), shared_bytes=0)
    run(null_toy, replace(fat, block=(256, 1, 1)))
    with pytest.raises(LaunchError, match="more threads than the kernel allows"):
        run(null_toy, replace(fat, block=(1024, 1, 1)))


@pytest.mark.parametrize("position", [2, 3, 4])
@pytest.mark.parametrize("replayed", [False, True])
def test_a_missing_edge_between_streams_is_a_race(null_toy: CudaExecutor, position: int, replayed: bool) -> None:
    loaded, _ = load(null_toy, diamond(missing=position, replay=replayed))
    with pytest.raises(LaunchError, match="races with"):
        loaded.run()


def test_an_edge_that_nobody_waits_for(null_toy: CudaExecutor) -> None:
    """`after` is held to even where no memory is shared."""

    class Deaf(NullDriver):
        def wait(self, stream, event):
            if event.after not in (0, 1):  # only the step's start is heard
                return
            super().wait(stream, event)

    toy = program(
        call(Custom((GOOD,)), 0, 1), Call(Custom(), (tensor(2),), (tensor(3),), stream=1, after=(0,)), streams=2
    )
    free_standing = replace(GOOD, args=(tensor(3), tensor(2), *GOOD.args[2:]))
    toy = replace(toy, calls=(toy.calls[0], replace(toy.calls[1], op=Custom((free_standing,)))))
    load(null_toy, toy)[0].run()
    with pytest.raises(LaunchError, match=r"does not wait for custom 0->1, as `after` says"):
        load(CudaExecutor(Deaf(), registry=REGISTRY), toy)[0].run()


def test_a_stream_that_does_not_join(null_toy: CudaExecutor) -> None:
    class NoJoin(NullDriver):
        """Loses the last wait of a step, which joins the side streams."""

        def wait(self, stream, event):
            if stream is not executor.main_stream or event.after == 0b111:
                super().wait(stream, event)

    executor = CudaExecutor(NoJoin(), registry=REGISTRY)
    calls = (call(Custom((GOOD,)), 0, 1), replace(call(Custom(), 2, 3), stream=1))
    aside = replace(GOOD, args=(tensor(3), tensor(2), *GOOD.args[2:]))
    toy = program(calls[0], replace(calls[1], op=Custom((aside,))), streams=2)
    load(null_toy, toy)[0].run()
    with pytest.raises(LaunchError, match="before all of its streams have joined"):
        load(executor, toy)[0].run()


def test_a_stream_that_does_not_fork(null_toy: CudaExecutor) -> None:
    class NoFork(NullDriver):
        def wait(self, stream, event):
            pass

    toy = program(replace(call(Custom((GOOD,)), 0, 1), stream=1), streams=2)
    load(null_toy, toy)[0].run()
    with pytest.raises(LaunchError, match="starts before the step does"):
        load(CudaExecutor(NoFork(), registry=REGISTRY), toy)[0].run()


FORBIDDEN = {
    "allocate": lambda d, m, s, e: d.allocate(8),
    "free": lambda d, m, s, e: d.free(m),
    "pinned": lambda d, m, s, e: d.pinned(8),
    "fill": lambda d, m, s, e: d.fill(m.address, 0, 8, s),
    "copy in": lambda d, m, s, e: d.copy_in(m.address, np.zeros(8, np.uint8), s),
    "copy out": lambda d, m, s, e: d.copy_out(np.zeros(8, np.uint8), m.address, s),
    "stream": lambda d, m, s, e: d.stream(),
    "event": lambda d, m, s, e: d.event(),
    "query": lambda d, m, s, e: d.reached(e),
    "await": lambda d, m, s, e: d.await_event(e),
    "synchronize": lambda d, m, s, e: d.synchronize(),
    "module": lambda d, m, s, e: d.module(b""),
    "step": lambda d, m, s, e: d.step([s]).__enter__(),
    "capture": lambda d, m, s, e: d.capture(s, lambda: None),
    "graph": lambda d, m, s, e: d.launch_graph(1, s),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_a_step_only_launches(what: str) -> None:
    driver = NullDriver()
    memory, stream, event = driver.allocate(64), driver.stream(), driver.event()
    with driver.step([stream]), pytest.raises(LaunchError, match="inside a step"):
        FORBIDDEN[what](driver, memory, stream, event)


def test_a_launch_outside_a_step(null_toy: CudaExecutor) -> None:
    class Impatient(NullDriver):
        def function(self, module, info, dynamic_shared_bytes):
            self.made = super().function(module, info, dynamic_shared_bytes)
            return self.made

        def step(self, streams):
            return contextlib.nullcontext()

    with pytest.raises(LaunchError, match="outside a step"):
        run(CudaExecutor(Impatient(), registry=REGISTRY), GOOD)


def test_memory_outside_an_allocation() -> None:
    driver = NullDriver()
    memory, stream = driver.allocate(64), driver.stream()
    driver.copy_in(memory.address + 60, np.zeros(4, np.uint8), stream)
    for address in (memory.address + 61, memory.address - 1, 0):
        with pytest.raises(LaunchError, match="not allocated"):
            driver.copy_in(address, np.zeros(4, np.uint8), stream)
    driver.free(memory)
    with pytest.raises(LaunchError, match="not allocated"):
        driver.copy_out(np.zeros(4, np.uint8), memory.address, stream)
    with pytest.raises(LaunchError, match="not allocated"):
        driver.free(memory)


def test_fresh_memory_is_not_zero_until_the_executor_makes_it_so(null_toy: CudaExecutor) -> None:
    driver = null_toy.driver
    raw = np.zeros(64, np.uint8)
    driver.copy_out(raw, driver.allocate(64).address, driver.stream())
    assert raw.all()
    assert not null_toy.region("x", 64).read(Spec((64,), "u8")).any()
    driver.counters.allocated_bytes -= 64  # the raw allocation above goes with the driver


def test_counters(null_toy: CudaExecutor) -> None:
    loaded, regions = load(null_toy, logging_program(100))
    counters = null_toy.driver.counters
    total = sum(r.nbytes for r in regions.values())
    assert counters.allocated_bytes == counters.peak_bytes == null_toy.allocated_bytes == total
    loaded.run(20)
    # 1 eager step, 2 graphs of 8, 3 of 1; two launches a step
    assert (counters.launches, counters.graph_launches, counters.captures) == (40, 5, 2)
    loaded.run(16)
    assert (counters.launches, counters.graph_launches, counters.captures) == (72, 7, 2)
    assert counters.copies_in == counters.copies_out == 0
    regions["state"].write(np.zeros(8, np.int32))
    regions["losses"].read(Spec((3,)))
    assert (counters.copies_in, counters.copies_out) == (1, 1)
    regions["arena"].free()
    assert counters.allocated_bytes == total - regions["arena"].nbytes
    assert counters.peak_bytes == total


def test_an_unknown_architecture() -> None:
    with pytest.raises(DeviceError, match="does not know this architecture"):
        NullDriver("sm_42")


def test_the_address_is_the_plans(null_toy: CudaExecutor) -> None:
    """A driver that is handed a block whose address is of another place refuses it."""

    class Shifted(NullDriver):
        def launch(self, bound, stream):
            data = bytearray(bound.arguments.data)
            data[0] ^= 16
            super().launch(replace(bound, arguments=replace(bound.arguments, data=bytes(data))), stream)

    roomy = program(call(Custom((GOOD,)), 0, 1), arena=3 * X.nbytes)
    with pytest.raises(LaunchError, match="not where the plan put its tensor"):
        load(CudaExecutor(Shifted(), registry=REGISTRY), roomy)[0].run()
