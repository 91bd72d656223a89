"""Tables out of rows: for the page, and for Markdown files between markers `<!-- rows:NAME -->` and `<!-- /rows -->`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from parcnn.bench.layer import CONV, FUSED
from parcnn.bench.rows import Row, latest
from parcnn.errors import ArgumentError, DataError

NONE = "–"
BLOCK_PEERS = ("torch_eager", "torch_compile")
MARKERS = "<!-- rows:NAME --> … <!-- /rows -->"


@dataclass(frozen=True)
class Table:
    """Columns and lines of text; the first `labels` columns are words, the others figures."""

    columns: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]
    labels: int = 1


def select(rows: Iterable[Row], bench: str) -> list[Row]:
    """The newest rows of one benchmark."""
    return latest([row for row in rows if row.bench == bench])


def machine_name(row: Row) -> str:
    """The GPU where the row used one, else the processor with its cores."""
    return row.gpu or f"{row.extra.get('cpu', 'CPU')}, {row.extra.get('cores', '?')} cores"


def sequential_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The sequential implementation's row of the same problem on the same machine."""
    same = (r for r in rows if r.variant == "sequential" and r.problem == row.problem and r.bench == row.bench)
    return next((r for r in same if r.extra.get("cpu") == row.extra.get("cpu")), None)


def speedup_over_sequential(row: Row, rows: Sequence[Row]) -> float | None:
    """How many times as fast as the sequential implementation."""
    base = sequential_of(row, rows)
    return base.p50_us / row.p50_us if base and base.p50_us and row.p50_us else None


def _speedup(rows: Sequence[Row]) -> Table:
    own = select(rows, "speedup")
    lines = []
    for row in own:
        share = row.extra.get("share_of_peak")
        lines.append(
            (
                row.problem,
                row.variant if row.gpu is None else row.gpu,
                duration(row.p50_us),
                f"{row.extra['images_per_second']:,.0f}",
                times(speedup_over_sequential(row, own)),
                f"{row.extra['gflops']:,.1f}",
                f"{share:.0%}" if share else NONE,
                mebibytes(row.peak_bytes),
                f"{duration(row.peer_p50_us)} ({row.peer})" if row.peer else NONE,
            )
        )
    columns = ("problem", "by", "time", "images/s", "speedup", "GFLOP/s", "of peak", "memory", "PyTorch")
    return Table(columns, lines, labels=2)


def _agreement(rows: Sequence[Row]) -> Table:
    lines = [
        (
            row.problem,
            row.variant if row.gpu is None else row.gpu,
            f"{row.extra['accuracy']:.2%}",
            f"{row.extra['seconds']:.1f} s",
            f"{row.extra['loss_difference']:.1e}",
        )
        for row in select(rows, "agreement")
    ]
    columns = ("training", "by", "test accuracy", "training time", "losses differ by (first 100 steps)")
    return Table(columns, lines, labels=2)


def _ablation(rows: Sequence[Row]) -> Table:
    own = select(rows, "ablation")
    lines = []
    for row in own:
        base = base_of_ablation(row, own)
        lines.append(
            (
                row.problem,
                machine_name(row),
                row.extra["switches"],
                duration(row.p50_us),
                ratio(row.p50_us, base.p50_us if base else None),
                mebibytes(row.peak_bytes),
                ratio(row.peak_bytes, base.peak_bytes if base else None),
            )
        )
    return Table(("problem", "on", "switches", "step", "× time", "memory", "× memory"), lines, labels=3)


