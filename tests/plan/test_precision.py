"""What a plan in bf16 holds in which type."""

from __future__ import annotations

import pytest

from parcnn import models, nn
from parcnn.cuda.executor import CudaExecutor
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.pointwise import Cast
from parcnn.ops.update import MAX_GROUP, Update
from parcnn.optim import SGD
from parcnn.plan.build import Plan
from parcnn.plan.describe import outline

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
    assert sum(isinstance(call.op, ConvWgrad) for call in calls) == len(
        [w for w in models.create(name, in_channels=SAMPLES[name][0]).named_variables() if w[1].data.ndim > 1]
    )


def test_filters_are_cast_once_in_groups() -> None:
    layers = [nn.Conv2d(8, 8, 1) for _ in range(MAX_GROUP + 3)]
    calls = plan_of(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 4)), "train", (8, 4, 4)).program.calls
    casts = [call for call in calls if isinstance(call.op, Cast)]
    assert [len(call.inputs) for call in casts] == [MAX_GROUP, 4]
    assert {slot.region for call in casts for slot in call.inputs} == {"weights"}
    first_convolution = next(i for i, call in enumerate(calls) if isinstance(call.op, ConvFprop))
    assert all(calls.index(call) < first_convolution for call in casts)


def test_predictions_are_f32() -> None:
    calls = plan_of(models.create("lenet5"), "predict", SAMPLES["lenet5"]).program.calls
    written = next(call for call in calls if call.op.name == "write_output")
    assert {slot.spec.dtype for slot in written.inputs} == {"f32", "i32"}


def test_masters_are_f32_and_activations_take_half() -> None:
    model = models.create("cifarnet", in_channels=3)
    half, full = (plan_of(model, "train", SAMPLES["cifarnet"], precision) for precision in ("bf16", "fp32"))
    assert half.persistent_bytes == full.persistent_bytes
    forward = [
        sum(slot.spec.nbytes for call in plan.program.calls if call.phase == "forward" for slot in call.outputs[:1])
        for plan in (half, full)
    ]
    assert forward[0] < 0.51 * forward[1]
