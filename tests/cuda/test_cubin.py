"""The cubin reader against the compiler's own report, and against damaged files."""

from __future__ import annotations

import contextlib
import re
from functools import cache

import pytest
from cuda.bindings import nvrtc
from hypothesis import given
from hypothesis import strategies as st

from parcnn.cuda.cubin import Parameter, parse
from parcnn.cuda.device import SHARED_BYTES
from parcnn.errors import DeviceError

SOURCE = rb"""
struct Item { float *w; int n; float rate; };
struct Group { Item items[3]; unsigned char last; };
struct Block { char bytes[20000]; };
extern "C" __global__ void __launch_bounds__(128)
plain(float *y, float a, long long m, unsigned char b, Group g, int n) {
    __shared__ float s[65];
    s[threadIdx.x % 65] = a + m + b + g.items[2].rate + g.last;
    __syncthreads();
    if (threadIdx.x < n) y[threadIdx.x] = s[(threadIdx.x + 7) % 65];
}
extern "C" __global__ void many_bytes(Block b, float *o) { o[threadIdx.x] = b.bytes[threadIdx.x]; }
extern "C" __global__ void none() {}
extern "C" __global__ void __launch_bounds__(1024) spills(const float *x, float *o) {
    float a[90];
    #pragma unroll
    for (int i = 0; i < 90; i++) a[i] = x[threadIdx.x + i * 1024];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 90; i++) a[i] *= a[(i * 7 + 3) % 90];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 90; i++) o[threadIdx.x + i * 1024] = a[i];
}
"""


@cache
def compile_verbosely(arch: str) -> tuple[bytes, str]:
    """The cubin and ptxas's report of it."""

    def call(name: str, *args):
        status, *results = getattr(nvrtc, name)(*args)
        assert status.value == 0, (name, status)
        return results[0] if results else None

    program = call("nvrtcCreateProgram", SOURCE, b"report.cu", 0, [], [])
    call("nvrtcCompileProgram", program, 3, [f"-arch={arch}".encode(), b"--std=c++17", b"--ptxas-options=-v"])
    log = bytearray(call("nvrtcGetProgramLogSize", program))
    call("nvrtcGetProgramLog", program, log)
    cubin = bytearray(call("nvrtcGetCUBINSize", program))
    call("nvrtcGetCUBIN", program, cubin)
    return bytes(cubin), log.decode()


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_registers_stack_and_shared_memory_are_what_ptxas_reports(arch: str) -> None:
    cubin, log = compile_verbosely(arch)
    reports = re.split(r"Compiling entry function '(\w+)'", log)[1:]
    reported = dict(zip(reports[::2], reports[1::2], strict=True))
    kernels = parse(cubin)
    assert set(kernels) == set(reported) == {"plain", "many_bytes", "none", "spills"}
    for name, report in reported.items():
        kernel = kernels[name]
        shared = re.search(r"(\d+) bytes smem", report)
        assert kernel.registers == int(re.search(r"Used (\d+) registers", report)[1])
        assert kernel.frame_bytes == int(re.search(r"(\d+) bytes stack frame", report)[1])
        assert kernel.static_shared_bytes == (int(shared[1]) if shared else 0)
    assert kernels["spills"].frame_bytes > 0  # else the comparison above compared nothing but zeros
    assert kernels["plain"].static_shared_bytes == 65 * 4


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_parameters_lie_where_c_puts_them(arch: str) -> None:
    kernels = parse(compile_verbosely(arch)[0])
    assert kernels["plain"].parameters == (
        Parameter(0, 8),
        Parameter(8, 4),
        Parameter(16, 8),
        Parameter(24, 1),
        Parameter(32, 56),  # 3 items of 16 bytes, one byte, and C's padding at the end
        Parameter(88, 4),
    )
    assert kernels["many_bytes"].parameters == (Parameter(0, 20000), Parameter(20000, 8))
    assert kernels["none"].parameters == ()
    assert {k.name: k.max_threads for k in kernels.values()} == {
        "plain": 128,
        "many_bytes": None,
        "none": None,
        "spills": 1024,
    }


def test_the_parameter_base_is_the_architectures() -> None:
    bases = {arch: parse(compile_verbosely(arch)[0])["plain"].parameter_base for arch in ("sm_80", "sm_90a", "sm_120")}
    assert bases == {"sm_80": 0x160, "sm_90a": 0x210, "sm_120": 0x380}


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"// not a cubin", bytes(4096)])
def test_what_is_no_cubin_is_refused(data: bytes) -> None:
    with pytest.raises(DeviceError, match="not a cubin"):
        parse(data)


def test_a_truncated_cubin_is_refused() -> None:
    cubin, _ = compile_verbosely("sm_90a")
    for length in range(64, len(cubin) // 2, 997):
        with pytest.raises(DeviceError, match="not a cubin"):
            parse(cubin[:length])


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_cubin_never_raises_anything_else(damage: list[tuple[int, int]]) -> None:
    cubin = bytearray(compile_verbosely("sm_90a")[0])
    for at, value in damage:
        cubin[at % len(cubin)] = value
    with contextlib.suppress(DeviceError):
        parse(bytes(cubin))
