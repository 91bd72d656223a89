"""One HTML page that holds everything: figures, graphs, tables, machine, optimizations. It loads nothing from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from parcnn.bench.rows import Row
from parcnn.bench.speedup import disagreement
from parcnn.report.optimizations import OPTIMIZATIONS, Optimization
from parcnn.report.plots import Graph
from parcnn.report.tables import (
    NONE,
    TABLES,
    Table,
    base_of_ablation,
    duration,
    machine_name,
    mebibytes,
    select,
    speedup_over_sequential,
    times,
)

STYLE = Path(__file__).with_name("page.css")


def page(rows: Sequence[Row], graphs: Sequence[Graph]) -> str:
    """The page of one run of the speedup benchmark."""
    by_name = {graph.name: graph for graph in graphs}
    title = "How much faster is it in parallel?"
    sections = [
        _head(rows, title),
        _accuracy(rows, by_name),
        _speed(rows, by_name),
        _optimizations(rows, by_name),
        _machine(rows),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>parcnn: {escape(title)}</title>",
            f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>",
            "</head>",
            "<body>",
            "<main>",
            *sections,
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def write(path: Path, rows: Sequence[Row], graphs: Sequence[Graph]) -> Path:
    """Write the page and, beside it, its graphs as PNG files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for graph in graphs:
        graph.write(path.parent)
    path.write_text(page(rows, graphs), encoding="utf-8")
    return path


def _head(rows: Sequence[Row], title: str) -> str:
    timed = [row for row in select(rows, "speedup") if row.extra["mode"] == "train"]
    tiles = []
    for network in dict.fromkeys(row.extra["network"] for row in timed):
        own = [row for row in timed if row.extra["network"] == network and row.variant != "sequential"]
        factors = [(speedup_over_sequential(row, timed) or 0.0, row) for row in own]
        if factors:
            factor, row = max(factors, key=lambda each: each[0])
            what = f"{network}: training step on {_by(row)}, batch {row.extra['batch']}, against the sequential one"
            tiles.append((times(factor), what))
    runs = select(rows, "agreement")
    if runs:
        lowest = min(runs, key=lambda row: row.extra["accuracy"])
        what = f"test accuracy of LeNet-5 on {lowest.extra['data']}, the lowest of all"
        tiles.append((f"{lowest.extra['accuracy']:.2%}", what))
    sequential = [row for row in timed if row.variant == "sequential"]
    if sequential:
        row = max(sequential, key=lambda each: each.extra["gflops"])
        share = row.extra["share_of_peak"]
        what = f"of the sequential implementation on {row.extra['network']}, {share:.0%} of what one core can do"
        tiles.append((f"{row.extra['gflops']:.0f} GFLOP/s", what))
    shown = "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in tiles)
    return (
        f"<h1>{escape(title)}</h1>\n"
        '<p class="lead">Two convolutional networks are trained by the same program in several ways: sequentially, on one '
        "core; on all cores; and, where there is one, on the GPU. They learn the same. This page shows how long "
        "each takes, and which optimization brings how much. Every number and graph comes from the rows of this run.</p>\n"
        f'<div class="tiles">{shown}</div>'
    )


def _accuracy(rows: Sequence[Row], graphs: dict[str, Graph]) -> str:
    fault = disagreement(rows)
    warning = f'<p class="warning">The implementations do not agree: {escape(fault)}.</p>' if fault else ""
    return (
        "<h2>They learn the same</h2>\n"
        "<p>LeNet-5 is trained from one seed by each implementation: the same initial weights, the same order of images. "
        "On the CPU the results are the same bits for every number of threads; a GPU adds in another order, "
        "so its losses differ by rounding, which grows slowly over the steps.</p>\n"
        f"{warning}{_figure(graphs.get('agreement'))}{_table(TABLES['agreement'](rows))}"
    )


