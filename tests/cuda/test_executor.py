"""The executor on the null driver: memory, binding, streams and graphs, and the errors of each."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import replace

import numpy as np
import pytest

from parcnn.cuda.arguments import pack
from parcnn.cuda.cubin import Parameter
from parcnn.cuda.executor import STEPS_PER_GRAPH, CudaExecutor
from parcnn.cuda.launch import LaunchError, Pointer, Struct
from parcnn.cuda.null import NullDriver
from parcnn.errors import ArgumentError, DeviceError, OutOfMemoryError, UnsupportedError
from parcnn.ops.base import Op, Spec
from parcnn.ops.program import Call, Program, Slot
from tests.cuda.toy import REGISTRY, ScaleAdd, SlowIncrement, WriteLog
from tests.cuda.toy_programs import X, call, diamond, load, logging_program, program, tensor

# Memory


@pytest.mark.parametrize("dtype", ["f32", "f64", "i32", "u32", "u8"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 7), (0, 4)])
def test_what_is_written_is_read(null_toy: CudaExecutor, dtype: str, shape: tuple[int, ...]) -> None:
    spec = Spec(shape, dtype)
    region = null_toy.region("x", spec.nbytes + 12)
    names = {"f32": "f4", "f64": "f8", "i32": "i4", "u32": "u4", "u8": "u1"}
    array = np.random.default_rng(0).integers(0, 200, shape).astype(names[dtype])
    region.write(array, 12)
    back = region.read(spec, 12)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)
    assert not region.read(Spec((12,), "u8")).any()


def test_pool_indices_come_packed(null_toy: CudaExecutor) -> None:
    spec = Spec((2, 3, 5), "u2")
    region = null_toy.region("idx", spec.nbytes)
    packed = np.arange(12, dtype=np.uint8).reshape(2, 3, 2)
    region.write(packed)
    np.testing.assert_array_equal(region.read(spec), packed)


def test_an_array_that_is_not_contiguous_arrives_in_order(null_toy: CudaExecutor) -> None:
    region = null_toy.region("x", 24)
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    region.write(array.T)
    np.testing.assert_array_equal(region.read(Spec((3, 2))), array.T)


@pytest.mark.parametrize(("size", "offset"), [(9, 0), (8, 4), (1, -4), (1, 32)])
def test_bytes_outside_a_region(null_toy: CudaExecutor, size: int, offset: int) -> None:
    region = null_toy.region("weights", 32)
    array = np.zeros(size, np.float32)
    for use in (
        lambda: region.write(array, offset),
        lambda: region.read(Spec((size,)), offset),
        lambda: region.write_async(array, offset),
        lambda: region.read_async(Spec((size,)), offset),
    ):
        with pytest.raises(ArgumentError, match=r"'weights'.*(?s:.)*bytes 0 to 32"):
            use()


def test_memory_comes_back_when_a_region_is_dropped_or_freed(null_toy: CudaExecutor) -> None:
    kept, dropped, freed = (null_toy.region(name, n) for name, n in (("a", 100), ("b", 1000), ("c", 10_000)))
    assert null_toy.allocated_bytes == 11_100
    del dropped
    gc.collect()
    assert null_toy.allocated_bytes == 10_100
    freed.free()
    freed.free()
    assert null_toy.allocated_bytes == null_toy.driver.counters.allocated_bytes == kept.nbytes
    with pytest.raises(ArgumentError, match="freed"):
        freed.read(Spec((1,)))


def test_a_limit_of_memory_names_the_region_and_what_there_is() -> None:
    executor = CudaExecutor.null(memory_limit=1000, registry=REGISTRY)
    weights = executor.region("weights", 600)
    assert executor.available_bytes() == 400
    with pytest.raises(OutOfMemoryError) as caught:
        executor.region("arena", 401)
    message = str(caught.value)
    for part in ("region 'arena'", "401 bytes", "400 bytes available (limit 1,000)", "weights 600"):
        assert part in message
    arena = executor.region("arena", 400)
    assert arena.nbytes == 400
    assert executor.available_bytes() == 0
    weights.free()
    assert executor.available_bytes() == 600


def test_the_devices_own_memory_ends_too() -> None:
    executor = CudaExecutor(NullDriver(total_bytes=10_000), registry=REGISTRY)
    weights = executor.region("weights", 4_000)
    assert weights.nbytes == executor.allocated_bytes
    assert executor.available_bytes() == 6_000
    with pytest.raises(OutOfMemoryError, match=r"region 'arena'"):
        executor.region("arena", 6_001)


def test_page_locked_memory_that_the_host_refuses() -> None:
    class NothingToLock(NullDriver):
        def pinned(self, nbytes: int) -> np.ndarray:
            raise MemoryError(nbytes)

    executor = CudaExecutor(NothingToLock(), registry=REGISTRY)
    assert executor.pinned((0, 3), np.float32).shape == (0, 3)
    with pytest.raises(OutOfMemoryError, match="24 bytes") as caught:
        executor.pinned((2, 3), np.float32)
    assert "ulimit" in caught.value.remedy


def test_memory_that_the_driver_refuses_although_it_looked_free() -> None:
    class Fragmented(NullDriver):
        def allocate(self, nbytes):
            raise MemoryError(nbytes)

    with pytest.raises(OutOfMemoryError, match="region 'arena'"):
        CudaExecutor(Fragmented(), registry=REGISTRY).region("arena", 64)


def test_an_empty_region_takes_nothing(null_toy: CudaExecutor) -> None:
    region = null_toy.region("optimizer", 0)
    assert (region.nbytes, null_toy.allocated_bytes) == (0, 0)
    assert region.read(Spec((0,))).size == 0
    region.free()


def test_a_size_below_zero(null_toy: CudaExecutor) -> None:
    with pytest.raises(ArgumentError, match="negative"):
        null_toy.region("x", -1)


# Asynchronous copies


def test_asynchronous_copies_arrive(null_toy: CudaExecutor) -> None:
    region = null_toy.region("images", 64)
    source = null_toy.pinned((2, 4), np.float32)
    source[:] = np.arange(8).reshape(2, 4)
    transfer = region.write_async(source, 16)
    assert transfer.wait() is source
    reading = region.read_async(Spec((2, 4)), 16)
    assert reading.ready()
    np.testing.assert_array_equal(reading.wait(), source)
    source[:] = 9
    region.write_async(source, 16)
    assert reading.wait().max() == 7  # its own copy, whatever comes after
    np.testing.assert_array_equal(region.read_async(Spec((2, 4)), 16).wait(), source)


def test_reads_share_their_page_locked_buffers() -> None:
    class Counting(NullDriver):
        pinned_buffers = 0

        def pinned(self, nbytes):
            self.pinned_buffers += 1
            return super().pinned(nbytes)

    executor = CudaExecutor(Counting(), registry=REGISTRY)
    region = executor.region("losses", 64)
    for _ in range(5):
        region.read_async(Spec((4,))).wait()
    assert executor.driver.pinned_buffers == 1
    both = [region.read_async(Spec((4,))), region.read_async(Spec((4,)))]
    region.write(np.arange(4, dtype=np.float32))
    assert executor.driver.pinned_buffers == 2
    assert all(not transfer.wait().any() for transfer in both)


class Recording(NullDriver):
    """Writes down what waits for what, by names that the test gives."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[object, object]] = []

    def wait(self, stream, event):
        self.waits.append((stream, event))
        super().wait(stream, event)


