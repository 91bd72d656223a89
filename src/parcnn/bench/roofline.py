"""How fast a GPU could be: its arithmetic, from what its maker states, and its memory, as a copy measures it."""

from __future__ import annotations

from dataclasses import dataclass

from parcnn.bench.repeated import RepeatedCalls, time_in_turn
from parcnn.ops.base import Spec
from parcnn.ops.pointwise import Act
from parcnn.ops.program import Call, Executor, Slot

# Part of a GPU's name -> dense bf16 with fp32 sums, and fp32, FLOP/s (NVIDIA's data sheets); the first that matches.
PEAKS = {
    "B200": (2250e12, 75e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}
COPY_BYTES = 1 << 29  # read, and written


@dataclass(frozen=True)
class Roofline:
    """Peak FLOP/s (None where the GPU is not known) and bytes/s of a copy."""

    flops_per_second: float | None
    bytes_per_second: float

    @classmethod
    def of(cls, name: str, precision: str, executor: Executor) -> Roofline:
        """Of the GPU of that name; the copy is measured here and now."""
        known = next((peaks for part, peaks in PEAKS.items() if part in name), None)
        spec = Spec((COPY_BYTES // 4,))
        call = Call(Act("relu"), (Slot(spec, "arena"),), (Slot(spec, "arena", spec.nbytes),), layer="copy")
        copies = RepeatedCalls(executor, [call])
        (took,) = time_in_turn([copies.run], executor.synchronize)
        copies.free()
        bytes_per_second = 2 * COPY_BYTES * copies.count / took.p50_us * 1e6
        return cls((known[0] if precision == "bf16" else known[1]) if known else None, bytes_per_second)

    def bound_us(self, flops: int, nbytes: int) -> float | None:
        """Microseconds that these FLOPs and bytes take at the least."""
        if self.flops_per_second is None:
            return None
        return max(flops / self.flops_per_second, nbytes / self.bytes_per_second) * 1e6
