"""Switches of the plan: every optimisation can be turned off, so that its effect is measured in the product itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What the plan may do. All on is the default."""

    # Convolution + bias + activation + pool in one kernel, with batch norm's statistics; activation's derivative in dgrad.
    fuse: bool = True
    reuse: bool = True  # tensors share arena memory when their lifetimes allow, error signals among them
    inplace: bool = True  # an op may write over an operand that nobody reads later
    parallel: bool = True  # weight gradients and updates run beside the chain of error signals
    graph: bool = True  # a step is captured once and replayed (CUDA graph)
    # Tensors between layers have channels of zeros where convolutions would otherwise add them at each call.
    pad_channels: bool = True
    # Gradients wait for one common update until they take this much memory; 0 updates each layer at once. Rules whose update
    # takes as long for one as for many (Muon's) let all of theirs wait.
    update_bytes: int = 1 << 20
    # Streams beside the main one for `parallel`.
    side_streams: int = 2
    # A tensor below this size outlives its last reader by a chain step where that keeps side branches apart: above it a
    # kernel fills a GPU alone, and memory counts more.
    slack_bytes: int = 1 << 20
