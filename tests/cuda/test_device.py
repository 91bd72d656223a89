"""What is said where something lacks: each case is simulated, the driver library by a stub of a few lines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from parcnn.cuda import device
from parcnn.cuda.executor import CudaExecutor
from parcnn.errors import DeviceError


def build_library(folder: Path, code: str) -> str:
    """A shared library of C code; not under the driver's own name, by which NVRTC would find it."""
    compiler = shutil.which("cc") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C compiler to build a stub with")
    source, library = folder / "stub.c", folder / "libstub.so"
    source.write_text(code)
    subprocess.run([compiler, "-x", "c", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return str(library)


def stub_driver(folder: Path, init: int, count: int) -> str:
    """A libcuda of two functions: cuInit returns `init`, cuDeviceGetCount finds `count` devices."""
    return build_library(
        folder,
        f"int cuInit(unsigned flags) {{ return {init}; }}\n"
        f"int cuDeviceGetCount(int *count) {{ *count = {count}; return 0; }}\n",
    )


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "DRIVER_LIBRARY", "libabsent.so.1")
    with pytest.raises(DeviceError, match=r"(?s)no NVIDIA driver.*libabsent.*install NVIDIA's driver"):
        device.device_count()


@pytest.mark.parametrize(("init", "count"), [(100, 0), (0, 0)])
def test_a_driver_but_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, init: int, count: int) -> None:
    monkeypatch.setattr(device, "DRIVER_LIBRARY", stub_driver(tmp_path, init, count))
    with pytest.raises(DeviceError, match=r"(?s)finds no GPU.*CUDA_VISIBLE_DEVICES"):
        device.device_count()


def test_a_driver_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "DRIVER_LIBRARY", stub_driver(tmp_path, 803, 0))
    with pytest.raises(DeviceError, match=r"(?s)does not start.*CUDA error 803.*restart"):
        device.device_count()


def test_a_driver_with_two_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "DRIVER_LIBRARY", stub_driver(tmp_path, 0, 2))
    assert device.device_count() == 2


def test_the_executor_and_is_available_ask_this(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "DRIVER_LIBRARY", "libabsent.so.1")
    assert not device.is_available()
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        CudaExecutor()
    monkeypatch.setattr(device, "DRIVER_LIBRARY", stub_driver(tmp_path, 0, 1))
    assert device.is_available()


def test_a_gpu_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "DRIVER_LIBRARY", stub_driver(tmp_path, 0, 2))
    for index in (2, -1):
        with pytest.raises(DeviceError, match=r"(?s)no such GPU.*0 to 1"):
            CudaExecutor(device=index)


def test_a_gpu_but_no_pycuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "DRIVER_LIBRARY", stub_driver(tmp_path, 0, 1))
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(DeviceError, match=r"(?s)PyCUDA is not installed.*extra `cuda`"):
        CudaExecutor()


def test_a_pycuda_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "DRIVER_LIBRARY", stub_driver(tmp_path, 0, 1))
    (tmp_path / "pycuda").mkdir()
    (tmp_path / "pycuda" / "__init__.py").write_text("")
    (tmp_path / "pycuda" / "driver.py").write_text("raise ImportError('undefined symbol: cuArrayCreate_v2')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [m for m in sys.modules if m.partition(".")[0] == "pycuda"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        with pytest.raises(DeviceError, match=r"(?s)PyCUDA does not load.*undefined symbol"):
            CudaExecutor()
    finally:
        sys.modules.pop("pycuda", None)
        sys.modules.pop("pycuda.driver", None)


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_120"),
    ],
)
def test_architectures_have_nvrtcs_names(capability: tuple[int, int], name: str) -> None:
    assert device.arch_name(capability) == name


def test_a_gpu_that_is_too_old() -> None:
    with pytest.raises(DeviceError, match=r"(?s)GTX 1080: this GPU is too old.*8\.0.*6\.1"):
        device.arch_name((6, 1), "GTX 1080")


def test_the_drivers_version(tmp_path: Path) -> None:
    (tmp_path / "version").write_text("580.65.06\n")
    assert device.driver_version(tmp_path / "version") == "580.65.06"
    assert device.driver_version(tmp_path / "absent", "libabsent.so.1") == ""
    nvml = build_library(
        tmp_path,
        "int nvmlInit_v2(void) { return 0; }\n"
        'int nvmlSystemGetDriverVersion(char *v, unsigned n) { for (const char *s = "575.1"; (*v++ = *s++);); return 0; }\n',
    )
    assert device.driver_version(tmp_path / "absent", nvml) == "575.1"


def test_importing_the_executor_imports_no_cuda() -> None:
    program = (
        "import sys, parcnn.cuda.executor; print([m for m in sys.modules if m.split('.')[0] in ('cuda', 'pycuda')])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
