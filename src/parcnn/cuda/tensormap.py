"""CUtensorMap: what it must keep to (checked without a GPU), and its encoding by the driver.

The rules are those of `cuTensorMapEncodeTiled` (CUDA Driver API), which itself only says that something is invalid.
"""

from __future__ import annotations

from typing import Any

from parcnn.cuda.launch import LaunchError, TensorMap
from parcnn.ops.base import ITEM_BYTES

NBYTES, ALIGNMENT = 128, 64  # of a CUtensorMap
MAX_RANK, MAX_BOX, MAX_ELEMENT_STRIDE = 5, 256, 8
_UNIT_BYTES = 16  # addresses, strides and the box's innermost run are multiples of it
_SWIZZLE_BYTES = {None: None, "64B": 64, "128B": 128}
_L2_BYTES = (0, 64, 128, 256)


def check(map: TensorMap, address: int, where: str) -> None:
    """Raises LaunchError where the map, of a tensor at `address`, breaks a rule."""

    def demand(holds: bool, what: str, expected: object, got: object) -> None:
        if not holds:
            raise LaunchError(f"tensor map: {what}", where=where, expected=expected, got=got)

    rank = len(map.dims)
    lengths = (len(map.strides_bytes) + 1, len(map.box), len(map.element_strides or map.dims))
    demand(1 <= rank <= MAX_RANK, "too many dimensions or none", f"1 to {MAX_RANK}", rank)
    demand(set(lengths) == {rank}, "a list is not as long as the others", f"rank {rank}", lengths)
    demand(map.dtype == "bf16", "no such element type", "bf16", map.dtype)
    demand(map.swizzle in _SWIZZLE_BYTES, "no such swizzle", list(_SWIZZLE_BYTES), map.swizzle)
    demand(map.l2_bytes in _L2_BYTES, "no such L2 promotion", _L2_BYTES, map.l2_bytes)
    demand(address % _UNIT_BYTES == 0, "misaligned base", f"a multiple of {_UNIT_BYTES}", hex(address))
    demand(all(1 <= d <= 2**32 for d in map.dims), "an extent is out of range", "1 to 2**32", map.dims)
    strides_fit = all(s % _UNIT_BYTES == 0 and 0 < s < 2**40 for s in map.strides_bytes)
    demand(strides_fit, "a stride does not fit", f"multiples of {_UNIT_BYTES} below 2**40", map.strides_bytes)
    demand(all(1 <= b <= MAX_BOX for b in map.box), "a box is out of range", f"1 to {MAX_BOX}", map.box)
    steps_fit = all(1 <= e <= MAX_ELEMENT_STRIDE for e in map.element_strides)
    demand(steps_fit, "an element stride is out of range", f"1 to {MAX_ELEMENT_STRIDE}", map.element_strides)
    run, span = map.box[0] * ITEM_BYTES[map.dtype], _SWIZZLE_BYTES[map.swizzle]
    demand(run % _UNIT_BYTES == 0, "the box's innermost run is odd", f"a multiple of {_UNIT_BYTES} bytes", run)
    demand(span is None or run <= span, "the box is wider than its swizzle", f"<= {span} bytes", run)
    end = map.offset + map.nbytes
    inside = map.offset >= 0 and end <= map.slot.spec.nbytes
    demand(inside, "reaches out of its tensor", f"bytes 0 to {map.slot.spec.nbytes}", f"{map.offset} to {end}")


def encode(bindings: Any, map: TensorMap, address: int) -> bytes:
    """The map's 128 bytes by `bindings`, cuda-bindings' driver module. Raises LaunchError where the driver refuses it."""
    promotions = bindings.CUtensorMapL2promotion
    promotion = {
        0: promotions.CU_TENSOR_MAP_L2_PROMOTION_NONE,
        64: promotions.CU_TENSOR_MAP_L2_PROMOTION_L2_64B,
        128: promotions.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        256: promotions.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
    }[map.l2_bytes]
    swizzles = bindings.CUtensorMapSwizzle
    swizzle = {
        None: swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
        "64B": swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
        "128B": swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
    }[map.swizzle]
    status, encoded = bindings.cuTensorMapEncodeTiled(
        bindings.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        len(map.dims),
        address,
        [bindings.cuuint64_t(d) for d in map.dims],
        [bindings.cuuint64_t(s) for s in map.strides_bytes],
        [bindings.cuuint32_t(b) for b in map.box],
        [bindings.cuuint32_t(e) for e in map.element_strides or (1,) * len(map.dims)],
        bindings.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle,
        promotion,
        bindings.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status.value:
        raise LaunchError(f"tensor map: {status.name}", where=map.slot.label, got=map)
    return b"".join(int(word).to_bytes(8, "little") for word in encoded.opaque)
