"""Recipes: those that ship, and what a faulty one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from parcnn import data, models, recipes
from parcnn.cpu import CpuExecutor
from parcnn.errors import ArgumentError, DataError
from parcnn.optim import SGD, AdamW, CosineLR, Muon, StepLR, TriangularLR

GOOD = '[model]\nname = "lenet5"\n[data]\nname = "digits"\n'


@pytest.mark.parametrize("name", recipes.shipped())
def test_shipped_recipes_name_models_and_data_that_exist(name: str) -> None:
    recipe = recipes.read(name)
    assert recipe.model in models.names()
    assert recipe.data in data.names()


def test_what_ships() -> None:
    assert recipes.shipped() == ("cifar10-cifarnet", "digits-lenet5", "mnist-lenet5")
    mnist = recipes.read("mnist-lenet5")
    assert (mnist.model, mnist.data, mnist.epochs, mnist.batch) == ("lenet5", "mnist", 10, 64)


def test_every_key_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        '[model]\nname = "cifarnet"\n[data]\nname = "cifar10"\nsize = [30, 31]\nflip = true\nshift_px = 3\n'
        '[train]\nepochs = 4\nbatch = 7\nseed = 9\nprecision = "fp64"\nlabel_smoothing = 0.2\n'
        '[optimizer]\nname = "adamw"\nlr = 1\nbetas = [0.8, 0.9]\n[schedule]\nname = "step"\nmilestones = [0.1]\n'
    )
    expected = recipes.Recipe(
        "cifarnet",
        "cifar10",
        4,
        7,
        9,
        "fp64",
        0.2,
        True,
        3,
        AdamW(1, betas=(0.8, 0.9)),
        StepLR(milestones=(0.1,)),
        size=(30, 31),
    )
    assert recipes.read(path) == expected


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ("[trian]\nepochs = 3\n", "trian"),
        ("epochs = 3\n", "data.epochs"),
        ("[train]\nepoch = 3\n", "train.epoch"),
        ("[optimizer]\nlearning_rate = 3\n", "optimizer.learning_rate"),
        ('[optimizer]\nname = "adam"\nmomentum = 0.9\n', "optimizer.momentum"),
        ('[optimizer]\nname = "lion"\n', "optimizer.name"),
        ('[optimizer]\nname = ["sgd"]\n', "optimizer.name"),
        ('[schedule]\nname = "sawtooth"\n', "schedule.name"),
        ("[schedule]\nwarm = 0.1\n", "schedule.warm"),
        ('[train]\nepochs = "ten"\n', "train.epochs"),
        ("[train]\nbatch = true\n", "train.batch"),
        ('[optimizer]\nlr = "fast"\n', "optimizer.lr"),
        ('[optimizer]\nname = "adam"\nbetas = ["a", 1]\n', "optimizer.betas"),
        ('[optimizer]\nwhere = "here"\n', "optimizer.where"),
        ('[schedule]\nname = "step"\nmilestones = ["a"]\n', "schedule.milestones"),
        ('[optimizer]\nname = "muon"\nexclude = [3]\n', "optimizer.exclude"),
        ('[optimizer]\nname = "muon"\nexclude = "head"\n', "optimizer.exclude"),
        ('[optimizer]\nname = "muon"\nothers = "sgd"\n', "optimizer.others"),
        ('[optimizer]\nname = "muon"\n[optimizer.others]\nname = "sgd"\nbetas = [0.1]\n', "optimizer.others.betas"),
    ],
)
def test_a_faulty_key_is_named_with_its_file(tmp_path: Path, extra: str, where: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(GOOD + extra)
    with pytest.raises(ArgumentError) as caught:
        recipes.read(path)
    assert str(path) in str(caught.value)
    assert where in str(caught.value)


def test_values_out_of_range(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    for extra in ("[train]\nepochs = 0\n", "[train]\nbatch = -1\n", "[optimizer]\nlr = -1.0\n", "[train]\nseed = -1\n"):
        path.write_text(GOOD + extra)
        with pytest.raises(ArgumentError):
            recipes.read(path)


@pytest.mark.parametrize("size", ["[28]", "[28, 0]", "[28, 28.5]", '["a", "b"]'])
def test_a_size_that_cannot_be(tmp_path: Path, size: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(GOOD + f"size = {size}\n")
    with pytest.raises(ArgumentError, match="that size"):
        recipes.read(path)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such recipe"):
        recipes.read(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("[model\n")
    with pytest.raises(DataError, match="not a TOML file"):
        recipes.read(tmp_path / "broken.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ArgumentError, match=r"model\.name"):
        recipes.read(tmp_path / "empty.toml")
    (tmp_path / "model.toml").write_text('[model]\nname = "alexnet"\n[data]\nname = "mnist"\n')
    with pytest.raises(ArgumentError, match="unknown model"):
        recipes.read(tmp_path / "model.toml")


def test_by_name() -> None:
    assert recipes.make_optimizer("sgd", {"lr": 0.5, "momentum": 0.9}) == SGD(0.5, momentum=0.9)
    assert recipes.make_schedule("cosine", {"warmup": 0.1}) == CosineLR(warmup=0.1)
    assert recipes.make_schedule("triangular") == TriangularLR()


def test_muon_with_another_optimizer_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "muon.toml"
    path.write_text(
        GOOD + '[optimizer]\nname = "muon"\nlr = 0.24\nexclude = ["fc3.*"]\nns_steps = 3\n'
        '[optimizer.others]\nname = "sgd"\nmomentum = 0.85\n'
    )
    expected = Muon(0.24, exclude=("fc3.*",), ns_steps=3, others=SGD(momentum=0.85))
    assert recipes.read(path).optimizer == expected
    assert recipes.make_optimizer("muon", {"others": {"lr": 1}}).others == AdamW(1)


def test_a_seed_gives_the_same_weights() -> None:
    train, executor = data.load("digits", "train"), CpuExecutor(1)
    first, second, other = (
        recipes.Recipe("lenet5", "digits", seed=seed).trainer(train, executor).model.state_dict()["conv1.weight"]
        for seed in (3, 3, 4)
    )
    assert (first == second).all()
    assert (first != other).any()
