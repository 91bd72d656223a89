"""CUDA C++ to cubins by NVRTC, in parallel threads, kept in a cache on disk.

Options: `--fmad` stays on (its default): a fused multiply-add rounds once and so errs less. Fast math stays off: it
flushes denormals and replaces division, square root and exp by approximations, which moves the error beyond what two
fp32 computations may differ by.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from parcnn.cuda.cubin import KernelInfo, parse
from parcnn.cuda.device import bindings_missing
from parcnn.cuda.launch import Kernel
from parcnn.errors import KernelCompileError

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

    Headers (`*.cuh`) are those of the folder; sources include them by name. Kernels of one source with the same macros
    share a compilation. `compiled` counts the runs of NVRTC.
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
        if missing:
            # More threads than cores would only compete: a compilation is pure computation, outside Python's lock.
            with ThreadPoolExecutor(min(len(missing), len(os.sched_getaffinity(0)))) as pool:
                for kernel, cubin in zip(missing, pool.map(self._compile, missing), strict=True):
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

    def _compile(self, kernel: Kernel) -> Cubin:
        try:
            source = (self.folder / kernel.source).read_bytes()
        except OSError as fault:
            raise KernelCompileError("the kernel's source cannot be read", where=kernel.label, got=fault) from fault
        options = [f"-arch={self.arch}", "--std=c++17", *(f"-D{name}={value}" for name, value in kernel.defines)]
        entry = self.cache / f"{self._key(source, options)}.cubin" if self.cache else None
        kept = _read_entry(entry) if entry else None
        if kept is not None:
            return Cubin(kept, parse(kept), from_cache=True)
        data = self._run_nvrtc(kernel, source, options)
        if entry:
            _write_entry(entry, data)
        return Cubin(data, parse(data))

    def _key(self, source: bytes, options: list[str]) -> str:
        """SHA-256 over all that a cubin depends on, each part with its length before it."""
        sha = hashlib.sha256()
        headers = [part for name, text in self._headers.items() for part in (name.encode(), text)]
        for part in (repr(self.nvrtc_version).encode(), *(o.encode() for o in options), source, *headers):
            sha.update(len(part).to_bytes(8, "little") + part)
        return sha.hexdigest()

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


def _read_entry(path: Path) -> bytes | None:
    """A cache entry's cubin; None where there is none or its digest shows that it is damaged."""
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    digest, cubin = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
    return cubin if hashlib.sha256(cubin).digest() == digest else None


def _write_entry(path: Path, cubin: bytes) -> None:
    """Write under another name, then rename: readers see all or nothing. A cache that cannot be written is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(cubin).digest() + cubin)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
