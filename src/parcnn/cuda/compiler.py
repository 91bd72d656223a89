"""CUDA C++ to cubins by NVRTC, kept in a cache on disk.

NVRTC holds one lock in a process: two threads compile no faster than one (measured with 13.5: eight kernels in 3.7 s by one
thread, 3.9 s by two). So many kernels are compiled by processes (`python -m parcnn.cuda.compiler`), which leave them in the
cache.

Options: `--fmad` stays on (its default): a fused multiply-add rounds once and so errs less. Fast math stays off: it
flushes denormals and replaces division, square root and exp by approximations, which moves the error beyond what two
fp32 computations may differ by.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from parcnn.cuda.cubin import KernelInfo, parse
from parcnn.cuda.device import bindings_missing
from parcnn.cuda.launch import Kernel
from parcnn.errors import KernelCompileError
from parcnn.files import write_whole

# A process takes about as long to start as NVRTC to compile one kernel.
_KERNELS_PER_PROCESS = 2
_INCLUDE = re.compile(rb'^\s*#\s*include\s*["<]([^">]+)[">]', re.MULTILINE)
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, eq=False)
class Cubin:
    """A compiled source with its kernels by entry."""

    data: bytes
    kernels: dict[str, KernelInfo]
    from_cache: bool = False


def default_cache() -> Path:
    """$XDG_CACHE_HOME/parcnn/cubins, by default below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parcnn" / "cubins"


