"""The rooms: imports go down only, and `import parcnn` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "parcnn"
MODULES = sorted(SOURCE.rglob("*.py"))

# What each room may import: the executors know neither the plan nor the layers, and the layers no executor.
BASE = {"errors", "files"}
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "data": BASE,
    "ops": BASE | {"data"},
    "cpu": BASE | {"data", "ops"},
    "cuda": BASE | {"data", "ops"},
    "plan": BASE | {"data", "ops"},
    "nn": BASE | {"data", "ops", "plan"},
    "optim": BASE | {"data", "ops", "plan"},
    "models": BASE | {"data", "ops", "plan", "nn", "optim"},
    "train": BASE | {"data", "ops", "cpu", "cuda", "plan", "nn", "optim", "models"},
}
ROOMS["recipes"] = ROOMS["train"] | {"train"}
ROOMS["bench"] = ROOMS["recipes"] | {"recipes"}
ROOMS["report"] = ROOMS["bench"] | {"bench"}
ROOMS["cli"] = ROOMS["report"] | {"report"}
HEAVY = ("numpy", "pycuda", "cuda", "matplotlib", "typer", "rich", "safetensors", "threadpoolctl", "PIL", "torch")


def _room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file it does."""
    package = ["parcnn", *path.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = (
                ".".join([*package[: len(package) - node.level + 1], node.module or ""]) if node.level else node.module
            )
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def _rooms_imported(path: Path) -> set[str]:
    rooms = set()
    for name in _imports(path):
        head, _, rest = name.partition(".")
        if head == "parcnn":
            rooms.add(rest.partition(".")[0])
    return rooms


def test_every_room_is_known() -> None:
    homeless = {_room(p) for p in MODULES} - ROOMS.keys() - {"__init__", "__main__"}
    assert not homeless, f"rooms without a rule: {homeless}"


@pytest.mark.parametrize("path", [p for p in MODULES if _room(p) in ROOMS], ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down_only(path: Path) -> None:
    allowed = ROOMS[_room(path)] | {_room(path), "__version__"}
    if _room(path) == "cli":
        allowed.add("")  # `import parcnn`, for its version
    assert _rooms_imported(path) <= allowed


def test_the_parser_sees_what_it_must() -> None:
    """The rules above hold nothing if the parser misses imports."""
    seen = _rooms_imported(SOURCE / "plan" / "build.py")
    assert {"errors", "ops", "plan"} <= seen
    assert {"nn", "plan"} <= _rooms_imported(SOURCE / "models" / "lenet5.py")
    assert "cuda" in _rooms_imported(SOURCE / "train" / "device.py"), "imports inside functions count too"


def test_only_the_cuda_room_knows_cuda() -> None:
    """PyCUDA and NVIDIA's bindings are imported in one room."""
    outside = [
        p for p in MODULES if _room(p) != "cuda" for name in _imports(p) if name.split(".")[0] in ("pycuda", "cuda")
    ]
    assert not outside


def _run(code: str) -> str:
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); {code}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_importing_parcnn_imports_nothing_heavy() -> None:
    loaded = _run("import parcnn; print(sorted({name.partition('.')[0] for name in sys.modules}))")
    assert not [name for name in HEAVY if f"'{name}'" in loaded]


def test_importing_parcnn_is_fast() -> None:
    """Best of five fresh interpreters: the import alone, without the interpreter's own start."""
    code = "import time; start = time.perf_counter(); import parcnn; print(time.perf_counter() - start)"
    assert min(float(_run(code)) for _ in range(5)) < 0.2


def test_describing_a_model_loads_no_executor() -> None:
    loaded = _run("from parcnn import nn, models, optim; models.LeNet5(); print(sorted(sys.modules))")
    assert "'parcnn.nn'" in loaded
    for name in ("parcnn.cpu", "parcnn.cuda", "pycuda", "matplotlib", "typer", "rich", "threadpoolctl"):
        assert f"'{name}'" not in loaded


def test_the_package_lists_what_it_has() -> None:
    names = _run("import parcnn; print([n for n in dir(parcnn) if not n.startswith('_')])")
    for name in ("Trainer", "Options", "cat", "nn", "optim", "models"):
        assert f"'{name}'" in names
    assert _run("import parcnn; print(hasattr(parcnn, 'nonsense'), parcnn.nn.Linear.__name__)") == "False Linear"
