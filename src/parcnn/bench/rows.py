"""A measurement as data: one row each, kept as JSON lines, so that no number of a table or a graph is ever typed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from parcnn.errors import DataError


@dataclass(frozen=True)
class Row:
    """One measurement.

    bench: which benchmark; problem: on what ('lenet5 mnist, batch 64, train'; of 'conv', an object with direction and
    shape); variant: how ('sequential', 'cuda', 'fuse off', a kernel's name).
    p20_us, p50_us, p80_us: time of one run; None where what was measured is no time. peer: what a user would take
    instead, with its time in the same run; None where there is none. peak_bytes: memory, the data set apart.
    gpu, driver, cuda: None where no GPU was used. commit: None outside of a git checkout. date: UTC, ISO 8601.
    extra: what else belongs to the measurement; times in it end in _us, sizes in _bytes.
    """

    bench: str
    problem: Any
    variant: str
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    peer: str | None = None
    peer_p50_us: float | None = None
    peak_bytes: int | None = None
    gpu: str | None = None
    driver: str | None = None
    cuda: str | None = None
    commit: str | None = None
    date: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes two rows measurements of the same thing: benchmark, problem, variant and machine."""
        problem = self.problem if isinstance(self.problem, str) else json.dumps(self.problem, sort_keys=True)
        return self.bench, problem, self.variant, self.gpu or str(self.extra.get("cpu", ""))

    @property
    def faster(self) -> float | None:
        """How many times as fast as the peer; None where either has no time."""
        return self.peer_p50_us / self.p50_us if self.peer_p50_us and self.p50_us else None

    @property
    def faster_rested(self) -> float | None:
        """The same, each timed after a pause."""
        ours, theirs = self.extra.get("rested_us"), self.extra.get("peer_rested_us")
        return theirs / ours if ours and theirs else None


_FIELDS = {f.name for f in fields(Row)}
_REQUIRED = {"bench", "problem", "variant"}


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows at the end of a file, which is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row), allow_nan=False) + "\n" for row in rows)


def read(path: Path) -> list[Row]:
    """The rows of a file, oldest first. Raises DataError that names the line which is no row."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise DataError("results cannot be read", where=str(path), got=fault) from fault
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
        except json.JSONDecodeError as fault:
            raise DataError("not JSON", where=f"{path}, line {number}", got=fault, remedy="remove the line") from fault
        if not isinstance(content, dict) or not _REQUIRED <= content.keys() <= _FIELDS:
            raise DataError(
                "not a row of results",
                where=f"{path}, line {number}",
                expected=f"an object with {', '.join(sorted(_REQUIRED))}, and no other keys than {', '.join(sorted(_FIELDS))}",
                got=line[:200],
                remedy="remove the line, or run the benchmark again",
            )
        rows.append(Row(**content))
    return rows


def read_folder(folder: Path) -> list[Row]:
    """The rows of all .jsonl files of a folder."""
    return [row for path in sorted(folder.glob("*.jsonl")) for row in read(path)]


def latest(rows: Sequence[Row]) -> list[Row]:
    """Of rows that measure the same thing, the last; in the order in which the things first came."""
    last: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        last[row.key] = row
    return list(last.values())