class Compiler:
    """Compiles the kernels of `folder` for one architecture ('sm_90a'); `cache` None: nothing is kept on disk.

    Headers (`*.cuh`) are those of the folder; sources include them by name, and are compiled again where one of those
    changed. Kernels of one source with the same macros
    share a compilation. `compiled` counts the runs of NVRTC in this process.
    """

    def __init__(self, arch: str, folder: Path, cache: Path | None) -> None:
        self.arch, self.folder, self.cache = arch, folder, cache
        self.compiled = 0
        self._nvrtc = _load_nvrtc()
        self.nvrtc_version: tuple[int, int] = self._call("nvrtcVersion")
        self._headers = {p.name: p.read_bytes() for p in sorted(folder.glob("*.cuh"))}
        self._done: dict[tuple[str, tuple[tuple[str, int | str], ...]], Cubin] = {}

    def compile(self, kernels: Iterable[Kernel]) -> dict[Kernel, Cubin]:
        """The cubin of each kernel. Raises KernelCompileError with NVRTC's log."""
        kernels = list(kernels)
        units = {(k.source, k.defines): k for k in kernels}
        missing = [k for unit, k in units.items() if unit not in self._done]
        self._compile_in_processes(missing)
        for kernel in missing:
            cubin = self._compile(kernel)
            self._done[kernel.source, kernel.defines] = cubin
            self.compiled += not cubin.from_cache
        cubins = {k: self._done[k.source, k.defines] for k in kernels}
        for kernel, cubin in cubins.items():
            if kernel.entry not in cubin.kernels:
                raise KernelCompileError(
                    f"{kernel.source} has no kernel of that name",
                    where=kernel.label,
                    expected=f'extern "C" __global__ void {kernel.entry}',
                    got=", ".join(cubin.kernels) or "none",
                )
        return cubins

    def _compile_in_processes(self, kernels: Sequence[Kernel]) -> None:
        """Fill the cache. What a process fails at is left to `_compile`, which says why."""
        if self.cache is None:
            return
        absent = [k for k in kernels if _read_entry(self._entry(*self._unit(k))) is None]
        count = min(len(os.sched_getaffinity(0)), len(absent) // _KERNELS_PER_PROCESS)
        if count < 2:
            return
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        order = {"arch": self.arch, "folder": str(self.folder), "cache": str(self.cache)}
        with contextlib.ExitStack() as running:
            for i in range(count):
                share = [(k.source, k.entry, k.defines) for k in absent[i::count]]
                process = subprocess.Popen(
                    [sys.executable, "-m", "parcnn.cuda.compiler", json.dumps({**order, "kernels": share})],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                )
                running.enter_context(process)  # waits for it at the end

    def _unit(self, kernel: Kernel) -> tuple[bytes, list[str]]:
        """What is compiled for a kernel: the source, and NVRTC's options."""
        try:
            source = (self.folder / kernel.source).read_bytes()
        except OSError as fault:
            raise KernelCompileError("the kernel's source cannot be read", where=kernel.label, got=fault) from fault
        return source, [f"-arch={self.arch}", "--std=c++17", *(f"-D{name}={value}" for name, value in kernel.defines)]

    def _entry(self, source: bytes, options: list[str]) -> Path | None:
        return self.cache / f"{self._key(source, options)}.cubin" if self.cache else None

    def _compile(self, kernel: Kernel) -> Cubin:
        source, options = self._unit(kernel)
        entry = self._entry(source, options)
        kept = _read_entry(entry)
        if kept is not None:
            return Cubin(kept, parse(kept), from_cache=True)
        data = self._run_nvrtc(kernel, source, options)
        if entry:
            _write_entry(entry, data)
        return Cubin(data, parse(data))

    def _key(self, source: bytes, options: list[str]) -> str:
        """SHA-256 over all that a cubin depends on, each part with its length before it."""
        sha = hashlib.sha256()
        headers = [part for name in self._included(source) for part in (name.encode(), self._headers[name])]
        for part in (repr(self.nvrtc_version).encode(), *(o.encode() for o in options), source, *headers):
            sha.update(len(part).to_bytes(8, "little") + part)
        return sha.hexdigest()

    def _included(self, source: bytes) -> list[str]:
        """The headers that a source includes, or one of its headers does."""
        found: set[str] = set()
        texts = [source]
        while texts:
            names = {name.decode() for name in _INCLUDE.findall(texts.pop())} & self._headers.keys() - found
            found |= names
            texts += [self._headers[name] for name in names]
        return sorted(found)

    def _run_nvrtc(self, kernel: Kernel, source: bytes, options: list[str]) -> bytes:
        names = [name.encode() for name in self._headers]
        program = self._call(
            "nvrtcCreateProgram", source, kernel.source.encode(), len(names), list(self._headers.values()), names
        )
        try:
            (status,) = self._nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
            if status.value:
                log = bytearray(self._call("nvrtcGetProgramLogSize", program))
                self._call("nvrtcGetProgramLog", program, log)
                raise KernelCompileError(
                    f"NVRTC {self.nvrtc_version[0]}.{self.nvrtc_version[1]} refused it: {status.name}\n"
                    + log.rstrip(b"\0\n").decode(errors="replace"),
                    where=f"{kernel.label} ({kernel.source}, {' '.join(options)})",
                )
            cubin = bytearray(self._call("nvrtcGetCUBINSize", program))
            self._call("nvrtcGetCUBIN", program, cubin)
            return bytes(cubin)
        finally:
            self._call("nvrtcDestroyProgram", program)

    def _call(self, name: str, *args: Any) -> Any:
        """Call NVRTC; what it returns after the status."""
        status, *results = getattr(self._nvrtc, name)(*args)
        if status.value:
            raise KernelCompileError(f"{name} failed: {status.name}")
        return results[0] if len(results) == 1 else tuple(results)


def _load_nvrtc() -> ModuleType:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # the library itself is loaded at the first call
    except (ImportError, RuntimeError, OSError) as fault:
        raise bindings_missing(fault) from fault
    return nvrtc


def _read_entry(path: Path | None) -> bytes | None:
    """A cache entry's cubin; None where there is none or its digest shows that it is damaged."""
    if path is None:
        return None
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    digest, cubin = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
    return cubin if hashlib.sha256(cubin).digest() == digest else None


def _write_entry(path: Path, cubin: bytes) -> None:
    """Readers see all or nothing. A cache that cannot be written is none."""
    with contextlib.suppress(OSError):
        write_whole(path, hashlib.sha256(cubin).digest() + cubin)


def _compile_share(order: str) -> None:
    """The work of one process: compile its share of the kernels into the cache."""
    share = json.loads(order)
    compiler = Compiler(share["arch"], Path(share["folder"]), Path(share["cache"]))
    for source, entry, defines in share["kernels"]:
        # One by one: a kernel that fails is the caller's to report, and keeps nothing else from the cache.
        with contextlib.suppress(KernelCompileError):
            compiler.compile([Kernel(source, entry, tuple((name, value) for name, value in defines))])


if __name__ == "__main__":
    _compile_share(sys.argv[1])
