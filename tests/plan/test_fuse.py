"""What becomes one call, and what must not; how updates are grouped."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from parcnn import cat, nn
from parcnn.cpu import CpuExecutor
from parcnn.nn import functional as F
from parcnn.ops.base import ACTIVATIONS, FROM_OUTPUT, Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop
from parcnn.ops.norm import BatchNormDgrad
from parcnn.ops.pointwise import Act, ActDgrad
from parcnn.ops.pool import PoolDgrad, PoolFprop
from parcnn.ops.program import Call
from parcnn.ops.update import MAX_GROUP, Update
from parcnn.plan.options import Options
from parcnn.plan.trace import Tensor
from tests.plan.step import check_gradients, make_plan, step_of

ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": F.tanh,
    "sigmoid": F.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, "tanh"),
}


class Net(nn.Module):
    """What lies between a convolution and the linear layer that follows."""

    def __init__(self, middle: Callable[[Net, Tensor], Tensor], features: int) -> None:
        super().__init__()
        self.middle = middle
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.other = nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.head = nn.Linear(features, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self, self.conv(x)).flatten(1))


def _calls(cpu: CpuExecutor, middle: Callable[[Net, Tensor], Tensor], mode: str, features: int) -> list[Call]:
    images, targets = np.random.default_rng(0).standard_normal((3, 2, 5, 7)), np.zeros(3, np.int32)
    model = Net(middle, features)
    if mode == "train":
        step = step_of(cpu, model, images, targets)
        check_gradients(step, model)
        return list(step.plan.program.calls)
    return list(make_plan(cpu, model, images, targets, mode=mode).program.calls)


def _forward(calls: list[Call]) -> list[str]:
    """Names of the ops between the batch and the head, with what is fused into them."""
    forward = [c.op for c in calls if c.phase == "forward" and c.layer not in ("head", "loss", "output")]
    return [_describe(op) for op in forward]


def _describe(op: Op) -> str:
    attributes = [str(getattr(op, a)) for a in ("act", "pool", "kind") if getattr(op, a, None)]
    kept = isinstance(op, ConvFprop) and op.keep
    return " ".join([op.name, *attributes, *["add"] * getattr(op, "add", False), *["kept"] * kept])


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_convolution_and_activation(cpu: CpuExecutor, kind: str, mode: str) -> None:
    """In training the activation's input is kept where the derivative does not follow from the output."""
    found = _forward(_calls(cpu, lambda net, x: ACT[kind](x), mode, 105))
    assert found == [f"conv_fprop {kind}" + " kept" * (kind not in FROM_OUTPUT and mode == "train")]


@pytest.mark.parametrize("kind", ["gelu", "silu"])
def test_the_error_passes_an_activation_by_its_input(cpu: CpuExecutor, kind: str) -> None:
    """The convolution above multiplies by the derivative at what the one below kept."""
    calls = _calls(cpu, lambda net, x: net.other(ACT[kind](x)), "train", 105)
    (below,) = (call for call in calls if isinstance(call.op, ConvFprop) and call.op.keep)
    (dgrad,) = (call for call in calls if isinstance(call.op, ConvDgrad) and call.op.act)
    assert isinstance(dgrad.op, ConvDgrad)
    assert dgrad.op.act == kind
    assert dgrad.op.operands(dgrad.inputs)["saved"] == below.outputs[-1]
    assert not [call for call in calls if isinstance(call.op, Act | ActDgrad)]


def test_nothing_is_kept_that_no_gradient_asks_for(cpu: CpuExecutor) -> None:
    model = Net(lambda net, x: F.gelu(x), 105)
    model.conv.requires_grad_(False)
    step = step_of(cpu, model, np.random.default_rng(0).standard_normal((3, 2, 5, 7)), np.zeros(3, np.int32))
    assert _forward(list(step.plan.program.calls)) == ["conv_fprop gelu"]