def test_a_write_waits_for_the_programs_of_its_region_alone_and_they_for_it() -> None:
    executor = CudaExecutor(Recording(), registry=REGISTRY)
    driver = executor.driver
    toy = program(call(ScaleAdd(), 0, 1))
    (first, first_regions), (second, _) = load(executor, toy), load(executor, toy)
    first.run(2)
    second.run(2)
    driver.waits.clear()
    first_regions["arena"].write_async(executor.pinned((4,), np.float32))
    assert driver.waits == [(executor.write_stream, first.done)]
    driver.waits.clear()
    second.run()
    assert driver.waits == []  # the double buffer's other half goes on
    first.run()
    assert [stream for stream, _ in driver.waits] == [executor.main_stream]
    driver.waits.clear()
    first.run()
    assert driver.waits == []


def test_an_asynchronous_read_comes_after_the_steps_so_far_and_pending_writes() -> None:
    executor = CudaExecutor(Recording(), registry=REGISTRY)
    region = executor.region("x", 64)
    region.write_async(executor.pinned((4,), np.float32))
    executor.driver.waits.clear()
    region.read_async(Spec((4,)))
    assert [stream for stream, _ in executor.driver.waits] == [executor.read_stream] * 2
    assert executor.driver.waits[1][1] is executor.submitted
    executor.driver.waits.clear()
    region.write_async(executor.pinned((4,), np.float32))
    assert [stream for stream, _ in executor.driver.waits] == [executor.write_stream]


