"""Activations on disk: written once, memory-mapped ever after."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fastsae.checks import BadType, BadValue, check_choice, check_number, check_type, reject
from fastsae.data.activations import Activations
from fastsae.data.tensorfile import TensorWriter, map_tensors

if TYPE_CHECKING:
    from filelock import FileLock

__all__ = [
    "ActivationStore",
    "SideBySide",
    "collect",
    "fetch_rows",
    "lock",
    "open_activations",
    "write_store",
    "write_stores",
]

FORMAT = 1
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DATA, _IDS, _MANIFEST = "activations.safetensors", "token_ids.safetensors", "manifest.json"
_PARTIAL = ".fastsae-partial"


class ActivationStore:
    """Activations of n_tokens tokens in a file, mapped into memory: nothing is read before it is asked for.

    ``store[rows]`` (a slice, or an integer array or tensor) is a fresh float32 tensor [len(rows), d_in] on
    the CPU. A mask is no such array: ``store[mask.nonzero()[0]]``.

    Attributes:
        path: the folder or file.
        manifest: what is known of the origin: n_tokens, d_in, dtype, and for folders written by
            :func:`collect` the format version, checksums and whatever the writer added (model, hook, context,
            ...).
        array: [n_tokens, d_in] as it lies on the disk; bfloat16 as the uint16 of its bits.
        token_ids: [n_tokens] int32, or None where the source had none.
    """

    def __init__(
        self, path: Path, manifest: dict[str, Any], array: np.ndarray, token_ids: np.ndarray | None = None
    ) -> None:
        self.path, self.manifest, self.array, self.token_ids = path, manifest, array, token_ids

    @classmethod
    def open(cls, directory: str | Path) -> ActivationStore:
        """Open a folder written by :func:`collect`.

        Raises:
            ValueError: there is no complete store of this format version in ``directory``.
        """
        path = Path(directory).expanduser()
        expected = "a folder written by collect"
        try:
            manifest = json.loads((path / _MANIFEST).read_text("utf-8"))
            version, dtype, has_ids = manifest["format"], manifest["dtype"], "token_ids" in manifest["sha256"]
            shape = (manifest["n_tokens"], manifest["d_in"])
        except OSError:
            raise BadValue(f"activations: got '{path}' with no {_MANIFEST}, expected {expected}") from None
        except (ValueError, KeyError, TypeError):
            raise BadValue(
                f"activations: got '{path}' with a damaged {_MANIFEST}, expected {expected}"
            ) from None
        if version != FORMAT:
            reject("activations", f"'{path}' in format {version}", f"format {FORMAT}: collect it again")
        found = _find_matrix(path / _DATA)
        ids = map_tensors(path / _IDS).get("token_ids", (None,))[0] if has_ids else None
        if (found.array.shape, found.dtype) != (shape, dtype) or (
            has_ids and (ids is None or len(ids) != shape[0])
        ):
            reject("activations", f"'{path}', whose files contradict its {_MANIFEST}", expected)
        return cls(path, manifest, found.array, ids)

    @property
    def n_tokens(self) -> int:
        return self.array.shape[0]

    @property
    def d_in(self) -> int:
        return self.array.shape[1]

    @property
    def dtype(self) -> str:
        """The dtype on the disk, by name."""
        return self.manifest["dtype"]

    def __len__(self) -> int:
        return self.n_tokens

    def __getitem__(self, rows: slice | np.ndarray | Tensor) -> Tensor:
        if isinstance(rows, slice):
            return self._to_float32(self.array[rows].copy())
        # Straight after the order asked for: sorting the rows first is slower on cached files and no faster
        # on cold ones (1024 of 345 k rows of 1.5 kB: 0.19 ms against 0.33 warm, 9 against 11 cold).
        return self._to_float32(np.take(self.array, _indices(rows, "integers or a slice"), axis=0))

    def _to_float32(self, block: np.ndarray) -> Tensor:
        if self.dtype == "bfloat16":
            return torch.from_numpy(block).view(torch.bfloat16).float()
        return torch.from_numpy(block.astype(np.float32, copy=False))

    def head(self, n: int) -> ActivationStore:
        """Return the first ``n`` tokens as a store, over the same memory map."""
        check_number("n", n, integer=True, low=1, high=self.n_tokens)
        ids = None if self.token_ids is None else self.token_ids[:n]
        return ActivationStore(self.path, self.manifest | {"n_tokens": n}, self.array[:n], ids)

    def verify(self) -> None:
        """Compare the files, of a ``head`` the whole ones, with their checksums; reads everything.

        Raises:
            ValueError: they differ.
        """
        if "sha256" not in self.manifest:
            return
        whole = ActivationStore.open(self.path)
        for name, expected in whole.manifest["sha256"].items():
            array = whole.array if name == "activations" else whole.token_ids
            if hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() != expected:
                got = f"'{self.path}', whose {name} differ from their checksum"
                reject("activations", got, "the data that collect wrote")


class SideBySide(ActivationStore):
    """Stores of the same tokens as one of [n_tokens, sum of their widths], a crosscoder's input.

    Rows are read from each and joined when asked for; ``array`` is the first one's.
    """

    def __init__(self, sites: Sequence[ActivationStore]) -> None:
        first, self.sites = sites[0], sites
        widths = [site.d_in for site in sites]
        manifest = {"n_tokens": len(first), "d_in": sum(widths), "dtype": first.dtype}
        super().__init__(first.path, manifest, first.array, first.token_ids)

    @property
    def d_in(self) -> int:
        return self.manifest["d_in"]

    def __getitem__(self, rows: slice | np.ndarray | Tensor) -> Tensor:
        return torch.cat([site[rows] for site in self.sites], 1)


def fetch_rows(x: ActivationStore | np.ndarray | Tensor, rows: np.ndarray) -> Tensor:
    """Return ``x[rows]`` for integers ``rows`` as a float32 tensor [len(rows), d]."""
    if isinstance(x, ActivationStore):
        return x[rows]
    rows = _indices(rows, "integers")
    if isinstance(x, Tensor):
        if rows.size and not -len(x) <= rows.min() <= rows.max() < len(x):  # on a GPU no mere exception
            raise IndexError(f"rows: got {rows.min()} to {rows.max()}, expected rows below {len(x)}")
        return x[torch.from_numpy(rows).to(x.device)].float()
    return torch.from_numpy(np.take(x, rows, axis=0).astype(np.float32, copy=False))


def _indices(rows: Any, expected: str) -> np.ndarray:
    """Return ``rows`` as int64. np.take reads a mask as the rows 0 and 1, torch uint8 rows as a mask."""
    rows = np.asarray(rows)
    if rows.dtype.kind not in "iu":
        reject("rows", f"{rows.dtype} {list(rows.shape)}", expected)
    return rows.astype(np.int64, copy=False)


def open_activations(path: str | Path) -> ActivationStore:
    """Open activations from a file or a folder, memory-mapped.

    Args:
        path: a ``.npy`` file, a ``.safetensors`` file whose only floating [n, d_in] tensor it is (or the one
            that is named ``activations``), or a folder written by :func:`collect`.

    Raises:
        ValueError: nothing of the kind, a truncated file, or one that holds pickled objects.
    """
    check_type("activations", path, (str, Path), "a file or a folder")
    path = Path(path).expanduser()
    if path.is_dir():
        return ActivationStore.open(path)
    if path.suffix not in (".safetensors", ".npy") or not path.exists():
        got = f"'{path}'" if path.exists() else f"'{path}', which doesn't exist"
        reject("activations", got, "a .safetensors or .npy file, or a folder written by collect")
    if path.suffix == ".safetensors":
        return _find_matrix(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadValue(
            f"activations: got '{path}', expected a whole .npy file of numbers ({error})"
        ) from None
    if not isinstance(array, np.ndarray):
        array.close()
        _not_a_matrix(path, "an archive")
    return _store(path, array, array.dtype.name)


def collect(
    chunks: Iterable[Activations | Tensor],
    directory: str | Path,
    *,
    dtype: str = "float32",
    metadata: dict[str, Any] | None = None,
) -> ActivationStore:
    """Write activations to a new folder, which appears under its name only when it is complete.

    The data grow in a hidden folder beside it, under a lock; what dead runs left there is removed. The lock's
    hidden, empty file stays.

    Args:
        chunks: [n, d_in] tensors, or :class:`Activations` of one hook, whose token ids are kept too.
        directory: a folder that doesn't exist yet.
        dtype: "float32", "float16" or "bfloat16", on the disk.
        metadata: more entries for the manifest; must go into JSON.

    Raises:
        ValueError: the folder exists, there are no tokens, widths differ, or a value overflows float16.
    """
    check_choice("dtype", dtype, _DTYPES)
    directory = Path(directory).expanduser().absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with lock(directory):
        if directory.exists():
            reject("directory", f"'{directory}', which exists already", "a new folder")
        return write_store(chunks, directory, dtype, metadata or {})


def write_store(
    chunks: Iterable[Activations | Tensor], directory: Path, dtype: str, metadata: dict[str, Any]
) -> ActivationStore:
    """Do the work of :func:`collect`; the caller holds the lock of ``directory``.

    A folder that has that name already is there until the new one is complete, and goes then. Who has it
    mapped into memory keeps it.
    """
    parts = (
        ({"": chunk.x}, chunk.token_ids) if isinstance(chunk, Activations) else ({"": chunk}, None)
        for chunk in chunks
    )
    return _write(parts, {"": (directory, metadata)}, dtype)[""]


def write_stores(
    chunks: Iterable[Activations], places: Mapping[str, tuple[Path, dict[str, Any]]], dtype: str
) -> dict[str, ActivationStore]:
    """Write a store for each of several hooks in one pass over ``chunks``; the caller holds every lock.

    No store takes its place before all are complete, and each does so as in :func:`write_store`.

    Args:
        chunks: activations by hook, as :class:`ModelActivations` gives them for a list of hooks.
        places: for each hook the store's folder, and more entries for its manifest.
        dtype: of all of them.
    """
    return _write(((chunk.x, chunk.token_ids) for chunk in chunks), places, dtype)


def _write(
    parts: Iterable[tuple[Any, Tensor | None]],
    places: Mapping[str, tuple[Path, dict[str, Any]]],
    dtype: str,
) -> dict[str, ActivationStore]:
    """Write the entry ``name`` of each part's dict to ``places[name]``."""
    directories = {name: directory for name, (directory, _) in places.items()}
    for directory in directories.values():
        _sweep(directory)
    partials = {name: _partial(directory) for name, directory in directories.items()}
    try:
        for partial in partials.values():
            partial.mkdir()
        for name, about in _write_data(parts, partials, dtype).items():
            manifest = places[name][1] | about
            (partials[name] / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
        for name, directory in directories.items():
            _rename(partials[name], directory)
    except BaseException:
        for partial in partials.values():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return {name: ActivationStore.open(directory) for name, directory in directories.items()}


def _write_data(
    parts: Iterable[tuple[Any, Tensor | None]], folders: dict[str, Path], dtype: str
) -> dict[str, dict[str, Any]]:
    """Write the tensors of the stores; returns the manifests' entries about them."""
    with ExitStack() as stack:
        writers = {name: _StoreWriter(folder, dtype, stack) for name, folder in folders.items()}
        for by_name, token_ids in parts:
            for name, writer in writers.items():
                writer.write(by_name[name], token_ids)
        return {name: writer.finish() for name, writer in writers.items()}


class _StoreWriter:
    """The tensors of a store under way in ``folder``; ``stack`` closes its files."""

    def __init__(self, folder: Path, dtype: str, stack: ExitStack) -> None:
        self.folder, self.dtype, self.stack = folder, dtype, stack
        self.data = stack.enter_context(TensorWriter(folder / _DATA, "activations", _DTYPES[dtype]))
        self.ids: TensorWriter | None = None
        self.width: int | None = None

    def write(self, x: Any, token_ids: Tensor | None) -> None:
        self.width = _check_chunk(x, token_ids, self.width)
        self.data.write(_narrow(x, self.dtype))
        if token_ids is not None:
            if self.ids is None:
                writer = TensorWriter(self.folder / _IDS, "token_ids", torch.int32)
                self.ids = self.stack.enter_context(writer)
            self.ids.write(token_ids)

    def finish(self) -> dict[str, Any]:
        """Complete the files; returns the manifest's entries about them."""
        n_rows = self.data.n_rows
        if not n_rows:
            reject("chunks", "no tokens", "at least one")
        if self.ids and self.ids.n_rows != n_rows:
            reject("chunks", f"token ids for {self.ids.n_rows} of {n_rows} tokens", "ids for all or for none")
        sums = {"activations": self.data.finish()} | ({"token_ids": self.ids.finish()} if self.ids else {})
        return {
            "format": FORMAT, "n_tokens": n_rows, "d_in": self.width, "dtype": self.dtype, "sha256": sums,
        }  # fmt: skip


def lock(directory: Path, timeout: float = -1) -> FileLock:
    """Return the lock of ``directory``, a file beside it; the system frees it when the process dies."""
    from filelock import FileLock

    return FileLock(directory.with_name(f".{directory.name}.lock"), timeout)


def _partial(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}{_PARTIAL}")


def _old(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}{_PARTIAL}-old")


def _rename(partial: Path, directory: Path) -> None:
    if directory.exists():  # a folder can't be renamed onto another
        directory.rename(_old(directory))
    partial.rename(directory)
    shutil.rmtree(_old(directory), ignore_errors=True)


def _sweep(directory: Path) -> None:
    """Remove the leftovers of dead runs beside ``directory``, whose own lock we hold."""
    from filelock import Timeout

    for own in (_partial(directory), _old(directory)):
        shutil.rmtree(own, ignore_errors=True)
    for left in directory.parent.glob(f".*{_PARTIAL}*"):
        name = left.name[1:].partition(_PARTIAL)[0]
        with suppress(Timeout), lock(left.with_name(name), timeout=0):
            shutil.rmtree(left, ignore_errors=True)


def _check_chunk(x: Any, token_ids: Tensor | None, width: int | None) -> int:
    if not isinstance(x, Tensor):
        raise BadType(
            f"chunks: got {type(x).__name__}, expected [n, d_in] tensors or Activations of one hook"
        )
    if x.ndim != 2 or not x.is_floating_point() or (width or x.shape[1]) != x.shape[1]:
        reject("chunks", f"{x.dtype} {list(x.shape)}", f"floating [n, {width or 'd_in'}] tensors")
    if token_ids is not None and len(token_ids) != len(x):
        reject("chunks", f"{len(token_ids)} token ids for {len(x)} tokens", "one for each token")
    return x.shape[1]


def _narrow(x: Any, dtype: str) -> Tensor:
    y = x.to(_DTYPES[dtype])
    if dtype == "float16" and y.isinf().sum() > x.isinf().sum():
        largest = x[x.isfinite()].abs().max().item()
        reject("dtype", f"'float16' and activations up to {largest:.3g}", "'bfloat16' or 'float32'")
    return y


def _find_matrix(path: Path) -> ActivationStore:
    tensors = map_tensors(path)
    spelled = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    fits = [name for name, (array, dtype) in tensors.items() if array.ndim == 2 and dtype in spelled]
    if len(fits) > 1 and "activations" in fits:
        fits = ["activations"]
    if len(fits) != 1:
        _not_a_matrix(path, f"{len(fits)} such tensors")
    array, dtype = tensors[fits[0]]
    return _store(path, array, spelled[dtype])


def _store(path: Path, array: np.ndarray, dtype: str) -> ActivationStore:
    if array.ndim != 2 or dtype not in ("float64", "float32", "float16", "bfloat16") or 0 in array.shape:
        _not_a_matrix(path, f"{dtype} {list(array.shape)}")
    return ActivationStore(path, {"n_tokens": array.shape[0], "d_in": array.shape[1], "dtype": dtype}, array)


def _not_a_matrix(path: Path, got: str) -> NoReturn:
    reject("activations", f"{got} in '{path}'", "one floating [n, d_in] array that isn't empty")