@pytest.mark.parametrize("kind", ["relu", "gelu"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("act_first", [True, False])
def test_convolution_activation_and_pool(cpu: CpuExecutor, kind: str, mode: str, pool: str, act_first: bool) -> None:
    reduce = F.max_pool2d if pool == "max" else F.avg_pool2d

    def middle(net: Net, x: Tensor) -> Tensor:
        return reduce(ACT[kind](x), 2) if act_first else ACT[kind](reduce(x, 2))

    found = _forward(_calls(cpu, middle, mode, 18))
    one = [f"conv_fprop {kind} {pool}"]
    act_then_pool = {
        ("relu", "train", "max"): one,
        ("relu", "train", "avg"): ["conv_fprop relu", "pool_fprop avg"],  # the kept output is the average
        ("gelu", "train", "max"): ["conv_fprop", "pool_fprop gelu max"],
        ("gelu", "train", "avg"): ["conv_fprop gelu kept", "pool_fprop avg"],
    }
    pool_then_act = {
        ("relu", "train", "max"): one,  # a maximum and a monotone function commute
        ("relu", "eval", "max"): one,
        ("relu", "eval", "avg"): ["conv_fprop avg", "act relu"],  # an average does not
        ("relu", "train", "avg"): ["conv_fprop avg", "act relu"],
    }
    expected = (act_then_pool if act_first else pool_then_act).get(
        (kind, mode, pool), one if act_first else [f"conv_fprop {pool}", f"act {kind}"]
    )
    assert found == expected


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_winners_are_named_where_a_gradient_asks_for_them(cpu: CpuExecutor, mode: str) -> None:
    calls = _calls(cpu, lambda net, x: F.max_pool2d(F.relu(net.other(x)), 2), mode, 18)
    (call,) = (call for call in calls if isinstance(call.op, ConvFprop) and call.op.pool)
    assert isinstance(call.op, ConvFprop)
    assert call.op.has_indices == (mode == "train")
    assert len(call.outputs) == 1 + call.op.has_indices


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.max_pool2d(x, 3),
        lambda x: F.max_pool2d(x, 2, 1),
        lambda x: F.max_pool2d(x, 2, padding=1),
        lambda x: F.max_pool2d(x, 2, ceil_mode=True),
        lambda x: F.max_pool2d(x, 2, dilation=2),
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    ],
)
def test_other_pools_stay_alone(cpu: CpuExecutor, pool: Callable[[Tensor], Tensor]) -> None:
    images, targets = np.zeros((3, 2, 5, 7)), np.zeros(3, np.int32)
    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    model.forward = lambda x: pool(model[0](x)).flatten(1)  # type: ignore[method-assign]
    calls = make_plan(cpu, model, images, targets, mode="predict").program.calls
    assert [c.op.name for c in calls if c.phase == "forward"][:2] == ["conv_fprop", "pool_fprop"]


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_activation_before_a_maximum_is_the_pools(cpu: CpuExecutor, kind: str, mode: str) -> None:
    """Of a window of any size, behind whatever; in training nothing is kept of the size before the pool."""

    def middle(net: Net, x: Tensor) -> Tensor:
        return F.max_pool2d(ACT[kind](net.other(x)), 3, 2, 1)

    calls = _calls(cpu, middle, mode, 36)
    assert _forward(calls) == ["conv_fprop", "conv_fprop", f"pool_fprop {kind} max"]
    pool = next(c for c in calls if isinstance(c.op, PoolFprop))
    assert len(pool.outputs) == (3 if mode == "train" and kind not in FROM_OUTPUT else 2)
    assert not [c for c in calls if isinstance(c.op, ActDgrad) and c.outputs[0].spec.shape == pool.inputs[0].spec.shape]


