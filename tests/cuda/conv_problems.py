"""Convolution problems, their operands, and how an executor's results are held to the float64 oracle's.

Where the operands are small integers every sum is exact, so the kernels must give the oracle's very bits, ties and all.
Elsewhere the tolerance follows from what is rounded: fp32 sums err by 2**-19 of their terms' magnitudes, and a bf16 result by
2**-8 of itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parcnn.cpu import CpuExecutor
from parcnn.ops.base import FROM_OUTPUT, Op, Spec
from parcnn.ops.conv import ConvDgrad, ConvFprop, ConvWgrad
from parcnn.ops.program import Executor
from tests.cuda.bf16 import from_bits, stored, to_bits, values_of
from tests.op_runner import run_op

Arrays = list[np.ndarray]
UNIT = 2.0**-24  # the rounding of one operation in fp32
MOMENT_STEPS = 48 + 16 + 32  # in their longest chain: the tiles of a block, threads and quotients, the merging of rows
MOMENT_TILE = 64 * UNIT  # a thread's pixels of a tile, one added to the next


@dataclass(frozen=True)
class Problem:
    n: int
    h: int
    w: int
    c: int
    k: int
    r: int = 3
    s: int = 3
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def op(self, kind: str, pool: str | None = None, **more: Any) -> Any:
        geometry = {
            "stride": self.stride, "pad": self.pad, "dilation": self.dilation, "pool": pool, "groups": self.groups
        }  # fmt: skip
        if kind == "fprop":
            return ConvFprop(**geometry, **more)
        if kind == "dgrad":
            return ConvDgrad(**geometry, image=(self.h, self.w), **more)
        return ConvWgrad(**geometry, filter=(self.r, self.s), **more)

    def flops(self, pool: str | None) -> int:
        """Of the convolution before the pool."""
        p, q = self.op("fprop", pool).output_hw(self.h, self.w, self.r, self.s)
        return 2 * self.n * p * q * self.k * self.r * self.s * self.c // self.groups

    def has(self, pool: str | None) -> bool:
        """Whether there are outputs, bytes of indices that one group alone has, and of a pool groups of several channels."""
        p, q = self.op("fprop", pool).pooled_hw(self.h, self.w, self.r, self.s)
        depthwise = self.groups == self.c > 1
        shared_bytes = pool == "max" and self.groups > 1 and self.k // self.groups % 4
        return p > 0 and q > 0 and not shared_bytes and not (pool and depthwise)

    def operands(self, op: Any, tensor: Callable[..., np.ndarray], random: np.random.Generator) -> Arrays:
        """Operands as floats that bf16 has (a bias: that f32 has)."""
        x, w = (self.n, self.h, self.w, self.c), (self.k, self.r, self.s, self.c // self.groups)
        dy = (self.n, *op.pooled_hw(self.h, self.w, self.r, self.s), self.k)
        idx = [random.integers(0, 4, dy).astype(np.uint8)] if op.pool == "max" else []
        if isinstance(op, ConvFprop):
            addend = [tensor(*dy)] if op.add else []
            return [tensor(*x), tensor(*w), *([8 * tensor(self.k)] if op.bias else []), *addend]
        if isinstance(op, ConvDgrad) and op.sums:
            return [tensor(*dy), tensor(*w), *idx, *norm_below(x, random)]
        if isinstance(op, ConvDgrad):
            least, most = (0 if op.act in ("relu", "sigmoid") else -1, 1) if op.act in FROM_OUTPUT else (-4, 4)
            saved = [np.clip(tensor(*x), least, most)] if op.act else []
            return [tensor(*dy), tensor(*w), *idx, *saved, *([tensor(*x)] if op.add else [])]
        return [tensor(*x), tensor(*dy), *idx]


def random_of(*parts: object) -> np.random.Generator:
    """A test's own numbers, the same each time."""
    return np.random.default_rng(sum(map(ord, "".join(map(str, parts)))))


def ternary(random: np.random.Generator) -> Callable[..., np.ndarray]:
    """-4, 0, 4: quarters of their products are integers too, and few sums reach 256 where bf16 leaves integers out."""
    return lambda *shape: 4.0 * random.integers(-1, 2, shape)


def normal(random: np.random.Generator) -> Callable[..., np.ndarray]:
    return lambda *shape: from_bits(to_bits(random.standard_normal(shape)))


def norm_below(shape: tuple[int, ...], random: np.random.Generator) -> Arrays:
    """x, gamma, beta, mean, rstd of a batch norm: small integers and powers of two, whose outputs are exact, often zero."""
    x = random.integers(-3, 4, shape).astype(float)
    gamma, beta, mean = (random.integers(-2, 3, shape[-1]).astype(float) for _ in range(3))
    return [x, gamma, beta, mean, 2.0 ** random.integers(-1, 2, shape[-1])]


def is_exact(op: Any) -> bool:
    """Whether integers stay integers: derivatives do at the outputs -1, 0 and 1 that `operands` then has."""
    exact = ("relu",) if isinstance(op, ConvFprop) else FROM_OUTPUT
    return isinstance(op, ConvWgrad) or op.act in (None, *exact)


def is_held_to_bits(op: Any) -> bool:
    """Whether there are no bounds for its errors here: a pool's of other windows than 2x2, a batch norm's sums."""
    return bool(op.window) if isinstance(op, ConvFprop) else isinstance(op, ConvDgrad) and op.sums


def tensors_of(op: Op, operands: Arrays, dtype: str) -> Arrays:
    """Operands as the device takes them: those of one number a channel are f32."""
    return [a if a.dtype == np.uint8 else stored(a, "f32" if a.ndim == 1 else dtype) for a in operands]


