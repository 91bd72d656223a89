"""Is there a GPU that parcnn can use, and if not, what is missing: one remedy for each thing that can be.

Nothing here imports CUDA; the driver library is asked through ctypes, so that the answer costs milliseconds.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from parcnn.errors import DeviceError

DRIVER_LIBRARY = "libcuda.so.1"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_OLDEST = (8, 0)
# Architecture-specific instructions (wgmma, TMA) need the 'a' target; its cubins run on that capability alone.
_ARCH_SPECIFIC = {(9, 0)}
# Shared memory that a block may have with opt-in (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"), for the null driver; a real device is asked.
SHARED_BYTES = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90a": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
}
CPU_REMEDY = "or use the CPU: device='cpu', `--device cpu`"


def device_count() -> int:
    """Number of CUDA devices, at least 1. Raises DeviceError: no driver, a driver that does not start, no GPU."""
    try:
        driver = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError as fault:
        raise DeviceError(
            "there is no NVIDIA driver on this machine",
            expected=f"the driver's library, {DRIVER_LIBRARY}",
            got=str(fault),
            remedy=f"install NVIDIA's driver (in a container, start it with GPU access), {CPU_REMEDY}",
        ) from fault
    status = driver.cuInit(0)
    count = ctypes.c_int(0)
    if status == 0:
        status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status == _NO_DEVICE or (status == 0 and count.value == 0):
        raise DeviceError(
            "NVIDIA's driver finds no GPU",
            expected="at least one CUDA device",
            got="none",
            remedy=f"check `nvidia-smi` and CUDA_VISIBLE_DEVICES, {CPU_REMEDY}",
        )
    if status:
        raise DeviceError(
            "NVIDIA's driver does not start",
            expected="cuInit to succeed",
            got=f"CUDA error {status}",
            remedy=f"check `nvidia-smi`; a driver updated without a restart does this, {CPU_REMEDY}",
        )
    return count.value


def is_available() -> bool:
    """Whether there is a driver and a GPU. PyCUDA and NVRTC are not looked at: their lack deserves an error."""
    try:
        return device_count() > 0
    except DeviceError:
        return False


def pycuda_missing(fault: ImportError) -> DeviceError:
    """There is a GPU, but PyCUDA cannot be imported."""
    return DeviceError(
        "PyCUDA is not installed" if isinstance(fault, ModuleNotFoundError) else "PyCUDA does not load",
        expected="PyCUDA, built for this Python and this driver",
        got=str(fault),
        remedy=f"install parcnn with its extra `cuda` (conda-forge has PyCUDA ready-built), {CPU_REMEDY}",
    )


def bindings_missing(fault: Exception) -> DeviceError:
    """NVRTC, or NVIDIA's Python bindings, cannot be loaded."""
    return DeviceError(
        "NVRTC, which compiles the kernels, cannot be loaded",
        expected="the packages cuda-bindings and nvidia-cuda-nvrtc",
        got=str(fault).splitlines()[0] if str(fault) else type(fault).__name__,
        remedy=f"install parcnn with its extra `cuda` (`nvrtc` alone where there is no GPU), {CPU_REMEDY}",
    )


def arch_name(capability: tuple[int, int], where: str = "") -> str:
    """NVRTC's name for a compute capability: (9, 0) -> 'sm_90a'. Raises DeviceError below 8.0 (Ampere)."""
    if capability < _OLDEST:
        raise DeviceError(
            "this GPU is too old",
            where=where,
            expected="compute capability 8.0 (Ampere) or newer",
            got=".".join(map(str, capability)),
            remedy="use a newer GPU, " + CPU_REMEDY,
        )
    major, minor = capability
    return f"sm_{major}{minor}" + "a" * (capability in _ARCH_SPECIFIC)


def driver_version(record: Path = Path("/sys/module/nvidia/version"), library: str = "libnvidia-ml.so.1") -> str:
    """Version of NVIDIA's kernel driver, '580.65.06', as the kernel or else NVML tells it; '' where neither does."""
    try:
        return record.read_text().strip()
    except OSError:
        pass
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return ""
    text = ctypes.create_string_buffer(80)
    if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, len(text)):
        return ""
    return text.value.decode()