def test_an_activation_with_another_reader_stays_alone(cpu: CpuExecutor) -> None:
    found = _forward(_calls(cpu, lambda net, x: (y := F.gelu(x)) + F.max_pool2d(y, 3, 1, 1), "train", 105))
    assert found == ["conv_fprop gelu kept", "pool_fprop max", "add"]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_what_somebody_else_reads_is_not_fused_away(cpu: CpuExecutor, mode: str) -> None:
    assert _forward(_calls(cpu, lambda net, x: x + F.relu(x), mode, 105)) == ["conv_fprop", "act relu", "add"]
    found = _forward(_calls(cpu, lambda net, x: cat([F.max_pool2d(x, 2), F.avg_pool2d(x, 2)], 1), mode, 36))
    assert found[:3] == ["conv_fprop", "pool_fprop max", "pool_fprop avg"]
    found = _forward(_calls(cpu, lambda net, x: F.max_pool2d(F.relu(x), 2) + F.avg_pool2d(F.relu(x), 2), mode, 18))
    assert "conv_fprop" in found


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_and_sum_with_their_activations(cpu: CpuExecutor, mode: str) -> None:
    norm = "batch_norm_train" if mode == "train" else "batch_norm_infer"
    assert _forward(_calls(cpu, lambda net, x: F.relu(net.norm(x)), mode, 105)) == ["conv_fprop", f"{norm} relu"]
    assert _forward(_calls(cpu, lambda net, x: F.tanh(net.norm(x)), mode, 105)) == ["conv_fprop", norm, "act tanh"]
    found = _forward(_calls(cpu, lambda net, x: F.relu(F.max_pool2d(x, 3, 1, 1) + F.avg_pool2d(x, 3, 1, 1)), mode, 105))
    assert found == ["conv_fprop", "pool_fprop max", "pool_fprop avg", "add relu"]


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_batch_norm_takes_a_shortcut_along(cpu: CpuExecutor, mode: str) -> None:
    """Which side of the sum it is on, and whether the shortcut is computed before it or after it, makes no difference."""
    norm = "batch_norm_train" if mode == "train" else "batch_norm_infer"

    def found(middle: Callable[[Net, Tensor], Tensor]) -> list[str]:
        def with_statistics(net: Net, x: Tensor) -> Tensor:
            for layer in (net.norm, net.norm2) if mode == "frozen" else ():
                layer.eval()
            return middle(net, x)

        return _forward(_calls(cpu, with_statistics, "eval" if mode == "eval" else "train", 105))

    first = ["conv_fprop"]
    assert found(lambda net, x: F.relu(net.norm(x) + x)) == [*first, f"{norm} relu add"]
    assert found(lambda net, x: F.relu(x + net.norm(net.other(x)))) == [*first, "conv_fprop", f"{norm} relu add"]
    assert found(lambda net, x: net.norm(x) + x) == [*first, f"{norm} add"]
    assert found(lambda net, x: F.tanh(net.norm(x) + x)) == [*first, f"{norm} add", "act tanh"]
    # The shortcut comes second: as a pool, as a convolution, as one with a norm of its own.
    late = found(lambda net, x: F.relu(net.norm(x) + F.max_pool2d(x, 3, 1, 1)))
    assert late == [*first, "pool_fprop max", f"{norm} relu add"]
    late = found(lambda net, x: F.relu(net.norm(x) + net.other(x)))
    assert late == [*first, "conv_fprop", f"{norm} relu add"]
    late = found(lambda net, x: F.relu(net.norm(x) + net.norm2(net.other(x))))
    assert late == [*first, "conv_fprop", norm, f"{norm} relu add"]
    # The same norm twice: its running statistics move in the order of the calls, so the first of them stays where it is.
    twice = found(lambda net, x: F.relu(net.norm(x) + net.norm(net.other(x))))
    assert twice == [*first, *([norm, "conv_fprop"] if mode == "train" else ["conv_fprop", norm]), f"{norm} relu add"]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_sums_that_no_batch_norm_takes_along(cpu: CpuExecutor, mode: str) -> None:
    """Of a tensor with itself, of what others read too, behind an activation."""
    norm = "batch_norm_train" if mode == "train" else "batch_norm_infer"
    assert _forward(_calls(cpu, lambda net, x: (y := net.norm(x)) + y, mode, 105))[1:] == [norm, "add"]
    found = _forward(_calls(cpu, lambda net, x: (y := net.norm(x)) + F.tanh(net.other(y)), mode, 105))
    assert found[1:] == [norm, "conv_fprop tanh", "add"]
    assert _forward(_calls(cpu, lambda net, x: F.relu(net.norm(x)) + x, mode, 105))[1:] == [f"{norm} relu", "add"]
    found = _forward(_calls(cpu, lambda net, x: F.gelu(net.norm(x)) + x, mode, 105))
    assert found[1:] == [norm, "act gelu", "add"]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_convolution_takes_a_shortcut_along(cpu: CpuExecutor, mode: str) -> None:
    """With the activation behind the sum where an activation may be fused; not behind one, or a pool, or before a pool."""

    def found(middle: Callable[[Net, Tensor], Tensor], features: int = 105) -> list[str]:
        first, *others = _forward(_calls(cpu, middle, mode, features))
        assert first == "conv_fprop"
        return others

    assert found(lambda net, x: x + net.other(x)) == ["conv_fprop add"]
    assert found(lambda net, x: F.relu(net.other(x) + x)) == ["conv_fprop relu add"]
    assert found(lambda net, x: F.sigmoid(net.other(x) + x)) == ["conv_fprop sigmoid add"]
    gelu = found(lambda net, x: F.gelu(net.other(x) + x))
    assert gelu == (["conv_fprop add", "act gelu"] if mode == "train" else ["conv_fprop gelu add"])
    late = found(lambda net, x: F.relu(net.other(x) + F.max_pool2d(x, 3, 1, 1)))
    assert late == ["pool_fprop max", "conv_fprop relu add"]
    twice = found(lambda net, x: F.relu(net.other(x) + net.other(F.relu(x))))
    assert twice == ["act relu", "conv_fprop", "conv_fprop relu add"]
    assert found(lambda net, x: F.relu(net.other(x)) + x) == ["conv_fprop relu", "add"]
    assert found(lambda net, x: (y := net.other(x)) + y) == ["conv_fprop", "add"]
    pooled = found(lambda net, x: F.max_pool2d(net.other(x), 2) + F.max_pool2d(x, 2), 18)
    assert pooled == ["conv_fprop max", "pool_fprop max", "add"]
    pooled = found(lambda net, x: F.max_pool2d(net.other(x) + x, 2), 18)
    assert pooled == ["conv_fprop add", "pool_fprop max"]


