"""Tensors of any size in safetensors files: written in a stream, in shards, and read as memory maps.

One block of rows is in memory at a time. Many bytes are cut into shards beside an index, as the Hugging Face
Hub has it for large models; what lies in a shard in part is named like the Python slice it is:
``W_enc[0:1048576]``.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.checks import BadValue, reject

__all__ = [
    "MAX_SHARD_BYTES",
    "Rows",
    "StoredTensors",
    "encode_header",
    "parse_json",
    "read_json",
    "staged",
    "sync",
    "to_bytes",
    "write_shards",
]

BLOCK_BYTES = 2 * 2**20
"""Bytes of a tensor that are read, converted, checked or written at a time; at least one row. Making or
checking a block takes a few times that."""
MAX_SHARD_BYTES = 5 * 2**30
"""Bytes of tensors in one file, as on the Hugging Face Hub; more where a single row has more."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PIECE = re.compile(r"(.+)\[([0-9]{1,18}):([0-9]{1,18})\]", re.DOTALL)
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, for the block to rename; gone afterwards."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Rows:
    """A tensor to be written, of which a block of rows is made at a time.

    Attributes:
        read: rows lo..hi, on any device; of a 0-dim tensor ``read(0, 1)`` is all of it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Rows:
        """The rows of a tensor that is there."""
        t = tensor.detach()
        return cls(tuple(t.shape), t.dtype, lambda lo, hi: t[lo:hi] if t.ndim else t)

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def n_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def part(self, lo: int, hi: int) -> Rows:
        """Rows lo..hi alone."""
        return Rows((hi - lo, *self.shape[1:]), self.dtype, lambda a, b: self.read(lo + a, lo + b))

    def spans(self) -> Iterator[tuple[int, int]]:
        """The bounds lo, hi of blocks of about BLOCK_BYTES that cover all rows."""
        n_rows, size = self.shape[0] if self.shape else 1, max(1, BLOCK_BYTES // max(1, self.row_bytes))
        for lo in range(0, n_rows, size):
            yield lo, min(lo + size, n_rows)


def encode_header(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    metadata: Mapping[str, str] | None = None,
    align: int = 8,
) -> bytes:
    """What precedes the data of tensors of these shapes and dtypes, in this order, in a safetensors file.

    Blanks fill it up to a multiple of ``align`` bytes. Raises ValueError at a dtype without a name there.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, (shape, dtype) in tensors.items():
        if dtype not in _DTYPES:
            reject(name, dtype, "one of " + ", ".join(map(str, _DTYPES)))
        end = start + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % align)
    return len(text).to_bytes(8, "little") + text


def to_bytes(block: Tensor) -> memoryview:
    """The bytes of a tensor on any device: without a copy if it is contiguous on the CPU."""
    return block.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data


def _write_file(path: Path, tensors: Mapping[str, Rows], metadata: Mapping[str, str]) -> None:
    # wide dtypes first, as safetensors itself does: all lie at multiples of their size
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    with open(path, "xb") as file:
        file.write(
            encode_header({name: (rows.shape, rows.dtype) for name, rows in ordered.items()}, metadata)
        )
        for name, rows in ordered.items():
            for lo, hi in rows.spans():
                file.write(_block(name, rows, lo, hi))  # and let go of it before the next is made
    sync(path)


def _block(name: str, rows: Rows, lo: int, hi: int) -> memoryview:
    block, shape = rows.read(lo, hi), (hi - lo, *rows.shape[1:]) if rows.shape else ()
    if (tuple(block.shape), block.dtype) != (shape, rows.dtype):
        got = f"{tuple(block.shape)} in {block.dtype}"
        reject(f"rows {lo}:{hi} of {name}", got, f"{shape} in {rows.dtype}")
    return to_bytes(block)


