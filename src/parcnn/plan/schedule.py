"""Which call waits for which, and on which stream each runs.

Dependences are derived from the bytes that calls read and write, so whatever shares memory (in place, a reused piece of
the arena, a weight that is updated after its last reader) is ordered by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from parcnn.ops.program import Call, Slot


def dependences(calls: Sequence[Call]) -> list[tuple[int, ...]]:
    """For each call the earlier calls that it must wait for, without those implied by the others."""
    accesses: dict[str, list[tuple[int, int, int, bool]]] = {}  # region -> (start, end, call, writes)
    ancestors: list[int] = []  # bit j of ancestors[i]: call j comes before call i
    result: list[tuple[int, ...]] = []
    for i, call in enumerate(calls):
        written = call.written
        conflicts: set[int] = set()
        for slot in call.inputs:
            conflicts |= {j for s, e, j, w in accesses.get(slot.region, []) if w and _meets(slot, s, e)}
        for slot in written:
            conflicts |= {j for s, e, j, _ in accesses.get(slot.region, []) if _meets(slot, s, e)}
        before, direct = 0, []
        for j in sorted(conflicts, reverse=True):
            if not before >> j & 1:
                direct.append(j)
                before |= ancestors[j] | 1 << j
        ancestors.append(before)
        result.append(tuple(sorted(direct)))
        for slot in written:  # what this call overwrites wholly, later calls need not look at: they wait for this one
            accesses[slot.region] = [a for a in accesses.get(slot.region, []) if a[0] < slot.offset or a[1] > slot.end]
        for slot in call.inputs:
            accesses.setdefault(slot.region, []).append((slot.offset, slot.end, i, False))
        for slot in written:
            accesses.setdefault(slot.region, []).append((slot.offset, slot.end, i, True))
    return result


def _meets(slot: Slot, start: int, end: int) -> bool:
    return slot.offset < end and start < slot.end


def schedule(calls: Sequence[Call], side_streams: int) -> tuple[Call, ...]:
    """Fill in `after` and `stream`: side branches take turns on the side streams, everything else is on stream 0.

    A side call that directly follows another side call (an update after its gradient) stays on that one's stream.
    """
    ready: list[Call] = []
    turn = 0
    for call, after in zip(calls, dependences(calls), strict=True):
        stream = 0
        if side_streams and call.op.side_branch:
            predecessors = [ready[j].stream for j in after if ready[j].stream]
            if len(after) == 1 and predecessors:
                stream = predecessors[0]
            else:
                stream = 1 + turn % side_streams
                turn += 1
        ready.append(replace(call, after=after, stream=stream))
    return tuple(ready)
