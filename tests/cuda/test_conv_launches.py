"""What a family says that it runs, it has launches for: random convolutions, also of sizes that no oracle would take, with
pools of any window, on a GPU with much shared memory and on one with little."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from parcnn.cuda.device import SHARED_BYTES
from parcnn.cuda.kernels import REGISTRY
from parcnn.cuda.kernels.conv_common import MAX_GRID_YZ
from parcnn.cuda.launch import Device
from parcnn.ops.base import Spec
from parcnn.ops.pool import PoolWindow
from parcnn.ops.program import Call, Slot
from tests.cuda.conv_problems import Problem

SM_COUNTS = {"sm_90a": 132, "sm_86": 84}
EVERYWHERE = {
    "conv_fprop",
    "conv_dgrad",
    "conv_wgrad",
    "conv_stem",
    "conv_mma_fprop",
    "conv_mma_dgrad",
    "conv_mma_wgrad",
}
ONLY_ON = {"sm_90a": {"conv_sm90", "conv_wgrad_sm90", "conv_padded", "conv_stem_sm90"}}
EXAMPLES, MOST_VARIANTS, MOST_ELEMENTS = 400, 3, 2**31
SIDES = st.sampled_from((1, 2, 3, 7, 8, 13, 28, 31, 56, 100, 224, 500))
CHANNELS = st.sampled_from(
    (1, 2, 3, 4, 5, 7, 10, 12, *(8 * eighths for eighths in (1, 2, 3, 4, 5, 8, 9, 16, 24, 32, 75)))
)
STRIDES = st.sampled_from((1, 1, 1, 2, 2, 3, 4, 6, 8))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    r, s = draw(st.sampled_from((1, 2, 3, 3, 5, 7, 11))), draw(st.sampled_from((1, 2, 3, 3, 4, 5, 7)))
    if draw(st.booleans()):
        s = r
    stride = (draw(STRIDES),) * 2 if draw(st.booleans()) else (draw(STRIDES), draw(STRIDES))
    dilation = draw(st.sampled_from(((1, 1), (1, 1), (1, 1), (2, 2), (3, 1))))
    pad = tuple(draw(st.integers(0, r)) for _ in range(4)) if draw(st.booleans()) else (r // 2, s // 2) * 2
    n, h, w = draw(st.sampled_from((1, 2, 5, 64, 300, 2000))), draw(SIDES), draw(SIDES)
    return Problem(n, h, w, draw(CHANNELS), draw(CHANNELS), r, s, pad, stride, dilation)


@st.composite
def operations(draw: st.DrawFn) -> tuple[Any, tuple[Spec, ...]]:
    """An op of whatever epilogue, and its operands."""
    problem, dtype = draw(problems().filter(lambda p: p.has(None))), draw(st.sampled_from(("bf16", "bf16", "f32")))
    kind, pool = draw(st.sampled_from(("fprop", "dgrad", "wgrad"))), draw(st.sampled_from((None, "max", "avg")))
    x, w = (
        Spec(shape, dtype)
        for shape in ((problem.n, problem.h, problem.w, problem.c), (problem.k, problem.r, problem.s, problem.c))
    )
    more: dict[str, Any] = {"bias": draw(st.booleans())} if kind != "dgrad" else {}
    if kind == "fprop":
        more["act"] = draw(st.sampled_from((None, "relu", "gelu")))
        if pool and draw(st.booleans()):
            window = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
            strides, pads = (
                (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
                tuple(draw(st.integers(0, k // 2)) for k in window),
            )
            more["window"] = PoolWindow(pool, window, strides, pads)
        more["moments"] = not pool and draw(st.booleans())
        more["indices"] = draw(st.booleans())
    if kind == "dgrad":
        more |= {"act": draw(st.sampled_from((None, "relu", "tanh"))), "add": draw(st.booleans())}
    op = problem.op(kind, pool, **more)
    bias = [Spec((problem.k,), "f32")] * more.get("bias", False)
    if kind == "fprop":
        return op, (x, w, *bias)
    y = problem.op("fprop", pool).infer(x, w)[0]
    idx = [Spec(y.shape, "u2")] * (pool == "max")
    if kind == "dgrad":
        return op, (y, w, *idx, *[x] * (op.act is not None), *[x] * op.add)
    return op, (x, y, *idx)


@pytest.mark.parametrize("arch", SM_COUNTS)
def test_what_a_family_takes_it_launches(arch: str) -> None:
    device = Device("a GPU", arch, SM_COUNTS[arch], shared_bytes_per_block=SHARED_BYTES[arch])
    registry = REGISTRY.on(arch)
    listed = set(registry.variants())
    taken: set[str] = set()

    @seeded(17)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operations())
    def run(drawn: tuple[Any, tuple[Spec, ...]]) -> None:
        op, inputs = drawn
        outputs = op.infer(*inputs)
        if any(not spec.size or spec.size >= MOST_ELEMENTS for spec in (*inputs, *outputs)):
            return
        call = Call(op, *(tuple(Slot(spec, "arena") for spec in specs) for specs in (inputs, outputs)))
        for name, family in registry.tunable(op, inputs).items():
            taken.add(name)
            for variant in (None, *family.candidates(call, device)[:MOST_VARIANTS]):
                scratch = family.workspace_bytes(op, inputs, outputs, device, variant)
                workspace = Slot(Spec((scratch,), "u8"), "arena") if scratch else None
                launches = family.launches(Call(op, call.inputs, call.outputs, workspace=workspace), device, variant)
                assert launches, (name, variant)
                for launch in launches:
                    assert launch.kernel in listed, (name, variant)
                    assert launch.shared_bytes <= device.shared_bytes_per_block, (name, variant)
                    assert min(launch.grid) > 0, (name, variant)
                    assert max(launch.grid[1:]) <= MAX_GRID_YZ, (name, variant)

    run()
    assert taken >= EVERYWHERE | ONLY_ON.get(arch, set())
