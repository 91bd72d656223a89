"""The Trainer: fit, evaluate, predict; checkpoints that a run can be resumed from, bit for bit."""

from __future__ import annotations

import operator
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from parcnn.data import Dataset
from parcnn.errors import ArgumentError, CheckpointError, DataError, LabelError, NonFiniteLossError, ShapeError
from parcnn.nn import CrossEntropyLoss, Module
from parcnn.nn.module import differing_keys
from parcnn.ops.base import Spec
from parcnn.ops.philox import permutation
from parcnn.ops.program import PERSISTENT, Executor, Region
from parcnn.optim import SGD, ConstantLR, Schedule
from parcnn.plan.build import Feed, Plan
from parcnn.plan.options import Options
from parcnn.train.batches import DeviceData
from parcnn.train.callbacks import Callback
from parcnn.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from parcnn.train.device import resolve_executor
from parcnn.train.passes import Pass
from parcnn.train.session import Session

REPORT_SECONDS = 0.25  # between two looks at the loss
_NEEDED = {"epoch", "step", "trained", "classes", "mean", "std"}  # of a checkpoint's description, to go on from it
_SAID_LATER = {"schedule", "loss", "precision", "augment", "shuffle"}  # which older checkpoints do not tell
_DATASET = "a data set: data.load(...) or data.from_arrays(images, labels)"


@dataclass(frozen=True)
class Augment:
    """Random changes of training images: mirrored left-right, moved by up to shift_px pixels each way.

    Raises ArgumentError for a shift_px below 0.
    """

    flip: bool = False
    shift_px: int = 0

    def __post_init__(self) -> None:
        if self.shift_px < 0:
            raise ArgumentError("a value out of range", where="Augment.shift_px", expected=">= 0", got=self.shift_px)


@dataclass(frozen=True)
class EpochResult:
    """One epoch: means over its samples; accuracy is None where the loss counts no right answers.

    Of an epoch that was resumed in its middle: over the samples since then.
    """

    epoch: int
    loss: float
    accuracy: float | None
    val_loss: float | None
    val_accuracy: float | None
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class EvalResult:
    """Means over a data set."""

    loss: float
    accuracy: float | None
    count: int


@dataclass
class History:
    """Every epoch, and the loss of every step."""

    epochs: list[EpochResult] = field(default_factory=list)
    losses: np.ndarray = field(default_factory=lambda: np.zeros(0))