# Programs


def test_the_first_step_is_eager_and_the_rest_is_replayed(null_toy: CudaExecutor) -> None:
    loaded, _ = load(null_toy, diamond())
    counters = null_toy.driver.counters
    loaded.run()
    assert (counters.launches, counters.captures, counters.graph_launches) == (5, 0, 0)
    loaded.run(0)
    assert counters.launches == 5
    loaded.run(STEPS_PER_GRAPH + 2)
    assert (counters.launches, counters.captures, counters.graph_launches) == (5 * (STEPS_PER_GRAPH + 3), 2, 3)


def test_without_replay_every_step_is_launched(null_toy: CudaExecutor) -> None:
    loaded, _ = load(null_toy, diamond(replay=False))
    loaded.run(11)
    counters = null_toy.driver.counters
    assert (counters.launches, counters.captures, counters.graph_launches) == (55, 0, 0)


def test_a_step_copies_nothing_and_waits_for_nothing(null_toy: CudaExecutor) -> None:
    loaded, _ = load(null_toy, logging_program(10))
    counters = null_toy.driver.counters
    before = replace(counters)
    loaded.run(10)
    assert (counters.copies_in, counters.copies_out) == (before.copies_in, before.copies_out)
    assert counters.synchronizations == before.synchronizations
    assert counters.allocated_bytes == before.allocated_bytes


def test_a_program_of_no_calls(null_toy: CudaExecutor) -> None:
    loaded, _ = load(null_toy, Program("empty", (), {}))
    loaded.run(3)
    assert null_toy.driver.counters.launches == 0


def test_negative_steps(null_toy: CudaExecutor) -> None:
    loaded, _ = load(null_toy, diamond())
    with pytest.raises(ArgumentError, match="negative"):
        loaded.run(-1)


def test_a_freed_region_stops_its_programs(null_toy: CudaExecutor) -> None:
    loaded, regions = load(null_toy, diamond())
    loaded.run()
    regions["arena"].free()
    with pytest.raises(DeviceError, match="'arena' is freed"):
        loaded.run()


def test_regions_must_be_there_own_and_large_enough(null_toy: CudaExecutor) -> None:
    toy = logging_program(10)
    _, regions = load(null_toy, toy)
    other = CudaExecutor.null(registry=REGISTRY)
    for wrong, match in (
        ({k: v for k, v in regions.items() if k != "state"}, "'state' is missing"),
        ({**regions, "losses": null_toy.region("losses", 36)}, "(?s)'losses' is too small.*40 bytes.*36"),
        ({**regions, "losses": other.region("losses", 40)}, "'losses' is missing.*(?s:.)*of this executor"),
    ):
        with pytest.raises(ArgumentError, match=match):
            null_toy.load(toy, wrong)


@pytest.mark.parametrize("slot", [Slot(X, "arena", 4096 * 2), Slot(X, "absent"), Slot(X, "arena", -8)])
def test_a_tensor_outside_the_bound_memory(null_toy: CudaExecutor, slot: Slot) -> None:
    toy = Program("toy", (Call(ScaleAdd(), (slot,), (tensor(1),)),), {"arena": 4096 + X.nbytes})
    with pytest.raises(ArgumentError, match="outside the memory bound to the program"):
        load(null_toy, toy)


@pytest.mark.parametrize("wrong", [{"after": (1,)}, {"after": (2,)}, {"after": (-1,)}, {"stream": 3}, {"stream": -1}])
def test_a_call_that_waits_for_later_ones_or_has_no_stream(null_toy: CudaExecutor, wrong: dict) -> None:
    toy = diamond()
    calls = list(toy.calls)
    calls[1] = replace(calls[1], **wrong)
    with pytest.raises(LaunchError, match="call 1 is out of order"):
        load(null_toy, replace(toy, calls=tuple(calls)))


