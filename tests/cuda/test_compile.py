"""Every kernel of every family, compiled for every architecture that parcnn supports."""

from __future__ import annotations

import pytest

from parcnn.cuda.compiler import Compiler, default_cache
from parcnn.cuda.device import SHARED_BYTES
from parcnn.cuda.kernels import REGISTRY
from parcnn.cuda.launch import Kernel

REGISTERS_PER_SM = 65536
# Bytes of a frame that a kernel may have: of its forms, the one that spills a little was measured to be the fastest.
FRAME_BYTES = {"conv_depthwise_sm90_fprop": 32, "conv_depthwise_sm90_dgrad": 32}


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_every_kernel_compiles(arch: str) -> None:
    kernels = REGISTRY.on(arch).variants()
    assert kernels
    cubins = Compiler(arch, REGISTRY.folder, default_cache()).compile(kernels)
    for kernel in kernels:
        info = cubins[kernel].kernels[kernel.entry]
        assert info.static_shared_bytes <= 48 * 1024, kernel.label
        assert info.registers * 32 <= REGISTERS_PER_SM, kernel.label


def test_nothing_spills_on_hopper() -> None:
    """A stack frame is registers that spilled, or an array that the compiler could not keep in registers."""
    kernels = REGISTRY.on("sm_90a").variants()
    cubins = Compiler("sm_90a", REGISTRY.folder, default_cache()).compile(kernels)
    frames = {kernel: cubins[kernel].kernels[kernel.entry].frame_bytes for kernel in kernels}
    assert {k.label: nbytes for k, nbytes in frames.items() if nbytes > FRAME_BYTES.get(k.entry, 0)} == {}


def test_variants_are_listed_once() -> None:
    kernels: tuple[Kernel, ...] = REGISTRY.on("sm_90a").variants()
    assert len(set(kernels)) == len(kernels)
