"""Activations of a model on a text, computed once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from fastsae.checks import BadValue, FastSAEError, check_choice, check_number, check_type, reject
from fastsae.data.activations import ModelActivations, load_model, model_folder
from fastsae.data.store import FORMAT, ActivationStore, lock, write_stores
from fastsae.data.text import Source, Texts, text_digest

__all__ = ["cached_activations"]

_HASHED = 2 << 30  # bytes of weights up to which their content counts, then their size and time


@overload
def cached_activations(
    model: str | Path,
    hook: str,
    text: Source,
    *,
    context: int = 128,
    n_tokens: int | None = None,
    cache_dir: str | Path | None = None,
    dtype: str = "float32",
    device: str | None = None,
    progress: bool = True,
) -> ActivationStore: ...


@overload
def cached_activations(
    model: str | Path,
    hook: list[str] | tuple[str, ...],
    text: Source,
    *,
    context: int = 128,
    n_tokens: int | None = None,
    cache_dir: str | Path | None = None,
    dtype: str = "float32",
    device: str | None = None,
    progress: bool = True,
) -> dict[str, ActivationStore]: ...


def cached_activations(
    model: str | Path,
    hook: str | list[str] | tuple[str, ...],
    text: Source,
    *,
    context: int = 128,
    n_tokens: int | None = None,
    cache_dir: str | Path | None = None,
    dtype: str = "float32",
    device: str | None = None,
    progress: bool = True,
) -> ActivationStore | dict[str, ActivationStore]:
    """Return the activations of ``model`` at ``hook`` on ``text``, from the cache if they are there.

    Each hook has a store of its own there. Its key is a sha256 of all that changes the numbers: the model's
    files (or its commit on the hub), hook, context, the text itself (a data set counts by its name), dtype,
    the device's kind and the versions of torch and transformers. Looking up costs reading the text and the
    weights (beyond 2 GiB: their size and time), without loading the model. Of several hooks those that are
    missing are computed together, in one pass over the model.

    ``n_tokens`` is no part of it. Of a store with more tokens come the first ``n_tokens``; one with too few
    is computed anew and replaced, and whoever has it open keeps the old one.

    Args:
        model: see :func:`load_model`.
        hook: a module path, or a list of them.
        text: see :func:`read_texts`.
        context: tokens in a window.
        n_tokens: how many activations at most; None: the whole text.
        cache_dir: default: the user's cache folder for fastsae.
        dtype: on the disk: "float32", "float16" or "bfloat16".
        device: where the model runs; None: a GPU if there is one.
        progress: show a progress bar.

    Returns:
        A store; for a list of hooks a dict of stores by module path, with the same tokens in the same order.

    Raises:
        ValueError: bad arguments, no tokens, or stores of a data set that has changed between them; see
            :class:`ModelActivations` and :func:`read_texts`.
        FastSAEError: the model or the data set can't be loaded.
    """
    hooks = _check_hooks(hook)
    check_choice("dtype", dtype, ("float32", "float16", "bfloat16"))
    check_number("context", context, integer=True, low=1)
    if n_tokens is not None:
        check_number("n_tokens", n_tokens, integer=True, low=1)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    about = {
        "model": str(model),
        "model_digest": _model_digest(model_folder(model)),
        "hook": "",
        "context": context,
        "text": [str(one) for one in text] if isinstance(text, (list, tuple)) else str(text),
        "text_digest": text_digest(text),
        "limit": n_tokens,
        "device": torch.device(device).type,
        "versions": {"torch": torch.__version__, "transformers": version("transformers").split(".")[0]},
    }
    root = _cache_root(cache_dir)
    places = {path: _place(root, about | {"hook": path}, dtype) for path in hooks}

    def compute(missing: list[str]) -> dict[str, ActivationStore]:
        loaded, tokenizer = load_model(model)
        chunks = ModelActivations(
            loaded,
            tokenizer,
            missing,
            Texts(text),
            context=context,
            device=device,
            n_tokens=n_tokens,
            progress=progress,
        )
        return write_stores(chunks, {path: places[path] for path in missing}, dtype)

    stores = _find_or_compute({path: place[0] for path, place in places.items()}, n_tokens, compute)
    _check_same_tokens(stores)
    return stores[hook] if isinstance(hook, str) else stores


def _check_hooks(hook: Any) -> list[str]:
    hooks = [hook] if isinstance(hook, str) else hook
    check_type("hook", hooks, (list, tuple), "a module path, or a list of them")
    for path in hooks:
        check_type("hook", path, str, "module paths as strings")
    if not hooks or len(set(hooks)) < len(hooks):
        reject("hook", list(hooks), "different module paths, at least one")
    return list(hooks)


def _place(root: Path, about: dict[str, Any], dtype: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a store, and what its manifest says of its origin."""
    origin = {name: value for name, value in about.items() if name not in ("model", "text", "limit")}
    origin |= {"dtype": dtype, "format": FORMAT}
    key = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", f"{Path(about['model']).name}-{about['hook']}")[:80]
    return root / f"{name}-{key[:16]}", about | {"key": key}


