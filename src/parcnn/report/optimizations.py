"""What each switch of the plan does, in a few sentences, for the page; docs/optimizations.md says more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Optimization:
    """switch: its name in `parcnn.plan.options.Options`; on_cpu: whether the CPU executor can gain time by it."""

    switch: str
    title: str
    text: str
    on_cpu: bool


OPTIMIZATIONS = (
    Optimization(
        "fuse",
        "Convolution, bias, activation and pooling in one kernel",
        "A convolution's output is rounded to its activation and pooled while it is still in registers. The tensor before "
        "the pool, four times as large, is never written: two bits for each window remember which of its four inputs "
        "won, and backward sends the pooled error straight into the convolution's gradients by them. The activation's "
        "derivative is applied by the kernel that computes the error signal.",
        on_cpu=True,
    ),
    Optimization(
        "reuse",
        "Buffers of higher layers used again",
        "All tensors of a step lie in one arena. Their lifetimes are known before anything runs, so a layer's error signal "
        "takes the place of tensors of the layers above it, which backward has left behind.",
        on_cpu=True,
    ),
    Optimization(
        "inplace",
        "Written in place",
        "An operation whose every output element depends on one element of an operand writes over that operand, when "
        "nobody reads it later: the error signal below an activation over the activation's own output.",
        on_cpu=True,
    ),
    Optimization(
        "parallel",
        "Gradients beside the chain of error signals",
        "In back-propagation only the error signals wait for one another. The gradients of weights and biases, and the "
        "updates, run beside them on streams of their own, and fill a GPU that one small layer leaves idle.",
        on_cpu=False,
    ),
    Optimization(
        "graph",
        "A step recorded once and replayed",
        "What changes from step to step (the rate, the counters, the batch's place in the data set) lies in the GPU's memory, "
        "so a whole training step is captured as a CUDA graph and replayed: launching kernels one by one would cost "
        "more time than a small network's kernels take.",
        on_cpu=False,
    ),
)
