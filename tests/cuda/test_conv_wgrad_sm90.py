"""bf16 filter gradient on Hopper's tensor cores: on the host's emulation and the null driver, and on the device.

Where the operands are small integers every sum is exact in fp32, so the kernels must give the oracle's very numbers.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import numpy as np
import pytest

from parcnn.cuda.executor import CudaExecutor
from parcnn.cuda.kernels import REGISTRY, Registry, conv_mma_wgrad, conv_unpool, conv_wgrad_sm90
from parcnn.cuda.kernels.conv_common import Conv, Forced
from parcnn.cuda.kernels.conv_wgrad_sm90_tiles import FORMS, MAX_STAGES, WINDOW_WIDTH, Form, Variant, fit, line_of
from parcnn.cuda.launch import Device
from parcnn.ops.base import Spec
from parcnn.ops.conv import ConvFprop, ConvWgrad
from parcnn.ops.program import Call, Executor, Slot
from tests.cuda.bf16 import from_bits, to_bits
from tests.cuda.compare import MakeExecutor, emulates, listing, makers, places
from tests.cuda.conv_problems import on_cpu, random_of
from tests.cuda.test_conv_sm90 import PROBLEMS, Problem
from tests.op_runner import run_op

H200 = Device("H200", "sm_90a", 132)
make_fixture = makers(listing(conv_unpool.variants()))
KINDS = ("bare", "bias", "pooled")

# Beside those of the forward convolution: more taps than a window has, and images that it fits badly.
MORE = {
    "7x7": Problem(2, 17, 9, 16, 72, 7, 7, (3, 3, 3, 3)),
    "column of taps": Problem(3, 9, 14, 64, 64, 4, 1, (1, 0, 2, 0)),
    "row of taps": Problem(3, 9, 14, 24, 64, 1, 5, (0, 2, 0, 2)),
    "one image, odd height": Problem(1, 7, 7, 64, 64),
    "odd images": Problem(7, 7, 7, 72, 64),
    "deep": Problem(2, 4, 4, 512, 320),
    "stride 2, 7x6": Problem(3, 19, 14, 24, 72, 7, 6, (3, 2, 3, 3), (2, 2)),
    "strides 1 and 2": Problem(5, 9, 22, 64, 64, 3, 5, (1, 2, 1, 2), (1, 2)),
    "strides 4 and 2": Problem(2, 17, 19, 72, 64, 5, 3, (2, 1, 2, 1), (4, 2)),
    "a row, stride 2": Problem(20, 1, 15, 64, 64, 1, 5, (0, 2, 0, 2), (2, 2)),
    "wide and deep pointwise": Problem(33, 7, 7, 320, 520, 1, 1, (0, 0, 0, 0)),
}
ALL = {**PROBLEMS, **MORE}


def op_of(problem: Problem, kind: str) -> ConvWgrad:
    geometry = {"stride": problem.stride, "pad": problem.pad, "dilation": problem.dilation}
    pool = {"pooled": "max", "mean": "avg"}.get(kind)
    return ConvWgrad(**geometry, filter=(problem.r, problem.s), bias=kind != "bare", pool=pool)


def has(problem: Problem, kind: str) -> bool:
    return min(op_of(problem, kind).pooled_hw(problem.h, problem.w, problem.r, problem.s)) > 0


CASES = [(name, kind) for name, problem in ALL.items() for kind in KINDS if has(problem, kind)]
CASES += [("few channels", "mean"), ("odd blocks of channels", "mean")]
EMULATED = ("64 channels", "few channels", "7x7", "stride 2", "many small images", "dilated", "pointwise", "deep")
cases = pytest.mark.parametrize(("name", "kind"), CASES, ids=[" ".join(case) for case in CASES])


def operands_of(problem: Problem, kind: str, random: np.random.Generator, *, integers: bool) -> list[np.ndarray]:
    """x, dy (floats that bf16 has: integers -4..4, or standard normal) and where there is a pool its indices."""
    op = op_of(problem, kind)
    out = (problem.n, *op.pooled_hw(problem.h, problem.w, problem.r, problem.s), problem.k)

    def tensor(*shape: int) -> np.ndarray:
        if integers:
            return random.integers(-4, 5, shape).astype(np.float64)
        return from_bits(to_bits(random.standard_normal(shape)))

    tensors = [tensor(problem.n, problem.h, problem.w, problem.c), tensor(*out)]
    return [*tensors, *([random.integers(0, 4, out).astype(np.uint8)] if op.pool == "max" else [])]


def bits_of(operands: list[np.ndarray]) -> list[np.ndarray]:
    """Operands as the device takes them."""
    return [a if a.dtype == np.uint8 else to_bits(a) for a in operands]


def call_of(op: ConvWgrad, operands: list[np.ndarray]) -> Call:
    """The call as a launcher sees it, in no place, with as much scratch as any variant asks for."""
    x, dy, *idx = operands
    inputs = (Spec(x.shape, "bf16"), Spec(dy.shape, "bf16"), *(Spec(i.shape, "u2") for i in idx))
    slots = [tuple(Slot(spec, "arena") for spec in specs) for specs in (inputs, op.infer(*inputs))]
    bare = Call(op, *slots)
    scratch = max(
        conv_wgrad_sm90.workspace_bytes(op, inputs, bare.output_specs, H200, v)
        for v in conv_wgrad_sm90.candidates(bare, H200)
    )
    return Call(op, *slots, Slot(Spec((scratch,), "u8"), "arena"))


def forced(executor: CudaExecutor, variant: Variant, monkeypatch: pytest.MonkeyPatch) -> CudaExecutor:
    monkeypatch.setattr(executor, "registry", Registry([Forced(conv_wgrad_sm90, variant)], REGISTRY.folder))
    return executor


def check_exact(
    executor: Executor, op: ConvWgrad, operands: list[np.ndarray], true: tuple[np.ndarray, ...], where: object = ""
) -> None:
    for name, got, wanted in zip(("dw", "db"), run_op(executor, op, bits_of(operands)), true, strict=False):
        assert got.dtype == np.float32
        wrong = np.argwhere(~(got == wanted))
        assert not wrong.size, (
            f"{where} {name}: {len(wrong)} of {got.size} differ, first at {wrong[0]}: "
            f"{got[tuple(wrong[0])]}, not {wanted[tuple(wrong[0])]}"
        )


def of_every_form(problem: Problem, kind: str, device: Device) -> list[Variant]:
    """Variants of each form that takes the problem, in tiles that hang over, with shares of whole items, of many and of a
    part, few stages and many."""
    op = op_of(problem, kind)
    x = Spec((problem.n, problem.h, problem.w, problem.c), "bf16")
    conv = Conv.of(op, x, Spec((problem.k, problem.r, problem.s, problem.c)))
    strides_fit = problem.stride[0] <= min(2, problem.h) and problem.stride[1] <= min(2, problem.w)
    windows = strides_fit and problem.dilation == (1, 1) and problem.r * problem.s > 1
    found = []
    for form in FORMS:
        if (form.window and not windows) or (form.cb == 32 and problem.c > 32):
            continue
        _, q = op.pooled_hw(problem.h, problem.w, problem.r, problem.s)
        q *= 1 if op.pool is None else 2
        windows_of = [(8, 4, 1), (8, 14, 1), (8, 1, 2), (8, 3, 2), (q, 1, 1), (q, 3, 1)]
        tiles = windows_of if form.window else [(1, 1, 16), (8, 2, 2), (5, 3, 16)]
        for i, tile in enumerate(tiles):
            even = fit(conv, op.bias, form, tile, device)
            if not even:
                continue
            line = line_of(conv, op.bias, even)
            found += [even, replace(even, stages=2)]
            if form.adders > 1:
                continue
            found.append(replace(even, share=line.longest + 1 if i % 2 else ceil(line.tiles / 40)))
            if line.taps_alone:
                found.append(replace(even, share=ceil(line.tiles_each / (1, 3, 7)[i % 3]), aligned=True))
    return found


# Without a GPU


@cases
def test_launches_are_right(null: CudaExecutor, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    """Each candidate compiles, and keeps to its parameter table, its tensor maps' rules, the device and the plan's memory."""
    op = op_of(ALL[name], kind)
    operands = operands_of(ALL[name], kind, random_of(name, kind), integers=True)
    listed = {*conv_wgrad_sm90.variants(), *conv_unpool.variants()}
    call = call_of(op, operands)
    found = conv_wgrad_sm90.candidates(call, H200)
    assert found
    for variant in found:
        assert {launch.kernel for launch in conv_wgrad_sm90.launches(call, H200, variant)} <= listed
        got = run_op(forced(null, variant, monkeypatch), op, bits_of(operands))
        assert all(result.dtype == np.float32 for result in got)


def test_launches_of_every_form_are_right(null: CudaExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[Form] = set()
    for name in ("few channels", "odd blocks of channels", "stride 2, 7x6", "7x7", "wide and deep pointwise"):
        operands = operands_of(ALL[name], "bias", random_of(name), integers=True)
        for variant in of_every_form(ALL[name], "bias", H200):
            run_op(forced(null, variant, monkeypatch), op_of(ALL[name], "bias"), bits_of(operands))
            seen.add(variant.form)
    assert seen == set(FORMS)


def test_blocks_fill_the_device_and_none_is_empty() -> None:
    for name, kind in CASES:
        op = op_of(ALL[name], kind)
        call = call_of(op, operands_of(ALL[name], kind, random_of(), integers=True))
        conv = Conv.of(op, call.inputs[0].spec, call.outputs[0].spec)
        for variant in conv_wgrad_sm90.candidates(call, H200):
            line = line_of(conv, op.bias, variant)
            assert 1 <= variant.share <= line.tiles
            assert line.blocks <= H200.sm_count
            assert variant.form.window or np.prod(variant.tile) % 16 == 0
            assert 2 <= variant.stages <= MAX_STAGES


def test_windows_of_odd_heights_are_of_two_images() -> None:
    """Of one image a step takes two rows: an odd one would read behind its stage, and behind shared memory in the last."""
    conv = Conv.of(op_of(ALL["64 channels"], "bare"), Spec((5, 13, 11, 64), "bf16"), Spec((64, 3, 3, 64)))
    for height, images, fits in ((3, 1, False), (4, 1, True), (3, 2, True)):
        found = fit(conv, False, FORMS[0], (WINDOW_WIDTH, height, images), H200)
        assert (found is not None) == fits, (height, images)


def test_the_registry_of_hopper_finds_it(null: CudaExecutor) -> None:
    op = ConvWgrad(pad=(1, 1, 1, 1), filter=(3, 3), bias=True)
    tensors = Spec((200, 8, 8, 64), "bf16"), Spec((200, 8, 8, 64), "bf16")
    assert null.registry.find(op, tensors, H200) is conv_wgrad_sm90
    assert null.registry.find(op, (Spec((4, 8, 8, 64)), Spec((4, 8, 8, 64))), H200) is not conv_wgrad_sm90
    assert CudaExecutor.null("sm_89").registry.find(op, tensors, H200) is conv_mma_wgrad


@pytest.mark.parametrize(("dilation", "pixels", "runs"), [(1, 438, True), (2, 376, False)])
def test_huge_filters_of_huge_images(null: CudaExecutor, dilation: int, pixels: int, runs: bool) -> None:
    """Windows of nine taps have few enough tiles, single taps have not: then another family runs it."""
    op = ConvWgrad(dilation=(dilation,) * 2, filter=(63, 63), bias=True)
    x, dy = Spec((900, 500, 500, 8), "bf16"), Spec((900, pixels, pixels, 8), "bf16")
    reason = conv_wgrad_sm90.supports(op, (x, dy))
    call = Call(op, (Slot(x, "arena"), Slot(dy, "arena")), tuple(Slot(spec, "arena") for spec in op.infer(x, dy)))
    assert bool(conv_wgrad_sm90.candidates(call, H200)) == (reason is None) == runs
    assert runs or "tiles" in str(reason)
    assert null.registry.find(op, (x, dy), H200) is conv_mma_wgrad
    odd = Spec((900, 500, 500, 5), "bf16")
    assert null.registry.find(op, (odd, dy), H200).supports(op, (odd, dy)) is None


def test_gradients_of_bf16_tensors_are_f32() -> None:
    op = ConvWgrad(pad=(1, 1, 1, 1), filter=(3, 3), bias=True)
    for dtype, wanted in (("bf16", "f32"), ("f32", "f32"), ("f64", "f64")):
        tensors = Spec((4, 8, 8, 16), dtype), Spec((4, 8, 8, 24), dtype)
        assert op.infer(*tensors) == (Spec((24, 3, 3, 16), wanted), Spec((24,), wanted))


def test_what_it_refuses() -> None:
    x, dy = Spec((2, 8, 8, 64), "bf16"), Spec((2, 6, 6, 64), "bf16")
    assert conv_wgrad_sm90.supports(ConvWgrad(filter=(3, 3)), (x, dy)) is None
    refused = [
        (ConvWgrad(filter=(3, 3)), (Spec((2, 8, 8, 64)), dy), "bf16"),
        (ConvWgrad(filter=(3, 3)), (x, Spec((2, 6, 6, 64))), "bf16"),
        (ConvWgrad(filter=(3, 3), stride=(1, 9)), (x, dy), "9"),
        (ConvWgrad(filter=(3, 3)), (Spec((2, 8, 8, 20), "bf16"), dy), "multiples of 8"),
        (ConvWgrad(filter=(3, 3)), (x, Spec((2, 6, 6, 10), "bf16")), "multiples of 8"),
        (ConvWgrad(filter=(3, 3), pad=(2**14, 0, 0, 0)), (x, dy), "16384"),
        (ConvWgrad(filter=(3, 3)), (Spec((0, 8, 8, 64), "bf16"), Spec((0, 6, 6, 64), "bf16")), "no pixels"),
        (ConvWgrad(filter=(3, 3)), (Spec((2**20, 8, 8, 64), "bf16"), dy), "2**31"),
        (ConvFprop(), (x, Spec((64, 3, 3, 64), "bf16")), "not a convolution's filter gradient"),
    ]
    for op, inputs, reason in refused:
        assert reason in (conv_wgrad_sm90.supports(op, inputs) or "supported"), op


# On the host's emulation and the device


@places("name kind", CASES, lambda name, kind: name in EMULATED and kind != "bare")
def test_every_candidate_is_exact(make: MakeExecutor, name: str, kind: str) -> None:
    op, operands = op_of(ALL[name], kind), operands_of(ALL[name], kind, random_of(name, kind), integers=True)
    true = on_cpu(op, operands)
    for variant in conv_wgrad_sm90.candidates(call_of(op, operands), H200)[: 1 if emulates(make) else None]:
        check_exact(make([Forced(conv_wgrad_sm90, variant)]), op, operands, true, variant)


@places(
    "name kind",
    [
        (name, kind)
        for name in (
            "few channels",
            "32 channels, 5x5",
            "odd blocks of channels",
            "asymmetric",
            "stride 2",
            "stride 2, 7x6",
            "strides 1 and 2",
            "strides 4 and 2",
            "dilated",
            "pointwise",
            "wide and deep pointwise",
            "7x7",
        )
        for kind in KINDS
    ],
    lambda name, kind: (name, kind) in (("few channels", "bare"), ("pointwise", "bias")),
)
def test_every_form_is_exact(make: MakeExecutor, name: str, kind: str) -> None:
    """In the emulation a tile of each form."""
    op, operands = op_of(ALL[name], kind), operands_of(ALL[name], kind, random_of(name, kind), integers=True)
    true, found = on_cpu(op, operands), of_every_form(ALL[name], kind, H200)
    assert len(found) > 20
    for variant in {v.form: v for v in found}.values() if emulates(make) else found:
        check_exact(make([Forced(conv_wgrad_sm90, variant)]), op, operands, true, variant)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(200))
def test_random_problems(cuda: CudaExecutor, seed: int) -> None:
    """The default choice on odd problems."""
    random = np.random.default_rng(seed)
    r, s = random.choice([1, 3, 5], 2) if seed % 3 else [random.choice([1, 3, 5])] * 2
    n, h, w = random.integers(1, 8), random.integers(1, 34), random.integers(1, 34)
    pad = random.integers(0, 3, 4) if seed % 2 else [random.integers(0, 3)] * 4
    stride = random.choice([1, 2, 3], 2) if seed % 4 == 0 else (1, 1)
    c, k = random.choice([8, 24, 32, 64, 72, 256]), random.choice([8, 16, 64, 72, 128, 256])
    numbers = [int(v) for v in (n, h, w, c, k, r, s)]
    problem = Problem(*numbers, tuple(map(int, pad)), tuple(map(int, stride)))
    for kind in KINDS:
        if has(problem, kind):
            op, operands = op_of(problem, kind), operands_of(problem, kind, random, integers=True)
            check_exact(cuda, op, operands, on_cpu(op, operands), f"{problem} {kind}")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["few channels", "64 channels", "many channels", "pointwise", "stride 2", "7x7"])
def test_real_numbers(cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    """A result errs by 2**-19 of the sum of its terms' magnitudes, which fp32 sums keep to."""
    op, operands = op_of(ALL[name], kind), operands_of(ALL[name], kind, random_of(name, kind), integers=False)
    true, magnitude = (on_cpu(op, [f(operands[0]), f(operands[1]), *operands[2:]]) for f in (np.asarray, np.abs))
    for variant in conv_wgrad_sm90.candidates(call_of(op, operands), cuda.device):
        got = run_op(forced(cuda, variant, monkeypatch), op, bits_of(operands))
        for result, wanted, scale in zip(got, true, magnitude, strict=True):
            assert np.isfinite(result).all()
            assert (np.abs(result - wanted) <= 2.0**-19 * scale).all(), variant


