"""Files: written whole or not at all, read with every doubt named. No pickle.

Here and in the modules above, what only files and progress bars need is imported when used: the operators
and the training step run where there is torch and no more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.checks import BadValue, reject
from fastsae.config import SAEConfig

__all__ = ["check_tensors", "read_dictionary", "write_atomically", "write_dictionary", "write_json"]

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_FORMAT = "fastsae/1"


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file beside ``path``, bring it to the disk, then rename it into place."""
    with _staged(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON, atomically."""
    write_atomically(path, json.dumps(data, indent=2) + "\n")


def write_dictionary(folder: Path, config: SAEConfig, tensors: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors: both whole on disk before either takes its place."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": _FORMAT, **config.to_dict()}, indent=2) + "\n"
    with _staged(folder / WEIGHTS_FILE) as weights, _staged(folder / CONFIG_FILE) as description:
        save_file(tensors, weights, {"format": _FORMAT})
        description.write_text(text)


def read_dictionary(folder: Path) -> tuple[SAEConfig, dict[str, Tensor]]:
    """Read what :func:`write_dictionary` wrote. Raises ValueError at missing, damaged or foreign files."""
    from safetensors import SafetensorError, safe_open

    path = folder / CONFIG_FILE
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise BadValue(f"{path}: got no readable file, expected a config.json of fastsae") from error
    except ValueError as error:
        raise BadValue(f"{path}: got text that isn't JSON ({error}), expected one of fastsae") from error
    if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
        reject(str(path), "a config of another format", f'one with "format": "{_FORMAT}"')
    config = SAEConfig.from_dict(data)
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BadValue(f"{path}: got no whole safetensors file ({error}), expected one of fastsae") from error


def check_tensors(
    path: Path, tensors: dict[str, Tensor], expected: dict[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """Raise ValueError unless exactly the expected tensors are there, in shape and dtype, and all finite."""
    for name in sorted(tensors.keys() | expected.keys()):
        shape, dtype = expected.get(name, ("no such tensor", None))
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        if found != shape:
            reject(str(path), f"{name} {found}", str(shape))
        if tensors[name].dtype != dtype:
            reject(str(path), f"{name} in {tensors[name].dtype}", str(dtype))
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            reject(str(path), f"NaN or Inf in {name}", "finite weights")


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place, synced to disk, if the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files readable to their owner alone
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
