"""Finds NVIDIA's driver library, libcuda.so.1, without any package: only the standard library is used."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

SONAME = "libcuda.so.1"
OLDEST_CUDA = 13000  # cuda-bindings 13 and the cubins of NVRTC 13 need a driver of CUDA 13.0 (580) or newer
# Where containers (NVIDIA's runtime, Kubernetes' device plugin) and WSL put the driver, at times unknown to ldconfig.
EXTRA_FOLDERS = (Path("/usr/local/nvidia/lib64"), Path("/usr/lib/wsl/lib"))


class Driver(NamedTuple):
    """A driver that loads: the path of its library, and the CUDA version it speaks (13000 is 13.0)."""

    path: Path
    cuda_version: int

    @property
    def cuda(self) -> str:
        """The CUDA version as people write it: "13.0"."""
        return f"{self.cuda_version // 1000}.{self.cuda_version % 1000 // 10}"


def find_driver() -> Driver | None:
    """The driver of this machine, or None where no libcuda.so.1 loads."""
    for name in (SONAME, *_from_ldconfig(), *(str(folder / SONAME) for folder in EXTRA_FOLDERS)):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        version = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(version)) == 0:
            return Driver(_path_of_loaded(), version.value)
    return None


def _from_ldconfig() -> list[str]:
    """Paths of libcuda.so.1 in the linker's cache; empty where ldconfig cannot be run."""
    path = os.environ.get("PATH", os.defpath) + os.pathsep + "/sbin:/usr/sbin"  # not on every user's PATH
    try:
        done = subprocess.run(
            ["ldconfig", "-p"], capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
        )
    except OSError:
        return []
    return re.findall(rf"^\s*{re.escape(SONAME)} .*=> (\S+)$", done.stdout, re.MULTILINE)


def _path_of_loaded() -> Path:
    """The file that the dynamic linker mapped for libcuda."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line[line.find("/") :] if "/" in line else ""
        if Path(path).name.startswith("libcuda.so"):
            return Path(path)
    raise OSError(f"{SONAME} was loaded but /proc/self/maps does not show from where")
