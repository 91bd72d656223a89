"""Training on real digits: it learns, it repeats, it resumes, it stops with a clear error."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parcnn
from parcnn import models, nn, optim
from parcnn.cpu import CpuExecutor
from parcnn.data import Dataset, from_arrays
from parcnn.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    LabelError,
    NonFiniteLossError,
    OutOfMemoryError,
    ShapeError,
)
from parcnn.nn import functional
from parcnn.plan.trace import Tensor
from parcnn.train import Augment, Callback, EpochResult, JsonLines, Trainer, predict
from parcnn.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from parcnn.train.session import KEPT_PLANS

Make = Callable[..., Trainer]


def weights(trainer: Trainer) -> dict[str, np.ndarray]:
    return dict(trainer.model.state_dict())


def assert_same(a: Trainer, b: Trainer) -> None:
    for name, value in weights(a).items():
        np.testing.assert_array_equal(value, weights(b)[name], err_msg=name)


def test_lenet5_learns_digits(make_trainer: Make, held_out: Dataset) -> None:
    trainer = make_trainer()
    history = trainer.fit(parcnn.data.load("digits"), 8, held_out)
    last = history.epochs[-1]
    assert last.val_accuracy is not None
    assert last.val_accuracy > 0.95
    assert last.loss < 0.1 * history.epochs[0].loss
    assert len(history.losses) == 8 * 23
    assert history.losses.mean() == pytest.approx(np.mean([e.loss for e in history.epochs]), rel=0.05)
    scores = trainer.evaluate(held_out)
    logits = trainer.predict(held_out.images)
    assert scores.accuracy == pytest.approx((logits.argmax(1) == held_out.labels).mean())
    shifted = logits - logits.max(1, keepdims=True)
    expected = -(shifted[np.arange(360), held_out.labels] - np.log(np.exp(shifted).sum(1))).mean()
    assert scores.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "optimizer", [optim.Adam(2e-3), optim.AdamW(2e-3), optim.SGD(0.02, momentum=0.9, nesterov=True)]
)
def test_every_optimizer_learns(make_trainer: Make, digits: Dataset, optimizer: Any) -> None:
    history = make_trainer(optimizer, batch_size=16).fit(digits, 6)
    assert history.epochs[-1].accuracy is not None
    assert history.epochs[-1].accuracy > 0.8


def test_two_runs_give_the_same_bits(make_trainer: Make, digits: Dataset) -> None:
    first, second = make_trainer(), make_trainer(device=CpuExecutor(threads=2))
    a, b = first.fit(digits, 2), second.fit(digits, 2)
    np.testing.assert_array_equal(a.losses, b.losses)
    assert_same(first, second)


def test_another_seed_gives_another_order(make_trainer: Make, digits: Dataset) -> None:
    a, b = make_trainer().fit(digits, 1), make_trainer(seed=1).fit(digits, 1)
    assert not np.array_equal(a.losses, b.losses)


def test_fp64_and_fp32_agree(make_trainer: Make, digits: Dataset) -> None:
    a, b = make_trainer().fit(digits, 2), make_trainer(precision="fp64").fit(digits, 2)
    np.testing.assert_allclose(a.losses, b.losses, rtol=1e-3)
    assert not np.array_equal(a.losses, b.losses)


class StopEarly(Callback):
    """Ends a run after its first epoch."""

    def on_epoch(self, result: Any) -> None:
        raise KeyboardInterrupt


def test_resumed_training_gives_the_same_bits(make_trainer: Make, digits: Dataset, tmp_path: Path) -> None:
    whole = make_trainer(optim.Adam(1e-3))
    whole.fit(digits, 3)

    half = make_trainer(optim.Adam(1e-3))
    with pytest.raises(KeyboardInterrupt):
        half.fit(digits, 3, callbacks=[StopEarly()], checkpoint=tmp_path / "a.safetensors")
    assert half.epoch == 1
    resumed = make_trainer(optim.Adam(1e-3))
    resumed.load(tmp_path / "a.safetensors")
    resumed.fit(digits, 3)
    assert_same(whole, resumed)


def test_a_checkpoint_of_fp64_holds_fp64(make_trainer: Make, digits: Dataset, tmp_path: Path) -> None:
    whole = make_trainer(precision="fp64")
    whole.fit(digits, 2)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(precision="fp64").fit(digits, 2, callbacks=[StopEarly()], checkpoint=tmp_path / "a.safetensors")
    saved = load_checkpoint(tmp_path / "a.safetensors")
    assert {tensor.dtype for tensor in (*saved.weights.values(), *saved.optimizer.values())} == {np.dtype(np.float64)}
    resumed = make_trainer(precision="fp64")
    resumed.load(tmp_path / "a.safetensors")
    resumed.fit(digits, 2)
    assert_same(whole, resumed)


def test_ctrl_c_leaves_a_checkpoint_in_the_middle_of_an_epoch(
    make_trainer: Make, digits: Dataset, tmp_path: Path
) -> None:
    class Interrupt(Callback):
        def on_progress(self, epoch: int, step: int, *rest: Any) -> None:
            if epoch == 1 and step >= 2:
                os.kill(os.getpid(), signal.SIGINT)

    path = tmp_path / "c.safetensors"
    stopped = make_trainer()
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(digits, 3, callbacks=[Interrupt()], checkpoint=path)
    resumed = make_trainer()
    resumed.load(path)
    assert (resumed.epoch, resumed.step) == (1, stopped.step)
    assert stopped.step >= 2
    resumed.fit(digits, 3)
    whole = make_trainer()
    whole.fit(digits, 3)
    assert_same(whole, resumed)


class InterruptAt(Callback):
    """Ctrl-C, `times` of them, when a step of the first epoch is done."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.step, self.times = step, times

    def on_progress(self, epoch: int, step: int, *rest: Any) -> None:
        if epoch == 0 and step >= self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_at_the_last_step_of_an_epoch_ends_the_epoch(
    make_trainer: Make, digits: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "c.safetensors"
    stopped = make_trainer()
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(digits, 2, callbacks=[InterruptAt(7)], checkpoint=path)
    resumed = make_trainer()
    resumed.load(path)
    assert (resumed.epoch, resumed.step) == (1, 0)
    history = resumed.fit(digits, 2)
    assert [result.epoch for result in history.epochs] == [1]
    assert history.epochs[0].loss > 0


def test_ctrl_c_after_the_last_step_is_not_lost(make_trainer: Make, digits: Dataset) -> None:
    class Interrupt(Callback):
        def on_epoch(self, result: EpochResult) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    trainer = make_trainer()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(digits, 1, callbacks=[Interrupt()])
    assert trainer.epoch == 1


def test_a_second_ctrl_c_leaves_the_last_epoch_s_checkpoint_and_weights(
    make_trainer: Make, digits: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "c.safetensors"
    trainer = make_trainer()
    start = weights(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(digits, 1, callbacks=[InterruptAt(1, times=2)], checkpoint=path)
    assert not path.exists()
    assert (trainer.epoch, trainer.step, trainer.trained) == (0, 0, 0)
    for name, value in weights(trainer).items():
        np.testing.assert_array_equal(value, start[name], err_msg=name)
    np.testing.assert_array_equal(trainer.fit(digits, 1).losses, make_trainer().fit(digits, 1).losses)


def test_an_epoch_is_resumed_on_the_data_that_it_was_begun_on(
    make_trainer: Make, digits: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "c.safetensors"
    stopped = make_trainer()
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(digits, 2, callbacks=[InterruptAt(1)], checkpoint=path)
    resumed = make_trainer()
    resumed.load(path)
    with pytest.raises(DataError, match="another number of samples"):
        resumed.fit(digits.subset(100), 2)


def test_a_checkpoint_written_within_an_epoch_holds_the_weights_of_its_step(
    make_trainer: Make, digits: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "c.safetensors"
    whole = make_trainer(optim.Adam(1e-3))

    class Save(Callback):
        def on_progress(self, epoch: int, step: int, *rest: Any) -> None:
            if epoch == 1 and not path.exists():
                whole.save(path)

    whole.fit(digits, 2, callbacks=[Save()])
    resumed = make_trainer(optim.Adam(1e-3))
    resumed.load(path)
    assert resumed.step > 0
    resumed.fit(digits, 2)
    assert_same(whole, resumed)


def test_an_untrained_checkpoint_brings_a_fresh_optimizer(make_trainer: Make, digits: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    trainer = make_trainer(optim.Adam(1e-3))
    trainer.save(path)
    first = trainer.fit(digits, 1)
    trainer.load(path)
    np.testing.assert_array_equal(trainer.fit(digits, 1).losses, first.losses)


@pytest.mark.parametrize("lost", ["epoch", "step", "trained", "classes", "mean", "std"])
def test_a_checkpoint_without_a_position_is_refused(
    make_trainer: Make, digits: Dataset, tmp_path: Path, lost: str
) -> None:
    path = tmp_path / "c.safetensors"
    make_trainer().save(path)
    whole = load_checkpoint(path)
    save_checkpoint(path, Checkpoint(whole.weights, {}, {k: v for k, v in whole.info.items() if k != lost}))
    with pytest.raises(CheckpointError, match="where training stood"):
        make_trainer().load(path)


def test_an_optimizer_s_state_that_does_not_fit_is_refused(make_trainer: Make, digits: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    make_trainer().fit(digits, 1, checkpoint=path)
    whole = load_checkpoint(path)
    for state in ({}, {**whole.optimizer, "conv2.weight.0": np.zeros((2, 2), np.float32)}):
        save_checkpoint(path, Checkpoint(whole.weights, state, whole.info))
        trainer = make_trainer()
        trainer.load(path)
        with pytest.raises(CheckpointError, match=r"conv[12]\.\w+\.0: the optimizer's state"):
            trainer.fit(digits, 2)


def test_a_checkpoint_knows_the_shape_of_its_images(make_trainer: Make, digits: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(KeyboardInterrupt):
        make_trainer().fit(digits, 1, callbacks=[InterruptAt(1)], checkpoint=path)
    trainer = make_trainer()
    trainer.load(path)
    assert trainer.input_shape == (1, 28, 28)
    whole = load_checkpoint(path)
    info = {k: v for k, v in whole.info.items() if k not in ("input", "samples")}  # as they were written before
    save_checkpoint(path, Checkpoint(whole.weights, whole.optimizer, info))
    older = make_trainer()
    older.load(path)
    assert older.input_shape == ()
    assert older.step > 0
    older.fit(digits, 1)
    trainer.fit(digits, 1)
    assert_same(older, trainer)


def test_where_ctrl_c_is_ignored_it_stays_so(make_trainer: Make, digits: Dataset) -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert len(make_trainer().fit(digits, 1, callbacks=[InterruptAt(1)]).epochs) == 1
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_fit_works_outside_the_main_thread(make_trainer: Make, digits: Dataset) -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(make_trainer().fit(digits, 1)))
    thread.start()
    thread.join()
    assert len(results[0].epochs) == 1


def test_streamed_data_gives_the_same_bits_as_resident_data(
    make_trainer: Make, digits: Dataset, held_out: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident, streamed = make_trainer(augment=Augment(shift_px=2)), make_trainer(augment=Augment(shift_px=2))
    # Room for three batches of 64 digits in all: two banks of one batch each.
    monkeypatch.setattr(streamed, "_room_for_data", lambda plan: 3 * 64 * 28 * 28)
    a, b = resident.fit(digits, 2, held_out), streamed.fit(digits, 2, held_out)
    assert not streamed.ready_pass("train", digits).data.resident
    np.testing.assert_array_equal(a.losses, b.losses)
    assert_same(resident, streamed)
    assert a.epochs[-1].val_accuracy == b.epochs[-1].val_accuracy


def test_augmentation_changes_training_only(make_trainer: Make, digits: Dataset) -> None:
    plain, moved = make_trainer(), make_trainer(augment=Augment(flip=True, shift_px=3))
    assert not np.array_equal(plain.fit(digits, 1).losses, moved.fit(digits, 1).losses)
    scores = moved.evaluate(digits)
    assert scores == moved.evaluate(digits)


def test_a_batch_larger_than_the_data(make_trainer: Make, digits: Dataset) -> None:
    history = make_trainer(batch_size=1000).fit(digits, 1)
    assert len(history.losses) == 1


def test_batch_norm_and_dropout_train_and_infer(digits: Dataset, held_out: Dataset) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2), nn.Dropout(0.1),
                nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
                nn.Linear(144, 10),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    parcnn.manual_seed(0)
    trainer = Trainer(Net(), optim.AdamW(3e-3), device=CpuExecutor())
    history = trainer.fit(parcnn.data.load("digits"), 5, held_out)
    assert history.epochs[-1].val_accuracy is not None
    assert history.epochs[-1].val_accuracy > 0.9
    assert trainer.model.state_dict()["layers.1.num_batches_tracked"] == 5 * 23
    one = trainer.predict(held_out.images[:1])
    np.testing.assert_allclose(one, trainer.predict(held_out.images)[:1], rtol=1e-4, atol=1e-4)


def test_regression_with_mse() -> None:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((96, 2, 5, 5)).astype(np.float32)
    targets = images.mean((2, 3)) * 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 2))
    trainer = Trainer(model, optim.Adam(0.05), nn.MSELoss(), batch_size=32, device="cpu")
    history = trainer.fit(from_arrays(images, targets), 60)
    assert history.epochs[-1].loss < 1e-3
    assert history.epochs[-1].accuracy is None


def test_predict_runs_a_model_on_arrays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Sigmoid())
    images = np.random.default_rng(1).standard_normal((5, 3, 6, 7)).astype(np.float32)
    out = predict(model, images, device="cpu", batch_size=2)
    assert out.shape == (5, 4, 6, 7)
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    at = padded[2, :, 1:4, 2:5]
    layer = model[0]
    value = (at * layer.weight.data[3]).sum() + layer.bias.data[3]  # type: ignore[union-attr, attr-defined]
    assert out[2, 3, 1, 2] == pytest.approx(1 / (1 + np.exp(-value)), abs=1e-5)


def test_another_data_set_at_the_same_address_is_another(make_trainer: Make, digits: Dataset) -> None:
    trainer = make_trainer()
    rng = np.random.default_rng(0)
    results = {trainer.evaluate(from_arrays(digits.images[:50], rng.integers(0, 10, 50))).loss for _ in range(20)}
    assert len(results) == 20


def test_layers_frozen_between_two_runs_stay(make_trainer: Make, digits: Dataset) -> None:
    trainer = make_trainer()
    trainer.fit(digits, 1)
    before = weights(trainer)
    trainer.model.conv1.requires_grad_(False)  # type: ignore[attr-defined]
    trainer.fit(digits, 2)
    np.testing.assert_array_equal(before["conv1.weight"], weights(trainer)["conv1.weight"])
    assert not np.array_equal(before["conv2.weight"], weights(trainer)["conv2.weight"])


def test_frozen_parameters_stay(make_trainer: Make, digits: Dataset) -> None:
    trainer = make_trainer(optim.SGD(0.05, momentum=0.9))
    before = weights(trainer)
    trainer.model.conv1.requires_grad_(False)  # type: ignore[attr-defined]
    frozen = make_trainer(optim.SGD(0.05, momentum=0.9))
    frozen.model.conv1.requires_grad_(False)  # type: ignore[attr-defined]
    session = Trainer(frozen.model, frozen.optimizer, device=CpuExecutor(1))
    session.fit(digits, 1)
    np.testing.assert_array_equal(before["conv1.weight"], weights(session)["conv1.weight"])
    assert not np.array_equal(before["conv2.weight"], weights(session)["conv2.weight"])


def test_weights_loaded_between_runs_are_used(make_trainer: Make, digits: Dataset) -> None:
    trainer = make_trainer()
    start = weights(trainer)
    first = trainer.evaluate(digits)
    trainer.fit(digits, 1)
    assert trainer.evaluate(digits) != first
    trainer.model.load_state_dict(start)
    assert trainer.evaluate(digits) == first


def test_a_label_outside_the_model_is_named(digits: Dataset) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 7))
    with pytest.raises(LabelError, match=r"0\.\.6") as caught:
        Trainer(model, device="cpu").fit(digits, 1)
    assert "10 wide" in caught.value.remedy


def test_a_loss_that_is_not_finite_stops_training(make_trainer: Make, digits: Dataset) -> None:
    trainer = make_trainer(optim.SGD(1e20), schedule=optim.ConstantLR())
    start = trainer.evaluate(digits)
    with pytest.raises(NonFiniteLossError, match="step"):
        trainer.fit(digits, 2)
    assert trainer.evaluate(digits) == start  # the weights before the epoch that failed
    assert (trainer.epoch, trainer.step, trainer.trained) == (0, 0, 0)


def test_images_that_do_not_fit_name_the_layer(digits: Dataset) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 10))
    with pytest.raises(ShapeError) as caught:
        Trainer(model, device="cpu").fit(digits, 1)
    assert caught.value.where == "0"
    assert "in_channels=1" in caught.value.remedy