def _speed(rows: Sequence[Row], graphs: dict[str, Graph]) -> str:
    with_peer = any(row.peer for row in rows)
    peer = (
        "Dashed lines are PyTorch in the same run, on as many threads, or on the GPU in the best of its modes."
        if with_peer
        else "PyTorch is not installed here, so it is not compared."
    )
    figures = "".join(_figure(g) for name, g in graphs.items() if name == "speedup" or name.startswith("throughput"))
    return (
        "<h2>Time</h2>\n"
        "<p>The sequential implementation is no straw man: it computes convolutions as matrix products by the best library "
        "for one core, in blocks that stay in its cache. Its share of the core's peak (a large matrix product by the same "
        "library) stands in the table. A training step is everything: the batch, forward, loss, backward and update. "
        f"{peer}</p>\n"
        f"{figures}{_table(TABLES['speedup'](rows))}"
    )


def _optimizations(rows: Sequence[Row], graphs: dict[str, Graph]) -> str:
    ablation = select(rows, "ablation")
    boxes = "".join(_optimization(each, ablation) for each in OPTIMIZATIONS)
    figures = "".join(_figure(graph) for name, graph in graphs.items() if name.startswith("ablation"))
    return (
        "<h2>What each optimization brings</h2>\n"
        "<p>Each can be switched off in the plan of a step, so its effect is measured in the program itself: the time and "
        "the memory of a training step without it, against the step with all of them.</p>\n"
        f"{boxes}{figures}{_table(TABLES['ablation'](rows))}"
    )


def _optimization(optimization: Optimization, ablation: Sequence[Row]) -> str:
    effects = []
    for row in ablation:
        base = base_of_ablation(row, ablation)
        if row.extra["switches"] != f"{optimization.switch} off" or base is None or not (row.p50_us and base.p50_us):
            continue
        effect = (
            f"{row.extra['network']}, batch {row.extra['batch']}, on {_by(row)}: without it {duration(row.p50_us)} in place of "
            f"{duration(base.p50_us)}, and {mebibytes(row.peak_bytes)} in place of {mebibytes(base.peak_bytes)}."
        )
        if row.gpu is None and not optimization.on_cpu:
            effect += " (The CPU runs calls one by one: only the memory differs; what is seen of time is noise.)"
        effects.append(f'<p class="effect">{escape(effect)}</p>')
    return (
        f'<div class="optimization"><h3>{escape(optimization.title)}</h3>'
        f"<p>{escape(optimization.text)}</p>{''.join(effects)}"
        f"<p><code>Options({escape(optimization.switch)}=False)</code> switches it off.</p></div>\n"
    )


def _machine(rows: Sequence[Row]) -> str:
    last = rows[-1]
    gpu = next((row for row in rows if row.gpu), None)
    facts = {
        "processor": f"{last.extra['cpu']}, {last.extra['cores']} cores",
        "GPU": f"{gpu.gpu}, driver {gpu.driver or NONE}, CUDA {gpu.cuda or NONE}" if gpu else "none",
        "Python, NumPy": f"{last.extra['python']}, {last.extra['numpy']}",
        "commit": last.commit or "not in a git checkout",
        "date": last.date,
    }
    terms = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return (
        f"<h2>The machine</h2>\n<dl>{terms}</dl>\n"
        "<p>Times are medians; the rows in the .jsonl file beside this page also hold the 20th and 80th percentiles. "
        "Memory is that of weights, optimizer state and the arena of the step, known exactly before the step runs; the "
        "data set is apart. FLOPs count a multiply-add as two, over the outputs that are computed.</p>"
    )


def _by(row: Row) -> str:
    return machine_name(row) if row.gpu else row.variant.rpartition(", ")[2]


def _figure(graph: Graph | None) -> str:
    if graph is None:
        return ""
    light, dark = (f"data:image/png;base64,{base64.b64encode(graph.png[t]).decode()}" for t in ("light", "dark"))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(graph.alt)}"></picture>'
        f"<figcaption>{escape(graph.title)}</figcaption></figure>\n"
    )


def _table(table: Table) -> str:
    def cells(tag: str, line: Sequence[str]) -> str:
        styles = (' class="word"' if i < table.labels else "" for i in range(len(line)))
        return "".join(f"<{tag}{s}>{escape(c)}</{tag}>" for s, c in zip(styles, line, strict=True))

    body = "\n".join(f"<tr>{cells('td', line)}</tr>" for line in table.lines)
    return (
        f'<div class="scroll"><table><thead><tr>{cells("th", table.columns)}</tr></thead>\n<tbody>\n{body}\n</tbody>'
        "</table></div>\n"
    )
