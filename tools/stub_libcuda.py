"""Makes a stand-in for NVIDIA's driver library, for machines that have none, such as those of CI.

The stub has every function that cuda.h declares. Each answers CUDA_ERROR_NO_DEVICE, as the real driver does where there
is no GPU, so a PyCUDA built against it imports, and fails where it should: at `init()`.

    python tools/stub_libcuda.py --include DIR_WITH_CUDA_H --out DIR      # writes DIR/libcuda.so.1
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
# What says who the driver is and what an error means works without a device.
WORKING = f"""
int cuDriverGetVersion(int *version) {{ *version = 13000; return 0; }}
int cuGetErrorString(int error, const char **text) {{
    *text = error == {NO_DEVICE} ? "no CUDA-capable device is detected" : "unknown error"; return 0; }}
int cuGetErrorName(int error, const char **text) {{
    *text = error == {NO_DEVICE} ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_UNKNOWN"; return 0; }}
"""


def stub_source(headers: list[Path]) -> str:
    """C code with one function for every name of the form `cuSomething` in the headers, versioned names included."""
    names = {name for header in headers for name in re.findall(r"\bcu[A-Z]\w*", header.read_text())}
    names -= set(re.findall(r"\b(cu[A-Z]\w*)\(", WORKING))
    return WORKING + "".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in sorted(names))


def build_stub(include: Path, out: Path, compiler: str = "gcc") -> Path:
    """Compile the stub from the headers in `include` to `out`/libcuda.so.1 and return its path."""
    out.mkdir(parents=True, exist_ok=True)
    library = out / "libcuda.so.1"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "libcuda.c"
        source.write_text(stub_source([include / "cuda.h", include / "cudaProfiler.h"]))
        command = [compiler, "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
    return library


def main() -> None:
    """Build the stub that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--include", type=Path, required=True, help="folder with cuda.h and cudaProfiler.h")
    parser.add_argument("--out", type=Path, required=True, help="folder for libcuda.so.1")
    arguments = parser.parse_args()
    print(build_stub(arguments.include, arguments.out))


if __name__ == "__main__":
    main()
