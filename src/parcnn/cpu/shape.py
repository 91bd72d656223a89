"""Moving elements."""

from __future__ import annotations

import numpy as np

from parcnn.cpu.workers import Workspace
from parcnn.ops.shape import Cat, ChannelPad, ChannelSlice, ToChannelsFirst, ToChannelsLast


def cat(op: Cat, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """Concatenate along channels."""
    np.concatenate(inputs, axis=-1, out=outputs[0])


def channel_slice(op: ChannelSlice, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """y = x[..., start:stop]."""
    np.copyto(outputs[0], inputs[0][..., op.start : op.stop])


def channel_pad(op: ChannelPad, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """y[..., :C] = x, zeros behind it."""
    channels = inputs[0].shape[-1]
    np.copyto(outputs[0][..., :channels], inputs[0])
    outputs[0][..., channels:] = 0


def to_channels_first(
    op: ToChannelsFirst, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace
) -> None:
    """(N,H,W,C) -> (N, C*H*W)."""
    n, h, w, c = inputs[0].shape
    np.copyto(outputs[0].reshape(n, c, h, w), inputs[0].transpose(0, 3, 1, 2))


def to_channels_last(
    op: ToChannelsLast, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace
) -> None:
    """(N, C*H*W) -> (N,H,W,C)."""
    n, h, w, c = outputs[0].shape
    np.copyto(outputs[0], inputs[0].reshape(n, c, h, w).transpose(0, 2, 3, 1))


RUN = {
    Cat: cat,
    ChannelSlice: channel_slice,
    ChannelPad: channel_pad,
    ToChannelsFirst: to_channels_first,
    ToChannelsLast: to_channels_last,
}
