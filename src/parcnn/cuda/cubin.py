"""What a compiled kernel says of itself: its parameter table and what it takes of a multiprocessor.

A cubin is a little-endian ELF64 file. `.nv.info` holds attributes of all kernels (by symbol), `.nv.info.<kernel>`
those of one: each is a byte of format, a byte of kind and, for format 4, a 16-bit size with so many bytes. NVIDIA does
not document it (names as `cuobjdump --dump-elf` prints them); the tests hold it to the compiler's own report
(`--ptxas-options=-v`) for every architecture.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from parcnn.errors import DeviceError

_SIZED = 4
_REGCOUNT, _FRAME_SIZE = 0x2F, 0x11  # of `.nv.info`: symbol, value
_PARAM_CBANK, _KPARAM_INFO, _KPARAM_INFO_V2, _MAX_THREADS, _REQNTID = 0x0A, 0x17, 0x45, 0x05, 0x10
# Instructions have 16 bytes; of their 12 bits of opcode the low 9 say the operation, the others its form.
_INSTRUCTION, _OPCODE, _OPERATION = "<H14x", 0xFFF, 0x1FF
_ACQBULK = 0x82E  # griddepcontrol.wait
_GLOBAL_ACCESSES = {
    0x180,  # LD
    0x181,  # LDG
    0x185,  # ST
    0x186,  # STG
    0x1AE,  # LDGSTS
    0x1B4,  # UTMALDG
    0x1B5,  # UTMASTG
}
_RESERVED_SHARED_BYTES = 1024  # Hopper and later keep so much of every block's shared memory for the system


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter's place in the argument block."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class KernelInfo:
    """One kernel of a cubin."""

    name: str
    parameters: tuple[Parameter, ...]
    parameter_base: int  # where the argument block starts in constant bank 0
    registers: int  # per thread
    static_shared_bytes: int
    frame_bytes: int  # stack per thread: registers that spilled, and local arrays that are indexed at run time
    max_threads: int | None  # of a block, where the source says so (__launch_bounds__)
    awaits_predecessors: bool  # by griddepcontrol.wait (sm_90 and later), above all that touches global memory


def parse(cubin: bytes) -> dict[str, KernelInfo]:
    """The kernels of a cubin by name. Raises DeviceError where the bytes are not a cubin."""
    try:
        return _parse(cubin)
    except (struct.error, ValueError, KeyError, IndexError, UnicodeDecodeError) as fault:
        raise DeviceError(
            "not a cubin, or one of an unknown layout", expected="an ELF64 file for a GPU", got=f"{len(cubin)} bytes"
        ) from fault


@dataclass(frozen=True)
class _Section:
    name: str
    data: bytes
    nbytes: int  # also where the file holds no bytes for it (shared memory)


def _parse(cubin: bytes) -> dict[str, KernelInfo]:
    sections = _sections(cubin)
    symbols = _symbols(sections)
    registers: dict[str, int] = {}
    frames: dict[str, int] = {}
    for kind, value in _attributes(sections[".nv.info"].data):
        if kind in (_REGCOUNT, _FRAME_SIZE):
            symbol, number = struct.unpack("<II", value)
            (registers if kind == _REGCOUNT else frames)[symbols[symbol]] = number
    reserved = _RESERVED_SHARED_BYTES if ".nv.shared.reserved.0" in sections else 0
    kernels = {}
    for name in (n.removeprefix(".nv.info.") for n in sections if n.startswith(".nv.info.")):
        if name not in registers:
            continue
        shared = sections.get(f".nv.shared.{name}")
        parameters: dict[int, Parameter] = {}
        base, max_threads = 0, None
        for kind, value in _attributes(sections[f".nv.info.{name}"].data):
            if kind in (_KPARAM_INFO, _KPARAM_INFO_V2):
                _, ordinal, offset, size = struct.unpack("<IHHI", value)
                parameters[ordinal] = Parameter(offset, size >> 18 if kind == _KPARAM_INFO else size & 0xFFFF)
            elif kind == _PARAM_CBANK:
                _, base, _ = struct.unpack("<IHH", value)
            elif kind in (_MAX_THREADS, _REQNTID):
                x, y, z = struct.unpack("<III", value)
                max_threads = x * y * z
        kernels[name] = KernelInfo(
            name=name,
            parameters=tuple(parameters[i] for i in range(len(parameters))),
            parameter_base=base,
            registers=registers[name],
            static_shared_bytes=max(0, shared.nbytes - reserved) if shared else 0,
            frame_bytes=frames.get(name, 0),
            max_threads=max_threads,
            awaits_predecessors=_waits_first(sections[f".text.{name}"].data),
        )
    return kernels


def _waits_first(code: bytes) -> bool:
    """Whether a wait for the predecessors comes before the first access to global memory, in the order of the code."""
    for (word,) in struct.iter_unpack(_INSTRUCTION, code):
        if word & _OPCODE == _ACQBULK:
            return True
        if word & _OPERATION in _GLOBAL_ACCESSES:
            return False
    return False


def _sections(cubin: bytes) -> dict[str, _Section]:
    """Sections of an ELF64 file by name."""
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise ValueError("no ELF64 header")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_bytes, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * entry_bytes) for i in range(count)]
    names = headers[names_at][4]
    sections = {}
    for name_offset, kind, _, _, offset, nbytes, *_ in headers:
        name = _string(cubin, names + name_offset)
        no_bits = 8
        sections[name] = _Section(name, b"" if kind == no_bits else cubin[offset : offset + nbytes], nbytes)
    return sections


def _symbols(sections: dict[str, _Section]) -> list[str]:
    """Names of the symbol table's entries."""
    table, strings = sections[".symtab"].data, sections[".strtab"].data
    return [_string(strings, struct.unpack_from("<I", table, at)[0]) for at in range(0, len(table), 24)]


def _attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and value of the attributes that have a sized value."""
    at = 0
    while at < len(info):
        form, kind, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _SIZED:
            yield kind, info[at : at + size]
            at += size


def _string(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()