def specs_of(op: Op, operands: Arrays, dtype: str) -> tuple[Spec, ...]:
    """Their specs."""
    names = {np.dtype(np.uint16): "bf16", np.dtype(np.float32): "f32", np.dtype(np.uint8): "u2"}
    return tuple(Spec(a.shape, names[a.dtype]) for a in tensors_of(op, operands, dtype))


def on_cpu(op: Any, operands: Arrays) -> Arrays:
    """The float64 oracle, group by group."""
    executor, single = CpuExecutor(threads=1), replace(op, groups=1)
    joined_at_front = {0, 1} if isinstance(op, ConvWgrad) else set()  # filters come first in dw and db
    split_at_front = {1, 2} if isinstance(op, ConvFprop) else {1} if isinstance(op, ConvDgrad) else set()
    parts = []
    for group in range(op.groups):
        own = [np.split(a, op.groups, 0 if i in split_at_front else -1)[group] for i, a in enumerate(operands)]
        own = [np.ascontiguousarray(a if a.dtype == np.uint8 else a.astype(np.float64)) for a in own]
        parts.append(run_op(executor, single, own))
    executor.close()
    return [
        np.concatenate([part[i] for part in parts], 0 if i in joined_at_front else -1) for i in range(len(parts[0]))
    ]


def check_exact(
    executor: Executor,
    op: Op,
    operands: Arrays,
    dtype: str,
    true: Arrays | None = None,
    where: object = "",
    alias: tuple[tuple[int, int], ...] = (),
) -> None:
    """The oracle's bits, but for the sign of a zero, and its moments but for what they may err by. `true`: what the oracle
    gave, where that is known."""
    results = list(run_op(executor, op, tensors_of(op, operands, dtype), alias=alias))
    true = on_cpu(op, operands) if true is None else true
    if isinstance(op, ConvFprop) and op.moments:
        check_moments(results[0], results.pop(), f"{where} {op}")
        true = true[:-1]
    for i, (got, wanted) in enumerate(zip(results, true, strict=True)):
        value, expected = got, wanted
        if got.dtype == np.uint16:
            value, expected = np.where(got == 0x8000, np.uint16(0), got), to_bits(wanted + 0.0)
        wrong = np.argwhere(value != expected)
        assert not wrong.size, (
            f"{where} {op} output {i}: {len(wrong)} of {got.size} differ, first at {wrong[0]}: "
            f"{value[tuple(wrong[0])]}, not {expected[tuple(wrong[0])]}"
        )


def check_close(executor: Executor, op: Any, operands: Arrays, dtype: str) -> None:
    """Slopes of activations are at most 1.2 and they err by 2**-20; a pooled value errs as the worst of its window."""
    before, plain = op, operands
    if isinstance(op, ConvFprop):
        before = replace(op, pool=None, act=None)
    elif isinstance(op, ConvDgrad) and op.act:
        before, plain = replace(op, act=None), [a for i, a in enumerate(operands) if i != 2 + (op.pool == "max")]
    magnitudes = on_cpu(before, [a if a.dtype == np.uint8 else np.abs(a) for a in plain])
    results = list(run_op(executor, op, tensors_of(op, operands, dtype)))
    if isinstance(op, ConvFprop) and op.moments:
        check_moments(results[0], results.pop(), op)
    slacks = []
    for got, true, magnitude in zip(results, on_cpu(op, operands), magnitudes, strict=False):  # no moments, no indices
        terms = windows_of(magnitude, true.shape).max(-1) if isinstance(op, ConvFprop) and op.pool else magnitude
        rounding = (2.0**-8 if got.dtype == np.uint16 else 2.0**-20) * np.abs(true) + 2.0**-20
        slacks.append(rounding + 1.2 * 2.0**-19 * terms)
        error = np.abs(values_of(got) - true)
        assert (error <= slacks[-1]).all(), f"{op}: {error.max():.3g}"  # NaN is not below it
    if isinstance(op, ConvFprop) and op.has_indices:
        values = windows_of(on_cpu(replace(op, pool=None), operands)[0], results[1].shape)
        winner = np.take_along_axis(values, results[1][..., None].astype(int), -1)[..., 0]
        assert (winner >= values.max(-1) - 2 * slacks[0]).all()


def check_moments(y: np.ndarray, moments: np.ndarray, where: object) -> None:
    """Against those of the stored values, float64. What is summed are differences from one of the values, which is at most
    `farthest` from the mean: the squares of n of them are at most 2 (m2 + n farthest^2) together."""
    values = from_bits(y).reshape(-1, y.shape[-1])
    n, mean, deviation = len(values), values.mean(0), values.std(0)
    m2, farthest = n * deviation**2, np.abs(values - mean).max(0)
    chain = MOMENT_TILE + MOMENT_STEPS * UNIT
    assert (np.abs(moments[0] - mean) <= chain * (deviation + farthest) + MOMENT_STEPS * UNIT * np.abs(mean)).all(), (
        where
    )
    slack = 3 * chain * 2 * (m2 + n * farthest**2) + MOMENT_STEPS * UNIT * (m2 + n * np.abs(mean) * deviation)
    slack += n * 2.0**-126  # smaller squares underflow
    assert (np.abs(moments[1] - m2) <= slack).all(), where


def windows_of(y: np.ndarray, pooled: tuple[int, ...]) -> np.ndarray:
    """(N,P,Q,K,4) of (N,2P,2Q,K)."""
    n, p, q, k = pooled
    return y[:, : 2 * p, : 2 * q].reshape(n, p, 2, q, 2, k).transpose(0, 1, 3, 5, 2, 4).reshape(n, p, q, k, 4)
