"""A plan as people read it."""

from __future__ import annotations

import pytest

from parcnn import models, nn
from parcnn.cpu import CpuExecutor
from parcnn.optim import SGD
from parcnn.plan.build import Plan
from parcnn.plan.describe import bytes_moved, describe, flops, outline
from parcnn.plan.options import Options

EXECUTOR = CpuExecutor(threads=1)
EXECUTOR.concurrent = True  # so that plans schedule as they do for a GPU


def lenet5(mode: str, batch: int = 3, **options: bool) -> Plan:
    return outline(
        models.create("lenet5", in_channels=1),
        mode=mode,
        batch=batch,
        sample=(1, 28, 28),
        executor=EXECUTOR,
        loss=nn.CrossEntropyLoss(),
        optimizer=SGD(0.1, momentum=0.9),
        options=Options(**options),
    )


def test_shapes_are_those_that_users_see() -> None:
    shapes = {(row.layer, row.op): row.shape for row in describe(lenet5("train"), EXECUTOR)}
    assert shapes["", "gather_batch"] == (3, 1, 28, 28)
    assert shapes["conv1", "conv_fprop"] == (3, 6, 14, 14)  # NCHW, after the pool
    assert shapes["conv2", "conv_wgrad"] == (16, 6, 5, 5)  # KCRS
    assert shapes["fc1", "conv_fprop"] == (3, 120)
    assert shapes["optimizer", "sgd_update"] == ()


def test_flops_are_counted_by_hand() -> None:
    forward = 3 * 2 * (28 * 28 * 6 * 25 + 10 * 10 * 16 * 6 * 25 + 400 * 120 + 120 * 84 + 84 * 10)
    rows = [row for row in describe(lenet5("predict"), EXECUTOR) if row.op == "conv_fprop"]
    assert sum(row.flops for row in rows) == forward
    assert flops(lenet5("predict")) == forward
    # Each layer's gradients cost twice its forward, but nothing is sent below the first one.
    convolutions = [row for row in describe(lenet5("train"), EXECUTOR) if row.op.startswith("conv_")]
    assert sum(row.flops for row in convolutions) == 3 * forward - 3 * 2 * 28 * 28 * 6 * 25


def test_fusion_moves_fewer_bytes_for_the_same_convolutions() -> None:
    fused, unfused = lenet5("train"), lenet5("train", fuse=False)
    assert len(describe(fused, EXECUTOR)) < len(describe(unfused, EXECUTOR))
    assert bytes_moved(fused) < bytes_moved(unfused)
    convolutions = [sum(r.flops for r in describe(p, EXECUTOR) if r.op.startswith("conv_")) for p in (fused, unfused)]
    assert convolutions[0] == convolutions[1]


def test_places_lie_in_the_arena() -> None:
    plan = lenet5("train")
    rows = describe(plan, EXECUTOR)
    offsets = [row.place for row in rows if isinstance(row.place, int)]
    assert len(offsets) > 10
    assert all(0 <= offset < plan.arena_bytes for offset in offsets)
    assert {row.place for row in rows if isinstance(row.place, str)} == {"weights", "state"}
    assert {row.stream for row in rows} == {0, 1, 2}


def test_the_data_set_does_not_count() -> None:
    """The outline's peak is that of a plan on a real data set."""
    from parcnn import data
    from parcnn.train import Trainer

    train = data.load("digits", "train")
    trainer = Trainer(models.create("lenet5", in_channels=1), SGD(0.1, momentum=0.9), batch_size=3, device=EXECUTOR)
    assert trainer.plan("train", train).peak_bytes == lenet5("train").peak_bytes


@pytest.mark.parametrize("mode", ["train", "eval", "predict"])
def test_every_call_has_a_kernel(mode: str) -> None:
    assert all(row.kernel and row.bytes > 0 for row in describe(lenet5(mode), EXECUTOR))