def test_a_norm_that_is_used_twice_keeps_the_order_of_its_statistics(cpu: CpuExecutor) -> None:
    images, targets = np.random.default_rng(0).standard_normal((3, 2, 5, 7)), np.zeros(3, np.int32)
    moved = []
    for options in (Options(), Options(fuse=False)):
        model = Net(lambda net, x: F.relu(net.norm(x) + net.norm(net.other(x))), 105)
        for parameter in model.parameters():
            parameter.assign(np.random.default_rng(len(parameter.shape)).standard_normal(parameter.shape))
        step = step_of(cpu, model, images, targets, options=options)
        moved.append(step.gradients()[1])
    for name, value in moved[0].items():
        np.testing.assert_allclose(value, moved[1][name], rtol=1e-9, atol=1e-9, err_msg=name)


class Toggling(nn.Module):
    """A batch norm that uses its running statistics, and then those of a batch, which move them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(105, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.norm.eval()
        first = self.norm(x)
        self.norm.train()
        return self.head(F.relu(first + self.norm(self.other(x))).flatten(1))


def test_a_norm_reads_its_statistics_before_a_later_one_moves_them(cpu: CpuExecutor) -> None:
    images, targets = np.random.default_rng(0).standard_normal((3, 2, 5, 7)), np.zeros(3, np.int32)
    losses = []
    for options in (Options(), Options(fuse=False)):
        model = Toggling()
        for parameter in model.parameters():
            parameter.assign(np.random.default_rng(len(parameter.shape)).standard_normal(parameter.shape))
        losses.append(step_of(cpu, model, images, targets, options=options).gradients()[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def _with_moments(calls: list[Call]) -> list[str]:
    """Forward ops between the batch and the head that give or take moments."""
    return _forward([c for c in calls if getattr(c.op, "moments", False)])


def test_convolutions_take_the_moments_of_what_a_batch_norm_reads(cpu: CpuExecutor) -> None:
    """Also of what others read too, and after an activation and a pool; the gradients are right (`_calls` checks them)."""
    both = ["conv_fprop", "batch_norm_train relu"]
    assert _with_moments(_calls(cpu, lambda net, x: F.relu(net.norm(x)), "train", 105)) == both
    assert _with_moments(_calls(cpu, lambda net, x: F.relu(net.norm(x)), "eval", 105)) == []
    residual = ["conv_fprop", "batch_norm_train add"]
    assert _with_moments(_calls(cpu, lambda net, x: x + net.norm(x), "train", 105)) == residual
    pooled = _calls(cpu, lambda net, x: net.norm(F.max_pool2d(F.tanh(x), 2)), "train", 18)
    assert _with_moments(pooled) == ["conv_fprop tanh max", "batch_norm_train"]
    assert _with_moments(_calls(cpu, lambda net, x: net.norm(F.gelu(x)), "train", 105)) == []
    twice = _calls(cpu, lambda net, x: net.norm(x) + net.norm(x), "train", 105)
    assert _with_moments(twice) == ["conv_fprop", "batch_norm_train", "batch_norm_train add"]
    taken = {slot.offset for c in twice if c.op.name == "batch_norm_train" for slot in c.inputs[5:6]}
    given = [slot.offset for c in twice if c.op.name == "conv_fprop" for slot in c.outputs[1:]]
    assert taken == set(given)
    assert len(given) == 1


@pytest.mark.parametrize("refused", ["conv_fprop", "batch_norm_train"])
def test_moments_need_both_ops_of_the_executor(refused: str) -> None:
    class One(CpuExecutor):
        def can_fuse(self, op: Op, inputs: tuple[Spec, ...]) -> bool:
            return super().can_fuse(op, inputs) and op.name != refused

    executor = One(threads=1)
    assert _with_moments(_calls(executor, lambda net, x: net.norm(x), "train", 105)) == []
    executor.close()


def test_the_error_signal_takes_sum_and_derivative_along(cpu: CpuExecutor) -> None:
    """Back through a residual: dgrad, the other path's error and relu's derivative are one call."""
    calls = _calls(cpu, lambda net, x: (y := F.relu(x)) + net.other(y), "train", 105)
    dgrads = [c.op for c in calls if isinstance(c.op, ConvDgrad)]
    assert [(op.act, op.add) for op in dgrads] == [(None, False), ("relu", True)]
    assert not [c for c in calls if c.op.name in ("act_dgrad", "add") and c.phase == "backward"]


def test_the_error_behind_a_residual_block(cpu: CpuExecutor) -> None:
    """The derivative of a block's activation is taken once, by the convolution above, though two paths read that error."""

    def middle(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.norm(net.other(x)) + x)
        return F.relu(net.norm2(net.other(y)) + y)

    calls = _calls(cpu, middle, "train", 105)
    backward = [
        _describe(c.op) for c in calls if c.phase == "backward" and isinstance(c.op, ConvDgrad | BatchNormDgrad)
    ]
    first = ["conv_dgrad relu", "batch_norm_dgrad"]  # by the linear layer
    assert backward == [*first, "conv_dgrad relu add", "batch_norm_dgrad", "conv_dgrad add"]
    assert not [c for c in calls if c.op.name in ("act_dgrad", "add") and c.outputs[0].spec.shape == (3, 5, 7, 3)]