def test_a_batch_that_does_not_fit_says_which_would(digits: Dataset) -> None:
    class SmallMachine(CpuExecutor):
        def available_bytes(self) -> int:
            return 3 << 20

    trainer = Trainer(models.create("lenet5"), device=SmallMachine(1), batch_size=4096)
    with pytest.raises(OutOfMemoryError) as caught:
        trainer.fit(
            from_arrays(np.zeros((5000, 1, 28, 28), np.uint8) + np.arange(28, dtype=np.uint8), np.zeros(5000, int)), 1
        )
    named = int(caught.value.remedy.split()[2])
    assert (
        trainer.plan("train", digits, named).peak_bytes <= 3 << 20 < trainer.plan("train", digits, named + 1).peak_bytes
    )
    assert "conv" in caught.value.where


def test_plans_are_kept_while_they_are_in_use(make_trainer: Make, digits: Dataset) -> None:
    trainer = make_trainer()
    first, second = trainer.plan("eval", digits, 1), trainer.plan("eval", digits, 2)
    for batch in range(3, KEPT_PLANS + 2):
        trainer.plan("eval", digits, batch)
        assert trainer.plan("eval", digits, 1) is first
    assert trainer.plan("eval", digits, 2) is not second
    assert trainer.plan("eval", digits, 2) == second


