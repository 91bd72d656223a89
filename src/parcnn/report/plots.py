"""Graphs out of rows, as PNG, each for a light and for a dark page."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parcnn.bench.layer import CONV
from parcnn.bench.rows import Row
from parcnn.errors import UnsupportedError
from parcnn.report.tables import base_of_ablation, conv_rows, select, speedup_over_sequential

ORDER = ("sequential", "all cores", "gpu")
MODES = {"forward": "forward pass", "train": "training step"}
DOTS_PER_INCH = 160


@dataclass(frozen=True)
class Theme:
    """Colours: of the page, of words, of lines that guide, and of the implementations."""

    name: str
    surface: str
    ink: str
    soft: str
    grid: str
    variants: dict[str, str]


LIGHT = Theme(
    "light", "#fcfcfb", "#1c1b19", "#6a6862", "#e4e2dc",
    {"sequential": "#898781", "all cores": "#2a78d6", "gpu": "#d2571e"},
)  # fmt: skip
DARK = Theme(
    "dark", "#1a1a19", "#f1f0ec", "#a19f97", "#35342f",
    {"sequential": "#9b9993", "all cores": "#4f9bf0", "gpu": "#f08a4b"},
)  # fmt: skip


@dataclass(frozen=True)
class Graph:
    """A graph in both themes. alt: what it shows, for those who cannot see it."""

    name: str
    title: str
    alt: str
    png: dict[str, bytes]

    def write(self, folder: Path) -> list[Path]:
        """FOLDER/NAME.png and FOLDER/NAME-dark.png."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for theme, data in self.png.items():
            paths.append(folder / f"{self.name}{'-dark' * (theme == 'dark')}.png")
            paths[-1].write_bytes(data)
        return paths


def graphs(rows: Sequence[Row]) -> list[Graph]:
    """The graphs that the rows allow. Raises UnsupportedError where matplotlib is not installed."""
    made = []
    timed = select(rows, "speedup")
    if timed:
        title = "Speedup over the sequential implementation"
        made.append(_graph("speedup", title, _speedup_alt(timed), _speedup, timed))
    for network in dict.fromkeys(row.extra["network"] for row in timed):
        own = [row for row in timed if row.extra["network"] == network]
        title = f"{network}: images per second"
        alt = f"Images per second of {network} over batch sizes by each implementation, forward and training step."
        made.append(_graph(f"throughput-{network}", title, alt, _throughput, own))
    agreement = select(rows, "agreement")
    if agreement:
        accuracies = ", ".join(f"{row.variant} {row.extra['accuracy']:.2%}" for row in agreement)
        alt = f"Training loss over the steps, one line for each implementation, from one seed. Test accuracy: {accuracies}."
        made.append(_graph("agreement", "Training loss, from one seed", alt, _agreement, agreement))
    ablation = select(rows, "ablation")
    for problem in dict.fromkeys(row.problem for row in ablation):
        own = [row for row in ablation if row.problem == problem]
        name = f"ablation-{own[0].extra['network']}"
        alt = "Time and memory of a training step with each optimization switched off, in parts of that with all on."
        made.append(_graph(name, f"{problem}: each optimization switched off", alt, _ablation, own))
    return made


def roofline(rows: Sequence[Row]) -> Graph | None:
    """Layers by their arithmetic intensity, ours and cuDNN's, below what the GPU could do; None without such rows."""
    own = [row for row in conv_rows(rows, "conv", CONV) if row.peer and row.extra["bound_us"]]
    if not own:
        return None
    title = f"Convolution layers in bf16 on {_label(own[0])}"
    alt = "TFLOP/s of each layer over its FLOPs a byte, ours and cuDNN's, one panel a direction, below the GPU's roofline."
    return _graph("convolution-roofline", title, alt, _roofline, own)


def _graph(name: str, title: str, alt: str, draw: Callable[[Sequence[Row], Theme], Any], rows: Sequence[Row]) -> Graph:
    return Graph(name, title, alt, {theme.name: _png(draw(rows, theme), theme) for theme in (LIGHT, DARK)})


