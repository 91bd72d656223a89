"""An executor that runs the CUDA kernels' own source on the host, block by block: tests of the kernels without a GPU.

A kernel is compiled by g++ behind `cuda_emulation.h`. Every tensor that a launch names lies between guard zones: a
write outside it, or to a tensor that the call does not own, is an error, and a read outside it gives NaN.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

import parcnn.cuda.kernels
from parcnn.cuda.arguments import pack
from parcnn.cuda.cubin import Parameter
from parcnn.cuda.launch import Argument, Device, Kernel, Launch, Launcher, Pointer, Struct, TensorMap
from parcnn.cuda.tensormap import NBYTES
from parcnn.ops.base import ITEM_BYTES, PACKED, Op, Spec
from parcnn.ops.program import Call, Program, Slot

KERNELS = Path(parcnn.cuda.kernels.__file__).parent
FOLDER = Path(__file__).parent
# Headers of kernels, and where the twins of what they have in PTX are.
TWINS = {"conv_mma.cuh": "mma_emulation.h", "sm90.cuh": "sm90_emulation.h"}
MOST_PARAMETERS = 64
GUARD = 4096  # bytes before and after each tensor
POISON = 0xFF  # a float of these bytes is NaN
# Products and sums are contracted to fused ones, as nvcc does: rounding is then about what a GPU's is.
FLAGS = ("-std=c++17", "-O1", "-march=native", "-ffp-contract=fast", "-fPIC", "-w", "-fno-strict-aliasing")
FLAGS += ("-fvisibility-inlines-hidden",)  # what a kernel includes is its own, not another's of the same name


class EmulationError(AssertionError):
    """A launch that would have failed on a GPU, or that touched memory that is not its own."""


def available() -> bool:
    """Whether there is a compiler."""
    return shutil.which("g++") is not None


@functools.cache
def compiled(kernel: Kernel) -> ctypes.CDLL:
    """The kernel as a host library, from the temporary folder's cache where it was built before."""
    source, headers = KERNELS / kernel.source, included(kernel.source)
    header = precompiled(next((twins for name, twins in TWINS.items() if name in headers), "cuda_emulation.h"))
    text = "".join(f"#define {k} {v}\n" for k, v in kernel.defines) + f'#include "{source}"\n'
    for cluster in re.findall(r"__cluster_dims__\(([^,]+),", source.read_text()):
        text += f"#if {cluster} > 1\n#define BLOCKS_OF_CLUSTER {cluster}\n#endif\n"
    text += (
        f"#ifndef BLOCKS_OF_CLUSTER\n#define BLOCKS_OF_CLUSTER 1\n#endif\nEMULATE({kernel.entry}, BLOCKS_OF_CLUSTER)\n"
    )
    texts = [source.read_text(), *((KERNELS / name).read_text() for name in headers)]
    library = _folder() / f"{kernel.entry}-{_digest(text, header.name, *texts)}.so"
    if not library.exists():
        code = library.with_suffix(f".{os.getpid()}.cpp")
        code.write_text(text)
        _build(library, kernel.label, "-shared", "-I", str(KERNELS), "-include", str(header), str(code))
        code.unlink()
    load_emulation()
    loaded = ctypes.CDLL(str(library))
    loaded.emulate.restype = ctypes.c_char_p
    return loaded


@functools.cache
def included(source: str) -> tuple[str, ...]:
    """The kernels' headers that a source includes, or one of its headers does."""
    names = set(re.findall(r'^#include "(.+)"', (KERNELS / source).read_text(), re.MULTILINE))
    return tuple(sorted(names.union(*(included(name) for name in names))))


@functools.cache
def load_emulation() -> None:
    """What all kernels' libraries call."""
    sources = sorted(FOLDER.glob("*.cpp"))
    texts = [path.read_text() for path in (*sources, *sorted(FOLDER.glob("*.h*")))]
    library = _folder() / f"emulation-{_digest(*texts)}.so"
    if not library.exists():
        _build(library, "the emulation", "-shared", *map(str, sources))
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


