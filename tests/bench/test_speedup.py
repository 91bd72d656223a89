"""The speedup benchmark at its smallest: what it measures is complete and consistent. No test asserts a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parcnn.bench import speedup
from parcnn.bench.rows import Row
from parcnn.cuda.device import is_available

TINY = speedup.Size(
    {"lenet5": (5, 16, 5000), "cifarnet": (3,)}, {"lenet5": 16}, seconds=0.01, repeats=1, epochs={"digits": 1}
)
VARIANTS = {"sequential", "all cores"} | ({"gpu"} if is_available() else set())


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def rows(said: list[str]) -> list[Row]:
    with pytest.MonkeyPatch.context() as patch:
        from parcnn import data

        real = data.load

        def digits_only(name: str, *arguments: object, **options: object) -> data.Dataset:
            if name == "digits":
                return real(name, *arguments)  # type: ignore[arg-type]
            raise speedup.DataUnavailableError("no network")

        patch.setattr(data, "load", digits_only)
        return [row for part in speedup.run(TINY, None, said.append) for row in part]


def test_every_combination_is_timed(rows: list[Row]) -> None:
    timed = [row for row in rows if row.bench == "speedup"]
    found = {(r.extra["network"], r.extra["batch"], r.extra["mode"], r.variant) for r in timed}
    problems = [("lenet5", 5), ("lenet5", 16), ("cifarnet", 3)]  # 5,000 images are more than the digits have
    assert found == {(n, b, mode, v) for n, b in problems for mode in ("forward", "train") for v in VARIANTS}
    for row in timed:
        assert row.p20_us is not None
        assert row.p80_us is not None
        assert row.p50_us is not None
        assert 0 < row.p20_us <= row.p50_us <= row.p80_us
        assert row.peak_bytes is not None
        assert row.peak_bytes > 0
        assert row.extra["gflops"] == pytest.approx(row.extra["flops"] / row.p50_us / 1e3)
        assert row.extra["images_per_second"] == pytest.approx(row.extra["batch"] / row.p50_us * 1e6)
    sequential = [row for row in timed if row.variant == "sequential"]
    assert all(row.extra["threads"] == 1 and row.extra["share_of_peak"] > 0 for row in sequential)


def test_the_implementations_learn_the_same(rows: list[Row]) -> None:
    runs = {row.variant: row for row in rows if row.bench == "agreement"}
    assert set(runs) == VARIANTS
    assert runs["all cores"].extra["accuracy"] == runs["sequential"].extra["accuracy"]
    assert runs["all cores"].extra["loss_difference"] == 0
    assert speedup.disagreement(rows) is None


@pytest.mark.parametrize("accuracy", [0.1, float("nan")])
def test_a_disagreement_is_told(rows: list[Row], accuracy: float) -> None:
    wrong = [
        replace(row, extra={**row.extra, "accuracy": accuracy})
        if row.bench == "agreement" and row.variant == "all cores"
        else row
        for row in rows
    ]
    assert "all cores reaches" in (speedup.disagreement(wrong) or "")


def test_every_switch_is_tried(rows: list[Row]) -> None:
    runs = {row.extra["switches"]: row for row in rows if row.bench == "ablation"}
    assert set(runs) == {"all on", "all off", *(f"{s} off" for s in ("fuse", "reuse", "inplace", "parallel", "graph"))}
    assert runs["fuse off"].extra["calls"] > runs["all on"].extra["calls"]
    assert (runs["reuse off"].peak_bytes or 0) > (runs["all on"].peak_bytes or 0)


def test_it_says_that_digits_take_the_place_of_mnist(rows: list[Row], said: list[str]) -> None:
    assert any("MNIST cannot be had" in line for line in said)
    assert {row.extra["data"] for row in rows} == {"digits", "noise"}