def base_of_ablation(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row with all switches on, of the same problem and machine."""
    same = (r for r in rows if r.extra["switches"] == "all on" and r.problem == row.problem)
    return next((r for r in same if machine_name(r) == machine_name(row)), None)


def _fused(rows: Sequence[Row]) -> Table:
    own = select(rows, "fused")
    lines = []
    for row in own:
        same = (r for r in own if r.problem == row.problem and machine_name(r) == machine_name(row))
        other = next((r for r in same if r.variant == "unfused"), None)
        if row.variant != "fused" or other is None:
            continue
        lines.append(
            (
                row.problem,
                machine_name(row),
                duration(row.p50_us),
                duration(other.p50_us),
                times(other.p50_us / row.p50_us if other.p50_us and row.p50_us else None),
                f"{mebibytes(row.peak_bytes)} / {mebibytes(other.peak_bytes)}",
                f"{row.extra['bytes_moved'] / 1e6:,.1f} / {other.extra['bytes_moved'] / 1e6:,.1f} MB",
            )
        )
    columns = ("layer", "on", "fused", "unfused", "speedup", "peak memory, fused / not", "bytes moved, fused / not")
    return Table(columns, lines, labels=2)


def _step(rows: Sequence[Row]) -> Table:
    lines = []
    for row in select(rows, "step"):
        modes, peer_bytes = (row.extra.get(name) or {} for name in ("peer_modes_us", "peer_modes_bytes"))
        faster = row.peer_p50_us / row.p50_us if row.peer_p50_us and row.p50_us else None
        lines.append(
            (
                row.problem,
                machine_name(row),
                duration(row.p50_us),
                f"{row.extra['images_per_second']:,.0f}",
                *(duration(_best(modes, mode)) for mode in ("eager", "graph", "compile")),
                times(faster),
                mebibytes(row.peak_bytes),
                mebibytes(min(peer_bytes.values(), default=None)),
            )
        )
    columns = (
        "training step", "on", "parcnn", "images/s", "PyTorch eager", "CUDA graph", "torch.compile", "against the best",
        "memory", "PyTorch's least",
    )  # fmt: skip
    return Table(columns, lines, labels=2)


def _best(modes: Mapping[str, float], mode: str) -> float | None:
    """The fastest of a mode's ways to compute: 'compile', or 'compile, autocast' and 'compile max-autotune, bf16 weights'."""
    return min((us for name, us in modes.items() if name.split(",")[0].split()[0] == mode), default=None)


def _memory(rows: Sequence[Row]) -> Table:
    lines = []
    for row in select(rows, "memory"):
        theirs = row.extra.get("peer_largest_batch")
        lines.append(
            (
                row.problem,
                machine_name(row),
                str(row.extra["largest_batch"]),
                mebibytes(row.peak_bytes),
                str(theirs) if theirs is not None else NONE,
                mebibytes(row.extra.get("peer_peak_bytes")),
            )
        )
    columns = ("training under a cap", "on", "largest batch", "memory", "PyTorch's largest batch", "its memory")
    return Table(columns, lines, labels=2)


def _accuracy(rows: Sequence[Row]) -> Table:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in select(rows, "accuracy"):
        groups.setdefault((row.extra["recipe"], row.extra.get("precision", "fp32"), machine_name(row)), []).append(row)
    lines = []
    for (recipe, precision, machine), own in groups.items():
        values = [row.extra["accuracy"] for row in own]
        seconds = sum(row.extra["seconds"] for row in own) / len(own)
        shares = (sum(values) / len(values), min(values), max(values))
        shown = (f"{share:.2%}" for share in shares)
        lines.append((recipe, precision, machine, str(len(own)), *shown, f"{seconds:.1f} s"))
    columns = ("recipe", "precision", "on", "seeds", "mean accuracy", "lowest", "highest", "training time")
    return Table(columns, lines, labels=3)


def conv_rows(rows: Sequence[Row], bench: str, directions: Sequence[str]) -> list[Row]:
    """The newest row of each problem, peer and GPU, whichever kernel ran; direction by direction."""
    newest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row.bench == bench and row.problem["direction"] in directions:
            newest[json.dumps(row.problem, sort_keys=True), row.peer or "", machine_name(row)] = row
    return sorted(newest.values(), key=lambda row: directions.index(row.problem["direction"]))


def _share(row: Row) -> str:
    """How much of the time the roofline asks for."""
    bound = row.extra["bound_us"]
    return f"{bound / row.p50_us:.0%}" if bound and row.p50_us else NONE


def _machines(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(map(machine_name, rows)))


def _ratios(rows: Sequence[Row]) -> tuple[str, str]:
    """Geometric mean and least of how much faster rows are than their peers."""
    found = [ratio for row in rows if (ratio := row.faster)]
    return (times(geometric_mean(found)), times(min(found))) if found else (NONE, NONE)


def _conv(bench: str) -> Callable[[Sequence[Row]], Table]:
    """Layers against cuDNN, each direction closed by its geometric mean."""

    def table(rows: Sequence[Row]) -> Table:
        lines = []
        for direction in CONV:
            own = conv_rows(rows, bench, (direction,))
            lines += [
                (
                    direction,
                    row.problem["shape"],
                    duration(row.p50_us),
                    duration(row.peer_p50_us),
                    times(row.faster),
                    times(row.faster_rested),
                    f"{row.extra['tflops']:,.0f}",
                    _share(row),
                )
                for row in own
            ]
            if own:
                mean, worst = _ratios(own)
                words = f"geometric mean of {sum(row.peer is not None for row in own)}, {_machines(own)}"
                rested = [ratio for row in own if (ratio := row.faster_rested)]
                after = times(geometric_mean(rested)) if rested else NONE
                lines.append((direction, words, "", f"worst {worst}", mean, after, "", ""))
        columns = (
            "direction", "N,H,W,C,K,R,stride,pad", "parcnn", "cuDNN", "faster", "after a pause", "TFLOP/s", "of the roofline",
        )  # fmt: skip
        return Table(columns, lines, labels=2)

    return table


def _conv_fused(rows: Sequence[Row]) -> Table:
    lines = []
    for direction in FUSED:
        own = conv_rows(rows, "conv", (direction,))
        by_shape: dict[str, dict[str, Row]] = {}
        for row in own:
            by_shape.setdefault(row.problem["shape"], {})[row.peer or ""] = row
        for shape, of in by_shape.items():
            ours = next(iter(of.values()))
            kept = [of["torch_compile"].extra["peer_kept_bytes"]] if "torch_compile" in of else []
            both = [mebibytes(nbytes) for nbytes in (ours.extra["kept_bytes"], *kept) if nbytes is not None]
            lines.append(
                (
                    direction,
                    shape,
                    duration(ours.p50_us),
                    *(
                        f"{duration(of[p].peer_p50_us)} ({times(of[p].faster)})" if p in of else NONE
                        for p in BLOCK_PEERS
                    ),
                    " / ".join(both) or NONE,
                )
            )
        if own:
            means = (_ratios([row for row in own if row.peer == peer])[0] for peer in BLOCK_PEERS)
            lines.append((direction, f"geometric mean of {len(by_shape)}, {_machines(own)}", "", *means, ""))
    columns = (
        "direction", "N,H,W,C,K,R,stride,pad", "parcnn", "PyTorch eager", "torch.compile", "kept for backward, ours / compiled",
    )  # fmt: skip
    return Table(columns, lines, labels=2)


def _conv_summary(rows: Sequence[Row]) -> Table:
    """Every set of layers in one line a direction."""
    lines = []
    for bench in sorted({row.bench for row in rows if row.bench.partition(" ")[0] == "conv"}):
        for direction in CONV:
            own = [row for row in conv_rows(rows, bench, (direction,)) if row.peer]
            if own:
                slowest = min(own, key=lambda row: row.faster or 0.0)
                mean, worst = _ratios(own)
                lines.append((bench, direction, str(len(own)), mean, worst, slowest.problem["shape"]))
    return Table(("layers", "direction", "problems", "geometric mean", "worst", "which"), lines, labels=2)


def _depthwise(rows: Sequence[Row]) -> Table:
    lines = [
        (
            row.problem["direction"],
            row.problem["shape"],
            duration(row.p50_us),
            f"{row.extra['copy_share']:.0%}",
            duration(row.peer_p50_us),
            times(row.faster),
        )
        for row in conv_rows(rows, "conv depthwise", CONV)
    ]
    columns = ("direction", "N,H,W,C,K,R,stride,pad", "parcnn", "of a copy's speed", "cuDNN", "faster")
    return Table(columns, lines, labels=2)


def _muon(rows: Sequence[Row]) -> Table:
    lines = []
    for row in select(rows, "muon"):
        peers = row.extra.get("peers_us") or {}
        named = [
            f"{duration(peers[peer])} ({ratio(peers[peer], row.p50_us)})" if peer in peers else NONE
            for peer in BLOCK_PEERS
        ]
        lines.append((row.problem, row.variant, duration(row.p50_us), *named))
    return Table(("filters of", "products in", "parcnn", "PyTorch", "torch.compile"), lines, labels=2)


def _both_ways(bench: str, labels: tuple[str, ...], *columns: str) -> Callable[[Sequence[Row]], Table]:
    """Problems done in two ways, the one without the fusion first; `labels` name what tells problems apart."""

    def table(rows: Sequence[Row]) -> Table:
        lines, apart = [], {}
        for row in select(rows, bench):
            problem = tuple(row.problem.values())
            if row.variant == "own pass":
                apart[problem] = row.p50_us
            elif problem in apart:
                took = duration(apart[problem]), duration(row.p50_us), ratio(apart[problem], row.p50_us)
                lines.append((*problem, f"{row.extra['tensor_bytes'] / 2**20:.1f} MiB", *took))
        return Table((*labels, *columns, "gain"), lines, labels=len(labels))

    return table


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "speedup": _speedup,
    "agreement": _agreement,
    "ablation": _ablation,
    "fused": _fused,
    "step": _step,
    "memory": _memory,
    "accuracy": _accuracy,
    "conv": _conv("conv"),
    "conv-fused": _conv_fused,
    "conv-fp32": _conv("conv fp32"),
    "conv-depthwise": _depthwise,
    "conv-summary": _conv_summary,
    "muon": _muon,
    "norm-sums": _both_ways("norm sums", ("N,H,W,C,K,R,stride,pad",), "error", "sums by a pass", "sums by dgrad"),
    "activation": _both_ways(
        "activation", ("N,H,W,C,K,R,stride,pad", "activation", "direction"), "tensor", "by passes", "by epilogues"
    ),
}


