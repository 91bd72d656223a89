"""Which family runs an op: the first that can, or of those that estimate their time the fastest."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import (
    REGISTRY,
    Registry,
    conv_mma_fprop,
    conv_mma_wgrad,
    conv_padded,
    conv_sm90,
    conv_stem_sm90,
)
from parcnn.cuda.launch import Device
from parcnn.errors import UnsupportedError
from parcnn.ops.base import Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.program import Call
from tests.cuda.toy import FOLDER, ScaleAdd

H200 = Device("H200", "sm_90a", 132)
INPUTS = (Spec((7,)),)


def family(name: str, refuses: str | None = None, cost: float | None = None) -> Any:
    def supports(op: Op, inputs: tuple[Spec, ...]) -> str | None:
        return refuses

    def cost_us(call: Call, device: Device) -> float:
        assert device == H200
        assert call.input_specs == call.output_specs == INPUTS
        return cost or 0.0

    nothing = {key: lambda *_: None for key in ("workspace_bytes", "launches", "variants")}
    more = {} if cost is None else {"cost_us": cost_us}
    return SimpleNamespace(OPS=(ScaleAdd,), supports=supports, __name__=name, **nothing, **more)


@dataclass(frozen=True)
class Case:
    families: tuple[Any, ...]
    taken: str


@pytest.mark.parametrize(
    "case",
    [
        Case((family("a"), family("b")), "a"),
        Case((family("a", "no"), family("b"), family("c")), "b"),
        Case((family("a", cost=3.0), family("b", cost=2.0), family("c", cost=2.5)), "b"),
        Case((family("a", cost=2.0), family("b", cost=2.0)), "a"),
        Case((family("a", cost=3.0), family("b", "no", cost=2.0)), "a"),
        Case((family("a"), family("b", cost=0.1)), "a"),
        Case((family("a", cost=3.0), family("b"), family("c", cost=2.0)), "c"),
    ],
    ids=[
        "first",
        "first that can",
        "fastest",
        "first of equals",
        "alone",
        "no estimate keeps its place",
        "estimates go on",
    ],
)
def test_what_is_taken(case: Case) -> None:
    assert Registry(case.families, FOLDER).find(ScaleAdd(), INPUTS, H200).__name__ == case.taken  # type: ignore[attr-defined]


def test_each_reason_is_told() -> None:
    registry = Registry([family("a", "too odd"), family("b", "too even", cost=1.0)], FOLDER)
    with pytest.raises(UnsupportedError, match=r"(?s)layer 3.*a: too odd; b: too even"):
        registry.find(ScaleAdd(), INPUTS, H200, "layer 3")


def bf16(*shape: int) -> Spec:
    return Spec(shape, "bf16")


@pytest.mark.parametrize(
    ("op", "inputs", "taken"),
    [
        (ConvFprop(pad=(1, 1, 1, 1)), (bf16(256, 28, 28, 128), bf16(128, 3, 3, 128)), conv_sm90),
        (ConvFprop(pad=(2, 2, 2, 2)), (bf16(29, 16, 16, 32), bf16(8, 4, 4, 32)), conv_mma_fprop),
        (ConvFprop(pad=(3, 3, 3, 3), stride=(2, 2)), (bf16(256, 224, 224, 3), bf16(64, 7, 7, 3)), conv_stem_sm90),
        (ConvDgrad(pad=(1, 1, 1, 1), image=(64, 64)), (bf16(64, 64, 64, 536), bf16(536, 3, 3, 44)), conv_padded),
        (ConvWgrad(pad=(2, 2, 2, 2), stride=(2, 2), filter=(5, 5)), (bf16(4, 140, 140, 8), bf16(4, 70, 70, 8)), conv_mma_wgrad),
    ],
    ids=["large", "few filters", "first layer", "odd channels", "few channels with a stride"],
)  # fmt: skip
def test_bf16_convolutions_on_hopper(op: Op, inputs: tuple[Spec, ...], taken: Any) -> None:
    """Each where it was measured to be at least 1.4 times as fast as the others."""
    assert REGISTRY.on("sm_90a").find(op, inputs, H200) is taken


@pytest.mark.parametrize("channels", [7, 8])
@pytest.mark.parametrize("images", [(0, 6, 6), (2, 2, 2)], ids=["no images", "no outputs"])
def test_what_has_no_outputs_runs(null: CudaExecutor, images: tuple[int, ...], channels: int) -> None:
    x, w = bf16(*images, channels), bf16(9, 3, 3, channels)
    assert null.kernel_name(ConvFprop(), (x, w), ConvFprop().infer(x, w)) == ""


def test_the_executor_names_what_is_taken(null: CudaExecutor) -> None:
    x, w = bf16(29, 16, 16, 32), bf16(8, 4, 4, 32)
    op = ConvFprop(pad=(2, 2, 2, 2))
    assert "conv_mma_fprop" in null.kernel_name(op, (x, w), op.infer(x, w))
    choices = null.choices(op, (x, w), op.infer(x, w))
    assert list(dict.fromkeys(choice.family for choice in choices)) == ["conv_mma_fprop", "conv_sm90", "conv_mma_lines"]