class Summing(CpuExecutor):
    """An executor whose input gradients take the sums of a batch norm below."""

    refused = ""

    def can_fuse(self, op: Op, inputs: tuple[Spec, ...]) -> bool:
        sums = isinstance(op, ConvDgrad | BatchNormDgrad) and op.sums
        return op.name != self.refused if sums else super().can_fuse(op, inputs)


def _sums(middle: Callable[[Net, Tensor], Tensor], features: int = 105, refused: str = "") -> list[str]:
    """Backward ops that give or take sums, with activation and addend; the gradients are right (`_calls` checks them)."""
    executor = Summing(threads=1)
    executor.refused = refused
    calls = _calls(executor, middle, "train", features)
    executor.close()
    found = [c.op for c in calls if isinstance(c.op, ConvDgrad | BatchNormDgrad) and c.op.sums]
    return [_describe(op) for op in found]


def test_input_gradients_take_the_sums_of_a_batch_norm_below() -> None:
    """The activation between them, too, and the error of another path; not of an error that others read, or of a pool's."""
    assert _sums(lambda net, x: net.other(F.relu(net.norm(x)))) == ["conv_dgrad relu", "batch_norm_dgrad"]
    assert _sums(lambda net, x: net.other(net.norm(x))) == ["conv_dgrad", "batch_norm_dgrad"]
    assert _sums(lambda net, x: net.norm(net.other(x))) == ["conv_dgrad", "batch_norm_dgrad"]  # by the linear layer
    both = _sums(lambda net, x: (y := F.relu(net.norm(x))) + net.other(y))
    assert both == ["conv_dgrad relu add", "batch_norm_dgrad"]
    assert _sums(lambda net, x: net.other(F.relu(net.norm(x) + x))) == []  # two read the error
    block = _sums(lambda net, x: F.relu(net.norm2(net.other(y := F.relu(net.norm(x)))) + y))
    assert block == ["conv_dgrad relu add", "batch_norm_dgrad"]
    pooled = _sums(lambda net, x: F.max_pool2d(F.tanh(net.other(F.relu(net.norm(x)))), 2), 18)
    assert pooled == ["conv_dgrad relu max", "batch_norm_dgrad"]
    assert _sums(lambda net, x: net.other(net.norm(x) + x)) == []
    assert _sums(lambda net, x: net.other(F.max_pool2d(net.norm(x), 2)), 18) == []
    assert _sums(lambda net, x: net.other(F.gelu(net.norm(x)))) == []
    assert _sums(lambda net, x: net.norm(net.other(x)) + x) == []


