"""Data on a device, and how batches are made of it."""

from __future__ import annotations

import numpy as np

from parcnn.cpu import CpuExecutor
from parcnn.cuda.executor import CudaExecutor
from parcnn.nn import CrossEntropyLoss, Flatten, Linear, Sequential
from parcnn.optim import SGD
from parcnn.plan.describe import outline
from parcnn.train.batches import DeviceData


def test_equal_channels_share_one_scale_and_shift() -> None:
    images = np.zeros((4, 24, 2, 2), np.uint8)
    data = DeviceData(CpuExecutor(1), images, np.zeros(4, int), 2, None, "f32")
    feed = data.feed((0.5,) * 24, (0.25,) * 24, 4)
    assert feed.scale == (1 / (255 * 0.25),)
    assert feed.shift == (-2.0,)
    varied = data.feed((0.5,) * 23 + (0.1,), (0.25,) * 24, 4)
    assert len(varied.scale) == len(varied.shift) == 24


def test_images_of_many_channels_have_a_plan_on_the_gpu() -> None:
    model = Sequential(Flatten(), Linear(64 * 4, 3))
    plan = outline(
        model,
        mode="train",
        batch=2,
        sample=(64, 2, 2),
        executor=CudaExecutor.null(),
        loss=CrossEntropyLoss(),
        optimizer=SGD(0.1),
    )
    assert plan.program.calls[0].op.name == "gather_batch"
