"""Every kernel of every family, for every architecture that parcnn supports.

`make compile-check` compiles them all. `make test` compiles those of a generation's first architecture, and shows of the later
ones that they have the same kernels of the same text: what PTX for the first says, the later ones can (PTX ISA, ".target").
Of each source it compiles one for them, too: so NVRTC knows them.
"""

from __future__ import annotations

import re

import pytest

from parcnn.cuda.compiler import Compiler, default_cache
from parcnn.cuda.device import SHARED_BYTES
from parcnn.cuda.kernels import REGISTRY
from parcnn.cuda.launch import Kernel

REGISTERS_PER_SM = 65536
FIRST_OF = {"sm_86": "sm_80", "sm_89": "sm_80", "sm_120": "sm_100"}


def check(arch: str, kernels: tuple[Kernel, ...]) -> None:
    """They compile. On Hopper nothing spills either: a stack frame is registers that spilled, or an array that the compiler
    could not keep in registers."""
    assert kernels
    cubins = Compiler(arch, REGISTRY.folder, default_cache()).compile(kernels)
    frames = {}
    for kernel in kernels:
        info = cubins[kernel].kernels[kernel.entry]
        assert info.static_shared_bytes <= 48 * 1024, kernel.label
        assert info.registers * 32 <= REGISTERS_PER_SM, kernel.label
        if info.frame_bytes:
            frames[kernel.label] = info.frame_bytes
    if arch == "sm_90a":
        assert frames == {}


ARCHS = [pytest.param(arch, marks=[pytest.mark.every_arch] * (arch in FIRST_OF)) for arch in SHARED_BYTES]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles(arch: str) -> None:
    check(arch, REGISTRY.on(arch).variants())


@pytest.mark.parametrize("arch", FIRST_OF)
def test_later_architectures_compile_the_same_text(arch: str) -> None:
    kernels = REGISTRY.on(arch).variants()
    assert kernels == REGISTRY.on(FIRST_OF[arch]).variants()
    for path in sorted(REGISTRY.folder.glob("*.cu*")):
        text = path.read_text()
        asked = re.findall(r"__CUDA_ARCH__ (?:<|>=) (\d+)", text)
        assert len(asked) == text.count("CUDA_ARCH") - text.count("defined(__CUDA_ARCH__)"), path.name
        for number in map(int, asked):
            assert (number > macro_of(arch)) == (number > macro_of(FIRST_OF[arch])), f"{path.name} asks for {number}"
    check(arch, tuple({kernel.source: kernel for kernel in kernels}.values()))


def macro_of(arch: str) -> int:
    """__CUDA_ARCH__, by which alone sources may differ."""
    return 10 * int(arch.removeprefix("sm_").rstrip("a"))


def test_variants_are_listed_once() -> None:
    kernels: tuple[Kernel, ...] = REGISTRY.on("sm_90a").variants()
    assert len(set(kernels)) == len(kernels)
