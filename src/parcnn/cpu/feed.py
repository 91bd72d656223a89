"""The borders of a step: the batch comes out of the data set, results are kept, counters move on."""

from __future__ import annotations

import numpy as np

from parcnn.cpu.workers import Scratch, Workspace
from parcnn.ops.feed import EndStep, GatherBatch, WriteOutput
from parcnn.ops.philox import AUGMENT, philox4x32


def gather_batch(op: GatherBatch, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """Batch = samples order[state[2]:][:batch], normalised per channel, then mirrored and moved at random."""
    images, targets, order, state = inputs
    x, batch_targets = outputs
    first = int(state[2])
    samples = order[first : first + op.batch]
    batch_targets[...] = targets[samples]
    scale, shift = np.asarray(op.scale, np.float32), np.asarray(op.shift, np.float32)

    def piece(i: slice, _: Scratch) -> None:
        np.copyto(x[i], images[samples[i]])
        x[i] *= scale
        x[i] += shift

    workspace.each_slice(op.batch, piece, piece=16)
    if op.flip or op.shift_px:
        _augment(op, x, state.view(np.uint32))


def _augment(op: GatherBatch, x: np.ndarray, state: np.ndarray) -> None:
    counter = np.arange(op.batch, dtype=np.uint64) + int(state[2])
    words = philox4x32((counter, AUGMENT, int(state[1]), 0), (int(state[3]), int(state[4])))
    span = 2 * op.shift_px + 1
    rows, columns = ((words[:, i] % span).astype(int) - op.shift_px for i in (1, 2))
    _, h, w, _ = x.shape
    for i, image in enumerate(x):
        source = image[:, ::-1].copy() if op.flip and words[i, 0] & 1 else image.copy()
        image.fill(0)
        (to_rows, from_rows), (to_columns, from_columns) = _moved(h, rows[i]), _moved(w, columns[i])
        image[to_rows, to_columns] = source[from_rows, from_columns]


def _moved(size: int, by: int) -> tuple[slice, slice]:
    """Where an axis' elements that stay inside go to, and come from."""
    kept = max(size - abs(by), 0)
    to, start = max(by, 0), max(-by, 0)
    return slice(to, to + kept), slice(start, start + kept)


def end_step(op: EndStep, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """Keep loss and hits at row state[0]; then move the counters on."""
    state, logs = inputs[0], iter(inputs[1:])
    for _ in range(op.loss + op.correct):
        log, value = next(logs), next(logs)
        log[state[0]] = value[0]
    state[0] += 1
    state[1] += op.train
    state[2] += op.batch


def write_output(op: WriteOutput, inputs: list[np.ndarray], outputs: list[np.ndarray], workspace: Workspace) -> None:
    """out[state[2]+i] = y[i]."""
    y, state, out = inputs
    out[state[2] : state[2] + y.shape[0]] = y


RUN = {GatherBatch: gather_batch, EndStep: end_step, WriteOutput: write_output}