def test_nothing_is_left_of_a_norms_backward_where_only_its_sums_are_wanted() -> None:
    """Below a norm that learns is a convolution that does not."""
    executor = Summing(threads=1)
    model = Net(lambda net, x: net.other(F.relu(net.norm(x))), 105)
    model.conv.requires_grad_(False)
    images, targets = np.random.default_rng(0).standard_normal((3, 2, 5, 7)), np.zeros(3, np.int32)
    step = step_of(executor, model, images, targets)
    check_gradients(step, model)
    assert not [c for c in step.plan.program.calls if isinstance(c.op, BatchNormDgrad)]
    assert [c.op.sums for c in step.plan.program.calls if isinstance(c.op, ConvDgrad)] == [False, True]
    executor.close()


@pytest.mark.parametrize("refused", ["conv_dgrad", "batch_norm_dgrad"])
def test_sums_need_both_ops_of_the_executor(refused: str) -> None:
    assert _sums(lambda net, x: net.other(F.relu(net.norm(x))), refused=refused) == []


class Greedy(CpuExecutor):
    """An executor that pools by any window as it convolves."""

    def can_fuse(self, op: Op, inputs: tuple[Spec, ...]) -> bool:
        return True


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("pool", [(3, 2, 1), (3, 3), (2, 1), (2, 2, 1)])
@pytest.mark.parametrize("kind", ["max", "avg"])
def test_a_pool_by_another_window(mode: str, pool: tuple[int, ...], kind: str) -> None:
    """Where the executor says that it can, it is the convolution's; its error goes back through the window first."""
    greedy = Greedy(threads=1)
    reduce = F.max_pool2d if kind == "max" else F.avg_pool2d
    (p, q) = PoolFprop(kind, *((v, v) for v in pool)).output_hw(5, 7)

    def middle(net: Net, x: Tensor) -> Tensor:
        return reduce(F.relu(net.other(x)) if kind == "max" else net.other(x), *pool)

    calls = _calls(greedy, middle, mode, 3 * p * q)
    greedy.close()
    assert _forward(calls) == ["conv_fprop", "conv_fprop relu max" if kind == "max" else "conv_fprop avg"]
    (op,) = (c.op for c in calls if isinstance(c.op, ConvFprop) and c.op.window)
    assert (op.window.kernel, op.window.stride) == ((pool[0],) * 2, (pool[1] if len(pool) > 1 else pool[0],) * 2)
    assert len([c for c in calls if isinstance(c.op, PoolDgrad)]) == (mode == "train")
    assert not [c for c in calls if isinstance(c.op, ConvDgrad) and c.op.pool]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["relu", "gelu"])
