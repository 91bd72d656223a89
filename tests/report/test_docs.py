"""The tables in the committed documents are what the committed rows say."""

from __future__ import annotations

from pathlib import Path

import pytest

from parcnn.bench.rows import read_folder
from parcnn.cuda.kernels import REGISTRY, conv_sm90
from parcnn.report.optimizations import OPTIMIZATIONS
from parcnn.report.tables import refresh

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_fresh(path: Path) -> None:
    rows = read_folder(ROOT / "benchmarks" / "results")
    assert refresh([path], rows, write=False) == [], "run `parcnn bench tables README.md docs/*.md`"


def test_how_many_kernels_there_are() -> None:
    text = (ROOT / "docs" / "convolution.md").read_text(encoding="utf-8").replace("\n", " ")
    everywhere, hopper = (len(REGISTRY.on(arch).variants()) for arch in ("sm_80", "sm_90a"))
    assert f"list {everywhere} for every architecture and {hopper - everywhere} more for Hopper" in text
    own = [kernel for kernel in conv_sm90.variants() if kernel.source == "conv_sm90.cu"]
    assert f"({len(own)} of them replaced" in text


def test_every_switch_has_its_section() -> None:
    text = (ROOT / "docs" / "optimizations.md").read_text(encoding="utf-8")
    for each in OPTIMIZATIONS:
        assert f"`{each.switch}`" in text
