"""Checkpoints: any tree of tensors and plain values, in safetensors and JSON, visible only when whole.

A checkpoint is the folder ``step-<n>``: ``state.safetensors``, or shards with an index, with the tensors, and
``state.json`` with the rest. It is written under a temporary name, flushed to disk and renamed, so that a
folder of that name is always complete.
No pickle, and no copy of a tensor: one block of rows at a time is in memory beside it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastsae.checks import BadValue, reject
from fastsae.shards import MAX_SHARD_BYTES, Rows, StoredTensors, sync, write_shards

__all__ = [
    "checkpoints",
    "latest_checkpoint",
    "load_checkpoint",
    "prune_checkpoints",
    "remove_checkpoint",
    "save_checkpoint",
]

_STEM, _PLAIN = "state", "state.json"
_NAME = re.compile(r"step-(\d{9})")


def save_checkpoint(
    folder: Path, step: int, tree: dict[str, Any], keep: int = 2, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Path:
    """Write ``tree`` as ``folder/step-<step>`` and remove all but the newest ``keep`` checkpoints.

    Args:
        tree: nested dicts, lists and tuples (read back as lists) of tensors, numbers, strings and None.
        max_shard_bytes: of tensors in one file; a tensor that has more is cut by rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tmp"):  # of a run that was killed while writing
        shutil.rmtree(leftover)
    final = folder / f"step-{step:09d}"
    if final.exists():  # the same step again: the same state
        return final
    temporary = folder / f".{final.name}.tmp"
    temporary.mkdir()
    tensors: dict[str, Rows] = {}
    plain = _flatten(tree, "", tensors)
    write_shards(temporary, _STEM, _pack(tensors, max_shard_bytes), {})
    (temporary / _PLAIN).write_text(json.dumps(plain))
    sync(temporary / _PLAIN)
    sync(temporary)
    os.replace(temporary, final)
    sync(folder)
    prune_checkpoints(folder, keep)
    return final


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints in ``folder``."""
    for old in list(checkpoints(folder).values())[:-keep]:
        remove_checkpoint(old)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; under its name it is whole or not at all."""
    hidden = path.with_name(f".{path.name}.tmp")
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in ``folder`` by step, the newest last."""
    found = {path: _NAME.fullmatch(path.name) for path in sorted(folder.glob("step-*"))}
    return {int(name[1]): path for path, name in found.items() if name}


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in ``folder``, or None."""
    return next(reversed(checkpoints(folder).values()), None)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote. Raises ValueError at a damaged checkpoint.

    Its tensors are private maps of the files, which take memory only where they are written to; those cut by
    rows are copied from piece by piece by ``copy_`` and ``to``, and joined in memory by any other use.
    """
    try:
        stored = StoredTensors(path, _STEM)
        tensors = {
            name: pieces[0] if len(pieces) == 1 else _Split(pieces) for name, pieces in stored.pieces.items()
        }
        return _unflatten(json.loads((path / _PLAIN).read_text()), tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"a checkpoint that can't be read ({error})"
        raise BadValue(
            f"{path}: got {reason}, expected a whole one; delete it to resume from the one before"
        ) from error


class _Split(Tensor):
    """A tensor whose rows lie in several files, whose address space can't be joined without a copy."""

    pieces: list[Tensor]

    @staticmethod
    def __new__(cls, pieces: list[Tensor]) -> _Split:
        shape = (sum(map(len, pieces)), *pieces[0].shape[1:])
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=pieces[0].dtype)
        made.pieces = pieces
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default and not isinstance(args[0], cls):
            return args[1].copy_to(args[0])
        if func is torch.ops.aten._to_copy.default:
            dtype, device = kwargs.get("dtype") or args[0].dtype, kwargs.get("device") or "cpu"
            return args[0].copy_to(torch.empty(args[0].shape, dtype=dtype, device=device))
        args, kwargs = tree_map(lambda t: torch.cat(t.pieces) if isinstance(t, cls) else t, (args, kwargs))
        return func(*args, **kwargs)

    def copy_to(self, destination: Tensor) -> Tensor:
        """Copy into ``destination``, piece by piece; returns it."""
        lo = 0
        for piece in self.pieces:
            destination[lo : lo + len(piece)].copy_(piece)
            lo += len(piece)
        return destination

    def __deepcopy__(self, memo: dict) -> Tensor:
        return torch.cat(self.pieces)


def _pack(tensors: dict[str, Rows], limit: int) -> list[dict[str, Rows]]:
    """Files of at most ``limit`` bytes (or a row, if that is more), in the order of the tensors."""
    shards: list[dict[str, Rows]] = [{}]
    room = limit
    for name, rows in tensors.items():
        for key, piece in _pieces(name, rows, limit):
            if piece.n_bytes > room and shards[-1]:
                shards.append({})
                room = limit
            shards[-1][key] = piece
            room -= piece.n_bytes
    return shards


def _pieces(name: str, rows: Rows, limit: int) -> Iterator[tuple[str, Rows]]:
    n_rows, size = rows.shape[0] if rows.shape else 1, max(1, limit // max(1, rows.row_bytes))
    if n_rows <= size:
        yield name, rows
        return
    for lo in range(0, n_rows, size):
        hi = min(lo + size, n_rows)
        yield f"{name}[{lo}:{hi}]", rows.part(lo, hi)


def _flatten(value: Any, name: str, tensors: dict[str, Rows]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = Rows.of(value)
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
