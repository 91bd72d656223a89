"""The command line through its interface."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from parcnn import data, models
from parcnn.cli import app
from parcnn.cuda.device import is_available
from parcnn.train import Trainer
from parcnn.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

RUNNER = CliRunner()
DIGITS = ("digits-lenet5", "--epochs", "2", "--device", "cpu")


def run(*arguments: str | Path) -> Result:
    result = RUNNER.invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def succeed(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def fail(*arguments: str | Path) -> str:
    """The error of a command that must fail as parcnn's own errors do."""
    result = run(*arguments)
    assert result.exit_code == 1
    assert "error:" in result.stderr
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short run on the digits."""
    folder = tmp_path_factory.mktemp("run")
    output = succeed("train", *DIGITS, "--out", folder)
    assert "epoch   2" in output
    return folder


def test_help_lists_the_commands() -> None:
    output = succeed("--help")
    for command in ("train", "eval", "predict", "bench", "plan", "info"):
        assert re.search(rf"^  {command}\b", output, re.MULTILINE)
    assert re.match(r"parcnn \d+\.\d+", succeed("--version"))


@pytest.mark.parametrize("arguments", [["nothing"], ["train"], ["train", "lenet5", "--epochs", "0"], ["plan", "--x"]])
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_errors_have_no_traceback_in_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "parcnn", "plan", "alexnet"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": "src"},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown model")
    assert "Traceback" not in done.stderr


def test_training_leaves_checkpoint_and_metrics(trained: Path) -> None:
    assert (trained / "checkpoint.safetensors").stat().st_size > 100_000
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert lines[1]["loss"] < lines[0]["loss"]


def test_eval(trained: Path) -> None:
    output = succeed("eval", trained / "checkpoint.safetensors", "--data", "digits", "--device", "cpu")
    expected = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])["val_accuracy"]
    assert f"accuracy {expected:.2%} on 360 images" in output


def test_predict_image_files_and_arrays(trained: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    test = data.load("digits", "test")
    for i in range(4):
        image.fromarray(test.images[i, 0]).save(tmp_path / f"{i}.png")
    np.save(tmp_path / "all.npy", test.images[:4])
    checkpoint = trained / "checkpoint.safetensors"
    from_files = succeed("predict", checkpoint, *(tmp_path / f"{i}.png" for i in range(4)), "--device", "cpu")
    from_array = succeed("predict", checkpoint, tmp_path / "all.npy", "--device", "cpu")

    def answers(output: str) -> list[tuple[str, str]]:
        return re.findall(r"(\d)\s+(\d+\.\d\d%)", output)

    assert len(answers(from_files)) == 4
    assert answers(from_files) == answers(from_array)
    top = succeed("predict", checkpoint, tmp_path / "0.png", "--top", "10", "--device", "cpu")
    assert sorted(label for label, _ in answers(top)) == list("0123456789")
    total = sum(float(share[:-1]) for _, share in answers(top))
    assert total == pytest.approx(100, abs=0.1)


def test_predict_resizes_to_the_size_of_training_or_as_asked(trained: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    picture = image.new("L", (40, 50))
    picture.paste(255, (18, 10, 22, 40))  # a one
    picture.save(tmp_path / "large.png")
    checkpoint = trained / "checkpoint.safetensors"
    asked = succeed("predict", checkpoint, tmp_path / "large.png", "--size", "28", "28", "--device", "cpu")
    assert "large.png" in asked
    assert succeed("predict", checkpoint, tmp_path / "large.png", "--device", "cpu") == asked
    assert "fc1" in fail("predict", checkpoint, tmp_path / "large.png", "--size", "50", "40", "--device", "cpu")
    assert "cannot have that size" in fail("predict", checkpoint, tmp_path / "large.png", "--size", "0", "28")


def test_predict_by_an_older_checkpoint_leaves_the_size_to_the_user(trained: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("L", (40, 50)).save(tmp_path / "large.png")
    whole = load_checkpoint(trained / "checkpoint.safetensors")
    assert whole.info.pop("input") == [1, 28, 28]
    save_checkpoint(tmp_path / "old.safetensors", Checkpoint(whole.weights, whole.optimizer, whole.info))
    command = ("predict", tmp_path / "old.safetensors", tmp_path / "large.png", "--device", "cpu")
    assert "fc1" in fail(*command)
    assert "large.png" in succeed(*command, "--size", "28", "28")


def test_predict_refuses_what_it_would_misread(trained: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    checkpoint = trained / "checkpoint.safetensors"
    image.fromarray(np.zeros((28, 28), np.uint16)).save(tmp_path / "deep.png")
    assert "8 bits" in fail("predict", checkpoint, tmp_path / "deep.png", "--device", "cpu")
    np.save(tmp_path / "nan.npy", np.full((28, 28), np.nan, np.float32))
    assert "not finite" in fail("predict", checkpoint, tmp_path / "nan.npy", "--device", "cpu")


def test_a_folder_of_images_of_many_sizes(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for label, grey in (("dark", 20), ("light", 230)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(10):
            image.new("L", (20 + i, 30), grey).save(tmp_path / "images" / label / f"{i}.png")
    arguments = ("lenet5", "--data", tmp_path / "images", "--epochs", "1", "--device", "cpu", "--out", tmp_path / "run")
    assert "--size" in fail("train", *arguments)
    succeed("train", *arguments, "--size", "28", "28")
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    assert "on 4 images" in succeed("eval", checkpoint, "--data", tmp_path / "images", "--device", "cpu")
    assert "other classes" in fail("eval", checkpoint, "--data", "digits", "--device", "cpu")


def test_resume_goes_on_and_a_run_is_not_overwritten(trained: Path) -> None:
    assert "holds a run already" in fail("train", *DIGITS, "--out", trained)
    more = ("digits-lenet5", "--epochs", "3", "--device", "cpu", "--out", trained, "--resume")
    output = succeed("train", *more)
    assert "epoch   3" in output
    assert "epoch   2" not in output
    assert "has had its 3 epochs" in succeed("train", *more)
    assert "no checkpoint to resume" in fail("train", *DIGITS, "--out", trained / "none", "--resume")


def test_options_change_the_recipe(tmp_path: Path) -> None:
    arguments = ("--optimizer", "adam", "--lr", "0.002", "--schedule", "cosine", "--batch", "50", "--seed", "4")
    output = succeed("train", *DIGITS, *arguments, "--threads", "1", "--out", tmp_path / "run")
    assert "batch 50, Adam(lr=0.002" in output
    assert "CosineLR" in output
    assert "seed 4" in output


def test_ctrl_c_keeps_the_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "parcnn", "train", "digits-lenet5", "--epochs", "100000", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": "src"}
    with subprocess.Popen(
        [*command, "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        deadline = time.monotonic() + 60
        metrics = tmp_path / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output
    assert "--resume" in output
    succeed("eval", tmp_path / "checkpoint.safetensors", "--data", "digits", "--device", "cpu")


def test_ctrl_c_before_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", interrupted)
    result = run("train", *DIGITS, "--out", tmp_path / "run")
    assert result.exit_code == 130
    assert "no checkpoint yet" in result.output
    assert "--resume" not in result.output


def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("train", *DIGITS, "--out", tmp_path / "file" / "run")
    assert result.exit_code == 1
    assert "--out" in result.stderr
    assert "LeNet" not in result.output
    assert "epoch" not in result.output


def test_bad_input_is_named(trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "checkpoint.safetensors"
    assert "no model or recipe 'alexnet'" in fail("train", "alexnet")
    assert "unknown data set" in fail("train", "lenet5", "--data", "nist", "--out", tmp_path / "a", "--device", "cpu")
    assert "--optimizer" in fail("train", *DIGITS, "--optimizer", "lion", "--out", tmp_path / "b")
    assert "unknown device" in fail("train", *DIGITS[:-1], "gpu", "--out", tmp_path / "c")
    assert not list(tmp_path.iterdir()), "runs that never began"
    assert "no such file" in fail("eval", tmp_path / "none.safetensors", "--data", "digits")
    assert "a folder" in fail("eval", trained, "--data", "digits")
    (tmp_path / "text.png").write_text("no image")
    assert "text.png" in fail("predict", checkpoint, tmp_path / "text.png", "--device", "cpu")
    assert "none.png: no such file" in fail("predict", checkpoint, tmp_path / "none.png", "--device", "cpu")
    assert "a folder, no image" in fail("predict", checkpoint, tmp_path, "--device", "cpu")
    np.save(tmp_path / "wide.npy", np.zeros((2, 3, 28, 28), np.uint8))
    assert "expected: (N, 1, H, W)" in fail("predict", checkpoint, tmp_path / "wide.npy", "--device", "cpu")
    (tmp_path / "bad.toml").write_text('[model]\nname = "lenet5"\n[data]\nname = "digits"\n[train]\nepoch = 1\n')
    assert "bad.toml: train.epoch" in fail("train", tmp_path / "bad.toml")
    assert "--input" in fail("plan", "lenet5", "--input", "28,28")
    assert "--input" in fail("plan", "lenet5", "--input", "1,28,²")
    assert "fc1" in fail("plan", "lenet5", "--input", "1,32,32")


@pytest.mark.skipif(is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told_with_the_remedy(tmp_path: Path) -> None:
    assert "--device cpu" in fail("train", "digits-lenet5", "--device", "cuda", "--out", tmp_path / "run")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plan_shows_every_layer_and_the_peak(device: str) -> None:
    if device == "cuda":
        pytest.importorskip("cuda.bindings.nvrtc")
    output = succeed("plan", "lenet5", "--batch", "32", "--device", device)
    for layer in ("conv1", "conv2", "fc1", "fc2", "fc3"):
        assert re.search(rf"{layer} +conv_fprop", output)
        assert re.search(rf"{layer} +conv_wgrad", output)
    assert "32×6×14×14" in output
    training = re.search(r"training: ([\d,]+) bytes .* = ([\d,]+) persistent \+ ([\d,]+) transient", output)
    assert training is not None
    peak, persistent, transient = (int(number.replace(",", "")) for number in training.groups())
    assert peak == persistent + transient
    assert persistent >= 2 * 4 * sum(p.numel() for p in models.create("lenet5").parameters())
    assert re.search(r"inference: [\d,]+ bytes", output)


def test_plan_switches() -> None:
    def calls(*arguments: str) -> int:
        found = re.search(r"^(\d+) calls", succeed("plan", "lenet5", "--device", "cpu", *arguments), re.MULTILINE)
        assert found is not None
        return int(found[1])

    assert calls("--no-fuse") > calls()
    assert calls("--mode", "predict") < calls()
    assert "3 streams" in succeed("plan", "lenet5", "--device", "cuda")
    assert "3 streams" not in succeed("plan", "lenet5", "--device", "cpu")
    assert "1 streams" in succeed("plan", "lenet5", "--device", "cpu", "--no-parallel")
    assert "no such precision" in fail("plan", "lenet5", "--device", "cpu", "--precision", "bf16")
    assert "no such precision" in fail("plan", "lenet5", "--device", "cuda", "--precision", "fp64")


def test_info_says_what_is_here_and_what_is_missing() -> None:
    output = succeed("info")
    assert "processor" in output
    assert "kernel cache" in output
    if not is_available():
        assert "there is no NVIDIA driver" in output
        assert "remedy:" in output


def test_tables_are_checked_and_renewed(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("<!-- rows:step -->\nold\n<!-- /rows -->\n")
    (tmp_path / "results").mkdir()
    results = ("--results", tmp_path / "results")
    stale = run("bench", "tables", path, *results, "--check")
    assert stale.exit_code == 1
    assert "stale" in stale.output
    assert "renewed" in succeed("bench", "tables", path, *results)
    assert succeed("bench", "tables", path, *results, "--check") == ""


def test_a_benchmark_adds_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "short.toml"
    recipe.write_text('[model]\nname = "lenet5"\n[data]\nname = "digits"\n[train]\nepochs = 1\n')
    arguments = ("bench", "accuracy", "--seeds", "1", "--recipe", recipe, "--device", "cpu", "--out", tmp_path)
    assert "1 rows added" in succeed(*arguments)
    succeed(*arguments)
    assert len((tmp_path / "accuracy.jsonl").read_text().splitlines()) == 2
