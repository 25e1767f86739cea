"""The texts that fire latents most, and the latents worth a look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsae.checks import check_number, check_type, reject
from fastsae.data.store import ActivationStore, fetch_rows
from fastsae.evaluate.metrics import eval_mode
from fastsae.sae import SAE

__all__ = ["Example", "LatentExamples", "top_examples"]

SHARES = (2e-4, 1e-2)
"""Latents that fire on a share of the tokens between these come first: not by chance, not everywhere."""
_REACH = 2  # places of the text are alike if they agree in the token and this many neighbours on each side
_MULTIPLIERS = np.random.default_rng(0).integers(2**62, 2**63, 2 * _REACH + 1)  # of the hash


@dataclass(frozen=True)
class Example:
    """One place where a latent fires, with its neighbourhood in the text.

    Attributes:
        position: the token's place in the stream.
        at: its place in ``tokens``.
        tokens: decoded strings, in reading order.
        activations: the latent's activation at each of them.
    """

    position: int
    at: int
    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    @property
    def activation(self) -> float:
        """The activation at ``position``."""
        return self.activations[self.at]


@dataclass(frozen=True)
class LatentExamples:
    """A latent and the places that fire it most, strongest first.

    Attributes:
        latent: its index.
        share: share of the tokens on which it fires.
        mean_activation: over those tokens.
        score: see :func:`top_examples`.
        examples: in distinct contexts.
    """

    latent: int
    share: float
    mean_activation: float
    score: float
    examples: tuple[Example, ...]


def top_examples(
    sae: SAE,
    activations: ActivationStore | np.ndarray | Tensor,
    tokens: np.ndarray | Tensor,
    *,
    decode_token: Callable[[int], str],
    n_latents: int = 24,
    n_examples: int = 6,
    context: int = 12,
    batch_size: int = 1024,
    window: int | None = None,
    progress: bool = False,
) -> list[LatentExamples]:
    """Find the most interesting latents and the texts that fire them most, in one pass over the activations.

        score = top * log2(top / mean)

    top is the mean of f_i ||W_dec[i]|| over a latent's n_examples best places, mean that over all its firing.
    So a high score means strong, and far above its own background. Latents whose best places mostly hold one
    token, and those that fire on various tokens, take turns by falling score. Each must have n_examples
    different places, and at most half of its best tokens among those of the latents before it. Latents that
    fire on a share of the tokens within SHARES come first, others only where those don't suffice.

    Places are different if the tokens within two on either side differ, and a latent's examples lie more than
    ``context`` tokens apart, which may leave fewer than n_examples. Ties go to the earlier place and the
    lower latent. Memory: one batch's code and 2 * n_examples places for each latent.

    Args:
        sae: the dictionary, used in ``eval()`` mode, which is undone afterwards.
        activations: [n, d_in] in the order of the text; rows with NaN or Inf are left out.
        tokens: [n] token ids.
        decode_token: from a token id to its string. "##" before it, or a space (or "Ġ" or "▁") in it, tells
            the report how to join tokens.
        n_latents: how many latents to return at most.
        n_examples: places for each, at most.
        context: tokens of text on either side.
        batch_size: tokens encoded at a time.
        window: tokens the model saw at a time; contexts don't reach across. None: one text.
        progress: show a progress bar.

    Returns:
        The latents in the order of choice.

    Raises:
        ValueError, TypeError: arguments that don't fit.
    """
    check_type("sae", sae, SAE, "an SAE")
    sizes = {"n_latents": n_latents, "n_examples": n_examples, "batch_size": batch_size, "window": window}
    for name, size in sizes.items():
        if size is not None:
            check_number(name, size, integer=True, low=1)
    check_number("context", context, integer=True, low=0)
    ids = tokens.cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    if ids.shape != (n := len(activations),) or ids.dtype.kind not in "iu":
        reject("tokens", f"{ids.dtype} {list(ids.shape)}", f"integers [{n}], one for each activation")
    text = _Text(ids, window or max(n, 1))
    with eval_mode(sae):
        best = _Best(sae.config.n_latents, 2 * n_examples)
        for places, latents, values in _firings(sae, activations, np.arange(n), batch_size, progress):
            best.add(latents, values, places, text.fingerprints(places))
        found = _choose(sae, best, text, n_latents, n_examples, context)
        shown = {place for each in found for p in each.places for place in text.around(p, context)}
        wanted = torch.tensor([each.latent for each in found], dtype=torch.int64)
        firing: dict[tuple[int, int], float] = {}
        rows = np.array(sorted(shown), np.int64)
        for places, latents, values in _firings(sae, activations, rows, batch_size):
            of_found = torch.isin(latents, wanted)
            keys = zip(latents[of_found].tolist(), places[of_found].tolist(), strict=True)
            firing.update(zip(keys, values[of_found].tolist(), strict=True))
    return [_describe(each, best, text, context, firing, decode_token) for each in found]


@dataclass(frozen=True)
class _Found:
    """A chosen latent: its score, and its places with the activation at each, strongest first."""

    latent: int
    score: float
    places: dict[int, float]


def _firings(
    sae: SAE,
    activations: ActivationStore | np.ndarray | Tensor,
    rows: np.ndarray,
    batch_size: int,
    progress: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Encode ``rows``; yield place, latent and activation of every positive entry, by place, on the CPU."""
    from tqdm.auto import tqdm

    bar = tqdm(
        total=len(rows), desc="examples", unit=" tokens", unit_scale=True, disable=None if progress else True
    )
    with bar:
        for lo in range(0, len(rows), batch_size):
            part = rows[lo : lo + batch_size]
            x = fetch_rows(activations, part)
            finite = x.isfinite().all(1)
            with torch.no_grad():
                code = sae.encode_sparse(x[finite].to(sae.W_enc.device, sae.dtype))
            entry = torch.arange(len(code.values), device=code.values.device)
            active = (code.values > 0) & (entry < code.offsets[-1])
            places = torch.from_numpy(part)[finite.cpu()][code.rows()[active].cpu()]
            yield places, code.indices[active].long().cpu(), code.values[active].float().cpu()
            bar.update(len(part))


