"""Independent float64 oracles: plain loops and direct formulas, sharing no code with parcnn.

Shapes are physical: images NHWC, filters KRSC.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

SQRT_2 = math.sqrt(2)


def conv(
    x: np.ndarray,
    w: np.ndarray,
    b: np.ndarray | None = None,
    stride: tuple[int, int] = (1, 1),
    pad: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> np.ndarray:
    """The seven loops (two of them, channels in and out, as one product)."""
    n_, h_, w_, _ = x.shape
    k_, r_, s_, _ = w.shape
    p_ = (h_ + pad[0] + pad[2] - dilation[0] * (r_ - 1) - 1) // stride[0] + 1
    q_ = (w_ + pad[1] + pad[3] - dilation[1] * (s_ - 1) - 1) // stride[1] + 1
    y = np.zeros((n_, p_, q_, k_))
    for n in range(n_):
        for p in range(p_):
            for q in range(q_):
                for r in range(r_):
                    for s in range(s_):
                        row = p * stride[0] + r * dilation[0] - pad[0]
                        column = q * stride[1] + s * dilation[1] - pad[1]
                        if 0 <= row < h_ and 0 <= column < w_:
                            y[n, p, q] += w[:, r, s].astype(np.float64) @ x[n, row, column].astype(np.float64)
    return y if b is None else y + b


def conv_gradients(
    x: np.ndarray,
    w: np.ndarray,
    dy: np.ndarray,
    stride: tuple[int, int] = (1, 1),
    pad: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dx, dw, db for the error dy before the pool: each product of the forward loops handed back."""
    _, h_, w_, _ = x.shape
    _, r_, s_, _ = w.shape
    dx, dw = np.zeros(x.shape), np.zeros(w.shape)
    for n, p, q in np.ndindex(dy.shape[:3]):
        for r in range(r_):
            for s in range(s_):
                row = p * stride[0] + r * dilation[0] - pad[0]
                column = q * stride[1] + s * dilation[1] - pad[1]
                if 0 <= row < h_ and 0 <= column < w_:
                    error = dy[n, p, q].astype(np.float64)
                    dx[n, row, column] += error @ w[:, r, s].astype(np.float64)
                    dw[:, r, s] += np.outer(error, x[n, row, column].astype(np.float64))
    return dx, dw, dy.sum(axis=(0, 1, 2), dtype=np.float64)


def pool2x2(y: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """2x2 stride-2 pool with floor; the winner's position, first of equals, NaN winning (zeros for the average)."""
    n_, p_, q_, k_ = y.shape
    out = np.zeros((n_, p_ // 2, q_ // 2, k_))
    index = np.zeros(out.shape, np.uint8)
    for n, p, q, k in np.ndindex(out.shape):
        window = [y[n, 2 * p + i, 2 * q + j, k] for i in (0, 1) for j in (0, 1)]
        if kind == "avg":
            out[n, p, q, k] = sum(window) / 4
        else:
            index[n, p, q, k] = _winner(window)
            out[n, p, q, k] = window[index[n, p, q, k]]
    return out, index


def unpool2x2(dy: np.ndarray, index: np.ndarray | None, hw: tuple[int, int]) -> np.ndarray:
    """The error before the pool, (N,*hw,K); index None: average."""
    n_, _, _, k_ = dy.shape
    out = np.zeros((n_, *hw, k_))
    for n, p, q, k in np.ndindex(dy.shape):
        for position in range(4):
            share = 0.25 if index is None else float(index[n, p, q, k] == position)
            if share:
                out[n, 2 * p + position // 2, 2 * q + position % 2, k] = share * dy[n, p, q, k]
    return out


def _winner(window: Sequence[float]) -> int:
    for position, value in enumerate(window):
        if math.isnan(value):
            return position
    return max(range(len(window)), key=lambda i: window[i])  # max keeps the first of equals


def pool_windows(
    image: tuple[int, int], out: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int],
    pad: tuple[int, int], dilation: tuple[int, int],
) -> dict[tuple[int, int], list[tuple[int, int, int]]]:  # fmt: skip
    """For each output (p,q): the (position in the window, row, column) that lie in the image."""
    windows = {}
    for p, q in np.ndindex(*out):
        taps = []
        for r in range(kernel[0]):
            for s in range(kernel[1]):
                row, column = p * stride[0] - pad[0] + r * dilation[0], q * stride[1] - pad[1] + s * dilation[1]
                if 0 <= row < image[0] and 0 <= column < image[1]:
                    taps.append((r * kernel[1] + s, row, column))
        windows[p, q] = taps
    return windows


def max_pool(x: np.ndarray, windows: dict, out: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Largest of each window and its position."""
    y = np.zeros((x.shape[0], *out, x.shape[3]))
    index = np.zeros(y.shape, np.int64)
    for (p, q), taps in windows.items():
        for n in range(x.shape[0]):
            for c in range(x.shape[3]):
                best = _winner([x[n, row, column, c] for _, row, column in taps])
                y[n, p, q, c] = x[n, taps[best][1], taps[best][2], c]
                index[n, p, q, c] = taps[best][0]
    return y, index


def batch_norm(
    x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """y, mean, rstd, unbiased variance over all axes but the last."""
    axes = tuple(range(x.ndim - 1))
    x = x.astype(np.float64)
    mean, var = x.mean(axis=axes), x.var(axis=axes)
    count = x.size // x.shape[-1]
    rstd = 1 / np.sqrt(var + eps)
    return (x - mean) * rstd * gamma + beta, mean, rstd, var * count / (count - 1)


ACTS: dict[str, Callable[[float], float]] = {
    "relu": lambda v: v if v > 0 or math.isnan(v) else 0.0,
    "tanh": math.tanh,
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v)),
    "silu": lambda v: v * ACTS["sigmoid"](v),
    "gelu": lambda v: 0.5 * v * math.erfc(-v / SQRT_2),
    "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
}


def act(kind: str | None, x: np.ndarray) -> np.ndarray:
    """The activation, one element at a time."""
    if kind is None:
        return x.astype(np.float64)
    return np.array([ACTS[kind](float(v)) for v in x.reshape(-1)]).reshape(x.shape)


def cross_entropy(logits: np.ndarray, labels: np.ndarray, smoothing: float) -> float:
    """Mean over rows, by the definition."""
    total = 0.0
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        top = max(row)
        log_sum = top + math.log(math.fsum(math.exp(v - top) for v in row))
        for c, v in enumerate(row):
            t = (1 - smoothing) * (c == label) + smoothing / len(row)
            total += t * (log_sum - v)
    return total / len(logits)


def numeric_gradient(
    f: Callable[[np.ndarray], np.ndarray], x: np.ndarray, dy: np.ndarray, step: float = 1e-5
) -> np.ndarray:
    """dL/dx for L = sum(dy * f(x)), by central differences in float64."""
    gradient = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        high, low = x.copy(), x.copy()
        high[i] += step
        low[i] -= step
        gradient[i] = ((f(high) - f(low)) * dy).sum() / (2 * step)
    return gradient


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python's integers (Salmon et al., SC'11)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    mask = 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & mask, p0 >> 32 ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3
