"""One training step, laid open: a plan on the CPU executor in float64 whose memory the test fills, runs and reads.

Arena and feeds are poisoned before every run, so a result that leans on what lay there is not finite, or differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from parcnn import nn
from parcnn.cpu import CpuExecutor
from parcnn.nn.functional import Loss
from parcnn.ops.base import Spec
from parcnn.ops.program import Call, Program
from parcnn.optim import SGD
from parcnn.plan.build import Feed, Plan, build
from parcnn.plan.optimizer import Optimizer
from parcnn.plan.options import Options
from parcnn.plan.trace import physical
from parcnn.plan.variable import Layout, Packing, Variable

FLOATS = {"f32": np.float32, "f64": np.float64}
LossFunction = Callable[[Any, Any], Loss]
KEY = (0x12345678, 0x9ABCDEF)  # random key of dropout: the masks of a step are the same in every run


def lay_out(model: nn.Module, optimizer: Optimizer | None = None, dtype: str = "f64") -> Layout:
    """The model's variables, and the optimizer's state, in memory."""
    layout = Layout.of(model.named_variables(), dtype)
    if optimizer is not None:
        layout.add_state(optimizer)
    return layout


def feed_of(images: np.ndarray, targets: np.ndarray, steps: int = 1) -> Feed:
    """How images (M, C, H, W) or (M, F) and targets, classes (M) or floats (M, F), flow in, in order."""
    n, *sample = images.shape
    channels = sample[0] if len(sample) == 3 else 1
    dtype = {v: k for k, v in FLOATS.items()}[images.dtype.type]
    return Feed(
        sample=tuple(sample),
        images=Spec((n, *physical(tuple(sample))), dtype),
        targets=Spec(targets.shape, "i32" if targets.dtype == np.int32 else dtype),
        order=n,
        steps=steps,
        scale=(1.0,) * channels,
        shift=(0.0,) * channels,
    )


def make_plan(
    executor: CpuExecutor,
    model: nn.Module,
    images: np.ndarray,
    targets: np.ndarray,
    *,
    mode: str = "train",
    batch: int | None = None,
    steps: int = 1,
    optimizer: Optimizer | None = None,
    loss: LossFunction | None = None,
    options: Options | None = None,
    dtype: str = "f64",
) -> Plan:
    """The plan of a step over the whole of `images`, or over batches of it."""
    optimizer = optimizer or SGD(lr=1.0)
    return build(
        model,
        mode=mode,
        batch=batch or len(images),
        feed=feed_of(images, targets, steps),
        executor=executor,
        layout=lay_out(model, optimizer, dtype),
        loss=loss or nn.CrossEntropyLoss(),
        optimizer=optimizer,
        options=options,
    )


class Step:
    """A plan with memory of its own. Weights are float64, in torch's layout, by their names in the model."""

    def __init__(self, executor: CpuExecutor, plan: Plan, images: np.ndarray, targets: np.ndarray) -> None:
        self.executor, self.plan = executor, plan
        self.images, self.targets = images, targets
        sizes = dict(plan.program.region_bytes)
        sizes["weights"] = plan.layout.weights_bytes
        if "optimizer" in sizes:
            sizes["optimizer"] = plan.layout.optimizer_bytes
        self.regions = {name: executor.region(name, nbytes) for name, nbytes in sizes.items()}
        self.loaded = executor.load(plan.program, self.regions)
        self.weights = {v: v.data.astype(np.float64) for v in plan.layout.offsets}

    def fill(self, lr: float | np.ndarray = 1.0) -> None:
        """Put everything as it is before the first step; all else is poisoned. lr: a rate, or a table (steps, 4)."""
        for name in self.regions:
            if name not in ("weights", "optimizer"):
                self.regions[name].write(np.full(self.regions[name].nbytes, 0xFF, np.uint8))
        if "optimizer" in self.regions:
            self.regions["optimizer"].write(np.zeros(self.regions["optimizer"].nbytes, np.uint8))
        images = self.images.transpose(0, 2, 3, 1) if self.images.ndim == 4 else self.images
        self.regions["images"].write(np.ascontiguousarray(images))
        self.regions["targets"].write(np.ascontiguousarray(self.targets))
        self.regions["order"].write(np.arange(len(self.images), dtype=np.int32))
        self.regions["state"].write(np.array([0, 0, 0, *KEY, 0, 0, 0], np.int32))
        if "hyper" in self.regions:
            float_type = FLOATS[self.plan.layout.dtype]
            rows = self.regions["hyper"].nbytes // (4 * np.dtype(float_type).itemsize)
            table = lr if isinstance(lr, np.ndarray) else np.tile([lr, 1.0, 1.0, 0.0], (rows, 1))
            self.regions["hyper"].write(np.ascontiguousarray(table.astype(float_type)))
        self.put_weights(self.weights)

    def put_weights(self, weights: dict[Variable, np.ndarray]) -> None:
        """Write weights into the executor's memory."""
        layout = self.plan.layout
        for variable, array in weights.items():
            packed = self._packing(variable).pack(array).astype(FLOATS[layout.dtype])
            self.regions["weights"].write(packed, layout.offsets[variable])

    def read_weights(self) -> dict[str, np.ndarray]:
        """The weights (and running statistics) that the executor has now."""
        layout = self.plan.layout
        return {
            layout.names[v]: self._packing(v).unpack(
                self.regions["weights"].read(self._packing(v).spec(v, layout.dtype), offset), v.shape
            )
            for v, offset in layout.offsets.items()
        }

    def _packing(self, variable: Variable) -> Packing:
        return self.plan.layout.packings.get(variable, Packing())

    def run(self, lr: float | np.ndarray = 1.0, steps: int = 1) -> float:
        """Fill, run, and return the (last) loss."""
        self.fill(lr)
        self.loaded.run(steps)
        self.executor.synchronize()
        return self.losses(steps)[-1]

    def run_calls(self, order: Sequence[int], lr: float = 1.0) -> float:
        """Fill, then run the calls one by one in `order`, each call's outputs poisoned just before it; the loss."""
        self.fill(lr)
        for position in order:
            call = replace(self.plan.program.calls[position], after=(), stream=0)
            self._poison(call)
            self.executor.load(Program("one", (call,), self.plan.program.region_bytes), self.regions).run()
        return self.losses(1)[0]

    def _poison(self, call: Call) -> None:
        """Set the bits of what a call writes without reading."""
        for slot in (*call.outputs, *((call.workspace,) if call.workspace else ())):
            if not any(s.region == slot.region and s.offset < slot.end and slot.offset < s.end for s in call.inputs):
                self.regions[slot.region].write(np.full(slot.spec.nbytes, 0xFF, np.uint8), slot.offset)

    def losses(self, steps: int) -> np.ndarray:
        """The losses that the steps left."""
        losses = self.regions["losses"].read(Spec((steps,), self.plan.layout.dtype))
        assert np.isfinite(losses).all()
        return losses

    def gradients(self) -> tuple[float, dict[str, np.ndarray]]:
        """Loss, and w_before - w_after of one SGD step at lr 1: the gradients, and how running statistics moved."""
        loss = self.run(lr=1.0)
        after = self.read_weights()
        names = self.plan.layout.names
        moved = {names[v]: before - after[names[v]] for v, before in self.weights.items()}
        for name, array in moved.items():
            assert np.isfinite(array).all(), name
        return loss, moved

    def loss_at(self, shift: dict[Variable, np.ndarray]) -> float:
        """The loss of the same step with some weights moved by `shift`."""
        unmoved = self.weights
        self.weights = {v: array + shift[v] if v in shift else array for v, array in unmoved.items()}
        try:
            return self.run(lr=0.0)
        finally:
            self.weights = unmoved