def _find_or_compute(
    directories: dict[str, Path],
    n_tokens: int | None,
    compute: Callable[[list[str]], dict[str, ActivationStore]],
) -> dict[str, ActivationStore]:
    """The stores in ``directories``, those that aren't there by one call of ``compute``."""
    found = {path: _find(directory, n_tokens) for path, directory in directories.items()}
    if missing := [path for path in directories if found[path] is None]:
        directories[missing[0]].parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as locks:
            for directory in sorted(directories[path] for path in missing):  # no two wait for each other
                locks.enter_context(lock(directory))
            for path in missing:  # another process may have been faster
                found[path] = _find(directories[path], n_tokens)
            if missing := [path for path in missing if found[path] is None]:
                found |= compute(missing)
    return {path: store for path, store in found.items() if store is not None}


def _check_same_tokens(stores: dict[str, ActivationStore]) -> None:
    """Raise unless row i is the same token in all: a data set may have grown since an older store."""
    first, *others = stores.values()
    for other in others:
        if not np.array_equal(first.token_ids, other.token_ids):  # type: ignore[arg-type]
            got = f"'{first.path}' and '{other.path}' with different tokens"
            reject("text", got, "the same in all: delete both, and they are computed anew")


def _find(directory: Path, n_tokens: int | None) -> ActivationStore | None:
    """Return up to ``n_tokens`` of the store in ``directory``; None if it has too few, or is damaged."""
    try:
        store = ActivationStore.open(directory)
    except BadValue:
        return None
    if n_tokens is not None and n_tokens <= len(store):
        return store.head(n_tokens)
    limit = store.manifest.get("limit", 0)
    exhausted = limit is None or len(store) < limit  # all that the text gives
    return store if exhausted else None


def _cache_root(cache_dir: str | Path | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("fastsae")) / "activations"


def _model_digest(model: str) -> str:
    """Digest the files of a local model; of one on the hub, its name and commit."""
    folder = Path(model)
    if not folder.is_dir():
        from transformers.utils import cached_file

        try:
            config = cached_file(model, "config.json")
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise FastSAEError(
                f"model: {model!r} is no folder and can't be found on the hub ({reason})"
            ) from error
        return f"{model}@{Path(str(config)).parent.name}"
    kinds = (".safetensors", ".bin", ".json", ".txt", ".model")
    files = sorted(file for file in folder.iterdir() if file.suffix in kinds)
    by_content = sum(file.stat().st_size for file in files) <= _HASHED
    digest = hashlib.sha256()
    for file in files:
        if by_content:
            with open(file, "rb") as opened:
                part = hashlib.file_digest(opened, "sha256").hexdigest()
        else:
            part = f"{folder.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}"
        digest.update(f"{file.name} {part}\n".encode())
    return digest.hexdigest()