@places("kind", [(kind,) for kind in KINDS], lambda kind: True)
def test_not_a_number_and_infinity_show(make: MakeExecutor, kind: str) -> None:
    """Wherever float64 has one, the device has no finite number."""
    problem = Problem(3, 13, 11, 64, 64)
    op, operands = op_of(problem, kind), operands_of(problem, kind, random_of(kind), integers=True)
    operands[0][0, 3, 4, 5], operands[0][2, 6, 6, 9] = np.nan, np.inf
    operands[1][1, 2, 3, 7] = -np.inf
    true = on_cpu(op, operands)
    for variant in conv_wgrad_sm90.candidates(call_of(op, operands), H200)[: 1 if emulates(make) else None]:
        got = run_op(make([Forced(conv_wgrad_sm90, variant)]), op, bits_of(operands))
        for result, wanted in zip(got, true, strict=True):
            assert not np.isfinite(wanted).all()
            assert not np.isfinite(result[~np.isfinite(wanted)]).any(), variant
            same = np.isfinite(result)
            assert (result[same] == wanted[same]).all(), variant


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bare", "bias"])
@pytest.mark.parametrize("form", [form for form in FORMS if form.sharers > 1], ids=str)
def test_more_clusters_than_run_at_once(
    cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, form: Form, kind: str
) -> None:
    """Forty times, in the same memory: blocks that share find each other, and let each other go."""
    problem = Problem(64, 7, 7, 520, 2048, 1, 1, (0, 0, 0, 0))
    op, operands = op_of(problem, kind), operands_of(problem, kind, random_of(kind), integers=True)
    conv = Conv.of(op, Spec((64, 7, 7, 520), "bf16"), Spec((2048, 1, 1, 520)))
    even = fit(conv, op.bias, form, (1, 1, 64), cuda.device)
    assert even
    variant = replace(even, share=17, aligned=True)
    assert line_of(conv, op.bias, variant).blocks * form.sharers > cuda.device.sm_count
    got = run_op(forced(cuda, variant, monkeypatch), op, bits_of(operands), steps=40)
    for result, wanted in zip(got, on_cpu(op, operands), strict=False):
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "problem",
    [
        Problem(1500, 5, 6, 64, 64),
        Problem(900, 7, 7, 128, 256),
        Problem(900, 9, 8, 24, 64),
        Problem(700, 8, 8, 256, 64, 1, 1, (0, 0, 0, 0)),
        Problem(500, 9, 9, 64, 72, stride=(2, 2)),
    ],
    ids=str,
)
def test_many_tiles_give_the_same_bits_each_time(
    cuda: CudaExecutor, monkeypatch: pytest.MonkeyPatch, problem: Problem
) -> None:
    """Splits of many tiles, where rings go round often: eight runs of each candidate, and exact on integers."""
    op, operands = op_of(problem, "bias"), operands_of(problem, "bias", random_of(problem), integers=False)
    exact = operands_of(problem, "bias", random_of(problem), integers=True)
    true = on_cpu(op, exact)
    for variant in conv_wgrad_sm90.candidates(call_of(op, operands), cuda.device):
        executor = forced(cuda, variant, monkeypatch)
        first = run_op(executor, op, bits_of(operands))
        for _ in range(7):
            for again, once in zip(run_op(executor, op, bits_of(operands)), first, strict=True):
                np.testing.assert_array_equal(again, once, err_msg=str(variant))
        check_exact(executor, op, exact, true, variant)
