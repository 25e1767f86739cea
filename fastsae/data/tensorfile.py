"""One growing tensor in a safetensors file: written in a stream, read as a memory map."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.checks import BadValue
from fastsae.shards import encode_header, to_bytes

__all__ = ["TensorWriter", "map_tensors"]

_HEADER = 256  # bytes before the data, the length field included; blanks fill it up, as the format allows
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}


class TensorWriter:
    """Write a safetensors file with one tensor whose number of rows isn't known yet; a context manager.

    Args:
        path: the file; must not exist.
        name: the tensor's name in it.
        dtype: float32, float16, bfloat16 or int32; what is written is converted to it.
    """

    def __init__(self, path: Path, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self.n_rows = 0
        self._row: list[int] = []
        self._digest = hashlib.sha256()
        self._file = open(path, "xb")  # noqa: SIM115  (closed on exit)
        self._file.write(bytes(_HEADER))

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, rows: Tensor) -> None:
        """Append ``rows`` [n, ...]; all calls agree on the shape of a row."""
        self._row = list(rows.shape[1:])
        self.n_rows += rows.shape[0]
        data = to_bytes(rows.to("cpu", self.dtype))
        self._digest.update(data)
        self._file.write(data)

    def finish(self) -> str:
        """Write the header, bring the file to the disk, and return the sha256 of the data."""
        shape = (self.n_rows, *self._row)
        self._file.seek(0)
        self._file.write(encode_header({self.name: (shape, self.dtype)}, align=_HEADER))
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()


def map_tensors(path: Path) -> dict[str, tuple[np.ndarray, str]]:
    """Map every tensor of a safetensors file into memory, read-only.

    Returns:
        By name: the array, and its dtype as safetensors spells it. bfloat16 (``"BF16"``) comes as the uint16
        of its bits; dtypes that can't be activations or token ids are left out.

    Raises:
        ValueError: not a safetensors file, or a truncated one.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("truncated or foreign")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: (_map(path, entry, 8 + length, size), entry["dtype"])
            for name, entry in header.items()
            if entry["dtype"] in _NUMPY
        }
    except FileNotFoundError:
        raise BadValue(
            f"activations: got '{path}', which doesn't exist, expected a safetensors file"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadValue(f"activations: got '{path}', expected a whole safetensors file ({error})") from None


def _map(path: Path, entry: dict[str, Any], start: int, size: int) -> np.ndarray:
    dtype, shape = np.dtype(_NUMPY[entry["dtype"]]), tuple(entry["shape"])
    first, last = entry["data_offsets"]
    n_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if last - first != n_bytes or first < 0:
        raise ValueError("its header contradicts itself")
    if start + last > size:
        raise ValueError(f"{start + last - size} bytes are missing at its end")
    if n_bytes == 0:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=start + first, shape=shape)
