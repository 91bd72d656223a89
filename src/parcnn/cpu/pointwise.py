"""Element by element: activations, sums, dropout. Work is cut into pieces that stay in cache, which the threads share."""

from __future__ import annotations

from math import ceil, pi, sqrt

import numpy as np

from parcnn.cpu.erf import erfc
from parcnn.cpu.workers import Scratch, Workspace
from parcnn.ops.philox import philox4x32
from parcnn.ops.pointwise import Act, ActDgrad, Add, Dropout

_GELU_TANH = sqrt(2 / pi)


def activate(kind: str, x: np.ndarray, out: np.ndarray) -> None:
    """out = act(x); `out` may be x. NaN goes through."""
    if kind == "relu":
        np.maximum(x, 0, out=out)
    elif kind == "tanh":
        np.tanh(x, out=out)
    elif kind == "sigmoid":
        np.copyto(out, _sigmoid(x))
    elif kind == "silu":
        np.multiply(x, _sigmoid(x), out=out)
    elif kind == "gelu":
        np.multiply(x, _normal_cdf(x), out=out)
    else:
        np.multiply(0.5 * x, 1 + np.tanh(_gelu_tanh_inner(x)), out=out)


def activate_backward(kind: str, dy: np.ndarray, saved: np.ndarray, out: np.ndarray) -> None:
    """out = dy * act'(saved); saved is the activation's output for relu, tanh, sigmoid, else its input. out may be either.

    relu's derivative at 0 is 0, and a NaN output lets the error through (torch's convention).
    """
    if kind == "relu":
        route(dy, ~(saved <= 0), out)
    elif kind == "tanh":
        np.multiply(dy, 1 - np.square(saved), out=out)
    elif kind == "sigmoid":
        np.multiply(dy, saved * (1 - saved), out=out)
    elif kind == "silu":
        s = _sigmoid(saved)
        np.multiply(dy, s * (1 + saved * (1 - s)), out=out)
    elif kind == "gelu":
        density = np.exp(-0.5 * np.square(saved)) * (1 / sqrt(2 * pi))
        np.multiply(dy, _normal_cdf(saved) + saved * density, out=out)
    else:
        t = np.tanh(_gelu_tanh_inner(saved))
        inner_slope = _GELU_TANH * (1 + 3 * 0.044715 * np.square(saved))
        np.multiply(dy, 0.5 * (1 + t) + 0.5 * saved * (1 - np.square(t)) * inner_slope, out=out)


def route(values: np.ndarray, where: np.ndarray, out: np.ndarray) -> None:
    """out = values where `where` (bool), else 0; out may be values.

    The product is one of integers, on the values' bits: as fast as one of floats (4 times a masked copy), and right for
    infinities and NaN.
    """
    bits = np.int32 if values.dtype == np.float32 else np.int64
    np.multiply(values.view(bits), where, out=out.view(bits))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * np.tanh(0.5 * x) + 0.5  # of exp's two forms neither is safe for both signs


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    return 0.5 * erfc(x * -sqrt(0.5))


def _gelu_tanh_inner(x: np.ndarray) -> np.ndarray:
    return _GELU_TANH * (x + 0.044715 * x * x * x)


def act(op: Act, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """y = act(x)."""
    x, y = inputs[0].reshape(-1), outputs[0].reshape(-1)
    workspace.each_slice(x.size, lambda i, _: activate(op.kind, x[i], y[i]))


def act_dgrad(op: ActDgrad, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """dx = dy * act'(saved)."""
    dy, saved, dx = inputs[0].reshape(-1), inputs[1].reshape(-1), outputs[0].reshape(-1)
    workspace.each_slice(dy.size, lambda i, _: activate_backward(op.kind, dy[i], saved[i], dx[i]))


def add(op: Add, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """y = act(a + b)."""
    a, b, y = inputs[0].reshape(-1), inputs[1].reshape(-1), outputs[0].reshape(-1)

    def piece(i: slice, _: Scratch) -> None:
        np.add(a[i], b[i], out=y[i])
        if op.act:
            activate(op.act, y[i], y[i])

    workspace.each_slice(a.size, piece)


def dropout(op: Dropout, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """y = x * keep / (1 - p), keep from the counter generator."""
    x, y, state = inputs[0].reshape(-1), outputs[0].reshape(-1), inputs[1].view(np.uint32)
    step, key = int(state[1]), (int(state[3]), int(state[4]))
    threshold = ceil(op.p * 2**32)
    scale = 1 / (1 - op.p) if op.p < 1 else 0.0

    def piece(i: slice, _: Scratch) -> None:
        counters = np.arange(i.start // 4, -(-i.stop // 4), dtype=np.uint64)  # pieces start at multiples of four
        words = philox4x32((counters, op.stream, step, 0), key).reshape(-1)[: i.stop - i.start]
        np.multiply(x[i], scale, out=y[i])
        route(y[i], words >= threshold, y[i])

    workspace.each_slice(x.size, piece)


RUN = {Act: act, ActDgrad: act_dgrad, Add: add, Dropout: dropout}
