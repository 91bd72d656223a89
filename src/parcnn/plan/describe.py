"""A plan as people read it: one row a call, and a plan made for looking at, without a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from parcnn.ops.base import Spec, accumulator
from parcnn.ops.program import Call, Executor
from parcnn.plan.build import Feed, Plan, build
from parcnn.plan.optimizer import Optimizer
from parcnn.plan.options import Options
from parcnn.plan.precision import tensor_type
from parcnn.plan.trace import Tensor, physical
from parcnn.plan.variable import Layout


@dataclass(frozen=True)
class CallRow:
    """One call of a program.

    shape: of its first output, as users see it: NCHW, filters KCRS, and (N, features) where the image is 1x1; () of a call
    that only overwrites. Channels of zeros (`parcnn.plan.channels`) count, here and in what follows.
    place: byte offset in the arena of what it writes first, or the region where that lies.
    flops: floating-point operations, a multiply-add being two. bytes: fewest that can be moved. after: calls it waits for.
    """

    layer: str
    op: str
    phase: str
    shape: tuple[int, ...]
    kernel: str
    flops: int
    bytes: int
    place: int | str
    workspace_bytes: int
    stream: int
    after: tuple[int, ...]


def describe(plan: Plan, executor: Executor) -> list[CallRow]:
    """The calls of a plan in their order; `executor` names the kernels."""
    return [_row(call, executor) for call in plan.program.calls]


def flops(plan: Plan) -> int:
    """Floating-point operations of one step."""
    return sum(call.op.flops(call.input_specs, call.output_specs) for call in plan.program.calls)


def bytes_moved(plan: Plan) -> int:
    """Fewest bytes that the calls of one step can move."""
    return sum(call.op.bytes(call.input_specs, call.output_specs) for call in plan.program.calls)


def outline(
    model: Any,
    *,
    mode: str,
    batch: int,
    sample: tuple[int, ...],
    executor: Executor,
    loss: Callable[[Tensor, Tensor], Any] | None = None,
    optimizer: Optimizer | None = None,
    options: Options | None = None,
    precision: str = "fp32",
) -> Plan:
    """The plan of `model` on inputs of shape `sample`, (C, H, W) or (F,), as it would be on a data set of one uint8 image.

    Targets are class numbers. The data set does not count in a plan's memory, so this plan takes what any other of that
    batch takes. Raises ArgumentError for an unknown precision, and what `parcnn.plan.build.build` raises.
    """
    layout = Layout.of(model.named_variables(), accumulator(tensor_type(precision)))
    if optimizer is not None:
        layout.add_state(optimizer)
    feed = Feed(
        sample=sample,
        images=Spec((1, *physical(sample)), "u8"),
        targets=Spec((1,), "i32"),
        order=batch,
        steps=1,
        scale=(1 / 255,),
        shift=(0.0,),
    )
    return build(
        model,
        mode=mode,
        batch=batch,
        feed=feed,
        executor=executor,
        layout=layout,
        loss=loss,
        optimizer=optimizer,
        options=options,
        dtype=tensor_type(precision),
    )


def _row(call: Call, executor: Executor) -> CallRow:
    inputs, outputs = call.input_specs, call.output_specs
    shown = call.outputs[0] if call.outputs else call.written[0]
    return CallRow(
        layer=call.layer,
        op=call.op.name,
        phase=call.phase,
        shape=_as_users_see_it(shown.spec.shape) if call.outputs else (),
        kernel=executor.kernel_name(call.op, inputs, outputs),
        flops=call.op.flops(inputs, outputs),
        bytes=call.op.bytes(inputs, outputs),
        place=shown.offset if shown.region == "arena" else shown.region,
        workspace_bytes=call.workspace.spec.nbytes if call.workspace else 0,
        stream=call.stream,
        after=call.after,
    )


def _as_users_see_it(shape: tuple[int, ...]) -> tuple[int, ...]:
    """NHWC -> NCHW and KRSC -> KCRS; (N, 1, 1, F) -> (N, F)."""
    if len(shape) != 4:
        return shape
    n, h, w, c = shape
    return (n, c) if h == w == 1 else (n, c, h, w)
