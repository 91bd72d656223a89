"""`Recipe` and the TOML files that hold one.

    [model]      name
    [data]       name, size (of a folder of images: [height, width]), flip, shift_px
    [train]      epochs, batch, seed, precision, label_smoothing
    [optimizer]  name ('sgd', 'adam', 'adamw', 'muon') and the arguments of that optimizer (`parcnn.optim`); of Muon,
                 [optimizer.others] is one, too
    [schedule]   name ('constant', 'cosine', 'linear', 'step', 'triangular') and the arguments of that schedule

Only the model's and the data set's name must be given.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from parcnn import models, nn
from parcnn.data import Dataset
from parcnn.errors import ArgumentError, DataError
from parcnn.nn.init import manual_seed
from parcnn.ops.program import Executor
from parcnn.optim import SGD, Adam, AdamW, ConstantLR, CosineLR, LinearLR, Muon, Schedule, StepLR, TriangularLR
from parcnn.plan.options import Options
from parcnn.train import Augment, Trainer

FOLDER = Path(__file__).parent
OPTIMIZERS: dict[str, Callable[..., Any]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW, "muon": Muon}
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": ConstantLR,
    "cosine": CosineLR,
    "linear": LinearLR,
    "step": StepLR,
    "triangular": TriangularLR,
}
# Keys of the tables whose names are those of Recipe's fields.
_KEYS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "data": {"name": str, "size": list, "flip": bool, "shift_px": int},
    "train": {"epochs": int, "batch": int, "seed": int, "precision": str, "label_smoothing": (int, float)},
    "model": {"name": str},
}


@dataclass(frozen=True)
class Recipe:
    """A training run.

    model, data: names; size: (H, W) that the images of a folder are resized to; batch: images a step; flip, shift_px:
    `parcnn.train.Augment`. Raises ArgumentError for values out of range.
    """

    model: str
    data: str
    epochs: int = 10
    batch: int = 64
    seed: int = 0
    precision: str = "fp32"
    label_smoothing: float = 0.0
    flip: bool = False
    shift_px: int = 0
    optimizer: Any = field(default_factory=lambda: SGD(0.05, momentum=0.9, nesterov=True))
    schedule: Schedule = field(default_factory=TriangularLR)
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch) < 1:
            raise ArgumentError(
                "epochs and batch are at least 1", where="recipe", got=f"epochs={self.epochs}, batch={self.batch}"
            )
        if not 0 <= self.seed < 2**64:
            raise ArgumentError("a seed out of range", where="recipe", expected="0 to 2**64 - 1", got=self.seed)
        if self.size is not None and (len(self.size) != 2 or not all(type(n) is int and n >= 1 for n in self.size)):
            raise ArgumentError(
                "images cannot have that size", where="recipe", expected="height and width", got=self.size
            )
        if self.model not in models.names():
            raise ArgumentError(
                "unknown model", where="recipe", expected=f"one of {', '.join(models.names())}", got=self.model
            )

    def trainer(self, data: Dataset, executor: Executor, options: Options | None = None) -> Trainer:
        """A trainer of a fresh model whose initial weights follow from the seed."""
        manual_seed(self.seed)
        model = models.create(self.model, num_classes=len(data.classes), in_channels=data.shape[0])
        return Trainer(
            model,
            self.optimizer,
            nn.CrossEntropyLoss(label_smoothing=self.label_smoothing),
            self.schedule,
            batch_size=self.batch,
            device=executor,
            seed=self.seed,
            precision=self.precision,
            options=options,
            augment=Augment(self.flip, self.shift_px),
        )


def shipped() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def read(source: str | Path) -> Recipe:
    """A recipe by the name of a shipped one or by the path of a TOML file.

    Raises DataError where the file cannot be read or is not TOML, ArgumentError that names file and key for a key or
    value that is not known.
    """
    path = FOLDER / f"{source}.toml" if str(source) in shipped() else Path(source)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as fault:
        raise DataError(
            "there is no such recipe",
            where=str(path),
            expected=f"a TOML file, or one of {', '.join(shipped())}",
            remedy="check the path",
        ) from fault
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as fault:
        raise DataError("not a TOML file", where=str(path), got=fault, remedy="mend the line it names") from fault
    known = (*_KEYS, "optimizer", "schedule")
    for name, table in content.items():
        if name not in known or not isinstance(table, dict):
            raise _unknown(path, name, known)
    values: dict[str, Any] = {}
    for name, keys in _KEYS.items():
        for key, value in content.get(name, {}).items():
            _check(path, f"{name}.{key}", key, value, keys)
            values[name if key == "name" else key] = tuple(value) if isinstance(value, list) else value
    for name in ("model", "data"):
        if name not in values:
            raise ArgumentError("a key is missing", where=f"{path}: {name}.name", remedy=f'add [{name}] name = "..."')
    for name, make, usual in (("optimizer", make_optimizer, "sgd"), ("schedule", make_schedule, "constant")):
        if name in content:
            arguments = dict(content[name])
            values[name] = make(arguments.pop("name", usual), arguments, f"{path}: {name}")
    return Recipe(**values)


def make_optimizer(name: str, arguments: Mapping[str, Any] | None = None, where: str = "optimizer") -> Any:
    """An optimizer by name. Raises ArgumentError for unknown names and arguments, and for values out of range."""
    return _make(OPTIMIZERS, name, where, arguments or {})


def make_schedule(name: str, arguments: Mapping[str, Any] | None = None, where: str = "schedule") -> Schedule:
    """A schedule by name. Raises ArgumentError for unknown names and arguments, and for values out of range."""
    return _make(SCHEDULES, name, where, arguments or {})


def _make(kinds: Mapping[str, Callable[..., Any]], name: str, where: str, arguments: Mapping[str, Any]) -> Any:
    if not isinstance(name, str) or name not in kinds:
        raise ArgumentError("unknown name", where=f"{where}.name", expected=", ".join(kinds), got=name)
    kind: Any = kinds[name]
    defaults, hints = {f.name: f.default for f in fields(kind)}, get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in arguments.items():
        full = f"{where}.{key}"
        if key not in defaults:
            raise ArgumentError("unknown key", where=full, expected=", ".join(defaults), got=key)
        if is_dataclass(defaults[key]):  # an optimizer in the optimizer
            _check_type(full, value, dict)
            rest = dict(value)
            values[key] = _make(kinds, rest.pop("name", type(defaults[key]).__name__.lower()), full, rest)
            continue
        expected = type(defaults[key])
        _check_type(full, value, {float: (int, float), tuple: (list, tuple)}.get(expected, expected))
        for item in value if isinstance(value, list | tuple) else ():
            _check_type(full, item, str if get_args(hints[key])[0] is str else (int, float))
        values[key] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _check(path: Path, full: str, key: str, value: Any, keys: Mapping[str, Any]) -> None:
    if key not in keys:
        raise _unknown(path, full, tuple(keys))
    _check_type(f"{path}: {full}", value, keys[key])


def _check_type(where: str, value: Any, allowed: Any) -> None:
    kinds = allowed if isinstance(allowed, tuple) else (allowed,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ArgumentError(
            "a value of another type", where=where, expected=" or ".join(k.__name__ for k in kinds), got=repr(value)
        )


def _unknown(path: Path, key: str, known: tuple[str, ...]) -> ArgumentError:
    return ArgumentError(
        "unknown key", where=f"{path}: {key}", expected=f"one of {', '.join(known)}", got=key, remedy="remove it"
    )
