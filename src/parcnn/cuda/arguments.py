"""A kernel's argument block: the bytes that `cuLaunchKernel` takes, at the offsets that the compiled kernel reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from parcnn.cuda.cubin import Parameter
from parcnn.cuda.launch import Argument, LaunchError, Pointer, Struct, TensorMap
from parcnn.cuda.tensormap import ALIGNMENT, check
from parcnn.ops.program import Slot

POINTER_BYTES = 8


@dataclass(frozen=True)
class Arguments:
    """`data` is the block; `pointers` says where in it which tensors' addresses lie (a tensor map begins with its own)."""

    data: bytes
    pointers: tuple[tuple[int, Pointer], ...]


@dataclass(frozen=True)
class _Value:
    data: bytes
    alignment: int
    pointers: tuple[tuple[int, Pointer], ...] = ()


def pack(
    args: Sequence[Argument],
    parameters: Sequence[Parameter],
    address: Callable[[Slot], int],
    encode: Callable[[TensorMap, int], bytes],
    where: str,
) -> Arguments:
    """Lay `args` out as the kernel's own parameter table says.

    `address` gives a slot's place in memory, `encode` the driver's form of a tensor map at an address. Raises
    LaunchError where number or size of the arguments are not the kernel's, or a tensor map breaks a rule.
    """
    values = [
        _tensor_map(arg, address, encode, f"{where}, argument {i}")
        if isinstance(arg, TensorMap)
        else _encode(arg, address, where)
        for i, arg in enumerate(args)
    ]
    if len(values) != len(parameters):
        raise LaunchError("wrong number of arguments", where=where, expected=len(parameters), got=len(values))
    block = bytearray(max((p.offset + p.nbytes for p in parameters), default=0))
    pointers = []
    for i, (value, parameter) in enumerate(zip(values, parameters, strict=True)):
        if len(value.data) != parameter.nbytes:
            raise LaunchError(
                f"argument {i} has the wrong size",
                where=where,
                expected=f"{parameter.nbytes} bytes",
                got=f"{len(value.data)} bytes: {args[i]!r}",
                remedy="give scalars their C type and structs the fields of the kernel's struct",
            )
        block[parameter.offset : parameter.offset + parameter.nbytes] = value.data
        pointers += [(parameter.offset + at, pointer) for at, pointer in value.pointers]
    return Arguments(bytes(block), tuple(pointers))


def _encode(arg: Argument, address: Callable[[Slot], int], where: str) -> _Value:
    if arg is None:
        return _Value(bytes(POINTER_BYTES), POINTER_BYTES)
    if isinstance(arg, Slot):
        arg = Pointer(arg)
    if isinstance(arg, Pointer):
        data = (address(arg.slot) + arg.offset).to_bytes(POINTER_BYTES, "little")
        return _Value(data, POINTER_BYTES, ((0, arg),))
    if isinstance(arg, Struct):
        return _struct([_encode(field, address, where) for field in arg.fields])
    if isinstance(arg, np.generic):
        return _Value(arg.tobytes(), arg.itemsize)
    if isinstance(arg, bytes):
        return _Value(arg, 1)
    raise LaunchError(
        "an argument has no C type",
        where=where,
        expected="Slot, Pointer, Struct, bytes, None, a NumPy scalar such as np.int32(3), or (no field) TensorMap",
        got=repr(arg),
    )


def _tensor_map(
    map: TensorMap, address: Callable[[Slot], int], encode: Callable[[TensorMap, int], bytes], where: str
) -> _Value:
    at = address(map.slot) + map.offset
    check(map, at, where)
    return _Value(encode(map, at), ALIGNMENT, ((0, Pointer(map.slot, map.offset, map.nbytes)),))


def _struct(fields: Sequence[_Value]) -> _Value:
    """C's layout: each field at the next multiple of its alignment, the whole a multiple of the largest."""
    data, pointers = bytearray(), []
    alignment = max((f.alignment for f in fields), default=1)
    for f in fields:
        data += bytes(-len(data) % f.alignment)
        pointers += [(len(data) + at, pointer) for at, pointer in f.pointers]
        data += f.data
    return _Value(bytes(data) + bytes(-len(data) % alignment), alignment, tuple(pointers))
