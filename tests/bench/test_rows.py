"""Rows: kept, read, and what a damaged file is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from parcnn.bench.machine import Machine, commit, cpu_name
from parcnn.bench.rows import Row, append, latest, read, read_folder
from parcnn.errors import DataError
from parcnn.train.timing import StepTiming

ROW = Row(
    "speedup", "lenet5, batch 64", "sequential", 1.0, 2.5, 3.0, peak_bytes=10, extra={"cpu": "one", "curve": [1, 2]}
)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "speedup.jsonl"
    append(path, [ROW])
    append(path, [replace(ROW, gpu="H200")])
    assert read(path) == [ROW, replace(ROW, gpu="H200")]
    append(tmp_path / "new" / "a.jsonl", [replace(ROW, bench="step")])
    assert [row.bench for row in read_folder(tmp_path / "new")] == ["step", "speedup", "speedup"]


@pytest.mark.parametrize(
    "line", ["{", "3", '{"bench": "a"}', '{"bench": "a", "problem": "b", "variant": "c", "speed": 1}']
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    append(path, [ROW])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2"):
        read(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "none.jsonl")


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        append(tmp_path / "rows.jsonl", [replace(ROW, p50_us=float("nan"))])


def test_the_latest_of_each() -> None:
    other_machine = replace(ROW, extra={"cpu": "two"})
    newer = replace(ROW, p50_us=1.5)
    on_gpu = replace(ROW, gpu="H200")
    assert latest([ROW, other_machine, newer, on_gpu]) == [newer, other_machine, on_gpu]


def test_a_row_says_where_and_when(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_COMMIT", "abc123")
    row = Machine.of().row("step", "lenet5", "cpu", StepTiming(1, 2, 3), peak_bytes=7, batch=64)
    assert (row.p20_us, row.p50_us, row.p80_us, row.peak_bytes) == (1, 2, 3, 7)
    assert (row.gpu, row.peer, row.peer_p50_us, row.commit) == (None, None, None, "abc123")
    assert row.date.endswith("+00:00")
    assert row.extra["batch"] == 64
    assert row.extra["cpu"] == cpu_name()
    assert row.extra["cores"] >= 1


def test_outside_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert commit(tmp_path) is None
    assert cpu_name(tmp_path / "none") != ""
