"""Checkpoints: one safetensors file with weights, optimizer state and where training stood, written atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from parcnn.errors import CheckpointError
from parcnn.files import write_whole

FORMAT = "parcnn-1"


@dataclass(frozen=True)
class Checkpoint:
    """weights: the model's state_dict; optimizer: its tensors; info: JSON (epoch, step, seed, classes, ...)."""

    weights: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint: the file at `path` is the old one or the whole new one, never half of one.

    Raises CheckpointError, naming the file, where it cannot be written.
    """
    path = Path(path)
    tensors = {f"model.{k}": v for k, v in checkpoint.weights.items()}
    tensors |= {f"optimizer.{k}": v for k, v in checkpoint.optimizer.items()}
    tensors = {k: np.asarray(v, order="C") for k, v in tensors.items()}
    info = json.dumps(checkpoint.info)
    blob = save(tensors, {"format": FORMAT, "info": info, "sha256": _digest(info, tensors)})
    try:
        write_whole(path, blob)
    except OSError as fault:
        raise CheckpointError(
            f"cannot be written ({fault.strerror or fault})",
            where=str(path),
            remedy="make room or give permission there, or write it to another folder",
        ) from fault


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint. Raises CheckpointError, naming the file, when it is missing, corrupt or not one of ours."""
    if Path(path).is_dir():
        raise CheckpointError("a folder", where=str(path), expected="a checkpoint's file", remedy="name the file in it")
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            _check_format(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise CheckpointError("no such file", where=str(path), remedy="check the path") from None
    except (SafetensorError, OSError) as fault:
        raise CheckpointError(
            "the file is not a whole safetensors file",
            where=str(path),
            got=str(fault),
            remedy="use an older checkpoint",
        ) from fault
    digest = _digest(metadata.get("info", ""), tensors)
    if metadata.get("sha256", digest) != digest:  # older ones have none
        raise CheckpointError(
            "the file was changed since it was written, or is damaged", where=str(path),
            expected=f"SHA-256 {metadata['sha256']} of its tensors and description", got=digest,
            remedy="use an older checkpoint",
        )  # fmt: skip
    try:
        info = json.loads(metadata["info"])
    except (KeyError, ValueError) as fault:
        raise _damaged(path, str(fault)) from fault
    if not isinstance(info, dict):
        raise _damaged(path, metadata["info"])
    parts: dict[str, dict[str, np.ndarray]] = {"model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        kind, _, key = name.partition(".")
        if kind not in parts:
            raise CheckpointError(
                "an unknown tensor", where=str(path), expected="model.* and optimizer.*", got=name,
                remedy="use an older checkpoint",
            )  # fmt: skip
        parts[kind][key] = tensor
    return Checkpoint(parts["model"], parts["optimizer"], info)


def _digest(info: str, tensors: Mapping[str, np.ndarray]) -> str:
    """Of the description and of all tensors' bytes, by name."""
    digest = hashlib.sha256(info.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def _check_format(path: str | Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            "not a parcnn checkpoint", where=str(path), expected=f"format {FORMAT!r}", got=metadata.get("format", "none"),
            remedy="load plain weights with model.load_state_dict(safetensors.numpy.load_file(path))",
        )  # fmt: skip


def _damaged(path: str | Path, got: str) -> CheckpointError:
    return CheckpointError(
        "the checkpoint's description is damaged", where=str(path), got=got, remedy="use an older checkpoint"
    )
