"""Metrics of a dictionary inside the model whose activations it was trained on."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.checks import BadType, check_type, reject
from fastsae.data.hooks import StopForward, find_module, replaced_output
from fastsae.evaluate.metrics import eval_mode
from fastsae.ops import upcast
from fastsae.sae import SAE

__all__ = ["ModelEvaluation", "evaluate_in_model"]

_CHUNK_SCORES = 1 << 24  # logits whose log-softmax is held at a time, in fp32: 64 MiB, twice


@dataclass(frozen=True)
class ModelEvaluation:
    """What the model does with x_hat, with 0, or with the mean of x, in place of its activations x.

    Of a causal language model, over the P positions that have a token and a next one, p being its predictions
    with x, and q those with a replacement:

        ce      = -1/P sum_t log p[t, token[t+1]]        ce_sae, ce_zero, ce_mean: q in place of p
        kl      =  1/P sum_t sum_v p[t, v] log(p[t, v] / q[t, v])       with x_hat; kl_zero, kl_mean alike
        loss_recovered_zero = (ce_zero - ce_sae) / (ce_zero - ce)       1: x_hat is as good as x
        loss_recovered_mean = (ce_mean - ce_sae) / (ce_mean - ce)       0: x_hat is no better than the mean

    Of an encoder, a[n] being the embedding of text n (the mean of last_hidden_state over its tokens) with x,
    and b[n] with x_hat; _zero and _mean, for scale, alike:

        embedding_cosine = mean_n <a[n], b[n]> / (||a[n]|| ||b[n]||)    0 where b[n] = 0
        embedding_change = mean_n ||a[n] - b[n]|| / ||a[n]||

    Numbers of the other kind of model, and those with a denominator of 0, are NaN.

    Attributes:
        causal: which of the two kinds the model is.
        texts: rows of the batches that have a token.
        replaced_tokens: tokens at which x was replaced.
        predictions: P; 0 of an encoder.
        ce, ce_sae, ce_zero, ce_mean, kl, kl_zero, kl_mean: in nats per token.
    """

    causal: bool
    texts: int
    replaced_tokens: int
    predictions: int = 0
    ce: float = math.nan
    ce_sae: float = math.nan
    ce_zero: float = math.nan
    ce_mean: float = math.nan
    kl: float = math.nan
    kl_zero: float = math.nan
    kl_mean: float = math.nan
    embedding_cosine: float = math.nan
    embedding_cosine_zero: float = math.nan
    embedding_cosine_mean: float = math.nan
    embedding_change: float = math.nan
    embedding_change_zero: float = math.nan
    embedding_change_mean: float = math.nan

    @property
    def loss_recovered_zero(self) -> float:
        """(ce_zero - ce_sae) / (ce_zero - ce)."""
        return _ratio(self.ce_zero - self.ce_sae, self.ce_zero - self.ce)

    @property
    def loss_recovered_mean(self) -> float:
        """(ce_mean - ce_sae) / (ce_mean - ce)."""
        return _ratio(self.ce_mean - self.ce_sae, self.ce_mean - self.ce)

    def to_dict(self) -> dict[str, float | int | None]:
        """The numbers of this kind of model for a JSON file; None where one isn't finite."""
        names = ["texts", "replaced_tokens"]
        if self.causal:
            names += ["predictions", "ce", "ce_sae", "ce_zero", "ce_mean"]
            names += ["loss_recovered_zero", "loss_recovered_mean", "kl", "kl_zero", "kl_mean"]
        else:
            names += [f"embedding_{of}{by}" for of in ("cosine", "change") for by in ("", "_zero", "_mean")]
        numbers = {name: getattr(self, name) for name in names}
        return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


