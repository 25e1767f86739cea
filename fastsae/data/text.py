"""Plain text as documents: files, folders, Hugging Face data sets, or the documentation inside Python."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from fastsae.checks import BadType, BadValue, FastSAEError, reject

__all__ = ["PYTHON_DOCS", "Source", "Texts", "is_dataset", "read_texts", "text_digest"]

PYTHON_DOCS = "python-docs"
_PIECE = 1 << 20  # characters; longer files come in pieces, cut at line ends
_DATASET = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^:/\\]+){0,3}")
_SUFFIXES = {".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".parquet", ".csv", ".html", ".tex"}

Source = str | Path | Sequence[str | Path]


def read_texts(
    source: Source, *, split: str | None = None, column: str | None = None, config: str | None = None
) -> Iterator[str]:
    """Read documents from ``source``, always in the same order.

    Args:
        source: one of these, or a list of them, read in the order given:

            - a utf-8 text file: one document (beyond 1 Mi characters: several, cut at line ends);
            - a ``.jsonl`` file: the field ``column`` of each line; a ``.parquet`` file: the column ``column``
              (needs pyarrow);
            - a folder: its files, recursively, in sorted order; hidden and binary files are skipped;
            - ``"python-docs"``: ``pydoc_data.topics`` and the standard library's docstrings, about 1.3 MB,
              offline;
            - ``"name"``, ``"name:split"``, ``"name:split:column"`` or ``"name:split:column:config"``: a
              Hugging Face data set, streamed (needs ``datasets``).
        split: of a data set, if the string doesn't say; default ``"train"``.
        column: the text's name in data sets, ``.jsonl`` and ``.parquet``; default ``"text"``.
        config: the data set's configuration, if it has several.

    Returns:
        An iterator of documents; those with nothing but white space are left out.

    Raises:
        ValueError: no such file, not utf-8 text, no such column; or, at its end, no document at all. What can
            be checked at once is, before the iterator is returned.
        FastSAEError: a package is missing, or the data set can't be reached.
    """
    return _not_empty(_read(source, split, column, config), source)


def _read(
    source: Source, split: str | None = None, column: str | None = None, config: str | None = None
) -> Iterator[str]:
    if isinstance(source, (list, tuple)):
        if not source:
            reject("text", "an empty list", "at least one file, folder or data set")
        return chain.from_iterable([_read(one, split, column, config) for one in source])
    if not isinstance(source, (str, Path)):
        raise BadType(
            f"text: got {type(source).__name__}, expected a file, a folder, a data set or a list of them"
        )
    if source == PYTHON_DOCS:
        return iter(_python_docs())
    path = Path(source).expanduser()
    if path.is_dir():
        documents = _read_folder(path, column or "text")
    elif path.exists():
        documents = _read_file(path, column or "text")
    elif is_dataset(source):
        return filter(str.strip, _read_dataset(str(source), split, column, config))
    else:
        reject(
            "text", repr(str(source)), f"an existing file or folder, a data set's name, or {PYTHON_DOCS!r}"
        )
    return filter(str.strip, documents)


def _not_empty(documents: Iterable[str], source: Source) -> Iterator[str]:
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        reject("text", f"no documents from {_name(source)}", "utf-8 text other than white space")


def _name(source: Source) -> str:
    if isinstance(source, (str, Path)):
        return f"'{source}'"
    more = f" and {len(source) - 3} more" if len(source) > 3 else ""
    return ", ".join(_name(str(one)) for one in source[:3]) + more


class Texts:
    """The documents of a source, read anew by each iteration."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.remote = any(map(is_dataset, source if isinstance(source, (list, tuple)) else [source]))

    def __iter__(self) -> Iterator[str]:
        return read_texts(self.source)

    def __str__(self) -> str:
        return _name(self.source)


def is_dataset(source: object) -> bool:
    """Tell whether ``read_texts`` takes ``source`` for the name of a Hugging Face data set."""
    if not isinstance(source, str) or source == PYTHON_DOCS or Path(source).expanduser().exists():
        return False
    return bool(_DATASET.fullmatch(source)) and Path(source).suffix.lower() not in _SUFFIXES


