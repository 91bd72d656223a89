"""What a plan in bf16 holds in which type."""

from __future__ import annotations

import numpy as np
import pytest

from parcnn import models, nn
from parcnn.cuda.executor import CudaExecutor
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.pointwise import Cast
from parcnn.ops.program import Call, Slot
from parcnn.ops.update import MAX_GROUP, Update
from parcnn.optim import SGD
from parcnn.plan.build import Plan
from parcnn.plan.describe import outline
from parcnn.plan.precision import bf16_bits

SAMPLES = {"lenet5": (1, 28, 28), "cifarnet": (3, 32, 32)}


def plan_of(model: nn.Module, mode: str, sample: tuple[int, ...], precision: str = "bf16") -> Plan:
    executor = CudaExecutor.null()
    return outline(
        model, mode=mode, batch=8, sample=sample, executor=executor, loss=nn.CrossEntropyLoss(), optimizer=SGD(momentum=0.9),
        precision=precision,
    )  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_convolutions_read_bf16_and_updates_write_f32(name: str) -> None:
    calls = plan_of(models.create(name, in_channels=SAMPLES[name][0]), "train", SAMPLES[name]).program.calls
    for call in calls:
        types = [slot.spec.dtype for slot in call.inputs]
        if isinstance(call.op, ConvFprop | ConvDgrad):
            assert [*types[:2], call.outputs[0].spec.dtype] == ["bf16"] * 3
        if isinstance(call.op, ConvWgrad):
            assert types[:2] == ["bf16"] * 2
            assert {slot.spec.dtype for slot in call.outputs} == {"f32"}
        if isinstance(call.op, Update):
            assert set(types) == {"f32", "i32"}
            assert {slot.spec.dtype for slot in call.outputs} == {"bf16"}
    assert sum(isinstance(call.op, ConvWgrad) for call in calls) == len(
        [w for w in models.create(name, in_channels=SAMPLES[name][0]).named_variables() if w[1].data.ndim > 1]
    )


@pytest.mark.parametrize("mode", ["train", "eval", "predict"])
def test_convolutions_read_copies_that_outlive_the_step(mode: str) -> None:
    """In every mode at the same place; in training the update of a filter writes the copy that the convolutions read."""
    layers = [nn.Conv2d(8, 8, 1) for _ in range(MAX_GROUP + 3)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 4))
    calls = plan_of(model, mode, (8, 4, 4)).program.calls
    read = [call.inputs[1] for call in calls if isinstance(call.op, ConvFprop | ConvDgrad)]
    assert {slot.region for slot in read} == {"copies"}
    assert not any(isinstance(call.op, Cast) for call in calls if call.layer != "output")
    filters = {slot.offset: slot.end for slot in read}
    assert len(filters) == MAX_GROUP + 4
    ends = [0, *sorted(filters.values())]
    assert all(start >= end for start, end in zip(sorted(filters), ends, strict=False)), "copies overlap"
    if mode == "train":
        updates = [call for call in calls if isinstance(call.op, Update)]
        written = {slot.offset: master for call in updates for slot, master in copies_of(call)}
        assert set(written) == set(filters)
        for slot in read:
            assert 2 * slot.offset == written[slot.offset].offset
            assert slot.spec.shape == written[slot.offset].spec.shape


def copies_of(call: Call) -> list[tuple[Slot, Slot]]:
    """The copies that an update writes, and what they are copies of."""
    return [(copy, call.inputs[2 + i]) for i, copy in zip(call.op.copies, call.outputs, strict=True)]


@pytest.mark.parametrize(("name", "unpooled"), [("lenet5", 0), ("cifarnet", 1)])
def test_the_same_is_fused_as_in_fp32(name: str, unpooled: int) -> None:
    """But for the errors that Hopper's kernels want unpooled: at this batch of one layer."""
    model = models.create(name, in_channels=SAMPLES[name][0])
    half, full = (
        [call.op.name for call in plan_of(model, "train", SAMPLES[name], precision).program.calls]
        for precision in ("bf16", "fp32")
    )
    assert sorted(half) == sorted([*full, *["conv_unpool"] * unpooled])


def test_bits_of_bf16_are_rounded_to_the_nearest_even() -> None:
    values = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -0.0, 3.4e38, -np.inf, np.nan], np.float32)
    bits = [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x8000, 0x7F80, 0xFF80, 0x7FFF]
    assert bf16_bits(values).tolist() == bits
    assert bf16_bits(np.array([-np.nan], np.float32)).tolist() == [0x7FFF]


def test_predictions_are_f32() -> None:
    calls = plan_of(models.create("lenet5"), "predict", SAMPLES["lenet5"]).program.calls
    written = next(call for call in calls if call.op.name == "write_output")
    assert {slot.spec.dtype for slot in written.inputs} == {"f32", "i32"}


def test_masters_are_f32_and_activations_take_half() -> None:
    model = models.create("cifarnet", in_channels=3)
    half, full = (plan_of(model, "train", SAMPLES["cifarnet"], precision) for precision in ("bf16", "fp32"))
    assert half.persistent_bytes == full.persistent_bytes + full.layout.weights_bytes // 2
    assert half.program.region_bytes["weights"] == full.program.region_bytes["weights"]
    forward = [
        sum(slot.spec.nbytes for call in plan.program.calls if call.phase == "forward" for slot in call.outputs[:1])
        for plan in (half, full)
    ]
    assert forward[0] < 0.51 * forward[1]