def write_shards(folder: Path, stem: str, shards: list[dict[str, Rows]], metadata: Mapping[str, str]) -> None:
    """Write one shard as ``<stem>.safetensors``; several, under new names, with their index.

    All is on the disk before one rename (from several to one: one removal) makes it what
    :class:`StoredTensors` finds; until then that finds what was there before. ``metadata`` is of the whole.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if len(shards) == 1:
        with staged(single) as temporary:
            _write_file(temporary, shards[0], metadata)
            os.replace(temporary, single)
        sync(folder)
        if index.exists():  # which goes before the single file, until it is gone
            index.unlink()
            sync(folder)
        return
    tag, size = secrets.token_hex(4), 0
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"{stem}-{tag}-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, metadata)
        weight_map |= dict.fromkeys(shard, name)
        size += sum(rows.n_bytes for rows in shard.values())
    sync(folder)
    with staged(index) as temporary:
        whole = {"metadata": {"total_size": size, **metadata}, "weight_map": weight_map}
        temporary.write_text(json.dumps(whole, indent=2) + "\n")
        sync(temporary)
        os.replace(temporary, index)
    sync(folder)


class StoredTensors:
    """What :func:`write_shards` wrote, mapped into memory: nothing is read before it is touched.

    Attributes:
        path: the file or the index, which errors name.
        metadata: of the whole.
        pieces: each tensor as its consecutive pieces, private maps of files; mostly one.

    Raises:
        ValueError: a missing, truncated or foreign file; pieces that leave rows out, overlap or differ; an
            index that leads out of the folder.
    """

    path: Path
    metadata: dict[str, Any]
    pieces: dict[str, list[Tensor]]

    def __init__(self, folder: Path, stem: str) -> None:
        self.path = folder / f"{stem}.safetensors.index.json"
        if not self.path.exists():
            self.path = folder / f"{stem}.safetensors"
            tensors, self.metadata = _map_file(self.path)
            self.pieces = {name: [tensor] for name, tensor in tensors.items()}
            return
        index = read_json(self.path, "an index of safetensors files")
        try:
            self.metadata, weight_map = dict(index["metadata"]), dict(index["weight_map"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadValue(f"{self.path}: got JSON of another kind, expected a safetensors index") from error
        for name in weight_map.values():
            if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
                reject(str(self.path), f"the file {name!r}", "the name of a .safetensors file beside it")
        self.pieces = self._join(folder, weight_map)
        size = sum(piece.nbytes for pieces in self.pieces.values() for piece in pieces)
        if size != (total := self.metadata.get("total_size")):
            reject(str(self.path), f"{size} bytes of tensors", f"its total_size, {total}")

    def _join(self, folder: Path, weight_map: dict[str, str]) -> dict[str, list[Tensor]]:
        files = {name: _map_file(folder / name)[0] for name in sorted(set(weight_map.values()))}
        found: dict[str, list[tuple[int, int | None, Tensor]]] = {}
        for key, file in weight_map.items():
            if key not in files[file]:
                reject(str(folder / file), f"no {key}", f"what {self.path.name} says is in it")
            name, lo, hi = match.groups() if (match := _PIECE.fullmatch(key)) else (key, 0, None)
            found.setdefault(name, []).append((int(lo), hi if hi is None else int(hi), files[file][key]))
        return {name: self._in_order(name, parts) for name, parts in found.items()}

    def _in_order(self, name: str, parts: list[tuple[int, int | None, Tensor]]) -> list[Tensor]:
        if len(parts) == 1 and parts[0][1] is None:
            return [parts[0][2]]
        parts.sort(key=lambda part: part[0])
        end, (_, _, first) = 0, parts[0]
        for lo, hi, piece in parts:
            if hi is None or lo != end:
                got = f"{name} in pieces and whole" if hi is None else f"{name}[{lo}:{hi}]"
                reject(str(self.path), got, f"pieces of it that follow each other, here from row {end}")
            shape, end = (hi - lo, *first.shape[1:]), hi
            if (tuple(piece.shape), piece.dtype) != (shape, first.dtype):
                got = f"{name}[{lo}:{hi}] {tuple(piece.shape)} in {piece.dtype}"
                reject(str(self.path), got, f"{shape} in {first.dtype}")
        return [piece for _, _, piece in parts]

    def rows(self, name: str) -> Rows:
        """A tensor, of which any rows can be read: without a copy unless they lie in several files."""
        pieces = self.pieces[name]
        if len(pieces) == 1:
            return Rows.of(pieces[0])

        def read(lo: int, hi: int) -> Tensor:
            parts, start = [], 0
            for piece in pieces:
                parts.append(piece[max(lo - start, 0) : max(hi - start, 0)])
                start += len(piece)
            parts = [part for part in parts if len(part)] or parts[:1]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return Rows((sum(map(len, pieces)), *pieces[0].shape[1:]), pieces[0].dtype, read)

    def check(self, expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """Raise ValueError unless exactly the expected tensors are there, in shape and dtype."""
        for name in sorted(self.pieces.keys() | expected.keys()):
            shape, dtype = expected.get(name, ("no such tensor", None))
            rows = self.rows(name) if name in self.pieces else None
            if rows is None or rows.shape != shape:
                reject(str(self.path), f"{name} {rows.shape if rows else 'missing'}", str(shape))
            if rows.dtype != dtype:
                reject(str(self.path), f"{name} in {rows.dtype}", str(dtype))

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield (lo, rows lo..), a block at a time; a 0-dim tensor as (0, all of it).

        Raises ValueError at NaN or Inf.
        """
        rows = self.rows(name)
        for lo, hi in rows.spans():
            block = rows.read(lo, hi)
            if block.is_floating_point() and not block.isfinite().all():
                reject(str(self.path), f"NaN or Inf in {name}", "finite weights")
            yield lo, block

    def copy_into(self, name: str, destination: Tensor) -> None:
        """Copy a tensor into one of its shape, of any dtype and device; ValueError at NaN or Inf."""
        for lo, block in self.blocks(name):
            (destination[lo : lo + len(block)] if block.ndim else destination).copy_(block)


def _map_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, mapped into memory, and its metadata; offsets and sizes checked."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BadValue(f"{path}: got no whole safetensors file ({error}), expected one of fastsae") from error


def read_json(path: Path, expected: str) -> Any:
    """What a JSON file says; a ValueError that names the file and what was expected if it can't be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadValue(f"{path}: got no readable file, expected {expected}") from error
    return parse_json(path, data, expected)


def parse_json(path: Path, text: str | bytes, expected: str) -> Any:
    """What a JSON text from ``path`` says, likewise."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadValue(f"{path}: got text that isn't JSON ({error}), expected {expected}") from error
