"""The host's emulation of Hopper's copies, barriers and products: a ring of tiles as kernels have it, with each fault."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from parcnn.cuda.launch import Kernel, Launch, TensorMap
from parcnn.ops.base import Spec
from parcnn.ops.program import Slot
from tests.cuda.bf16 import from_bits, to_bits
from tests.cuda.host_emulation import runner

SOURCE = Path(__file__).with_name("faults.cu")
TILES, ROWS, FILTERS, DEPTH = 5, 72, 64, 64
ORDERS = {"ascending": False, "descending": True}
# Faults that only one order of threads can show, by a wrong result: copies that come late, or early.
WRONG = {"READS_EARLY": "ascending", "GIVES_BACK_EARLY": "descending", "STORES_EARLY": "descending"}
# Faults that end a launch, and what is said of them.
SEEN = {
    "EXPECTS_LESS": "copies bring more bytes than a memory barrier expects",
    "EXPECTS_MORE": "never reach: .* wait for a memory barrier; .* lacks 0 arrivals, 16 bytes",
    "ARRIVES_TOO_OFTEN": "more arrivals at a memory barrier than it takes",
    "STAYS_AWAY": "never reach: 96 threads wait for a named barrier",
    "READS_BEYOND": "shared memory that there is not",
    "IS_MISALIGNED": "an address not aligned",
    "LEAVES_STORE": "a thread ends while what it stores",
    "LEAVES_PRODUCT": "a thread ends while products of its warp",
    "TAKES_TOO_MUCH": "never reach: .* 128 threads wait for registers",
}
FAULTS = ["NONE", *WRONG, *SEEN]  # twin of faults.cu's

pytestmark = pytest.mark.skipif(not runner.available(), reason="the emulation needs g++")


def run(fault: str, order: str) -> tuple[np.ndarray, np.ndarray]:
    """y of the kernel, and what it should be."""
    x = np.random.default_rng(1).integers(-2, 3, (TILES, ROWS, DEPTH)).astype(np.float64)
    slots = Slot(Spec(x.shape, "bf16"), "x"), Slot(Spec((FILTERS, ROWS - FILTERS), "bf16"), "y")
    regions = {"x": to_bits(x).reshape(-1).view(np.uint8), "y": np.full(slots[1].spec.nbytes, 0xFF, np.uint8)}
    rows, width = slots[1].spec.shape
    maps = (
        TensorMap(slots[0], (DEPTH, ROWS, TILES), (2 * DEPTH, 2 * DEPTH * ROWS), (DEPTH, ROWS, 1), swizzle="128B"),
        TensorMap(slots[1], (width, rows, 1, 1), (2 * width, *[2 * width * rows] * 2), (width, rows, 1, 1)),
    )
    shared_bytes = 2 * ROWS * 128 + 2 * width * rows
    launch = Launch(
        Kernel(str(SOURCE), "ring"),
        (1, 1, 1),
        (160, 1, 1),
        (*maps, np.int32(TILES), np.int32(FAULTS.index(fault))),
        shared_bytes,
    )
    runner.run_launch(launch, regions, [slots[1]], descending=ORDERS[order])
    y = from_bits(regions["y"].view(np.uint16)).reshape(rows, width)
    return y, np.einsum("tmk,tnk->mn", x[:, :FILTERS], x[:, FILTERS:])


@pytest.mark.parametrize("order", ORDERS)
def test_a_ring_without_a_fault(order: str) -> None:
    y, wanted = run("NONE", order)
    np.testing.assert_array_equal(to_bits(y), to_bits(wanted))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", SEEN)
def test_a_fault_ends_the_launch(fault: str, order: str) -> None:
    with pytest.raises(runner.EmulationError, match=SEEN[fault]):
        run(fault, order)


@pytest.mark.parametrize("fault", WRONG)
def test_what_comes_too_early_or_too_late_shows(fault: str) -> None:
    y, wanted = run(fault, WRONG[fault])
    assert (y != wanted).any()
