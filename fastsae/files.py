"""Files: written whole or not at all, read with every doubt named. No pickle.

A dictionary is config.json beside model.safetensors, or beside shards and model.safetensors.index.json. Its
weights are replaced by one rename, and carry the config they were saved with. config.json says, by a digest,
which saved config it shows: edited by hand it still holds; but left by another save, which a crash between
the two renames can do, it is passed over for the weights' own.

Here and in the modules above, what only files and progress bars need is imported when used: the operators
and the training step run where there is torch and no more.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastsae.checks import reject
from fastsae.config import SAEConfig
from fastsae.shards import (
    MAX_SHARD_BYTES,
    Rows,
    StoredTensors,
    parse_json,
    read_json,
    staged,
    sync,
    write_shards,
)

__all__ = [
    "Dictionary",
    "open_dictionary",
    "write_atomically",
    "write_dictionary",
    "write_json",
]

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_FORMAT, _DIGEST = "fastsae/1", "config_sha256"
_EXPECTED = "a config of fastsae"
_OUR_SHARD = re.compile(r"model-[0-9a-f]{8}-[0-9]{5,}-of-[0-9]{5,}\.safetensors")
_OUR_TEMPORARY = re.compile(r"\.(config\.json|model\.safetensors(\.index\.json)?)\.[0-9a-f]+\.tmp")


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file beside ``path``, bring it to the disk, then rename it into place."""
    with staged(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        sync(temporary)
        os.replace(temporary, path)


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON, atomically."""
    write_atomically(path, json.dumps(data, indent=2) + "\n")


def write_dictionary(
    folder: Path,
    config: SAEConfig,
    tensors: Mapping[str, Rows | Tensor],
    weight_format: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a dictionary in place of the one that may be in ``folder``, in a block of rows of memory.

    Whatever fails or crashes, the folder holds the old dictionary or the new one, whole. What an earlier save
    left is removed: old shards once the new weights are in place, a crashed save's files before.

    Args:
        tensors: by name; more than ``max_shard_bytes`` of them are cut by latents; those whose first
            dimension isn't n_latents stay whole, in the first shard.
        weight_format: how the module held W_enc and W_dec (see :class:`fastsae.SAE`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: t if isinstance(t, Rows) else Rows.of(t) for name, t in tensors.items()}
    saved = {"format": _FORMAT, "weight_format": weight_format, **config.to_dict()}
    text = json.dumps(saved)
    _sweep(folder)
    try:
        with staged(folder / CONFIG_FILE) as description:
            description.write_text(json.dumps(saved | {_DIGEST: _digest(text)}, indent=2) + "\n")
            sync(description)
            shards = _cut(rows, config.n_latents, max_shard_bytes)
            write_shards(folder, "model", shards, {"format": _FORMAT, "config": text})
            os.replace(description, folder / CONFIG_FILE)
        sync(folder)
    finally:
        _sweep(folder)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _cut(tensors: dict[str, Rows], n_latents: int, limit: int) -> list[dict[str, Rows]]:
    cut = {name: rows for name, rows in tensors.items() if rows.shape[:1] == (n_latents,)}
    whole = {name: rows for name, rows in tensors.items() if name not in cut}
    rest = sum(rows.n_bytes for rows in whole.values())
    per_latent = sum(rows.row_bytes for rows in cut.values())
    if rest + n_latents * per_latent <= limit or n_latents == 1 or not per_latent:
        return [tensors]
    first = min(max(1, (limit - rest) // per_latent), n_latents - 1)
    bounds = [0, *range(first, n_latents, max(1, limit // per_latent)), n_latents]
    shards = [
        {f"{name}[{lo}:{hi}]": rows.part(lo, hi) for name, rows in cut.items()} for lo, hi in pairwise(bounds)
    ]
    return [whole | shards[0], *shards[1:]]


def _sweep(folder: Path) -> None:
    """Remove files of earlier saves that the weights in place don't name."""
    index = folder / f"{WEIGHTS_FILE}.index.json"
    sharded, named = index.exists(), set()
    if sharded:
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            named = {path.name for path in folder.iterdir()}  # damaged: who knows what it named
    for path in folder.iterdir():
        stale = _OUR_SHARD.fullmatch(path.name) or (sharded and path.name == WEIGHTS_FILE)
        if _OUR_TEMPORARY.fullmatch(path.name) or (stale and path.name not in named):
            path.unlink(missing_ok=True)


class Dictionary(NamedTuple):
    """What :func:`open_dictionary` found; ``weight_format`` is how the module held its weights."""

    config: SAEConfig
    weight_format: str
    tensors: StoredTensors


def open_dictionary(folder: Path) -> Dictionary:
    """Open what :func:`write_dictionary` wrote. Raises ValueError at missing, damaged or foreign files."""
    path = folder / CONFIG_FILE
    data = _check_config(path, read_json(path, _EXPECTED))
    tensors = StoredTensors(folder, "model")
    own, digest = tensors.metadata.get("config"), data.pop(_DIGEST, None)
    if tensors.metadata.get("format") == _FORMAT and isinstance(own, str) and _digest(own) != digest:
        # config.json is another save's
        data = _check_config(tensors.path, parse_json(tensors.path, own, _EXPECTED))
    weight_format = data.pop("weight_format", "float32")
    return Dictionary(SAEConfig.from_dict(data), weight_format, tensors)


def _check_config(path: Path, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
        reject(str(path), "a config of another format", f'one with "format": "{_FORMAT}"')
    return data