class Trainer:
    """Trains a model on one executor.

    model: a `parcnn.nn.Module`; optimizer: of `parcnn.optim`; loss: CrossEntropyLoss or MSELoss; schedule: factors on
    the learning rate; device: 'auto', 'cpu', 'cuda' or an executor; seed: of shuffling, dropout and augmentation
    (initial weights are the model's own: `parcnn.manual_seed`). Two runs with one seed give the same bits. Raises
    ArgumentError for a batch_size that is no whole number from 1 on, and for arguments that are of another kind.
    """

    def __init__(
        self,
        model: Module,
        optimizer: Any = None,
        loss: Callable[..., Any] | None = None,
        schedule: Schedule | None = None,
        *,
        batch_size: int = 64,
        device: str | Executor = "auto",
        seed: int = 0,
        precision: str = "fp32",
        options: Options | None = None,
        augment: Augment | None = None,
        shuffle: bool = True,
    ) -> None:
        _check_kind(isinstance(model, Module), "Trainer.model", "a parcnn.nn.Module", model)
        _check_kind(
            optimizer is None or _has(optimizer, "rules"), "Trainer.optimizer", "optim.SGD(0.1), ...", optimizer
        )
        _check_kind(loss is None or callable(loss), "Trainer.loss", "nn.CrossEntropyLoss(), ...", loss)
        _check_kind(schedule is None or _has(schedule, "factor"), "Trainer.schedule", "optim.CosineLR(), ...", schedule)
        self.model = model
        self.optimizer = optimizer or SGD(0.01, momentum=0.9)
        self.schedule = schedule or ConstantLR()
        self.batch_size, self.seed, self.shuffle = _whole(batch_size, 1, "Trainer.batch_size"), seed, shuffle
        self.augment, self.loss = augment or Augment(), loss or CrossEntropyLoss()
        self.executor = resolve_executor(device)
        self.session = Session(
            model,
            self.executor,
            loss=self.loss,
            optimizer=self.optimizer,
            precision=precision,
            options=options,
        )
        self.classes: tuple[str, ...] = ()
        self.normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # mean, std of the training data
        self.input_shape: tuple[int, ...] = ()  # (C, H, W) of the training images
        self.epoch, self.step, self.trained = 0, 0, 0  # finished epochs, steps of the current one, steps in all
        self._pulled = (0, 0, 0)  # epoch, step, trained of the model's weights on the host
        self._samples = 0  # of the training data that epoch and step count on
        self._passes: WeakKeyDictionary[Dataset, dict[tuple[str, int], Pass]] = WeakKeyDictionary()
        self._pending_state: dict[str, np.ndarray] | None = None  # of a checkpoint, until the training plan is loaded
        self._ran_on = self._kernels()  # of the steps so far

    # -- what users call ----------------------------------------------------------------------------------------

    def fit(
        self,
        train: Dataset,
        epochs: int = 10,
        validation: Dataset | None = None,
        callbacks: Sequence[Callback] = (),
        checkpoint: str | Path | None = None,
    ) -> History:
        """Train until `epochs` epochs are done in all (a loaded checkpoint's count); evaluate after each.

        Writes `checkpoint` after each epoch. Ctrl-C ends the run after the step in flight, writes the checkpoint and
        raises KeyboardInterrupt; a second one ends it at once, and leaves the checkpoint of the last epoch's end. Raises
        ArgumentError for what is no data set or no number of epochs, ShapeError, LabelError, OutOfMemoryError, DataError (an
        epoch begun on another number of samples) before the first step, and NonFiniteLossError when the loss is NaN or
        infinite. After that, as after a second Ctrl-C, model and position are those of the last epoch's end, and the
        optimizer's state is fresh: `load` a checkpoint to go on. Warns where the loaded checkpoint was trained on other
        hardware or with other tables of measured kernels, which may round sums differently.
        """
        _check_kind(isinstance(train, Dataset), "fit.train", _DATASET, train)
        _check_kind(validation is None or isinstance(validation, Dataset), "fit.validation", _DATASET, validation)
        epochs = _whole(epochs, 0, "fit.epochs")
        if self._ran_on != self._kernels():
            (before, its_tables), (now, tables) = self._ran_on, self._kernels()
            warnings.warn(
                f"trained so far on {before or 'the CPU'} (tables of kernels '{its_tables}'), now on {now or 'the CPU'} "
                f"('{tables}'): sums may round differently, so it does not go on bit for bit",
                stacklevel=2,
            )
            self._ran_on = self._kernels()
        if self.step and self._samples not in (0, len(train)):  # 0: an older checkpoint does not say
            raise DataError(
                f"epoch {self.epoch + 1} was begun on another number of samples",
                where=train.name,
                expected=f"{self._samples:,}, of which {self.step} batches are done",
                got=f"{len(train):,}",
                remedy="go on with the same data set",
            )
        self.classes, self.normalization = train.classes, (train.mean, train.std)
        self.input_shape, self._samples = tuple(train.images.shape[1:]), len(train)
        run = self.ready_pass("train", train)
        if validation is not None:
            self.ready_pass("eval", validation)  # what does not fit is told now, not after an epoch
        if self._pending_state is not None:
            if self.trained:
                self.session.load_optimizer_state(self._pending_state)
            else:
                self.session.clear_optimizer_state()
            self._pending_state = None
        history = History()
        losses: list[np.ndarray] = []
        for callback in callbacks:
            callback.on_start(self, epochs, run.steps)
        try:
            with _interruptible() as interrupted:
                while self.epoch < epochs:
                    began, first = time.perf_counter(), self.step
                    for _ in self._train_steps(train, epochs, callbacks):
                        if interrupted() and self.step < run.steps:  # else the epoch is ended first
                            raise KeyboardInterrupt
                    seconds = time.perf_counter() - began
                    losses.append(run.results(first, run.steps)[0])
                    loss, accuracy = run.means(first, run.steps)
                    self.epoch, self.step = self.epoch + 1, 0
                    self._pull()
                    scores = self.evaluate(validation) if validation is not None else None
                    rate = int(run.sizes(first, run.steps).sum()) / seconds
                    result = EpochResult(
                        self.epoch - 1,
                        loss,
                        accuracy,
                        scores.loss if scores else None,
                        scores.accuracy if scores else None,
                        seconds,
                        rate,
                    )
                    history.epochs.append(result)
                    if checkpoint is not None:
                        self.save(checkpoint)
                    for callback in callbacks:
                        callback.on_epoch(result)
                    if interrupted():
                        raise KeyboardInterrupt
        except NonFiniteLossError:
            self._rewind()
            raise
        except KeyboardInterrupt:
            if interrupted() > 1:  # a step may be half done
                self._rewind()
                raise
            self._pull()
            if checkpoint is not None:
                self.save(checkpoint)
            raise
        finally:
            history.losses = np.concatenate(losses) if losses else np.zeros(0)
            for callback in callbacks:
                callback.on_end(history)
        return history

    def evaluate(self, data: Dataset) -> EvalResult:
        """Mean loss and accuracy of the model on a data set, in inference mode. Raises ArgumentError for anything else."""
        _check_kind(isinstance(data, Dataset), "evaluate.data", _DATASET, data)
        run = self.ready_pass("eval", data)
        order = np.arange(len(data), dtype=np.int32)
        run.start(order, 0, self.trained, self.seed)
        for _ in run.run(order, 0, 3600.0):
            pass
        loss, accuracy = run.means(0, run.steps)
        return EvalResult(loss, accuracy, len(data))

    def predict(self, images: np.ndarray) -> np.ndarray:
        """The model's output (N, ...), float32 (fp64: float64), for images (N,C,H,W), normalised as in training: uint8 pixels
        are scaled to 0..1 before that, floats are taken as scaled so already.

        Raises ShapeError for no images or images that do not fit the model, DataError for other types.
        """
        images = np.asarray(images)
        if images.ndim not in (2, 4) or not images.size:
            raise ShapeError(
                "not a batch of images",
                expected="(N, C, H, W), at least one",
                got=images.shape,
                remedy="image[None] makes a batch of one image (C, H, W)",
            )
        if images.dtype != np.uint8 and images.dtype.kind != "f":
            raise DataError(
                "images have a type that is not supported",
                expected="uint8 pixels (0..255) or floats",
                got=images.dtype,
                remedy="images.astype(np.uint8) for values 0..255, else images.astype(np.float32)",
            )
        mean, std = self.normalization or ((0.0,), (1.0,))
        data = DeviceData(
            self.executor, images, np.zeros(len(images), np.int32), self.batch_size, None, self.session.layout.dtype
        )
        feed = data.feed(*_per_channel(mean, std, images.shape[1]), len(images))
        run = self._bind(self._plans("predict", data.batch, feed), data, {})
        order = np.arange(len(images), dtype=np.int32)
        run.start(order, 0, self.trained, self.seed)
        for _ in run.run(order, 0, 3600.0):
            pass
        spec = Spec((len(images), *run.plan.output_physical[1:]), self.session.layout.dtype)
        out = run.regions["out"].read(spec)
        out = out.transpose(0, 3, 1, 2) if len(run.plan.output_shape) == 4 else out
        run.free()
        return np.ascontiguousarray(out).reshape(len(images), *run.plan.output_shape[1:])

    def save(self, path: str | Path) -> None:
        """Write a checkpoint, atomically. Raises CheckpointError where it cannot be written."""
        self._pull()
        mean, std = self.normalization or ((), ())
        info = {
            "model": type(self.model).__name__,
            **self._recipe(),
            "epoch": self.epoch,
            "step": self.step,
            "trained": self.trained,
            "classes": list(self.classes),
            "mean": list(mean),
            "std": list(std),
            "input": list(self.input_shape),
            "samples": self._samples,
            "hardware": self.executor.hardware,
            "tuning": self.executor.tuning_digest,
        }
        state = self.session.optimizer_state() if self._pending_state is None else self._pending_state
        save_checkpoint(path, Checkpoint(self.model.state_dict(), state, info))

    def load(self, path: str | Path) -> None:
        """Take weights, optimizer state and position from a checkpoint; `fit` goes on from there.

        Raises CheckpointError, changing nothing, when it is corrupt, belongs to another model, or was trained in another
        way: by another optimizer, schedule, loss, batch size, seed, augmentation or order, or in fp64 or not. What was trained
        in bf16 may go on, or predict, in fp32, and the other way round: the weights of both are fp32.
        """
        checkpoint = load_checkpoint(path)
        info = checkpoint.info
        if differing := differing_keys(dict(self.model.named_variables()), checkpoint.weights):
            raise CheckpointError(
                "the checkpoint is another model's",
                where=str(path),
                expected=type(self.model).__name__,
                got=f"{info.get('model', 'a model')}: {differing}",
                remedy="give the model that was trained, or another checkpoint",
            )
        if not info.keys() >= _NEEDED:
            raise CheckpointError(
                "the checkpoint does not say where training stood",
                where=str(path),
                expected=", ".join(sorted(_NEEDED)),
                got=", ".join(sorted(info)) or "nothing",
                remedy="take the weights only, from load_checkpoint(path).weights",
            )
        for key, own in self._recipe().items():
            if info["trained"] and info.get(key, own if key in _SAID_LATER else None) != own:
                raise CheckpointError(
                    f"the checkpoint was trained with another {key}",
                    where=str(path),
                    expected=own,
                    got=info.get(key),
                    remedy=f"give the same {key}; or take the weights only, from load_checkpoint(path).weights",
                )
        self.model.load_state_dict(checkpoint.weights)
        self.epoch, self.step, self.trained = self._pulled = info["epoch"], info["step"], info["trained"]
        self.input_shape, self._samples = tuple(info.get("input", ())), info.get("samples", 0)
        hardware = info.get("hardware", self.executor.hardware)  # which older checkpoints do not tell
        self._ran_on = (hardware, info.get("tuning", "")) if self.trained else self._kernels()
        self.classes = tuple(info["classes"])
        self.normalization = (tuple(info["mean"]), tuple(info["std"])) if info["mean"] else None
        self._pending_state = checkpoint.optimizer

    def plan(self, mode: str, data: Dataset, batch: int | None = None) -> Plan:
        """The plan of a mode for a data set's shape, without running anything."""
        return self.session.plan(mode, batch or self.batch_size, _sketch(data, batch or self.batch_size, self.session))

    @property
    def peak_bytes(self) -> int:
        """Memory of weights, optimizer state and arena on the device, the data set apart; 0 before anything ran."""
        return self.session.held_bytes

    # -- how it is done -----------------------------------------------------------------------------------------

    def _kernels(self) -> tuple[str, str]:
        """What decides which code runs an op: the hardware, and tables of measured kernels."""
        return self.executor.hardware, self.executor.tuning_digest

    def _recipe(self) -> dict[str, Any]:
        """What a run that goes on must have in common with the one before."""
        return {
            "optimizer": _described(self.optimizer),
            "schedule": _described(self.schedule),
            "loss": _described(self.loss),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "precision": self.session.layout.dtype,  # of the weights
            "augment": repr(self.augment),
            "shuffle": self.shuffle,
        }

    def _train_steps(self, train: Dataset, epochs: int, callbacks: Sequence[Callback]) -> Iterator[None]:
        """The steps of the current epoch that are left, a slice at a time."""
        run = self.ready_pass("train", train)
        count, first = run.count, self.step
        order = permutation(count, self.seed, self.epoch) if self.shuffle else np.arange(count, dtype=np.int32)
        steps = np.arange(run.steps) + self.epoch * run.steps
        rates = self.optimizer.lr * self.schedule.factor(steps, epochs * run.steps)
        hyper = self.optimizer.hyper(rates, self.epoch * run.steps)
        run.start(order, first, self.trained, self.seed, hyper)
        began = time.perf_counter()
        for done in run.run(order, first, REPORT_SECONDS):
            losses, corrects = run.results(first, done)
            bad = np.flatnonzero(~np.isfinite(losses))
            if bad.size:
                step = first + int(bad[0])
                raise NonFiniteLossError(
                    f"the loss became {losses[bad[0]]} at step {step} of epoch {self.epoch + 1}",
                    where=type(self.model).__name__,
                    got=f"learning rate {rates[step]:g}",
                    remedy="lower the learning rate, add warm-up, or look for NaN in the data",
                )
            self.trained += done - self.step
            self.step = done
            seen = int(run.sizes(first, done).sum())
            rate = seen / (time.perf_counter() - began)
            accuracy = None if corrects is None else float(corrects.sum()) / seen
            for callback in callbacks:
                callback.on_progress(self.epoch, done, run.steps, float(losses.mean()), accuracy, rate)
            yield
            self.ready_pass("train", train)  # a callback may have run a larger plan, which took another arena

    def _pull(self) -> None:
        """Bring the weights home, where steps have changed them since."""
        if self._pulled == (self.epoch, self.step, self.trained):
            return
        self.session.pull()
        for module in self.model.modules():
            counter = getattr(module, "num_batches_tracked", None)
            if counter is not None and module.training:
                counter.assign(counter.data + (self.trained - self._pulled[2]))
        self._pulled = self.epoch, self.step, self.trained

    def _rewind(self) -> None:
        """Go back to the weights on the host, and to where training stood when they were brought there."""
        self.session.forget_training()
        self.epoch, self.step, self.trained = self._pulled

    def ready_pass(self, mode: str, data: Dataset) -> Pass:
        """A pass over a data set, its data and programs in place; kept as long as the data set is.

        Programs are loaded anew, into the same Pass, when layers were frozen or switched to inference since, or memory was
        replaced.
        """
        if not len(data):
            raise ShapeError("an empty data set", where=data.name, remedy="give at least one sample")
        kept = self._passes.setdefault(data, {})
        batch = min(self.batch_size, len(data))
        known = kept.get((mode, batch))
        if known is not None:
            device_data, regions = known.data, known.regions
        else:
            sketch = self.plan(mode, data, batch)
            self._check_labels(sketch, data)
            limit = self._room_for_data(sketch)
            device_data = DeviceData(self.executor, data.images, data.labels, batch, limit, self.session.layout.dtype)
            regions = {}
        mean, std = self.normalization or (data.mean, data.std)
        augment = self.augment if mode == "train" else Augment()
        mean, std = _per_channel(mean, std, data.images.shape[1])
        plans = self._plans(mode, batch, device_data.feed(mean, std, len(data), augment.flip, augment.shift_px))
        if known is None:
            known = kept[mode, batch] = self._bind(plans, device_data, regions)
        elif known.generation != self.session.generation or known.plans != plans:
            bound = self._bind(plans, device_data, regions)
            known.plans, known.programs, known.generation = bound.plans, bound.programs, bound.generation
        self.session.push()
        return known

    def _plans(self, mode: str, batch: int, feed: Feed) -> dict[str, Plan]:
        """Plans for whole batches and for the smaller last one, where there are such."""
        whole, rest = divmod(feed.order, batch)
        sizes = {"full": batch} if whole else {}
        if rest:
            sizes["tail"] = rest
        return {name: self.session.plan(mode, size, feed) for name, size in sizes.items()}

    def _bind(self, plans: dict[str, Plan], data: DeviceData, regions: dict[str, Region]) -> Pass:
        """A pass with its programs bound to memory; `regions` gains what feeds the steps and is not there yet."""
        for plan in plans.values():
            for name, nbytes in plan.program.region_bytes.items():
                if name not in ("arena", *PERSISTENT, "images", "targets") and name not in regions:
                    regions[name] = self.executor.region(name, nbytes)
        loaded = [self.session.load(plans, {**regions, **bank}) for bank in data.banks]
        programs = {name: [bank[name] for bank in loaded] for name in plans}
        return Pass(data, regions, plans, programs, self.session.generation)

    def _room_for_data(self, plan: Plan) -> int | None:
        """Bytes that a data set may take beside the plan; None: no limit known."""
        free = self.executor.available_bytes()
        if free is None:
            return None
        return max(0, int(0.95 * (free + self.session.held_bytes - plan.peak_bytes)))

    def _check_labels(self, plan: Plan, data: Dataset) -> None:
        if plan.mode == "predict" or data.labels.dtype.kind not in "iu":
            return
        outputs = plan.output_shape[1]
        if int(data.labels.max()) >= outputs or int(data.labels.min()) < 0:
            raise LabelError(
                "a label outside the model's classes",
                where=data.name,
                expected=f"0..{outputs - 1}, the model has {outputs} outputs",
                got=f"{int(data.labels.min())}..{int(data.labels.max())}",
                remedy=f"make the last layer {int(data.labels.max()) + 1} wide, or mend the labels",
            )


