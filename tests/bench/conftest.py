"""What the benchmarks' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from parcnn.errors import DataUnavailableError


@pytest.fixture
def no_data_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without data sets and without a network."""

    def fail(*arguments: object) -> None:
        raise DataUnavailableError("no network", where="test", got="cut off")

    monkeypatch.setattr("parcnn.data.download.download", fail)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PARCNN_DATA", raising=False)