def require_matplotlib() -> None:
    """Raises UnsupportedError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as fault:
        raise UnsupportedError(
            "graphs need matplotlib, which is not installed", remedy="pip install matplotlib"
        ) from fault


def _figure(theme: Theme, panels: int, height: float) -> tuple[Any, list[Any]]:
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), facecolor=theme.surface, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        ax.set_facecolor(theme.surface)
        ax.tick_params(colors=theme.soft, labelsize=9, length=0)
        ax.grid(True, color=theme.grid, linewidth=0.8)
        ax.set_axisbelow(True)
        for side in ax.spines.values():
            side.set_visible(False)
    return figure, axes


def _png(figure: Any, theme: Theme) -> bytes:
    buffer = io.BytesIO()
    # No date and no version inside: the same rows give the same file.
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, facecolor=theme.surface, metadata={"Software": None})
    return buffer.getvalue()


def _title(ax: Any, theme: Theme, text: str) -> None:
    ax.set_title(text, color=theme.ink, fontsize=11, loc="left", pad=10)


def _label(row: Row) -> str:
    """An implementation for people."""
    if row.gpu:
        return row.gpu.removeprefix("NVIDIA ")
    threads = row.extra.get("threads") or row.extra.get("cores")
    return "sequential" if row.variant == "sequential" else f"{threads} cores"


def _variants(rows: Sequence[Row]) -> list[str]:
    present = {row.variant for row in rows}
    return [v for v in ORDER if v in present]


def _speedup(rows: Sequence[Row], theme: Theme) -> Any:
    """Bars: training step, one panel a network, by batch."""
    networks = list(dict.fromkeys(row.extra["network"] for row in rows))
    figure, axes = _figure(theme, len(networks), 3.6)
    for ax, network in zip(axes, networks, strict=True):
        own = [r for r in rows if r.extra["network"] == network and r.extra["mode"] == "train"]
        batches = sorted({row.extra["batch"] for row in own})
        variants = _variants(own)
        width = 0.84 / len(variants)
        factors = []
        for i, variant in enumerate(variants):
            bars = [(row, speedup_over_sequential(row, own)) for row in own if row.variant == variant]
            for row, factor in bars:
                if factor is None:
                    continue
                factors.append(factor)
                at = batches.index(row.extra["batch"]) + (i - (len(variants) - 1) / 2) * width
                ax.bar(at, factor, width * 0.92, color=theme.variants[variant], label=_label(row))
                text = f"{factor:,.0f}×" if factor >= 10 else f"{factor:.1f}×"
                place = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center"}
                ax.annotate(text, (at, factor), color=theme.ink, fontsize=9, **place)
        _scale(ax, factors)
        ax.set_xticks(range(len(batches)), [str(b) for b in batches])
        ax.set_xlabel("batch", color=theme.soft, fontsize=9)
        ax.grid(False, axis="x")
        _title(ax, theme, f"{network} on {own[0].extra['data']}: training step, sequential = 1")
    _legend(figure, axes, theme)
    return figure


def _speedup_alt(rows: Sequence[Row]) -> str:
    parts = []
    for row in rows:
        factor = speedup_over_sequential(row, rows)
        if row.variant != "sequential" and row.extra["mode"] == "train" and factor is not None:
            parts.append(f"{row.extra['network']} batch {row.extra['batch']} on {_label(row)} {factor:.1f} times")
    return "Speedup of a training step over the sequential implementation: " + "; ".join(parts) + "."


def _throughput(rows: Sequence[Row], theme: Theme) -> Any:
    """Lines over batch sizes, one panel a mode; the best of PyTorch's dashed."""
    figure, axes = _figure(theme, len(MODES), 3.6)
    for ax, (mode, words) in zip(axes, MODES.items(), strict=True):
        own = sorted((r for r in rows if r.extra["mode"] == mode), key=lambda r: r.extra["batch"])
        for variant in _variants(own):
            line = [r for r in own if r.variant == variant]
            batches = [r.extra["batch"] for r in line]
            colour = theme.variants[variant]
            rates = [r.extra["images_per_second"] for r in line]
            ax.plot(batches, rates, color=colour, linewidth=2, marker="o", markersize=5, label=_label(line[0]))
            theirs = [(r.extra["batch"], r.extra["batch"] / r.peer_p50_us * 1e6) for r in line if r.peer_p50_us]
            if theirs:
                label = f"PyTorch, {_label(line[0])}"
                ax.plot(*zip(*theirs, strict=True), color=colour, linewidth=1.4, linestyle=(0, (3, 3)), label=label)
        ax.set_xscale("log", base=2)
        ticks = sorted({row.extra["batch"] for row in own})
        ax.set_xticks(ticks, [str(t) for t in ticks])
        _scale(ax, [y for line in ax.get_lines() for y in line.get_ydata()])
        ax.set_xlabel("batch", color=theme.soft, fontsize=9)
        _title(ax, theme, f"{words}, images per second")
    _legend(figure, axes, theme)
    return figure


def _agreement(rows: Sequence[Row], theme: Theme) -> Any:
    """Loss curves on top of each other."""
    figure, (ax,) = _figure(theme, 1, 3.4)
    for row in rows:
        curve = row.extra["loss_curve"]
        steps = [(i + 0.5) * row.extra["steps"] / len(curve) for i in range(len(curve))]
        style = {"linewidth": 5, "alpha": 0.45} if row.variant == "sequential" else {"linewidth": 1.8}
        label = f"{_label(row)}: test accuracy {row.extra['accuracy']:.2%}"
        ax.plot(steps, curve, color=theme.variants[row.variant], label=label, **style)
    ax.set_yscale("log")
    _plain_ticks(ax.yaxis, ax.get_ylim())
    ax.set_xlabel("training step", color=theme.soft, fontsize=9)
    _title(ax, theme, f"{rows[0].problem}: loss")
    _legend(figure, [ax], theme)
    return figure