def test_progress_is_reported(make_trainer: Make, digits: Dataset) -> None:
    seen: list[tuple[int, int, float]] = []

    class Watch(Callback):
        def on_progress(
            self, epoch: int, step: int, steps: int, loss: float, accuracy: float | None, images_per_second: float
        ) -> None:
            seen.append((epoch, step, images_per_second))
            time.sleep(0)

    make_trainer().fit(digits, 2, callbacks=[Watch()])
    assert seen[-1][:2] == (1, 7)
    assert all(rate > 0 for *_, rate in seen)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": 5}, "seed"),
        ({"batch_size": 32}, "batch_size"),
        ({"optimizer": optim.Adam()}, "optimizer"),
        ({"schedule": optim.CosineLR(warmup=0.2)}, "schedule"),
        ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "loss"),
        ({"precision": "fp64"}, "precision"),
        ({"augment": Augment(flip=True)}, "augment"),
        ({"shuffle": False}, "shuffle"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    make_trainer: Make, digits: Dataset, tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    path = tmp_path / "x.safetensors"
    first = make_trainer()
    first.fit(digits, 1, checkpoint=path)
    other = make_trainer(**change)
    before = weights(other)
    with pytest.raises(CheckpointError, match=what):
        other.load(path)
    for name, value in before.items():
        np.testing.assert_array_equal(value, weights(other)[name])


def test_an_older_checkpoint_that_says_less_is_taken(make_trainer: Make, digits: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    make_trainer().fit(digits, 1, checkpoint=path)
    old = load_checkpoint(path)
    for key in ("schedule", "loss", "precision", "augment", "shuffle"):
        del old.info[key]
    save_checkpoint(path, old)
    make_trainer().load(path)
    del old.info["seed"]
    save_checkpoint(path, old)
    with pytest.raises(CheckpointError, match="seed"):
        make_trainer().load(path)


class Halves:
    """A schedule of the user's own, without a repr."""

    def factor(self, step: np.ndarray, total: int) -> np.ndarray:
        return np.where(np.asarray(step) < total / 2, 1.0, 0.5)


def smoothed(x: Tensor, target: Tensor) -> functional.Loss:
    """A loss of the user's own."""
    return functional.cross_entropy(x, target, label_smoothing=0.1)


def test_a_schedule_and_a_loss_of_the_user_s_own_are_known_again(
    make_trainer: Make, digits: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    make_trainer(schedule=Halves(), loss=smoothed).fit(digits, 1, checkpoint=path)
    make_trainer(schedule=Halves(), loss=smoothed).load(path)
    with pytest.raises(CheckpointError, match="another loss"):
        make_trainer(schedule=Halves()).load(path)
    with pytest.raises(CheckpointError, match="another schedule"):
        make_trainer(loss=smoothed).load(path)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "3"])
def test_a_batch_size_that_cannot_be_is_refused(make_trainer: Make, batch_size: Any) -> None:
    with pytest.raises(ArgumentError, match="batch_size"):
        make_trainer(batch_size=batch_size)


@pytest.mark.parametrize("shape", [(), (5,), (28, 28, 1), (0, 1, 28, 28)])
def test_predict_takes_batches_of_images(make_trainer: Make, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="not a batch of images"):
        make_trainer().predict(np.zeros(shape, np.uint8))


def test_floats_are_normalised_as_pixels_are(make_trainer: Make, digits: Dataset, held_out: Dataset) -> None:
    trainer = make_trainer()
    trainer.fit(digits, 1)
    scaled = (held_out.images / 255).astype(np.float32)
    logits = trainer.predict(held_out.images)
    np.testing.assert_allclose(trainer.predict(scaled), logits, rtol=1e-4, atol=1e-4)
    assert trainer.evaluate(from_arrays(scaled, held_out.labels)).accuracy == trainer.evaluate(held_out).accuracy


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("model", {"model": models.create}),
        ("optimizer", {"optimizer": "sgd"}),
        ("optimizer", {"optimizer": optim.SGD}),
        ("loss", {"loss": "mse"}),
        ("schedule", {"schedule": "cosine"}),
    ],
)
def test_arguments_of_another_kind_are_named(what: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=rf"Trainer\.{what}: an argument of another kind"):
        Trainer(**{"model": models.create("lenet5"), "device": "cpu", **arguments})


