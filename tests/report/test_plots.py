"""What graphs say."""

from __future__ import annotations

from parcnn.report import plots


def test_ticks_say_what_they_are() -> None:
    assert [plots._thousands(value, 0) for value in (0.75, 1.25, 2, 1500)] == ["0.75", "1.25", "2", "1,500"]
