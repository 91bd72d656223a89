"""Tables of convolution layers: each direction with its mean, each peer in its column."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from parcnn.bench.rows import Row, append
from parcnn.cli.app import app
from parcnn.report import plots, tables

MIB = 1 << 20


def row(
    direction: str, shape: str, us: float, peer: str | None, peer_us: float | None, *, bench: str = "conv", **extra: Any
) -> Row:
    extra = {
        "tflops": 512.3,
        "bound_us": us / 2,
        "copy_share": 0.875,
        "kept_bytes": None,
        "peer_kept_bytes": None,
        **extra,
    }
    problem = {"direction": direction, "shape": shape}
    return Row(bench, problem, f"kernel {us}", us, us, us, peer=peer, peer_p50_us=peer_us, gpu="H200", extra=extra)


ROWS = [
    row("wgrad", "a", 10.0, "cudnn", 40.0),
    row("fprop", "a", 99.0, "cudnn", 10.0),  # an older row, of a kernel that is gone
    row("fprop", "a", 10.0, "cudnn", 20.0),
    row("fprop", "b", 10.0, "cudnn", 80.0, rested_us=8.0, peer_rested_us=24.0),
    row("fprop", "c", 10.0, None, None, bound_us=None),
    row("fused_pool_fwd", "a", 20.0, "torch_eager", 100.0),
    row("fused_pool_fwd", "a", 20.0, "torch_compile", 50.0),
    row("fused_pool_train", "a", 50.0, "torch_eager", 200.0, kept_bytes=MIB, peer_kept_bytes=40 * MIB),
    row("fused_pool_train", "a", 50.0, "torch_compile", 100.0, kept_bytes=MIB, peer_kept_bytes=20 * MIB),
    row("fprop", "r", 10.0, "cudnn", 9.0, bench="conv random"),
    row("fprop", "s", 10.0, "cudnn", 16.0, bench="conv random"),
    row("dgrad", "d", 10.0, "cudnn", 25.0, bench="conv depthwise"),
]


def test_layers_by_direction_with_their_means() -> None:
    assert tables.TABLES["conv"](ROWS).lines == [
        ("fprop", "a", "10.0 µs", "20.0 µs", "2.00×", "–", "512", "50%"),
        ("fprop", "b", "10.0 µs", "80.0 µs", "8.00×", "3.00×", "512", "50%"),
        ("fprop", "c", "10.0 µs", "–", "–", "–", "512", "–"),
        ("fprop", "geometric mean of 2, H200", "", "worst 2.00×", "4.00×", "3.00×", "", ""),
        ("wgrad", "a", "10.0 µs", "40.0 µs", "4.00×", "–", "512", "50%"),
        ("wgrad", "geometric mean of 1, H200", "", "worst 4.00×", "4.00×", "–", "", ""),
    ]


def test_the_fused_block_has_a_column_for_each_peer() -> None:
    assert tables.TABLES["conv-fused"](ROWS).lines == [
        ("fused_pool_fwd", "a", "20.0 µs", "100 µs (5.00×)", "50.0 µs (2.50×)", "–"),
        ("fused_pool_fwd", "geometric mean of 1, H200", "", "5.00×", "2.50×", ""),
        ("fused_pool_train", "a", "50.0 µs", "200 µs (4.00×)", "100 µs (2.00×)", "1.00 MiB / 20.00 MiB"),
        ("fused_pool_train", "geometric mean of 1, H200", "", "4.00×", "2.00×", ""),
    ]


def test_the_fused_block_without_a_peer() -> None:
    alone = row("fused_pool_train", "a", 50.0, None, None, kept_bytes=MIB)
    lines = tables.TABLES["conv-fused"]([alone]).lines
    assert lines[0] == ("fused_pool_train", "a", "50.0 µs", "–", "–", "1.00 MiB")


def test_the_summary_names_the_worst_problem() -> None:
    lines = {line[:2]: line[2:] for line in tables.TABLES["conv-summary"](ROWS).lines}
    assert lines["conv", "fprop"] == ("2", "4.00×", "2.00×", "a")
    assert lines["conv random", "fprop"] == ("2", "1.20×", "0.90×", "r")
    assert ("conv", "fused_pool_fwd") not in lines


def test_depthwise_layers_against_a_copy() -> None:
    assert tables.TABLES["conv-depthwise"](ROWS).lines == [("dgrad", "d", "10.0 µs", "88%", "25.0 µs", "2.50×")]


def test_the_roofline_shows_layers_that_have_a_peer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    own = [
        row(d, "a", us, "cudnn", 2 * us, flops=10**11, bytes_moved=10**9, copy_bytes_per_second=4e12)
        for d, us in (("fprop", 300.0), ("dgrad", 400.0), ("wgrad", 500.0))
    ]
    graph = plots.roofline(own)
    assert graph is not None
    assert [path.name for path in graph.write(tmp_path)] == [
        "convolution-roofline.png",
        "convolution-roofline-dark.png",
    ]
    assert graph.png == plots.roofline(own).png, "the same rows give the same file"
    faster = plots.roofline([replace(own[0], p50_us=100.0), *own[1:]])
    assert faster is not None
    assert faster.png["light"] != graph.png["light"]
    alone = replace(own[0], peer=None, peer_p50_us=None)
    assert plots.roofline([alone]) is None
    append(tmp_path / "rows.jsonl", own)
    assert CliRunner().invoke(app, ["bench", "graphs", "--results", str(tmp_path)]).exit_code == 0
    (tmp_path / "rows.jsonl").write_text("")
    assert CliRunner().invoke(app, ["bench", "graphs", "--results", str(tmp_path)]).exit_code == 1
