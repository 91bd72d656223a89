"""What the CPU executor says of free memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from parcnn.cpu import CpuExecutor
from parcnn.cpu.memory import available_bytes

MEMINFO = "MemTotal:       16000 kB\nMemFree:          100 kB\nMemAvailable:    8000 kB\n"


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", "5", 8_192_000), ("4096000", "1096000", 3_000_000), ("9000000000", "0", 8_192_000), ("10", "20", 0)],
)
def test_caches_count_and_the_containers_limit_holds(tmp_path: Path, limit: str, used: str, expected: int) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(used + "\n")
    assert available_bytes(tmp_path / "meminfo", tmp_path) == expected


def test_a_system_that_says_less(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    assert available_bytes(tmp_path / "meminfo", tmp_path / "none") == 8_192_000
    (tmp_path / "meminfo").write_text("MemTotal: 5 kB\n")
    assert available_bytes(tmp_path / "meminfo", tmp_path) is None
    assert available_bytes(tmp_path / "none", tmp_path) is None


def test_this_machine() -> None:
    found = CpuExecutor(threads=1).available_bytes()
    assert found is None or found > 1 << 20
