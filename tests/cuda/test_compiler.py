"""NVRTC with its cache on disk."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from parcnn.cuda.compiler import Compiler, default_cache
from parcnn.cuda.launch import Kernel
from parcnn.errors import DeviceError, KernelCompileError

SOURCE = """
#include "shared.cuh"
extern "C" __global__ void store(float *y) { y[threadIdx.x] = VALUE * scale; }
extern "C" __global__ void clear(float *y) { y[threadIdx.x] = 0; }
"""
STORE = Kernel("store.cu", "store", (("VALUE", 3),))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "store.cu").write_text(SOURCE)
    (folder / "shared.cuh").write_text("constexpr float scale = 2.f;\n")
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cubins"


def compile_once(folder: Path, cache: Path | None, kernel: Kernel = STORE, arch: str = "sm_90a") -> tuple[bytes, int]:
    """The cubin, and whether a new compiler had to run NVRTC for it."""
    compiler = Compiler(arch, folder, cache)
    return compiler.compile([kernel])[kernel].data, compiler.compiled


def test_the_second_time_it_comes_from_the_disk(folder: Path, cache: Path) -> None:
    first, compiled = compile_once(folder, cache)
    assert compiled == 1
    second, compiled = compile_once(folder, cache)
    assert (second, compiled) == (first, 0)


def test_kernels_of_a_source_with_the_same_macros_are_compiled_once(folder: Path) -> None:
    compiler = Compiler("sm_90a", folder, None)
    clear = Kernel("store.cu", "clear", STORE.defines)
    cubins = compiler.compile([STORE, clear])
    assert compiler.compiled == 1
    assert cubins[STORE] is cubins[clear]
    assert set(cubins[STORE].kernels) == {"store", "clear"}
    compiler.compile([clear])
    assert compiler.compiled == 1


def test_whatever_a_cubin_depends_on_makes_a_new_one(folder: Path, cache: Path) -> None:
    seen = {compile_once(folder, cache)[0]}

    def must_compile(what: str, kernel: Kernel = STORE, arch: str = "sm_90a") -> None:
        cubin, compiled = compile_once(folder, cache, kernel, arch)
        assert compiled == 1, what
        assert cubin not in seen, what
        seen.add(cubin)

    must_compile("macro", Kernel("store.cu", "store", (("VALUE", 4),)))
    must_compile("architecture", arch="sm_80")
    (folder / "shared.cuh").write_text("constexpr float scale = 5.f;\n")
    must_compile("header")
    (folder / "shared.cuh").write_text('#include "inner.cuh"\nconstexpr float scale = inner;\n')
    (folder / "inner.cuh").write_text("constexpr float inner = 6.f;\n")
    must_compile("header of a header")
    (folder / "inner.cuh").write_text("constexpr float inner = 7.f;\n")
    must_compile("change in a header of a header")
    (folder / "other.cuh").write_text("constexpr float other = 5.f;\n")
    assert compile_once(folder, cache)[1] == 0, "a header that the source does not include"
    (folder / "store.cu").write_text(SOURCE.replace("VALUE *", "VALUE +"))
    must_compile("source")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other"])
def test_a_damaged_entry_is_compiled_again_and_replaced(folder: Path, cache: Path, damage: str) -> None:
    good, _ = compile_once(folder, cache)
    (entry,) = cache.iterdir()
    data = bytearray(entry.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    entry.write_bytes({"truncated": data[:-100], "flipped": data, "empty": b"", "other": b"x" * 500}[damage])
    assert compile_once(folder, cache) == (good, 1)
    assert compile_once(folder, cache) == (good, 0)


def test_compilers_at_once_leave_whole_entries_and_nothing_else(folder: Path, cache: Path) -> None:
    kernels = [Kernel("store.cu", "store", (("VALUE", i),)) for i in range(3)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: Compiler("sm_90a", folder, cache).compile(kernels), range(4)))
    assert len({tuple(r[k].data for k in kernels) for r in results}) == 1
    assert sorted(p.suffix for p in cache.iterdir()) == [".cubin"] * 3
    again = Compiler("sm_90a", folder, cache)
    again.compile(kernels)
    assert again.compiled == 0


@pytest.fixture
def many(folder: Path) -> list[Kernel]:
    return [Kernel("store.cu", "store", (("VALUE", i),)) for i in range(6)]


def test_many_kernels_are_compiled_by_processes(folder: Path, cache: Path, many: list[Kernel], two_cores: None) -> None:
    compiler = Compiler("sm_90a", folder, cache)
    cubins = compiler.compile(many)
    assert compiler.compiled == 0  # all came from the cache, where the processes put them
    assert len({c.data for c in cubins.values()}) == 6
    alone = Compiler("sm_90a", folder, None)
    assert {k: c.data for k, c in alone.compile(many).items()} == {k: c.data for k, c in cubins.items()}
    assert alone.compiled == 6


def test_a_fault_among_many_kernels_is_reported_all_the_same(
    folder: Path, cache: Path, many: list[Kernel], two_cores: None
) -> None:
    wrong = Kernel("store.cu", "store", (("VALUE", "undeclared"),))
    compiler = Compiler("sm_90a", folder, cache)
    with pytest.raises(KernelCompileError, match="undeclared"):
        compiler.compile([wrong, *many])
    assert len(list(cache.iterdir())) == 6


def test_without_processes_the_work_is_done_here(
    folder: Path, cache: Path, many: list[Kernel], two_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    compiler = Compiler("sm_90a", folder, cache)
    compiler.compile(many)
    assert compiler.compiled == 6


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def test_a_cache_that_cannot_be_written_costs_time_only(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("where the cache's folder should be")
    assert compile_once(folder, tmp_path / "file" / "cubins")[1] == 1


def test_a_fault_in_a_kernel_shows_nvrtcs_log(folder: Path, cache: Path) -> None:
    (folder / "bad.cu").write_text('extern "C" __global__ void bad(float *y) { y[0] = undeclared; }\n')
    with pytest.raises(KernelCompileError, match=r"bad\.cu\(1\): error: identifier \"undeclared\" is undefined"):
        Compiler("sm_90a", folder, cache).compile([Kernel("bad.cu", "bad")])
    assert not cache.exists()


def test_a_header_is_found_by_name_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "shared.cuh").write_text("#error not this one\n")
    monkeypatch.chdir(elsewhere)
    assert compile_once(folder, None)[1] == 1


def test_a_kernel_that_the_source_does_not_have(folder: Path) -> None:
    with pytest.raises(KernelCompileError, match="absent"):
        Compiler("sm_90a", folder, None).compile([Kernel("store.cu", "absent", STORE.defines)])


def test_a_source_that_is_not_there(folder: Path) -> None:
    with pytest.raises(KernelCompileError, match="cannot be read"):
        Compiler("sm_90a", folder, None).compile([Kernel("absent.cu", "absent")])


def test_an_unknown_architecture(folder: Path) -> None:
    with pytest.raises(KernelCompileError, match="sm_42"):
        Compiler("sm_42", folder, None).compile([STORE])


def test_without_nvrtc_the_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    monkeypatch.delattr("cuda.bindings.nvrtc", raising=False)
    with pytest.raises(DeviceError, match=r"(?s)NVRTC.*extra `cuda`"):
        Compiler("sm_90a", folder, None)


def test_the_cache_lies_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "parcnn" / "cubins"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "parcnn" / "cubins"
