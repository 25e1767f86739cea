"""Checkpoints: any tree of tensors and plain values, in safetensors and JSON, visible only when whole.

A checkpoint is the folder ``step-<n>``: ``state.safetensors`` with the tensors, ``state.json`` with the rest.
It is written under a temporary name, flushed to disk and renamed, so that a folder of that name is always
complete.
No pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.checks import BadValue, reject

__all__ = ["latest_checkpoint", "load_checkpoint", "save_checkpoint"]

_TENSORS, _PLAIN = "state.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{9})")


def save_checkpoint(folder: Path, step: int, tree: dict[str, Any], keep: int = 2) -> Path:
    """Write ``tree`` as ``folder/step-<step>`` and remove all but the newest ``keep`` checkpoints.

    Args:
        tree: nested dicts, lists and tuples (read back as lists) of tensors, numbers, strings and None.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tmp"):  # of a run that was killed while writing
        shutil.rmtree(leftover)
    final = folder / f"step-{step:09d}"
    if final.exists():  # the same step again: the same state
        return final
    temporary = folder / f".{final.name}.tmp"
    temporary.mkdir()
    tensors: dict[str, Tensor] = {}
    plain = _flatten(tree, "", tensors)
    save_file(tensors, temporary / _TENSORS)
    (temporary / _PLAIN).write_text(json.dumps(plain))
    for path in (temporary / _TENSORS, temporary / _PLAIN, temporary):
        _sync(path)
    os.replace(temporary, final)
    _sync(folder)
    for old in _checkpoints(folder)[:-keep]:
        hidden = old.with_name(f".{old.name}.tmp")
        os.replace(old, hidden)  # a half-removed checkpoint must not bear its name
        shutil.rmtree(hidden)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in ``folder``, or None."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote, on the CPU. Raises ValueError at a damaged checkpoint."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return _unflatten(json.loads((path / _PLAIN).read_text()), load_file(path / _TENSORS))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = f"a checkpoint that can't be read ({error})"
        raise BadValue(
            f"{path}: got {reason}, expected a whole one; delete it to resume from the one before"
        ) from error


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):  # as pairs: keys may be integers
        return {"items": [[key, _flatten(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_flatten(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, str | int | float):
        return {"value": value}
    reject(
        f"checkpoint{name}", type(value).__name__, "tensors, numbers, strings, None, lists and dicts of them"
    )


def _unflatten(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "items":
        return {key: _unflatten(item, tensors) for key, item in value}
    return [_unflatten(item, tensors) for item in value] if kind == "list" else value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def random_state() -> dict[str, Tensor]:
    """The states of torch's global generators: the CPU's and each CUDA device's."""
    devices = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    return {"cpu": torch.get_rng_state()} | {str(i): torch.cuda.get_rng_state(i) for i in range(devices)}


def restore_random_state(states: dict[str, Tensor]) -> None:
    """Undo :func:`random_state`; states of devices that aren't here are passed over."""
    torch.set_rng_state(states["cpu"])
    for i in range(torch.cuda.device_count()):
        if str(i) in states:
            torch.cuda.set_rng_state(states[str(i)], i)