def predict(model: Module, images: np.ndarray, *, device: str | Executor = "auto", batch_size: int = 256) -> np.ndarray:
    """The output of `model` for images (N,C,H,W) as they are: floats unchanged, uint8 as 0..255/255. No training state.

    Raises ShapeError when the images do not fit the model.
    """
    return Trainer(model, device=device, batch_size=batch_size).predict(images)


def _sketch(data: Dataset, batch: int, session: Session) -> Feed:
    """A feed of the data's shapes for plans that are only looked at."""
    shape = data.images.shape[1:]
    physical = (*shape[1:], shape[0]) if len(shape) == 3 else tuple(shape)
    dtype = session.layout.dtype
    images = Spec((batch, *physical), "u8" if data.images.dtype == np.uint8 else dtype)
    targets = Spec((batch, *data.labels.shape[1:]), "i32" if data.labels.dtype.kind in "iu" else dtype)
    ones = (1.0,) * shape[0]
    return Feed(tuple(shape), images, targets, batch, 1, ones, ones)


def _per_channel(
    mean: tuple[float, ...], std: tuple[float, ...], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """One entry a channel from one for all or one for each."""
    return (mean * channels if len(mean) == 1 else mean), (std * channels if len(std) == 1 else std)


def _described(thing: Any) -> str:
    """Its repr, where that says what it is; else its name, or that of its class: not where in memory it lies."""
    if type(thing).__repr__ not in (object.__repr__, type(_described).__repr__):
        return repr(thing)
    return str(getattr(thing, "__qualname__", type(thing).__qualname__))


def _whole(value: Any, least: int, where: str) -> int:
    """A whole number from `least` on, of any integer type."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ArgumentError(
            "a value out of range", where=where, expected=f"a whole number, at least {least}", got=repr(value)
        )
    return number


def _has(thing: Any, method: str) -> bool:
    """Whether it is an object with such a method, not a class."""
    return not isinstance(thing, type) and callable(getattr(thing, method, None))


def _check_kind(good: bool, where: str, expected: str, got: Any) -> None:
    """Raise ArgumentError unless `good`."""
    if not good:
        name = f"the class {got.__name__}" if isinstance(got, type) else type(got).__name__
        raise ArgumentError("an argument of another kind", where=where, expected=expected, got=name)


@contextmanager
def _interruptible() -> Iterator[Callable[[], int]]:
    """While it lasts, the first Ctrl-C is only counted: the step in flight ends whole. The second is as usual.

    Gives a function that tells how many there were.
    """
    hits = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal hits
        hits += 1
        if hits > 1:
            raise KeyboardInterrupt

    ignored = signal.getsignal(signal.SIGINT) in (
        signal.SIG_IGN,
        None,
    )  # as nohup and background jobs of scripts have it
    if ignored or threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: hits
    finally:
        signal.signal(signal.SIGINT, previous)