def duration(us: float | None) -> str:
    """Microseconds for people: three figures and a unit."""
    if us is None:
        return NONE
    for unit, scale in (("s", 1e6), ("ms", 1e3), ("µs", 1.0)):
        if us >= scale or unit == "µs":
            value = us / scale
            decimals = 2 if value < 10 else 1 if value < 100 else 0
            return f"{value:,.{decimals}f} {unit}"
    return NONE


def mebibytes(nbytes: float | None) -> str:
    """Bytes for people."""
    if nbytes is None:
        return NONE
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.2f} MiB"


def times(factor: float | None) -> str:
    """A factor: 3.4×."""
    if factor is None:
        return NONE
    return f"{factor:,.0f}×" if factor >= 100 else f"{factor:.1f}×" if factor >= 10 else f"{factor:.2f}×"


def ratio(value: float | None, base: float | None) -> str:
    """value/base as a factor."""
    return times(value / base if value is not None and base else None)


def markdown(table: Table) -> str:
    """The table in Markdown, its figures to the right."""
    if not table.lines:
        return "*No measurement yet.*"
    head = "| " + " | ".join(table.columns) + " |"
    rule = "|" + "|".join("---" if i < table.labels else "--:" for i in range(len(table.columns))) + "|"
    body = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table.lines)
    return "\n".join([head, rule, *body])


_MARKED = re.compile(r"<!-- rows:(?P<name>[\w-]+) -->\n(?P<content>.*?)<!-- /rows -->", re.DOTALL)


def fill(text: str, rows: Sequence[Row], where: str) -> str:
    """`text` with the tables between its markers made anew. Raises ArgumentError for a table that is not known."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ArgumentError("unknown table", where=where, expected=", ".join(TABLES), got=name)
        return f"<!-- rows:{name} -->\n{markdown(TABLES[name](rows))}\n<!-- /rows -->"

    if len(_MARKED.findall(text)) != text.count("<!-- rows:"):
        raise ArgumentError("a table's markers do not match", where=where, expected=MARKERS)
    return _MARKED.sub(table, text)


def refresh(files: Sequence[Path], rows: Sequence[Row], write: bool) -> list[Path]:
    """The files whose tables are not what the rows say; with `write` they are mended."""
    stale = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as fault:
            raise DataError("cannot be read", where=str(path), got=fault) from fault
        fresh = fill(text, rows, str(path))
        if fresh != text:
            stale.append(path)
            if write:
                path.write_text(fresh, encoding="utf-8")
    return stale
