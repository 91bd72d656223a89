"""The transient arena: who may lie where, so that everything fits into as few bytes as possible.

Every call is a point in time. A tensor lives from the call that writes it to the last that reads it; two whose lives
overlap lie apart. Placement is greedy by size, largest first, each at the lowest offset that is free for its whole life
(Pisarchyk & Lee 2020, "Efficient memory management for deep neural net inference", greedy by size).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from parcnn.plan.variable import align


@dataclass(eq=False)
class Block:
    """Memory of one tensor, or of several that share it in place."""

    nbytes: int
    first: int  # call that writes it
    last: int  # last call that reads it
    label: str = ""
    offset: int = field(default=-1)

    def overlaps(self, other: Block) -> bool:
        """Whether the two are ever alive together."""
        return self.first <= other.last and other.first <= self.last


def place(blocks: Sequence[Block], reuse: bool) -> int:
    """Give every block its offset; return the arena's size in bytes."""
    if not reuse:
        top = 0
        for block in blocks:
            block.offset, top = top, top + align(block.nbytes)
        return top
    placed: list[Block] = []
    for block in sorted(blocks, key=lambda b: (-b.nbytes, b.first)):
        offset = 0
        for other in sorted((p for p in placed if p.overlaps(block)), key=lambda p: p.offset):
            if offset + align(block.nbytes) <= other.offset:
                break
            offset = max(offset, other.offset + align(other.nbytes))
        block.offset = offset
        placed.append(block)
    return max((b.offset + align(b.nbytes) for b in blocks), default=0)


def live_bytes(blocks: Sequence[Block], calls: int) -> list[int]:
    """Bytes alive during each call: the lower bound of any placement is their maximum."""
    change = [0] * (calls + 1)
    for block in blocks:
        change[block.first] += align(block.nbytes)
        change[block.last + 1] -= align(block.nbytes)
    total, alive = 0, []
    for delta in change[:calls]:
        total += delta
        alive.append(total)
    return alive
