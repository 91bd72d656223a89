"""Which executor runs the work."""

from __future__ import annotations

from parcnn.errors import ArgumentError
from parcnn.ops.program import Executor


def resolve_executor(device: str | Executor = "auto", threads: int | None = None) -> Executor:
    """The executor for 'cpu', 'cuda' or 'auto' (the GPU where there is one); an executor is given back as it is.

    threads: CPU threads (None: all cores; 1: the sequential implementation). Raises ArgumentError for another name and
    DeviceError, with the remedy, when 'cuda' is asked for and something that it needs is missing.
    """
    if not isinstance(device, str):
        return device
    if device == "auto":
        from parcnn.cuda.device import is_available

        device = "cuda" if is_available() else "cpu"
    if device == "cuda":
        from parcnn.cuda.executor import CudaExecutor

        return CudaExecutor()
    if device == "cpu":
        from parcnn.cpu import CpuExecutor

        return CpuExecutor(threads)
    raise ArgumentError("unknown device", expected="'auto', 'cpu' or 'cuda'", got=device)
