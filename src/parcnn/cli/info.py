"""`parcnn info`: what is here, what is missing, and how to get it."""

from __future__ import annotations

import os
from pathlib import Path

from threadpoolctl import threadpool_info

import parcnn
from parcnn.bench.machine import Machine, installed
from parcnn.cli.console import say
from parcnn.cuda.compiler import default_cache
from parcnn.errors import DeviceError, TuningError

CUDA = "'.[cuda]' in a clone of parcnn"
# Package -> what it is for and what pip installs it by.
OPTIONAL = {
    "pycuda": ("runs the kernels on the GPU", CUDA),
    "cuda-bindings": ("NVRTC and CUDA graphs", CUDA),
    "nvidia-cuda-nvrtc": ("compiles the kernels", CUDA),
    "matplotlib": ("graphs of the benchmarks", "matplotlib"),
    "pillow": ("reads image files", "pillow"),
    "torch": ("compared with in the benchmarks", "torch"),
}


def info() -> None:
    """Versions, devices, caches; what is missing, and how to get it."""
    machine = Machine.of()
    blas = sorted(
        {f"{each['internal_api']} {each['version']}" for each in threadpool_info() if each["user_api"] == "blas"}
    )
    facts = {
        "parcnn": parcnn.__version__ + (f", commit {machine.commit}" if machine.commit else ""),
        "Python, NumPy, BLAS": f"{machine.python}, {machine.numpy}, {', '.join(blas) or 'unknown'}",
        "processor": f"{machine.cpu}, {machine.cores} cores",
        "kernel cache": _folder(default_cache()),
        "data cache": _folder(default_cache().parent / "data"),
        "$PARCNN_DATA": os.environ.get("PARCNN_DATA") or "not set",
    }
    obstacle: DeviceError | TuningError | None = None
    try:
        from parcnn.cuda.executor import CudaExecutor

        executor = CudaExecutor()
        gpu, tuning = Machine.of(executor), executor.tuning
        facts["tuned kernels"] = (
            f"{tuning.digest or 'none'}: {len(tuning.user)} problems in {tuning.path}, {len(tuning.shipped)} as shipped"
        )
        facts["GPU"] = f"{gpu.gpu}, driver {gpu.driver or 'unknown'}, CUDA {gpu.cuda}"
    except (DeviceError, TuningError) as error:
        facts["GPU"], obstacle = "none that can be used", error
    for name, (purpose, what) in OPTIONAL.items():
        facts[name] = f"{installed(name) or f'not installed: pip install {what}'} ({purpose})"
    for name, value in facts.items():
        say(f"{name:<21}{value}")
    if obstacle is not None:
        say(f"\nThe GPU cannot be used, the CPU is:\n{obstacle}")


def _folder(path: Path) -> str:
    files = [file for file in path.rglob("*") if file.is_file()]
    return f"{path} ({len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB)"
