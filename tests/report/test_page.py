"""The page holds its graphs, its tables and its words, and loads nothing from elsewhere."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from parcnn.bench.rows import Row
from parcnn.report import page, plots
from parcnn.report.optimizations import OPTIMIZATIONS
from parcnn.report.tables import TABLES
from tests.report.rows import on_cpu, on_gpu

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

VOID = {"meta", "source", "img", "br"}


class Reader(HTMLParser):
    """Collects tags, cells and text; fails on tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.lines: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.lines.append([])
        if tag in ("td", "th"):
            self.lines[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.lines[-1][-1] += data

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attrs[name] or "" for t, attrs in self.tags if t == tag and name in attrs]


@pytest.fixture(scope="module", params=[on_cpu, on_gpu], ids=["cpu", "gpu"])
def rows(request: pytest.FixtureRequest) -> list[Row]:
    return request.param()


@pytest.fixture(scope="module")
def reader(rows: list[Row]) -> Reader:
    return Reader(page.page(rows, plots.graphs(rows)))


def test_every_graph_is_embedded_in_both_themes(reader: Reader) -> None:
    images = reader.attributes("img", "src") + reader.attributes("source", "srcset")
    assert len(images) == 2 * 4  # speedup, throughput, agreement, ablation
    for image in images:
        kind, _, data = image.partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.width > 1000
    assert all(reader.attributes("img", "alt"))


def test_nothing_is_loaded_from_elsewhere(reader: Reader) -> None:
    assert not {"script", "link", "iframe", "a"} & {tag for tag, _ in reader.tags}
    addresses = [v or "" for _, attrs in reader.tags for k, v in attrs.items() if k in ("src", "srcset", "href")]
    assert all(address.startswith("data:") for address in addresses)
    assert "@import" not in reader.text
    assert "url(" not in reader.text
    assert "prefers-color-scheme: dark" in reader.text


def test_every_row_is_in_a_table(reader: Reader, rows: list[Row]) -> None:
    for name in ("speedup", "agreement", "ablation"):
        table = TABLES[name](rows)
        assert table.lines
        assert list(table.columns) in reader.lines
        for line in table.lines:
            assert list(line) in reader.lines


def test_every_optimization_is_described_with_its_effect(reader: Reader, rows: list[Row]) -> None:
    for each in OPTIMIZATIONS:
        assert each.title in reader.text
        assert f"Options({each.switch}=False)" in reader.text
    measured = {row.extra["switches"] for row in rows if row.bench == "ablation"} - {"all on", "all off"}
    assert reader.text.count(": without it") == len(measured)


def test_the_machine_and_the_peer(reader: Reader, rows: list[Row]) -> None:
    assert "Some CPU <i9>, 4 cores" in reader.text  # escaped in the source
    assert "c0ffee" in reader.text or rows[-1].commit is None
    with_gpu = any(row.gpu for row in rows)
    assert ("NVIDIA H200" in reader.text) == with_gpu
    assert ("PyTorch is not installed here" in reader.text) != with_gpu


def test_a_disagreement_stands_on_the_page() -> None:
    wrong = [
        replace(row, extra={**row.extra, "accuracy": 0.1})
        if (row.bench, row.variant) == ("agreement", "all cores")
        else row
        for row in on_cpu()
    ]
    assert "The implementations do not agree" in Reader(page.page(wrong, [])).text
    assert "The implementations do not agree" not in Reader(page.page(on_cpu(), [])).text


def test_the_page_and_its_graphs_as_files(tmp_path: Path) -> None:
    rows = on_cpu()
    path = page.write(tmp_path / "new" / "speedup.html", rows, plots.graphs(rows))
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    names = {p.name for p in path.parent.glob("*.png")}
    graphs = {"speedup", "throughput-lenet5", "agreement", "ablation-lenet5"}
    assert names == {f"{g}{dark}.png" for g in graphs for dark in ("", "-dark")}


def test_the_same_rows_give_the_same_graphs() -> None:
    first, second = (plots.graphs(on_gpu()) for _ in range(2))
    assert [g.png for g in first] == [g.png for g in second]
    assert all(g.png["light"] != g.png["dark"] for g in first)


def test_rows_without_anything_to_draw() -> None:
    assert plots.graphs([]) == []
