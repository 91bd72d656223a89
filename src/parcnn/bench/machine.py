"""What a measurement ran on and of which sources, for its row."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from parcnn.bench.rows import Row
from parcnn.ops.program import Executor
from parcnn.train.timing import StepTiming


@dataclass(frozen=True)
class Machine:
    """A machine as rows name it. gpu, driver and cuda are None where no GPU is used."""

    cpu: str
    cores: int
    python: str
    numpy: str
    torch: str | None
    gpu: str | None
    driver: str | None
    cuda: str | None
    commit: str | None

    @classmethod
    def of(cls, executor: Executor | None = None) -> Machine:
        """This machine, with the GPU of `executor` where it is a CUDA executor."""
        device = getattr(executor, "device", None)
        return cls(
            cpu=cpu_name(),
            cores=len(os.sched_getaffinity(0)),
            python=platform.python_version(),
            numpy=np.__version__,
            torch=installed("torch"),
            gpu=device.name if device else None,
            driver=device.driver or None if device else None,
            cuda=device.cuda or None if device else None,
            commit=commit(),
        )

    def row(
        self,
        bench: str,
        problem: Any,
        variant: str,
        timing: StepTiming | None = None,
        *,
        peer: str | None = None,
        peer_p50_us: float | None = None,
        peak_bytes: int | None = None,
        **extra: Any,
    ) -> Row:
        """A measurement made here and now."""
        return Row(
            bench=bench,
            problem=problem,
            variant=variant,
            p20_us=timing.p20_us if timing else None,
            p50_us=timing.p50_us if timing else None,
            p80_us=timing.p80_us if timing else None,
            peer=peer,
            peer_p50_us=peer_p50_us,
            peak_bytes=peak_bytes,
            gpu=self.gpu,
            driver=self.driver,
            cuda=self.cuda,
            commit=self.commit,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            extra={**extra, "cpu": self.cpu, "cores": self.cores, "python": self.python, "numpy": self.numpy},
        )


def cpu_name(record: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name; its architecture where the system does not say."""
    try:
        lines = record.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def installed(package: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """$GIT_COMMIT, or the commit of the checkout that holds `folder` ("+changes" where it was edited); else None."""
    if named := os.environ.get("GIT_COMMIT"):
        return named
    head = _git(folder, "rev-parse", "HEAD")
    return f"{head}+changes" if head and _git(folder, "status", "--porcelain", "--", ".") else head


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