def step_of(executor: CpuExecutor, model: nn.Module, images: np.ndarray, targets: np.ndarray, **keywords: Any) -> Step:
    """Plan and memory in one call (`make_plan`'s keywords)."""
    return Step(executor, make_plan(executor, model, images, targets, **keywords), images, targets)


def check_gradients(step: Step, model: nn.Module, seed: int = 0, rtol: float = 2e-6) -> dict[str, np.ndarray]:
    """Each trained tensor's gradient against central differences of the loss along random directions; frozen ones stay."""
    random = np.random.default_rng(seed)
    loss, moved = step.gradients()
    trained = {v for _, v in model.named_parameters() if v.requires_grad}
    for variable, name in step.plan.layout.names.items():
        gradient = moved[name]
        if variable not in trained:
            if any(variable is p for p in model.parameters()):
                assert not gradient.any(), f"{name} is frozen and moved"
            continue
        for _ in range(2):
            direction = random.standard_normal(variable.shape)
            h = 1e-6 / np.linalg.norm(direction)
            up, down = step.loss_at({variable: h * direction}), step.loss_at({variable: -h * direction})
            numeric = (up - down) / (2 * h)
            size = np.linalg.norm(gradient) * np.linalg.norm(direction)
            noise = 400 * np.finfo(float).eps * max(abs(loss), 1) / h  # of rounding, on its way through the layers
            assert abs(numeric - np.vdot(gradient, direction)) <= rtol * size + noise, (
                f"{name}: along a random direction the loss changes by {numeric}, the gradient says "
                f"{np.vdot(gradient, direction)}"
            )
    return moved