def test_an_op_without_a_kernel_says_why(null_toy: CudaExecutor) -> None:
    double = Spec((4,), "f64")
    toy = program(Call(ScaleAdd(), (tensor(0, double),), (tensor(1, double),), layer="features.3"))
    with pytest.raises(
        UnsupportedError, match=r"(?s)features\.3: no kernel runs scale_add on f64\(4,\).*single precision"
    ):
        load(null_toy, toy)
    with pytest.raises(UnsupportedError, match="no kernel runs"):
        null_toy.workspace_bytes(Op(), (X,), (X,))


def test_what_the_plan_asks(null_toy: CudaExecutor) -> None:
    assert null_toy.can_fuse(ScaleAdd(), (X,))
    assert not null_toy.can_fuse(ScaleAdd(), (Spec((4,), "f64"),))
    assert not null_toy.can_fuse(Op(), (X,))
    assert null_toy.workspace_bytes(ScaleAdd(), (X,), (X,)) == 0
    assert null_toy.kernel_name(SlowIncrement(), (X,), (X,)) == "slow_increment"
    assert null_toy.kernel_name(WriteLog(), (Spec((8,), "i32"), X, X), ()) == "write_log"
    assert null_toy.driver.counters.launches == 0


def test_two_programs_need_not_agree_on_shared_memory(null_toy: CudaExecutor) -> None:
    """The older program still has what it asked for when a newer one asks for less, and the other way round."""
    large = program(call(SlowIncrement(shared_bytes=100 * 1024), 0, 1))
    small = program(call(SlowIncrement(shared_bytes=60 * 1024), 0, 1))
    loaded = [load(null_toy, toy)[0] for toy in (small, large, small)]
    for one in loaded:
        one.run(3)
    assert null_toy.driver.counters.launches == 9


def test_close_frees_everything() -> None:
    executor = CudaExecutor.null(registry=REGISTRY)
    loaded, _ = load(executor, diamond())
    loaded.run(3)
    executor.close()
    executor.close()
    assert executor.allocated_bytes == executor.driver.counters.allocated_bytes == 0
    with pytest.raises(DeviceError, match="freed"):
        loaded.run()


def test_an_executor_that_is_dropped_leaves_nothing() -> None:
    executor = CudaExecutor.null(registry=REGISTRY)
    driver = executor.driver
    loaded, regions = load(executor, diamond())
    loaded.run(20)
    del executor, loaded, regions
    assert driver.counters.allocated_bytes == 0  # without the cycle collector, which any thread may run


# Arguments


def test_arguments_are_laid_out_as_c_does() -> None:
    class Inner(ctypes.Structure):
        _fields_ = (("flag", ctypes.c_uint8), ("n", ctypes.c_int16), ("x", ctypes.c_double))

    class Outer(ctypes.Structure):
        _fields_ = (("a", ctypes.c_float), ("inner", Inner), ("p", ctypes.c_uint64), ("last", ctypes.c_uint8))

    inner = Struct((np.uint8(7), np.int16(-3), np.float64(2.5)))
    slot = Slot(X, "arena", 256)
    outer = Struct((np.float32(1.5), inner, Pointer(slot, 12), np.uint8(9)))
    parameters = (Parameter(0, 4), Parameter(8, ctypes.sizeof(Outer)), Parameter(8 + ctypes.sizeof(Outer), 8))
    packed = pack((np.int32(-1), outer, None), parameters, lambda s: 0x1000 + s.offset, lambda map, at: b"", "test")
    wanted = Outer(1.5, Inner(7, -3, 2.5), 0x1000 + 256 + 12, 9)
    got = Outer.from_buffer_copy(packed.data, 8)
    assert (got.a, got.inner.flag, got.inner.n, got.inner.x, got.p, got.last) == (1.5, 7, -3, 2.5, wanted.p, 9)
    assert packed.data[:4] == b"\xff" * 4
    assert packed.data[-8:] == bytes(8)
    assert len(packed.data) == parameters[-1].offset + 8
    assert packed.pointers == ((8 + Outer.p.offset, Pointer(slot, 12)),)