class _Text:
    """Token ids [n] in windows that contexts don't leave."""

    def __init__(self, ids: np.ndarray, window: int) -> None:
        self.ids, self.window = ids, window

    def around(self, place: int, context: int) -> range:
        """The places up to ``context`` before and after, within the window."""
        start = place // self.window * self.window
        end = min(start + self.window, len(self.ids))
        return range(max(start, place - context), min(end, place + context + 1))

    def fingerprints(self, places: Tensor) -> Tensor:
        """A hash of the tokens within _REACH of each place, [n] int64."""
        near = places[:, None].numpy() + np.arange(-_REACH, _REACH + 1)
        outside = (near // self.window != places[:, None].numpy() // self.window) | (near >= len(self.ids))
        ids = self.ids[near.clip(0, len(self.ids) - 1)].astype(np.int64)
        return torch.from_numpy((np.where(outside, -1, ids) * _MULTIPLIERS).sum(1))  # wraps modulo 2^64


class _Best:
    """Per latent: how often and how strongly it fired, and its ``n`` strongest distinct places."""

    def __init__(self, n_latents: int, n: int) -> None:
        self.counts = torch.zeros(n_latents, dtype=torch.int64)
        self.sums = torch.zeros(n_latents, dtype=torch.float64)
        self.values = torch.zeros(n_latents, n)  # descending; 0 where there are fewer than n
        self.places = torch.full((n_latents, n), -1)
        self.prints = torch.zeros(n_latents, n, dtype=torch.int64)

    def add(self, latents: Tensor, values: Tensor, places: Tensor, prints: Tensor) -> None:
        """Merge in entries [e] of later places than all before."""
        self.counts += torch.bincount(latents, minlength=len(self.counts))
        self.sums += torch.bincount(latents, values.double(), minlength=len(self.sums))
        high = values > self.values[latents, -1]
        touched, rows = latents[high].unique(return_inverse=True)
        rows = torch.cat([torch.arange(len(touched)).repeat_interleave(self.values.shape[1]), rows])
        merged = [
            torch.cat([kept[touched].flatten(), new[high]])
            for kept, new in ((self.values, values), (self.places, places), (self.prints, prints))
        ]
        order = _lexsort(rows, -merged[0])  # stable: earlier places first among equals
        rows, merged = rows[order], [t[order] for t in merged]
        again = _repeats(rows, merged[2]) | (merged[0] <= 0)
        rows, merged = rows[~again], [t[~again] for t in merged]
        rank = torch.arange(len(rows)) - torch.searchsorted(rows, rows)
        top = rank < self.values.shape[1]
        self.values[touched] = 0
        for kept, new in zip((self.values, self.places, self.prints), merged, strict=True):
            kept[touched[rows[top]], rank[top]] = new[top]


def _lexsort(*keys: Tensor) -> Tensor:
    """The stable order of entries by the first key, then the second."""
    order = torch.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order


def _repeats(*keys: Tensor) -> Tensor:
    """Whether an entry has the keys of an earlier one, [e] bool."""
    order = _lexsort(*keys)
    same = torch.ones(max(len(order) - 1, 0), dtype=torch.bool)
    for key in keys:
        same &= key[order][1:] == key[order][:-1]
    repeats = torch.zeros(len(order), dtype=torch.bool)
    repeats[order[1:][same]] = True
    return repeats


def _choose(
    sae: SAE, best: _Best, text: _Text, n_latents: int, n_examples: int, context: int
) -> list[_Found]:
    """The latents that :func:`top_examples` describes, and their places."""
    latents = (best.values[:, n_examples - 1] > 0).nonzero().flatten()
    counts, top = best.counts[latents], best.values[latents, :n_examples].double().mean(1)
    lengths = torch.linalg.vector_norm(sae.W_dec.detach(), dim=1, dtype=torch.float32).cpu()[latents]
    score = top * lengths * (top * counts / best.sums[latents]).log2()
    ids = torch.from_numpy(text.ids[best.places[latents, :n_examples].numpy()])
    commonest = (ids[:, :, None] == ids[:, None, :]).sum(2).amax(1)
    various = (2 * commonest <= n_examples).long()
    share = counts / max(len(text.ids), 1)
    outside = ((share < SHARES[0]) | (share > SHARES[1])).long()

    order = _lexsort(kind := 2 * outside + various, -score)
    turn = torch.empty_like(order)
    turn[order] = torch.arange(len(order)) - torch.searchsorted(kind[order], kind[order])
    found: list[_Found] = []
    seen: set[int] = set()
    for i in _lexsort(outside, turn, various).tolist():
        if len(found) == n_latents:
            break
        tokens = ids[i].tolist()
        if 2 * sum(token in seen for token in tokens) <= n_examples:
            seen.update(tokens)
            latent = int(latents[i])
            found.append(_Found(latent, float(score[i]), _apart(best, latent, n_examples, context)))
    return found


def _apart(best: _Best, latent: int, n_examples: int, context: int) -> dict[int, float]:
    """The latent's strongest places more than ``context`` apart, with the activation at each."""
    places: dict[int, float] = {}
    for place, value in zip(best.places[latent].tolist(), best.values[latent].tolist(), strict=True):
        if value > 0 and len(places) < n_examples and all(abs(place - p) > context for p in places):
            places[place] = value
    return places


def _describe(
    found: _Found,
    best: _Best,
    text: _Text,
    context: int,
    firing: dict[tuple[int, int], float],
    decode_token: Callable[[int], str],
) -> LatentExamples:
    examples = []
    for place, value in found.places.items():
        around = text.around(place, context)
        values = {p: firing.get((found.latent, p), 0.0) for p in around} | {place: value}
        words = tuple(decode_token(int(text.ids[p])) for p in around)
        examples.append(Example(place, place - around.start, words, tuple(values.values())))
    count = int(best.counts[found.latent])
    return LatentExamples(
        latent=found.latent,
        share=count / len(text.ids),
        mean_activation=float(best.sums[found.latent]) / count,
        score=found.score,
        examples=tuple(examples),
    )