@functools.cache
def precompiled(name: str) -> Path:
    """A header that includes one of the emulation's, and has been read by g++ before: most kernels are shorter than it."""
    header = FOLDER / name
    text = f'#include "{header}"\n'
    found = _folder() / f"{header.stem}-{_digest(text, *(path.read_text() for path in sorted(FOLDER.glob('*.h'))))}.h"
    kept = found.with_suffix(".h.gch")
    if not kept.exists():
        own = found.with_suffix(f".{os.getpid()}.h")
        own.write_text(text)
        own.replace(found)
        _build(kept, name, "-x", "c++-header", str(found))
    return found


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"parcnn-emulation-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join((*FLAGS, *parts)).encode()).hexdigest()[:24]


def _build(path: Path, what: str, *arguments: str) -> None:
    """Run g++; others see the file when it is whole."""
    built = path.with_suffix(f".{os.getpid()}{path.suffix}")
    done = subprocess.run(["g++", *FLAGS, *arguments, "-o", str(built)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulationError(f"g++ refused {what}:\n{done.stderr[:4000]}")
    built.replace(path)


class Guarded:
    """Copies of the memory that a launch names, each run of overlapping slots between two guard zones of its own."""

    def __init__(self, slots: Iterable[Slot], regions: Mapping[str, np.ndarray]) -> None:
        self.spans: list[tuple[str, int, int, np.ndarray]] = []
        for slot in sorted(set(slots), key=lambda s: (s.region, s.offset)):
            if self.spans and self.spans[-1][0] == slot.region and slot.offset < self.spans[-1][2]:
                region, start, end, _ = self.spans.pop()
                self.spans.append((region, start, max(end, slot.end), np.empty(0)))
            else:
                self.spans.append((slot.region, slot.offset, slot.end, np.empty(0)))
        for i, (region, start, end, _) in enumerate(self.spans):
            padded = np.full(end - start + 2 * GUARD + 256, POISON, np.uint8)
            lead = (start - padded.ctypes.data - GUARD) % 256  # addresses keep their alignment
            memory = padded[lead : lead + end - start + 2 * GUARD]
            memory[GUARD : GUARD + end - start] = regions[region][start:end]
            self.spans[i] = (region, start, end, memory)

    def address(self, slot: Slot) -> int:
        for region, start, end, memory in self.spans:
            if region == slot.region and start <= slot.offset < max(end, start + 1):
                return memory.ctypes.data + GUARD + slot.offset - start
        raise EmulationError(f"slot {slot} is in no span")

    def write_back(self, regions: Mapping[str, np.ndarray], written: Sequence[Slot], label: str) -> None:
        for region, start, end, memory in self.spans:
            if not ((memory[:GUARD] == POISON).all() and (memory[end - start + GUARD :] == POISON).all()):
                raise EmulationError(f"{label} wrote outside the tensor at {region}[{start}:{end}]")
            before, after = regions[region][start:end], memory[GUARD : GUARD + end - start]
            foreign = before != after
            for slot in written:
                if slot.region == region:
                    foreign[max(slot.offset - start, 0) : max(slot.end - start, 0)] = False
            if foreign.any():
                raise EmulationError(f"{label} wrote to an input, byte {start + int(foreign.argmax())} of {region}")
            before[...] = after


def named_slots(args: Iterable[Argument]) -> Iterable[Slot]:
    """Every slot that the arguments name."""
    for arg in args:
        if isinstance(arg, Struct):
            yield from named_slots(arg.fields)
        elif isinstance(arg, Pointer | TensorMap):
            yield arg.slot
        elif isinstance(arg, Slot):
            yield arg


def parameters(library: ctypes.CDLL) -> list[Parameter]:
    """Where a kernel's arguments lie in their block."""
    table = (ctypes.c_uint * 2 * MOST_PARAMETERS)()
    return [Parameter(*table[i]) for i in range(library.parameters(table))]


def tensor_map(arg: TensorMap, address: int) -> bytes:
    """What sm90_emulation.h reads: address, rank and swizzle; of each dimension extent, stride in bytes, elements and step."""
    steps = arg.element_strides or (1,) * len(arg.dims)
    if len(arg.dims) > 4 or steps[0] > 1:
        raise EmulationError(f"the emulation knows neither five dimensions nor a stride in the innermost: {arg}")
    words = [address, len(arg.dims) | {None: 0, "64B": 64, "128B": 128}[arg.swizzle] << 8]
    strides = (ITEM_BYTES[arg.dtype], *arg.strides_bytes)
    for extent, stride, box, step in zip(arg.dims, strides, arg.box, steps, strict=True):
        words += [extent, stride, -(-box // step) | step << 32]
    return np.array(words, np.uint64).tobytes().ljust(NBYTES, b"\0")


def run_launch(
    launch: Launch, regions: Mapping[str, np.ndarray], written: Sequence[Slot], *, descending: bool = False
) -> None:
    """Run one launch on regions of bytes; `written` are the slots that it may change."""
    memory, library = Guarded(named_slots(launch.args), regions), compiled(launch.kernel)
    args = pack(launch.args, parameters(library), memory.address, tensor_map, launch.kernel.label)
    u32x3 = ctypes.c_uint * 3
    fault = library.emulate(
        u32x3(*launch.grid), u32x3(*launch.block), ctypes.c_size_t(launch.shared_bytes), args.data, int(descending)
    )
    if fault:
        raise EmulationError(f"{launch.kernel.label}: {fault.decode()}")
    memory.write_back(regions, written, launch.kernel.label)


class HostRegion:
    """A region as bytes of the host."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        padded = np.zeros(nbytes + 256, np.uint8)
        lead = -padded.ctypes.data % 256
        self.bytes = padded[lead : lead + nbytes]

    def write(self, array: np.ndarray, offset: int = 0) -> None:
        self.bytes[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def read(self, spec: Spec, offset: int = 0) -> np.ndarray:
        raw = self.bytes[offset : offset + spec.nbytes].copy()
        if spec.dtype in PACKED:
            return raw.reshape(spec.stored_shape)
        kinds = {"f32": np.float32, "f64": np.float64, "i32": np.int32, "u32": np.uint32, "u8": np.uint8}
        return raw.view(kinds[spec.dtype]).reshape(spec.shape)


class LoadedOnHost:
    def __init__(self, executor: EmulationExecutor, program: Program, regions: Mapping[str, HostRegion]) -> None:
        self.executor, self.program = executor, program
        self.regions = {name: region.bytes for name, region in regions.items()}

    def run(self, steps: int = 1) -> None:
        for _ in range(steps):
            for call in self.program.calls:
                for launch in self.executor.launches(call):
                    run_launch(launch, self.regions, call.written, descending=self.executor.descending)


class EmulationExecutor:
    """`parcnn.ops.program.Executor` on the host, with the launchers of the given kernel families.

    `descending` runs the threads of a block in descending order.
    """

    name = "emulation"

    def __init__(self, families: Sequence[Launcher], *, descending: bool = False, sm_count: int = 4) -> None:
        self.families, self.descending = families, descending
        self.device = Device("host emulation", "sm_90a", sm_count)

    def family(self, op: Op) -> Launcher:
        return next(f for f in self.families if isinstance(op, f.OPS))

    def launches(self, call: Call) -> list[Launch]:
        return self.family(call.op).launches(call, self.device)

    concurrent = False

    def can_fuse(self, op: Op, inputs: tuple[Spec, ...]) -> bool:
        return self.family(op).supports(op, inputs) is None

    def workspace_bytes(self, op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> int:
        return self.family(op).workspace_bytes(op, inputs, outputs, self.device)

    def kernel_name(self, op: Op, inputs: tuple[Spec, ...], outputs: tuple[Spec, ...]) -> str:
        return op.name

    def available_bytes(self) -> int | None:
        return None

    def region(self, name: str, nbytes: int) -> HostRegion:
        return HostRegion(nbytes)

    def load(self, program: Program, regions: Mapping[str, HostRegion]) -> LoadedOnHost:
        return LoadedOnHost(self, program, regions)

    def synchronize(self) -> None:
        """Every run is complete on return."""

    def close(self) -> None:
        """Nothing is held."""
