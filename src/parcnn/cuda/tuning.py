"""Which variant of a kernel runs a problem, where that was measured: a table that ships, and one of the user's own.

A table belongs to one kind of GPU, an architecture with a number of SMs. It maps a problem (op, attributes, operands) to
a kernel family and the name of one of its variants. A problem that neither table has is left to the family's own rule, so
the choice is a pure function of the problem, the GPU and the tables; `Tuning.digest` names those.

The user's table is no cache: sums of another variant may round differently, so it lies beside the user's settings, where
no clearing of caches takes it away, and its digest goes into checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from parcnn.cuda.launch import Device
from parcnn.errors import TuningError
from parcnn.files import write_whole
from parcnn.ops.base import Op, Spec

FORMAT = "parcnn-tuning-1"
SHIPPED = Path(__file__).parent / "tuned"
REMEDY = "remove the file, or that line of it; `parcnn tune MODEL` measures again"


@dataclass(frozen=True)
class Choice:
    """A kernel family (the name of its launcher's module) and the variant of it that str() names so."""

    family: str
    variant: str

    def __str__(self) -> str:
        return f"{self.family}: {self.variant}"

    @classmethod
    def parse(cls, text: str) -> Choice:
        """The way back from str()."""
        family, _, variant = text.partition(": ")
        return cls(family, variant)


@dataclass(frozen=True)
class Tuning:
    """The tables in force: choices by problem (`problem_key`), those of the user before those that ship."""

    shipped: Mapping[str, Choice] = field(default_factory=dict)
    user: Mapping[str, Choice] = field(default_factory=dict)
    path: Path | None = None  # of the user's table

    @classmethod
    def of(cls, device: Device, folder: Path | None = None) -> Tuning:
        """What ships for a GPU, and the user's table in `folder` where it has one. Raises TuningError for a damaged file."""
        path = folder / file_name(device) if folder else None
        return cls(read(SHIPPED / file_name(device), device), read(path, device) if path else {}, path)

    def find(self, op: Op, inputs: Sequence[Spec]) -> Choice | None:
        """What the tables say of a problem."""
        key = problem_key(op, inputs)
        return self.user.get(key) or self.shipped.get(key)

    def is_users(self, op: Op, inputs: Sequence[Spec]) -> bool:
        """Whether the user's own table has the problem."""
        return problem_key(op, inputs) in self.user

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name what the tables say, wherever it stands; '' where they are silent."""
        choices = {key: str(choice) for key, choice in {**self.shipped, **self.user}.items()}
        return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:12] if choices else ""


def user_folder() -> Path:
    """$XDG_CONFIG_HOME/parcnn/tuned, by default below ~/.config."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "parcnn" / "tuned"


def file_name(device: Device) -> str:
    """Name of a GPU's table: 'sm_90a-132.json'."""
    return f"{device.arch}-{device.sm_count}.json"


def problem_key(op: Op, inputs: Sequence[Spec]) -> str:
    """A problem as tables name it: the op, its attributes that are not the defaults, its operands.

    'conv_fprop pad=(1, 1, 1, 1) bf16[256,56,56,64] bf16[64,3,3,64]'. Attributes that an op gains later change no key.
    """
    attributes = (f"{f.name}={getattr(op, f.name)!r}" for f in fields(op) if getattr(op, f.name) != f.default)
    return " ".join([op.name, *attributes, *(f"{s.dtype}[{','.join(map(str, s.shape))}]" for s in inputs)])


def read(path: Path, device: Device) -> dict[str, Choice]:
    """The choices of a file; none where there is no file. Raises TuningError where it is damaged or another GPU's."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as fault:
        raise TuningError("the table cannot be read", where=str(path), got=fault, remedy=REMEDY) from fault
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as fault:  # numbers too long, lists too deep
        raise TuningError("the table is not JSON", where=str(path), got=fault, remedy=REMEDY) from fault
    known = isinstance(content, dict) and content.get("format") == FORMAT
    if not known or not _are_choices(content.get("choices")):
        raise TuningError(
            "not a table of measured kernels",
            where=str(path),
            expected=f'{{"format": "{FORMAT}", "gpu": ..., "choices": {{problem: "family: variant"}}}}',
            got=text[:100],
            remedy=REMEDY,
        )
    if content.get("gpu") != _gpu(device):
        raise TuningError(
            "the table is another GPU's", where=str(path), expected=_gpu(device), got=content.get("gpu"), remedy=REMEDY
        )
    return {key: Choice.parse(choice) for key, choice in content["choices"].items()}


def write(path: Path, device: Device, choices: Mapping[str, Choice]) -> None:
    """Make `choices` the file's content; readers see the old file or the whole new one. Raises TuningError."""
    content = {"format": FORMAT, "gpu": _gpu(device), "choices": {k: str(choices[k]) for k in sorted(choices)}}
    try:
        write_whole(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as fault:
        raise TuningError(
            f"the table cannot be written ({fault.strerror or fault})",
            where=str(path),
            remedy="make room or give permission there, or name another file with --table",
        ) from fault


def _gpu(device: Device) -> dict[str, Any]:
    return {"arch": device.arch, "sm_count": device.sm_count}


def _are_choices(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) and ": " in v for v in value.values())