@pytest.mark.parametrize("act_first", [True, False])
def test_an_activation_and_a_mean_by_another_window(mode: str, kind: str, act_first: bool) -> None:
    """Before the mean, the convolution has both where nothing is kept for backward; behind it, the activation stays alone."""
    greedy = Greedy(threads=1)

    def middle(net: Net, x: Tensor) -> Tensor:
        return F.avg_pool2d(ACT[kind](x), 3, 2, 1) if act_first else ACT[kind](F.avg_pool2d(x, 3, 2, 1))

    found = _forward(_calls(greedy, middle, mode, 36))
    greedy.close()
    if not act_first:
        assert found == ["conv_fprop avg", f"act {kind}"]
    elif mode == "eval":
        assert found == [f"conv_fprop {kind} avg"]
    else:
        assert found == [f"conv_fprop {kind}" + " kept" * (kind == "gelu"), "pool_fprop avg"]


@pytest.mark.parametrize("act_first", [True, False])
def test_a_window_that_may_lie_in_the_padding_is_pooled_apart_from_the_activation(act_first: bool) -> None:
    """Its maximum is -inf before the activation, and after it too where the activation comes first."""
    greedy = Greedy(threads=1)

    def middle(net: Net, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(F.relu(x) if act_first else x, 2, 1, 1, dilation=3)
        return pooled if act_first else F.relu(pooled)

    (p, q) = PoolFprop("max", (2, 2), (1, 1), (1, 1), (3, 3)).output_hw(5, 7)
    calls = _calls(greedy, middle, "train", 3 * p * q)
    greedy.close()
    pools = [c.op for c in calls if getattr(c.op, "window", None) and c.phase == "forward"]
    assert pools
    assert all(op.act is None for op in pools)


class Choosy(CpuExecutor):
    """An executor without any fused form."""

    def can_fuse(self, op: Op, inputs: tuple[Spec, ...]) -> bool:
        return False


@pytest.mark.parametrize("mode", ["train", "eval", "predict"])
def test_the_executor_decides(mode: str) -> None:
    choosy = Choosy(threads=1)

    def middle(net: Net, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(net.norm2(x) + net.norm(F.relu(net.other(F.relu(x))))), 2)

    calls = _calls(choosy, middle, mode, 18)
    choosy.close()
    for call in calls:
        attributes = (getattr(call.op, "act", None), getattr(call.op, "add", False))
        assert attributes == (None, False)
        assert not (isinstance(call.op, ConvFprop) and call.op.pool)


def _update_sizes(cpu: CpuExecutor, layers: int, options: Options) -> list[int]:
    parts = [nn.Conv2d(2, 2, 1) for _ in range(layers)]
    model = nn.Sequential(*parts, nn.Flatten())
    plan = make_plan(cpu, model, np.zeros((2, 2, 3, 3)), np.zeros(2, np.int32), options=options)
    return [c.op.count for c in plan.program.calls if isinstance(c.op, Update)]


def test_updates_wait_for_each_other(cpu: CpuExecutor) -> None:
    assert _update_sizes(cpu, 5, Options()) == [10]
    assert _update_sizes(cpu, 5, Options(update_bytes=0)) == [1] * 10
    assert _update_sizes(cpu, 30, Options()) == [MAX_GROUP, MAX_GROUP, 12]
    assert _update_sizes(cpu, 5, Options(update_bytes=8 * 6)) == [3, 3, 3, 1]  # biases (2) and filters (4) in float64