def text_digest(source: Source) -> str:
    """Return a sha256 of the documents of ``source``: equal digests, equal documents.

    Reads everything, except for data sets: there the name stands for the content.

    Raises:
        ValueError: see :func:`read_texts`.
    """
    digest = hashlib.sha256()
    parts = source if isinstance(source, (list, tuple)) else [source]
    documents = ([f"data set {one}"] if is_dataset(one) else _read(one) for one in parts)
    for document in _not_empty(chain.from_iterable(documents), source):
        data = document.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


@functools.cache
def _python_docs() -> tuple[str, ...]:
    """The language reference's topics, then the public docstrings of each module that a single name imports.

    Each only once. With the private ones and the submodules there would be half as much again.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FastSAEError(
            f"text: {PYTHON_DOCS!r} needs the module pydoc_data of a full Python installation"
        ) from error
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        [*root.glob("*.py"), *root.glob("*/__init__.py")], key=lambda p: p.relative_to(root).as_posix()
    )
    documents = dict.fromkeys(topics[name] for name in sorted(topics))
    for file in files:
        if file.parent.name not in {"test", "site-packages", "dist-packages"}:
            documents.update(dict.fromkeys(_docstrings(file)))
    return tuple(document for document in documents if document.strip())


def _docstrings(file: Path) -> Iterator[str]:
    """Yield the docstrings of a source file and of its public classes and functions, from top to bottom."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:
            return
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if getattr(node, "name", "").startswith("_"):
                continue
            if docstring := ast.get_docstring(node):
                yield docstring
        stack.extend(reversed(list(ast.iter_child_nodes(node))))


def _read_folder(folder: Path, column: str) -> Iterator[str]:
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield from _read_file(Path(where, name), column, skip_binary=True)


def _read_file(path: Path, column: str, skip_binary: bool = False) -> Iterator[str]:
    if path.suffix.lower() == ".parquet":
        yield from _read_parquet(path, column)
    elif path.suffix.lower() == ".jsonl":
        yield from _read_jsonl(path, column)
    else:
        with open(path, encoding="utf-8-sig") as file:
            first = True
            try:
                while piece := file.read(_PIECE):
                    if first and "\0" in piece:
                        raise UnicodeError
                    first = False
                    yield piece + file.readline() if len(piece) == _PIECE else piece
            except UnicodeError:
                if not (first and skip_binary):
                    raise BadValue(
                        f"text: got '{path}', which is not utf-8 text, expected a text file"
                    ) from None


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    with open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _field(json.loads(line), column, f"line {number} of '{path}'")
        except (UnicodeError, json.JSONDecodeError) as error:
            raise BadValue(f"text: got '{path}', which is not one JSON object per line ({error})") from None


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow as pa  # type: ignore
        import pyarrow.parquet as pq  # type: ignore
    except ImportError as error:
        raise FastSAEError(f"text: reading '{path}' needs pyarrow: pip install fastsae[datasets]") from error
    try:
        table = pq.ParquetFile(path)
    except pa.ArrowInvalid:
        raise BadValue(f"text: got '{path}', which is not a parquet file") from None
    with table:
        if column not in (names := table.schema_arrow.names):
            reject("text", f"'{path}' with the columns {', '.join(names)}", f"a column {column!r}")
        for batch in table.iter_batches(columns=[column]):
            for row in batch.to_pylist():
                yield _field(row, column, f"'{path}'")


def _read_dataset(source: str, split: str | None, column: str | None, config: str | None) -> Iterator[str]:
    name, *rest = source.split(":")
    named = dict(zip(("split", "column", "config"), rest, strict=False))
    split, column, config = (
        named.get("split", split),
        named.get("column", column),
        named.get("config", config),
    )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise FastSAEError(
            f"text: {source!r} is no file or folder here; for data sets: pip install fastsae[datasets]"
        ) from error
    try:
        rows = load_dataset(name, config, split=split or "train", streaming=True)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FastSAEError(
            f"text: {source!r} is no file or folder here, nor a data set that can be loaded ({reason})"
        ) from error
    return (_field(row, column or "text", f"the data set {name!r}") for row in rows)


def _field(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict) or column not in row:
        got = f"the fields {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        reject("text", f"{got} in {where}", f"a field {column!r}")
    if not isinstance(row[column], str):
        reject("text", f"{type(row[column]).__name__} in the field {column!r} of {where}", "a string")
    return row[column]
