"""Tables say what the rows say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from parcnn.bench.rows import Row
from parcnn.errors import ArgumentError
from parcnn.report import tables
from tests.report.rows import on_cpu, on_gpu, timed

TEXT = "before\n<!-- rows:ablation -->\nold\n<!-- /rows -->\nbetween\n<!-- rows:memory -->\n<!-- /rows -->\nafter\n"


@pytest.mark.parametrize(
    ("us", "text"),
    [(None, "–"), (0.5, "0.50 µs"), (12.34, "12.3 µs"), (999.0, "999 µs"), (1500.0, "1.50 ms"), (2.5e6, "2.50 s")],
)
def test_durations(us: float | None, text: str) -> None:
    assert tables.duration(us) == text


def test_sizes_and_factors() -> None:
    assert tables.mebibytes(3 << 19) == "1.50 MiB"
    assert tables.mebibytes(3 << 29) == "1.50 GiB"
    assert [tables.times(f) for f in (None, 1.234, 12.34, 1234.5)] == ["–", "1.23×", "12.3×", "1,234×"]
    assert tables.ratio(3, 2) == "1.50×"
    assert tables.ratio(3, None) == "–"


def test_speedup_is_against_the_sequential_row_of_that_problem_and_machine() -> None:
    lines = {line[:2]: line for line in tables.TABLES["speedup"](on_gpu()).lines}
    gpu = lines["lenet5 mnist, batch 64, train", "NVIDIA H200"]
    assert gpu[2:5] == ("50.0 µs", "1,280,000", "160×")
    assert gpu[-1] == "75.0 µs (torch, graph)"
    assert lines["lenet5 mnist, batch 64, train", "all cores"][4] == "3.20×"
    assert lines["lenet5 mnist, batch 64, train", "sequential"][4:7] == ("1.00×", "12.5", "25%")
    elsewhere = replace(timed("all cores", 10.0, batch=65), extra={**timed("all cores", 10.0).extra, "cpu": "other"})
    assert tables.speedup_over_sequential(elsewhere, on_gpu()) is None


def test_newer_rows_take_the_place_of_older_ones() -> None:
    table = tables.TABLES["speedup"]([*on_cpu(), timed("all cores", 1000.0)])
    assert [line[4] for line in table.lines if line[:2] == ("lenet5 mnist, batch 64, train", "all cores")] == ["8.00×"]


def test_ablation_is_against_all_on_of_the_same_machine() -> None:
    lines = {line[1:3]: line[3:] for line in tables.TABLES["ablation"]([*on_cpu(), *on_gpu()]).lines}
    assert lines["Some CPU <i9>, 4 cores", "all off"] == ("6.00 ms", "2.40×", "9.00 MiB", "4.50×")
    assert lines["NVIDIA H200", "graph off"] == ("400 µs", "8.00×", "2.00 MiB", "1.00×")


def test_muon_against_each_peer() -> None:
    rows = [
        Row("muon", "cifarnet", "bf16", p50_us=100.0, extra={"peers_us": {"torch_eager": 600.0}}),
        Row("muon", "cifarnet", "fp32", p50_us=900.0),
    ]
    assert tables.TABLES["muon"](rows).lines == [
        ("cifarnet", "bf16", "100 µs", "600 µs (6.00×)", "–"),
        ("cifarnet", "fp32", "900 µs", "–", "–"),
    ]


def test_sums_for_a_batch_norm_both_ways() -> None:
    """A layer that was not measured both ways has no line."""
    both = [("own pass", "a", 100.0), ("dgrad", "a", 80.0), ("dgrad", "b", 5.0), ("own pass", "c", 7.0)]
    rows = [
        Row("norm sums", {"shape": shape}, way, p50_us=us, extra={"tensor_bytes": 3 << 20}) for way, shape, us in both
    ]
    assert tables.TABLES["norm-sums"](rows).lines == [("a", "3.0 MiB", "100 µs", "80.0 µs", "1.25×")]


def test_the_table_of_activations_tells_directions_apart() -> None:
    took = {("forward", "own pass"): 60.0, ("backward", "own pass"): 50.0, ("forward", "epilogue"): 30.0}
    rows = [
        Row(
            "activation",
            {"shape": "a", "act": "silu", "direction": direction},
            way,
            p50_us=us,
            extra={"tensor_bytes": 1 << 20},
        )
        for (direction, way), us in took.items()
    ]
    table = tables.TABLES["activation"](rows)
    assert table.lines == [("a", "silu", "forward", "1.0 MiB", "60.0 µs", "30.0 µs", "2.00×")]
    assert len(table.columns) == 7


def test_a_step_against_the_best_of_the_compilers_modes() -> None:
    for modes, shown in (
        ({"compile": 66.0, "compile max-autotune": 65.0}, "65.0 µs"),
        ({"compile, autocast": 67.0, "compile max-autotune, autocast": 68.0, "graph, autocast": 5.0}, "67.0 µs"),
    ):
        row = Row("step", "a", "cuda", p50_us=50.0, extra={"images_per_second": 1e6, "peer_modes_us": modes})
        table = tables.TABLES["step"]([row])
        assert table.lines[0][table.columns.index("torch.compile")] == shown


def test_the_other_tables() -> None:
    rows = [
        Row("step", "lenet5, batch 64", "cuda", p50_us=50.0, peer="torch 2, graph", peer_p50_us=60.0, gpu="H200",
            peak_bytes=1 << 20, extra={
                "images_per_second": 1.28e6,
                "peer_modes_us": {"eager, autocast": 900.0, "graph, autocast": 70.0, "graph, bf16 weights": 60.0},
                "peer_modes_bytes": {"eager, autocast": 3 << 20, "graph, autocast": 2 << 20},
            }),
        Row("fused", "conv1", "fused", p50_us=10.0, peak_bytes=1 << 20, gpu="H200", extra={"bytes_moved": 1e6}),
        Row("fused", "conv1", "unfused", p50_us=25.0, peak_bytes=4 << 20, gpu="H200", extra={"bytes_moved": 4e6}),
        Row("memory", "cifarnet, 8 GiB", "cuda", peak_bytes=2 << 30, gpu="H200", extra={"largest_batch": 40}),
        *(Row("accuracy", f"mnist-lenet5, seed {s}", "cuda", gpu="H200",
              extra={"recipe": "mnist-lenet5", "accuracy": a, "seconds": 2.0}) for s, a in ((0, 0.99), (1, 0.992))),
    ]  # fmt: skip
    lines = {name: make(rows).lines for name, make in tables.TABLES.items()}
    step = (
        "lenet5, batch 64",
        "H200",
        "50.0 µs",
        "1,280,000",
        "900 µs",
        "60.0 µs",
        "–",
        "1.20×",
        "1.00 MiB",
        "2.00 MiB",
    )
    assert lines["step"] == [step]
    assert lines["fused"] == [("conv1", "H200", "10.0 µs", "25.0 µs", "2.50×", "1.00 MiB / 4.00 MiB", "1.0 / 4.0 MB")]
    assert lines["memory"] == [("cifarnet, 8 GiB", "H200", "40", "2.00 GiB", "–", "–")]
    assert lines["accuracy"] == [("mnist-lenet5", "fp32", "H200", "2", "99.10%", "99.00%", "99.20%", "2.0 s")]
    assert lines["speedup"] == []


def test_markdown_between_markers() -> None:
    filled = tables.fill(TEXT, on_cpu(), "README.md")
    assert "old" not in filled
    assert filled.startswith("before\n<!-- rows:ablation -->\n| problem | on | switches |")
    assert "\n<!-- rows:memory -->\n*No measurement yet.*\n<!-- /rows -->\nafter\n" in filled
    assert tables.fill(filled, on_cpu(), "README.md") == filled
    lines = [line for line in filled.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {8}


@pytest.mark.parametrize("text", ["<!-- rows:nothing -->\n<!-- /rows -->", "<!-- rows:step -->\nno end"])
def test_markers_that_are_wrong(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"README\.md"):
        tables.fill(text, on_cpu(), "README.md")


def test_refresh_tells_and_mends_stale_files(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(TEXT)
    assert tables.refresh([path], on_cpu(), write=False) == [path]
    assert path.read_text() == TEXT
    assert tables.refresh([path], on_cpu(), write=True) == [path]
    assert tables.refresh([path], on_cpu(), write=False) == []