def evaluate_in_model(
    model: nn.Module,
    hook: str,
    sae: SAE,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    special_ids: Tensor | Sequence[int] = (),
    mean: Tensor | None = None,
    progress: bool = False,
) -> ModelEvaluation:
    """Measure what ``model`` loses when ``sae`` reconstructs the output of its module ``hook``.

    Four forward passes a batch: untouched, and with the output replaced by its reconstruction, by 0, and by
    its mean; before them, where ``mean`` isn't given, one up to the hook. Padding is never replaced, and
    counts nowhere. Model and dictionary are in ``eval()`` mode meanwhile, without gradients; modes come back
    and hooks go, whatever happens. Activations are cast to the dictionary's dtype, and reconstructions back.
    Log-softmax is in at least fp32, sums are fp64. Memory: twice the logits of a batch, in the model's dtype.

    Args:
        model: a transformers model: a causal language model with its head, or an encoder, whose output has
            last_hidden_state; see :func:`fastsae.data.load_model`.
        hook: path of a module that a forward pass calls once. It returns [batch, tokens, d_in], or a tuple of
            which that is the first.
        sae: an autoencoder of that output; no transcoder or crosscoder, whose x_hat isn't x.
        batches: what the model takes, on any device: ``input_ids`` [batch, tokens] integers,
            ``attention_mask`` of the same shape (none: no padding), and others by name. Models that count
            positions from the left, such as GPT-2, want the padding on the right. Read twice, unless ``mean``
            is given.
        special_ids: ids of tokens whose activations stay as they are, because the dictionary was trained
            without them (:func:`fastsae.data.special_ids`); they are predicted and pooled all the same.
        mean: [d_in], the mean activation; None: of the tokens that are replaced.
        progress: show a progress bar.

    Raises:
        ValueError: no such module, or one of another width or called more than once; an ``sae`` that is no
            autoencoder; a model of neither kind; batches without tokens to replace or to predict, or an
            iterator where a list is needed.
        TypeError: batches of another kind.

    Source: loss recovered by zero ablation as in Rajamanoharan et al. 2024, arXiv 2404.16014.
    """
    check_type("model", model, nn.Module, "a torch module")
    check_type("sae", sae, SAE, "an SAE")
    d_in = sae.config.d_in
    if sae.config.transcoder or sae.config.n_sites > 1:
        kind = "transcoder" if sae.config.transcoder else "crosscoder"
        reject("sae", f"a {kind}", "an autoencoder, whose x_hat can stand for its input")
    find_module(model, hook)
    if mean is None and isinstance(batches, Iterator):
        reject("batches", "an iterator, which can be read only once", "a list of batches, or the mean given")
    if mean is not None and tuple(mean.shape) != (d_in,):
        reject("mean", f"shape {tuple(mean.shape)}", f"({d_in},), one number for each input of the sae")
    special = torch.as_tensor(special_ids, dtype=torch.int64)
    with torch.inference_mode(), eval_mode(model, sae):
        patch = _Patch(model, hook, d_in)
        prepared = _Prepared(batches, model, special, progress)
        at = sae.W_enc.device
        mean = _mean(patch, prepared) if mean is None else mean
        replacements: dict[str, Callable[[Tensor], Tensor]] = {
            "sae": lambda x: sae(x.to(at, sae.dtype)),
            "zero": torch.zeros_like,
            "mean": lambda x: mean.to(x).expand_as(x),
        }
        return _measure(patch, prepared, replacements)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


@dataclass(frozen=True)
class _Batch:
    """inputs: what the model takes, on its device.  ids, mask, replaced: [batch, tokens] int64, bool, bool:
    tokens, which of them aren't padding, and at which of these x is replaced."""

    inputs: dict[str, Any]
    ids: Tensor
    mask: Tensor
    replaced: Tensor


@dataclass(frozen=True)
class _Prepared:
    """The batches that have tokens, checked and moved to the model's device, anew in each iteration."""

    batches: Iterable[Mapping[str, Tensor]]
    model: nn.Module
    special: Tensor
    progress: bool

    def __iter__(self) -> Iterator[_Batch]:
        from tqdm.auto import tqdm

        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        takes_cache = "use_cache" in inspect.signature(self.model.forward).parameters
        options = {"use_cache": False} if takes_cache else {}
        shown = None if self.progress else True
        for batch in tqdm(self.batches, desc="evaluate in model", unit="batch", disable=shown):
            _check_batch(batch)
            inputs = {name: t.to(device) for name, t in batch.items() if isinstance(t, Tensor)}
            ids = inputs["input_ids"].long()
            mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
            if mask.any():  # of nothing, models make NaN or an error
                replaced = mask & ~torch.isin(ids, self.special.to(device))
                yield _Batch(inputs | options, ids, mask, replaced)


