"""The errors that parcnn raises: each says where the fault is, what was expected, what came, and what to do about it."""

from __future__ import annotations


class ParcnnError(Exception):
    """Base of every error that parcnn raises on purpose.

    The message reads: where, what is wrong, then the lines `expected`, `got` and `remedy` where they are known.
    """

    def __init__(
        self, what: str, *, where: str = "", expected: object = None, got: object = None, remedy: str = ""
    ) -> None:
        self.what, self.where, self.expected, self.got, self.remedy = what, where, expected, got, remedy
        lines = [f"{where}: {what}" if where else what]
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if got is not None:
            lines.append(f"  got:      {got}")
        if remedy:
            lines.append(f"  remedy:   {remedy}")
        super().__init__("\n".join(lines))


class ShapeError(ParcnnError, ValueError):
    """Shapes that do not fit: between two layers, an array and a model, a kernel and its padded image."""


class UnsupportedError(ParcnnError, NotImplementedError):
    """Something that the field knows and parcnn does not do (yet): the remedy says what to use in its place."""


class UnknownNameError(UnsupportedError, AttributeError):
    """A layer, function or method that parcnn does not have: hasattr() sees an AttributeError."""


class ArgumentError(ParcnnError, ValueError):
    """A value outside the range that it may have, or a name that is not known."""


class DataError(ParcnnError, ValueError):
    """A data file or array that is missing, truncated, corrupt or does not match its companion."""


class DataUnavailableError(DataError):
    """A published data set that is not on this machine and could not be downloaded."""


class LabelError(DataError):
    """A label outside 0..classes-1."""


class CheckpointError(ParcnnError, ValueError):
    """A checkpoint that is corrupt, or that belongs to another model."""


class NonFiniteLossError(ParcnnError, ArithmeticError):
    """The loss became NaN or infinite."""


class OutOfMemoryError(ParcnnError, MemoryError):
    """The plan needs more memory than there is: says how much, by which layer, and the largest batch that fits."""


class DeviceError(ParcnnError, RuntimeError):
    """No usable GPU, driver, PyCUDA or compiler; or a launch that the driver refused."""


class TuningError(ParcnnError, ValueError):
    """A table of measured kernels that is damaged, another GPU's, or older than the kernels."""


class KernelCompileError(DeviceError):
    """NVRTC refused a kernel: carries its log."""
