"""The tables in the committed documents are what the committed rows say."""

from __future__ import annotations

from pathlib import Path

import pytest

from parcnn.bench.rows import read_folder
from parcnn.report.optimizations import OPTIMIZATIONS
from parcnn.report.tables import refresh

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_fresh(path: Path) -> None:
    rows = read_folder(ROOT / "benchmarks" / "results")
    assert refresh([path], rows, write=False) == [], "run `parcnn bench tables README.md docs/*.md`"


def test_every_switch_has_its_section() -> None:
    text = (ROOT / "docs" / "optimizations.md").read_text(encoding="utf-8")
    for each in OPTIMIZATIONS:
        assert f"`{each.switch}`" in text
