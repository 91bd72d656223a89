"""A model on an executor: its weights and optimizer state there, the arena that its plans share, its loaded programs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from parcnn.errors import CheckpointError
from parcnn.nn import Module
from parcnn.ops.base import accumulator
from parcnn.ops.program import Executor, LoadedProgram, Region
from parcnn.plan.build import Feed, Plan, build, check_memory
from parcnn.plan.optimizer import Optimizer
from parcnn.plan.options import Options
from parcnn.plan.precision import TENSOR_TYPES, bf16_bits, check_precision
from parcnn.plan.variable import Layout, Variable

# Plans take some 100 kB each, and every number of images that is predicted has its own.
KEPT_PLANS = 64


class Session:
    """Owns the memory of one model on one executor.

    Plans are made once for each (mode, batch, feed) in use. The arena is as large as the largest plan needs. Weights live
    on the device while they are trained; `pull` brings them home, `push` takes host changes (load_state_dict) there.
    """

    def __init__(
        self,
        model: Module,
        executor: Executor,
        *,
        loss: Callable[..., Any] | None = None,
        optimizer: Optimizer | None = None,
        precision: str = "fp32",
        options: Options | None = None,
    ) -> None:
        check_precision(executor, precision)
        self.model, self.executor, self.loss, self.optimizer = model, executor, loss, optimizer
        self.options, self.dtype = options or Options(), TENSOR_TYPES[precision]
        self.layout = Layout.of(model.named_variables(), accumulator(self.dtype))
        if self.layout.dtype == "f64":
            for variable in self.layout.offsets:
                variable.widen()
        if optimizer is not None:
            self.layout.add_state(optimizer)
        self._plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
        self.generation = 0  # counts regions that were replaced: programs loaded before are void
        self._regions: dict[str, Region] = {}
        self._versions: dict[Variable, int] = {}

    def plan(self, mode: str, batch: int, feed: Feed) -> Plan:
        """The plan for a mode, a batch size and a feed; the latest KEPT_PLANS are kept."""
        trainable = tuple(v.requires_grad for v in self.layout.offsets)
        training = tuple(m.training for m in self.model.modules())
        key = (mode, batch, feed, trainable, training)
        if key not in self._plans:
            self._plans[key] = self._build(mode, batch, feed)
        self._plans.move_to_end(key)
        if len(self._plans) > KEPT_PLANS:
            self._plans.popitem(last=False)
        return self._plans[key]

    def _build(self, mode: str, batch: int, feed: Feed) -> Plan:
        return build(
            self.model,
            mode=mode,
            batch=batch,
            feed=feed,
            executor=self.executor,
            layout=self.layout,
            loss=self.loss,
            optimizer=self.optimizer if mode == "train" else None,
            options=self.options,
            dtype=self.dtype,
        )

    def load(self, plans: Mapping[str, Plan], feeds: Mapping[str, Region]) -> dict[str, LoadedProgram]:
        """Bind plans to memory: the session's own, and the feeds given. All are bound to one arena, large enough for each.

        Raises OutOfMemoryError, before anything is allocated, when they do not fit.
        """
        for plan in plans.values():
            free = self.executor.available_bytes()
            if free is not None:
                held = sum(r.nbytes for r in self._regions.values())
                check_memory(plan, free + held, partial(self._rebatch, plan))
        self._need("weights", self.layout.weights_bytes)
        if copies := self.layout.copies_bytes(self.dtype):
            self._need("copies", copies)
        if any(plan.mode == "train" for plan in plans.values()):
            self._need("optimizer", self.layout.optimizer_bytes)
        self._need("arena", max(plan.arena_bytes for plan in plans.values()))
        self.push()
        regions = {**self._regions, **feeds}
        return {name: self.executor.load(plan.program, regions) for name, plan in plans.items()}

    def _rebatch(self, plan: Plan, batch: int) -> Plan:
        return self._build(plan.mode, batch, plan.feed)

    def _need(self, name: str, nbytes: int) -> None:
        """Make a region of at least `nbytes`; programs bound to a smaller one must be loaded anew."""
        old = self._regions.get(name)
        if old is not None and old.nbytes >= nbytes:
            return
        if old is not None:
            self.generation += 1
            del self._regions[name]  # so that a failure below leaves no freed memory behind
            old.free()
        self._regions[name] = self.executor.region(name, nbytes)

    @property
    def held_bytes(self) -> int:
        """Bytes of the regions that the session holds: weights, optimizer state, arena."""
        return sum(r.nbytes for r in self._regions.values())

    def push(self) -> None:
        """Copy to the device what has changed on the host since the last push."""
        for variable, offset in self.layout.offsets.items():
            if self._versions.get(variable) == variable.version:
                continue
            packing = self.layout.packings.get(variable)
            if packing is None:  # forward() does not use it
                continue
            dtype = np.float64 if self.layout.dtype == "f64" else np.float32
            packed = packing.pack(variable.data).astype(dtype)
            self._regions["weights"].write(packed, offset)
            if "copies" in self._regions and packing.logical:
                self._regions["copies"].write(bf16_bits(packed), self.layout.copy_offset(offset, self.dtype))
            self._versions[variable] = variable.version

    def pull(self) -> None:
        """Copy weights and running statistics from the device into the model."""
        for variable, offset in self.layout.offsets.items():
            packing = self.layout.packings.get(variable)
            if packing is not None and variable in self._versions:
                array = self._regions["weights"].read(packing.spec(variable, self.layout.dtype), offset)
                variable.assign(packing.unpack(array, variable.shape))
                self._versions[variable] = variable.version

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """The optimizer's tensors in torch's layout, keyed by parameter name and number; empty before training."""
        if "optimizer" not in self._regions:
            return {}
        state = {}
        for variable, offsets in self.layout.state_offsets.items():
            packing = self.layout.packings.get(variable)
            for i, offset in enumerate(offsets if packing else ()):
                array = self._regions["optimizer"].read(packing.spec(variable, self.layout.dtype), offset)  # type: ignore[union-attr]
                state[f"{self.layout.names[variable]}.{i}"] = packing.unpack(array, variable.shape)  # type: ignore[union-attr]
        return state

    def load_optimizer_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Put back what `optimizer_state` gave; the training plan must have been loaded.

        Raises CheckpointError, changing nothing, where a tensor is missing or has another shape.
        """
        arrays: dict[int, np.ndarray] = {}
        for variable, offsets in self.layout.state_offsets.items():
            packing = self.layout.packings.get(variable)
            for i, offset in enumerate(offsets if packing else ()):
                name = f"{self.layout.names[variable]}.{i}"
                array = state.get(name)
                if array is None or array.shape != variable.shape:
                    raise CheckpointError(
                        "the optimizer's state does not belong to this model",
                        where=name,
                        expected=f"a tensor {variable.shape}",
                        got="none" if array is None else array.shape,
                        remedy="freeze the same layers as when it was saved, or use an older checkpoint",
                    )
                arrays[offset] = packing.pack(array)  # type: ignore[union-attr]
        dtype = np.float64 if self.layout.dtype == "f64" else np.float32
        for offset, array in arrays.items():
            self._regions["optimizer"].write(array.astype(dtype), offset)

    def clear_optimizer_state(self) -> None:
        """Back to the state before the first step."""
        region = self._regions.get("optimizer")
        if region is not None:
            region.write(np.zeros(region.nbytes, np.uint8))

    def forget_training(self) -> None:
        """Drop what steps did on the device since `pull`: the host's weights hold, the optimizer's state is fresh."""
        self._versions.clear()
        self.clear_optimizer_state()
