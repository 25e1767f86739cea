"""Losses at partial reconstructions, each of which holds the one before: see
:class:`fastsae.policies.Nested`.

With e_g = x_hat_g - target the error of the g-th, and e the last one:

    e_g = e - sum of f_i W_dec[i] over the parts after g
    L   = sum_g w_g ||e_g||^2

Everything is made of e and of the code again, a few tokens at a time: memory doesn't grow with the number
of parts. dL / df_i of an entry in part h is 2 <sum_{g >= h} w_g e_g, W_dec[i]>; here it is split in what it
would be in part 0, which is that of a plain decoder under the error G = sum_g w_g e_g, and the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.ops import upcast
from fastsae.policies import Nested

__all__ = ["Gradients", "first_parts", "gradients", "squares"]

MOST_ELEMENTS = 2**20
"""Of the errors of some tokens in all parts, held at a time: 4 MiB."""

_ops = torch.ops.fastsae


class Gradients(NamedTuple):
    """Derivatives of L by its arguments, where e is one of them.

    error: [N, D] 2 G.  values: [P].  latents, rows: [R] ascending, [R, D], those of W_dec.
    """

    error: Tensor
    values: Tensor
    latents: Tensor
    rows: Tensor


def squares(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor,
    W_dec: Tensor,
    error: Tensor,
    nested: Nested,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """L, 0-dim; the sum over tokens of ||e_main||^2, 0-dim; the largest ||e_g||^2 of a token, 0-dim."""
    weights = upcast(error).new_tensor(nested.weights)
    total = upcast(error).new_zeros(len(weights))
    peak = total.new_zeros(())
    for part in _chunks(values, indices, offsets, W_dec, error, nested, backend):
        lengths = part.errors.square().sum(2)
        total += lengths.sum(1)
        peak = torch.maximum(peak, lengths.amax())
    return (weights * total).sum(), total[nested.main], peak


def gradients(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor,
    W_dec: Tensor,
    error: Tensor,
    nested: Nested,
    backend: str,
) -> Gradients:
    """The derivatives of L by e, by values and by W_dec."""
    latents = _ops.transpose(values, indices, offsets, len(W_dec), backend)[0]
    latents = latents[latents < len(W_dec)]
    whole, rows = torch.empty_like(upcast(error)), upcast(error).new_zeros(len(latents), W_dec.shape[1])
    by_value = upcast(values).new_zeros(len(values))
    weights = whole.new_tensor(nested.weights)[:, None, None]
    for part in _chunks(values, indices, offsets, W_dec, error, nested, backend):
        pulls = 2 * weights * part.errors
        upto = pulls.cumsum(0)  # [G, T, D]
        whole[part.tokens] = upto[-1]
        before = (pulls - upto).flatten(0, 1)  # less what parts after theirs feel: of part h, -sum_{g < h}
        code = part.values, part.indices, part.offsets
        by_value[part.places] = _ops.code_grad(before, W_dec, *code[1:], backend)
        found, starts, entry_rows, order = _ops.transpose(*code, len(W_dec), backend)
        used = int((found < len(W_dec)).sum())
        made = _ops.row_grads(upcast(part.values)[order], before, starts[: used + 1], entry_rows, backend)
        rows.index_add_(0, torch.searchsorted(latents, found[:used]), made)
    return Gradients(whole, by_value, latents, rows)


def first_parts(indices: Tensor, offsets: Tensor, nested: Nested) -> Tensor:
    """Which entries [P] belong to the main reconstruction."""
    return _parts(indices, offsets, nested) <= nested.main


class _Chunk(NamedTuple):
    """Some tokens' code with a row for each part of each, and their errors.

    tokens: which.  places: of the entries in the whole code.
    values, indices, offsets: CSR over G x T rows, part by part.  errors: [G, T, D] e_g.
    """

    tokens: slice
    places: Tensor
    values: Tensor
    indices: Tensor
    offsets: Tensor
    errors: Tensor


def _chunks(values, indices, offsets, W_dec, error, nested: Nested, backend: str) -> Iterator[_Chunk]:
    n_parts, (n, width) = len(nested.ends), error.shape
    some = max(1, MOST_ELEMENTS // (n_parts * max(width, 1)))
    part_of = _parts(indices, offsets, nested)
    for lo in range(0, n, some):
        hi = min(lo + some, n)
        ends = offsets[lo : hi + 1]
        first, last = int(ends[0]), int(ends[-1])
        token = torch.arange(hi - lo, device=ends.device).repeat_interleave(
            ends.diff(), output_size=last - first
        )
        row, order = (part_of[first:last] * (hi - lo) + token).sort(stable=True)
        places = order + first
        counts = torch.bincount(row, minlength=n_parts * (hi - lo))
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        code = values[places], indices[places], starts
        parts = upcast(_ops.decode(*code, W_dec, None, backend)).view(n_parts, hi - lo, width)
        later = parts.flip(0).cumsum(0).flip(0) - parts
        yield _Chunk(slice(lo, hi), places, *code, upcast(error[lo:hi]) - later)


def _parts(indices: Tensor, offsets: Tensor, nested: Nested) -> Tensor:
    """The part of each entry, [P] int64; what is beyond offsets[-1] has any."""
    ends = torch.tensor(nested.ends, device=indices.device)
    if nested.by == "latent":
        return torch.bucketize(indices.long(), ends, right=True)
    place = torch.arange(len(indices), device=indices.device)
    row = torch.searchsorted(offsets[1:].contiguous(), place, right=True).clamp_max(len(offsets) - 2)
    return torch.bucketize(place - offsets[row], ends, right=True)
