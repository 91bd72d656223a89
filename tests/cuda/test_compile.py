"""Every kernel of every family, compiled for every architecture that parcnn supports."""

from __future__ import annotations

import pytest

from parcnn.cuda.compiler import Compiler, default_cache
from parcnn.cuda.device import SHARED_BYTES
from parcnn.cuda.kernels import REGISTRY
from parcnn.cuda.launch import Kernel
from tests.cuda.test_overlap import WITHOUT_WAIT

REGISTERS_PER_SM = 65536


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_every_kernel_compiles(arch: str) -> None:
    """On Hopper nothing spills either: a stack frame is registers that spilled, or an array that the compiler could not keep in
    registers. And a kernel whose source waits for its predecessors does so first; else its loads were moved above the wait, as
    a compiler may do with those through `const __restrict__`. (One test: two would compile everything twice where they run side
    by side.)"""
    kernels = REGISTRY.on(arch).variants()
    assert kernels
    cubins = Compiler(arch, REGISTRY.folder, default_cache()).compile(kernels)
    frames, waiting = {}, set()
    for kernel in kernels:
        info = cubins[kernel].kernels[kernel.entry]
        assert info.static_shared_bytes <= 48 * 1024, kernel.label
        assert info.registers * 32 <= REGISTERS_PER_SM, kernel.label
        if info.frame_bytes:
            frames[kernel.label] = info.frame_bytes
        if info.awaits_predecessors:
            waiting.add(kernel.label)
    if arch == "sm_90a":
        assert frames == {}
    sources = {path.name for path in REGISTRY.folder.glob("*.cu") if "await_predecessors();" in path.read_text()}
    assert sources
    assert waiting == (set() if arch in WITHOUT_WAIT else {k.label for k in kernels if k.source in sources})


def test_variants_are_listed_once() -> None:
    kernels: tuple[Kernel, ...] = REGISTRY.on("sm_90a").variants()
    assert len(set(kernels)) == len(kernels)
