"""Activations of a model on a text, computed once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import re
from importlib.metadata import version
from pathlib import Path

import torch

from fastsae.checks import BadValue, FastSAEError, check_choice, check_number, check_type
from fastsae.data.activations import ModelActivations, load_model, model_folder
from fastsae.data.store import FORMAT, ActivationStore, lock, write_store
from fastsae.data.text import Source, Texts, text_digest

__all__ = ["cached_activations"]

_HASHED = 2 << 30  # bytes of weights up to which their content counts, then their size and time


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
) -> ActivationStore:
    """Return the activations of ``model`` at ``hook`` on ``text``, from the cache if they are there.

    The key is a sha256 of all that changes the numbers: the model's files (or its commit on the hub), hook,
    context, the text itself (a data set counts by its name), dtype, the device's kind and the versions of
    torch and transformers. Looking up costs reading the text and the weights (beyond 2 GiB: their size and
    time), without loading the model.

    ``n_tokens`` is no part of it. Of a store with more tokens come the first ``n_tokens``; one with too few
    is computed anew and replaced, and whoever has it open keeps the old one.

    Args:
        model: see :func:`load_model`.
        hook: one module path.
        text: see :func:`read_texts`.
        context: tokens in a window.
        n_tokens: how many activations at most; None: the whole text.
        cache_dir: default: the user's cache folder for fastsae.
        dtype: on the disk: "float32", "float16" or "bfloat16".
        device: where the model runs; None: a GPU if there is one.
        progress: show a progress bar.

    Raises:
        ValueError: bad arguments, or no tokens; see :class:`ModelActivations` and :func:`read_texts`.
        FastSAEError: the model or the data set can't be loaded.
    """
    check_type("hook", hook, str, "one module path")
    check_choice("dtype", dtype, ("float32", "float16", "bfloat16"))
    check_number("context", context, integer=True, low=1)
    if n_tokens is not None:
        check_number("n_tokens", n_tokens, integer=True, low=1)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    about = {
        "model": str(model),
        "model_digest": _model_digest(model_folder(model)),
        "hook": hook,
        "context": context,
        "text": [str(one) for one in text] if isinstance(text, (list, tuple)) else str(text),
        "text_digest": text_digest(text),
        "limit": n_tokens,
        "device": torch.device(device).type,
        "versions": {"torch": torch.__version__, "transformers": version("transformers").split(".")[0]},
    }
    origin = {name: value for name, value in about.items() if name not in ("model", "text", "limit")}
    origin |= {"dtype": dtype, "format": FORMAT}
    key = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", f"{Path(model).name}-{hook}")[:80]
    directory = _cache_root(cache_dir) / f"{name}-{key[:16]}"
    if (found := _find(directory, n_tokens)) is not None:
        return found
    directory.parent.mkdir(parents=True, exist_ok=True)
    with lock(directory):
        if (found := _find(directory, n_tokens)) is not None:  # another process was faster
            return found
        loaded, tokenizer = load_model(model)
        chunks = ModelActivations(
            loaded,
            tokenizer,
            hook,
            Texts(text),
            context=context,
            device=device,
            n_tokens=n_tokens,
            progress=progress,
        )
        return write_store(chunks, directory, dtype, about | {"key": key})


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