def _ablation(rows: Sequence[Row], theme: Theme) -> Any:
    """Horizontal bars: time and memory against all switches on."""
    figure, axes = _figure(theme, 2, 3.4)
    shown = [row for row in rows if row.extra["switches"] != "all on"][::-1]
    colour = theme.variants[rows[0].extra["executor"]]
    for ax, quantity, words in ((axes[0], "p50_us", "time of a step"), (axes[1], "peak_bytes", "peak memory")):
        ax.axvline(1, color=theme.soft, linewidth=1)
        for i, row in enumerate(shown):
            base = base_of_ablation(row, rows)
            if base is None:
                continue
            factor = getattr(row, quantity) / getattr(base, quantity)
            ax.barh(i, factor, 0.62, color=colour, zorder=2)
            place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
            ax.annotate(f"{factor:.2f}×", (max(factor, 1), i), color=theme.ink, fontsize=9, **place)
        ax.set_yticks(range(len(shown)), [row.extra["switches"] for row in shown])
        ax.grid(False, axis="y")
        ax.margins(x=0.18)
        ax.set_xlim(left=0)
        _title(ax, theme, f"{words} (all on = 1)")
    axes[1].set_yticklabels([])
    return figure


def _roofline(rows: Sequence[Row], theme: Theme) -> Any:
    """Points, one panel a direction; a line joins a layer's two."""
    figure, axes = _figure(theme, len(CONV), 3.6)
    intensity = {id(row): row.extra["flops"] / row.extra["bytes_moved"] for row in rows}
    bytes_per_second = rows[0].extra["copy_bytes_per_second"]
    peak = max((row.extra["flops"] / row.extra["bound_us"] * 1e6 for row in rows), default=0.0)
    low, high = min(intensity.values()) / 1.6, max(intensity.values()) * 1.6
    slowest = min(row.extra["flops"] / max(row.p50_us or 0, row.peer_p50_us or 0) * 1e6 for row in rows)
    for ax, direction in zip(axes, CONV, strict=True):
        own = [row for row in rows if row.problem["direction"] == direction]
        bound = [(x, min(peak, x * bytes_per_second) / 1e12) for x in sorted((low, peak / bytes_per_second, high))]
        ax.plot(*zip(*bound, strict=True), color=theme.soft, linewidth=1.4, label="roofline")
        for row in own:
            if row.p50_us is None or row.peer_p50_us is None:
                continue
            x = intensity[id(row)]
            speeds = [row.extra["flops"] / us / 1e6 for us in (row.peer_p50_us, row.p50_us)]
            ax.plot([x, x], speeds, color=theme.grid, linewidth=1.4, zorder=1)
            place = {"linestyle": "none", "markersize": 5, "zorder": 2}
            ax.plot([x], speeds[:1], color=theme.variants["all cores"], marker="o", label="cuDNN", **place)
            ax.plot([x], speeds[1:], color=theme.variants["gpu"], marker="D", label="parcnn", **place)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("FLOPs a byte", color=theme.soft, fontsize=9)
        ax.set_ylim(slowest / 1e12 / 1.6, peak / 1e12 * 1.6)
        _plain_ticks(ax.yaxis, ax.get_ylim())
        _plain_ticks(ax.xaxis, ax.get_xlim())
        ax.tick_params(axis="x", labelsize=8)
        _title(ax, theme, f"{direction}, TFLOP/s")
    _legend(figure, axes, theme)
    return figure


def _legend(figure: Any, axes: Sequence[Any], theme: Theme) -> None:
    """One for all panels, below them."""
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    legend = figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_color(theme.ink)


def _scale(ax: Any, values: Sequence[float]) -> None:
    """The y axis from 0, or logarithmic where the values are far apart."""
    low, high = min(values), max(values)
    if high < 20 * low:
        ax.set_ylim(0, high * 1.18)
        ax.yaxis.set_major_formatter(_thousands)
    else:
        ax.set_yscale("log")
        ax.set_ylim(low / 2, high * 2)
        _plain_ticks(ax.yaxis, ax.get_ylim())


def _plain_ticks(axis: Any, limits: tuple[float, float]) -> None:
    """On a logarithmic axis: 1, 2 and 5 of each decade where it spans few, and no powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = limits
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high / low < 200 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_thousands)


def _thousands(value: float, position: int) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.3g}"