def test_what_is_no_data_set_is_named(make_trainer: Make, digits: Dataset) -> None:
    trainer = make_trainer()
    for call in (
        lambda: trainer.fit(digits.images, 1),  # type: ignore[arg-type]
        lambda: trainer.fit(digits, 1, digits.images),  # type: ignore[arg-type]
        lambda: trainer.evaluate(digits.images),  # type: ignore[arg-type]
    ):
        with pytest.raises(ArgumentError, match=r"(?s)of another kind.*data\.load.*ndarray"):
            call()
    with pytest.raises(ArgumentError, match=r"fit\.epochs"):
        trainer.fit(digits, 1.5)  # type: ignore[arg-type]


def test_another_model_s_checkpoint_is_told_by_its_name(make_trainer: Make, digits: Dataset, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.fit(digits, 1, checkpoint=tmp_path / "c.safetensors")
    other = Trainer(models.create("cifarnet"), device="cpu")
    with pytest.raises(CheckpointError, match=r"(?s)another model's.*CifarNet.*LeNet5") as caught:
        other.load(tmp_path / "c.safetensors")
    assert len(str(caught.value)) < 500


def test_metrics_that_cannot_be_written_are_told_before_the_first_step(
    make_trainer: Make, digits: Dataset, tmp_path: Path
) -> None:
    trainer = make_trainer()
    with pytest.raises(DataError, match="metrics cannot be written"):
        trainer.fit(digits, 1, callbacks=[JsonLines(tmp_path)])
    assert trainer.trained == 0


def test_predict_refuses_pixels_of_a_type_that_it_would_not_normalise(make_trainer: Make, digits: Dataset) -> None:
    with pytest.raises(DataError, match="int64"):
        make_trainer().predict(digits.images[:2].astype(np.int64))


def test_images_cannot_move_by_less_than_nothing() -> None:
    with pytest.raises(ArgumentError, match="shift_px"):
        Augment(shift_px=-1)


def test_a_validation_set_that_does_not_fit_is_told_before_the_first_step(make_trainer: Make, digits: Dataset) -> None:
    trainer = make_trainer()
    with pytest.raises(LabelError, match=r"0\.\.11"):
        trainer.fit(digits, 1, from_arrays(digits.images[:12], np.arange(12)))
    assert trainer.trained == 0


@pytest.mark.parametrize("where", ["validation", "on_epoch", "on_progress"])
def test_what_runs_beside_training_may_need_more_memory(digits: Dataset, held_out: Dataset, where: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    from parcnn.cuda.executor import CudaExecutor

    class Look(Callback):
        def on_progress(self, *arguments: Any) -> None:
            if where == "on_progress":
                trainer.evaluate(held_out)

        def on_epoch(self, result: EpochResult) -> None:
            if where == "on_epoch":
                trainer.predict(held_out.images)

    trainer = Trainer(models.create("lenet5"), batch_size=512, device=CudaExecutor.null())
    small = digits.subset(30)  # needs less than the 360 images of held_out
    history = trainer.fit(small, 2, held_out if where == "validation" else None, callbacks=[Look()])
    assert len(history.losses) == 2
