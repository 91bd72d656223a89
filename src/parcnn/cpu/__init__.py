"""The CPU executor: NumPy and BLAS, one readable function per op. With one thread it is the sequential implementation."""

from parcnn.cpu.executor import CpuExecutor
from parcnn.cpu.peak import peak_gflops

__all__ = ["CpuExecutor", "peak_gflops"]