def _check_batch(batch: Any) -> None:
    expected = "dicts with input_ids and attention_mask, integers [batch, tokens]"
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        kind = f"a dict of {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
        raise BadType(f"batches: got {kind}, expected {expected}")
    ids = batch["input_ids"]
    if ids.ndim != 2 or ids.is_floating_point():
        reject("batches", f"input_ids {ids.dtype} {list(ids.shape)}", expected)
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape != ids.shape:
        reject("batches", f"input_ids {list(ids.shape)} and attention_mask {list(mask.shape)}", expected)


@dataclass(frozen=True)
class _Patch:
    """Forward passes of ``model`` with the output of ``hook`` [batch, tokens, d_in] replaced."""

    model: nn.Module
    hook: str
    d_in: int

    def __call__(self, batch: _Batch, function: Callable[[Tensor], Tensor]) -> Any:
        """The model's output with function(x) [n, d_in] in place of x, at the tokens to be replaced."""
        calls = 0

        def replace(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            self._check_output(x, batch)
            rows = batch.replaced.flatten().nonzero().flatten().to(x.device)
            flat = x.reshape(-1, self.d_in)
            return flat.index_copy(0, rows, function(flat[rows]).to(flat)).view(x.shape)

        with replaced_output(self.model, self.hook, replace):
            output = self.model(**batch.inputs)
        if calls != 1:
            how_often = f"calls {calls} times" if calls else "never calls"
            reject("hook", f"{self.hook!r}, which a forward pass {how_often}", "a module that it calls once")
        return output

    def _check_output(self, x: Tensor, batch: _Batch) -> None:
        if x.ndim < 2 or x.shape[:-1].numel() != batch.ids.numel():
            got = f"{self.hook!r}, which returns {list(x.shape)}"
            reject("hook", got, f"a module that returns {list(batch.ids.shape)} + [d_in]")
        if x.shape[-1] != self.d_in:
            reject("sae", f"d_in {self.d_in}", f"{x.shape[-1]}, the width of {self.hook!r}")


def _mean(patch: _Patch, batches: _Prepared) -> Tensor:
    """The mean [d_in] fp64 of the activations that are to be replaced; the layers above never run."""
    total, count = torch.zeros((), dtype=torch.float64), 0

    def take(x: Tensor) -> Tensor:
        nonlocal total
        total = total.to(x.device) + x.double().sum(0)
        raise StopForward

    for batch in batches:
        count += int(batch.replaced.sum())
        with suppress(StopForward):
            patch(batch, take)
    if not count:
        reject("batches", "no tokens to replace", "at least one that is neither padding nor special")
    return total / count


def _measure(
    patch: _Patch, batches: _Prepared, replacements: dict[str, Callable[[Tensor], Tensor]]
) -> ModelEvaluation:
    kind: _Kind | None = None
    totals: dict[str, Tensor] = {}
    texts = replaced = compared = 0
    for batch in batches:
        output = patch.model(**batch.inputs)
        kind = _kind(patch.model, output) if kind is None else kind
        clean = kind.read(output, batch)
        del output  # its other parts
        sums = {"clean": kind.compare(clean, clean, batch)}
        for name, function in replacements.items():
            sums[name] = kind.compare(clean, kind.read(patch(batch, function), batch), batch)
        totals = {name: totals.get(name, 0) + both for name, both in sums.items()}
        texts += int(batch.mask.any(1).sum())
        replaced += int(batch.replaced.sum())
        compared += len(clean) if kind is _ENCODER else len(_positions(batch))
    if kind is None or not replaced:
        reject("batches", "no tokens to replace", "at least one that is neither padding nor special")
    if not compared:
        reject("batches", "no token with a next one", "texts of two or more")
    means = {
        field: float(total / compared)
        for name, fields in kind.fields.items()
        for field, total in zip(fields, totals[name], strict=False)
    }
    causal = kind is _LANGUAGE_MODEL
    return ModelEvaluation(causal, texts, replaced, compared if causal else 0, **means)


@dataclass(frozen=True)
class _Kind:
    """What is compared in a kind of model.

    read: what of its output.  compare: two sums over what read gives of the untouched model and of another.
    fields: the names of their means, by what replaces the activations.
    """

    read: Callable[[Any, _Batch], Tensor]
    compare: Callable[[Tensor, Tensor, _Batch], Tensor]
    fields: dict[str, tuple[str, ...]]


def _kind(model: nn.Module, output: Any) -> _Kind:
    """Whether the model predicts next tokens: by its class, for others have logits too."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = {parent.__name__ for parent in type(model).__mro__}
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    causal = bool(names & known) or any(name.endswith("ForCausalLM") for name in names)
    if causal and isinstance(getattr(output, "logits", None), Tensor):
        return _LANGUAGE_MODEL
    if isinstance(getattr(output, "last_hidden_state", None), Tensor):
        return _ENCODER
    reject(
        "model",
        f"{type(model).__name__}, which returns {type(output).__name__}",
        "a causal language model with logits, or an encoder with last_hidden_state",
    )


def _logits(output: Any, _batch: _Batch) -> Tensor:
    return output.logits


def _positions(batch: _Batch) -> Tensor:
    """Flat indices [P] of the tokens that have a next one in the same text."""
    both = batch.mask[:, :-1] & batch.mask[:, 1:]
    return nn.functional.pad(both, (0, 1)).flatten().nonzero().flatten()


def _compare_logits(clean: Tensor, other: Tensor, batch: _Batch) -> Tensor:
    """Sums over positions [2] fp64: the cross-entropy of ``other``, and KL(clean || other).

    logits: [batch, tokens, vocabulary].
    """
    positions = _positions(batch)
    following = batch.ids.flatten().roll(-1)
    total = torch.zeros(2, dtype=torch.float64, device=clean.device)
    for rows in positions.split(max(1, _CHUNK_SCORES // clean.shape[-1])):
        log_p, log_q = (upcast(t.flatten(0, 1)[rows]).log_softmax(1) for t in (clean, other))
        total[0] -= log_q.gather(1, following[rows, None]).sum(dtype=torch.float64)
        # a token that can't come (log p = -inf) adds nothing
        terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0)
        total[1] += terms.sum(dtype=torch.float64)
    return total


def _embeddings(output: Any, batch: _Batch) -> Tensor:
    """The mean of last_hidden_state over the tokens of each text that has one, [texts, d] fp64."""
    some = batch.mask.any(1)
    mask = batch.mask[some, :, None]
    return output.last_hidden_state[some].double().where(mask, 0).sum(1) / mask.sum(1)


def _compare_embeddings(clean: Tensor, other: Tensor, _batch: _Batch) -> Tensor:
    """Sums over texts [2] fp64: the cosine of the embeddings [texts, d], and the relative change."""
    norm, norm_other = clean.norm(dim=1), other.norm(dim=1)
    cosine = (clean * other).sum(1) / norm / norm_other.where(norm_other != 0, 1)
    return torch.stack([cosine.sum(), ((clean - other).norm(dim=1) / norm).sum()])


_LANGUAGE_MODEL = _Kind(
    _logits,
    _compare_logits,
    {
        "clean": ("ce",),
        "sae": ("ce_sae", "kl"),
        "zero": ("ce_zero", "kl_zero"),
        "mean": ("ce_mean", "kl_mean"),
    },
)
_ENCODER = _Kind(
    _embeddings,
    _compare_embeddings,
    {
        "sae": ("embedding_cosine", "embedding_change"),
        "zero": ("embedding_cosine_zero", "embedding_change_zero"),
        "mean": ("embedding_cosine_mean", "embedding_change_mean"),
    },
)
