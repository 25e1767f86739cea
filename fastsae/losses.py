"""Loss terms as functions of tensors: in normalised space, in fp32 (fp64 of fp64)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae import functional as F
from fastsae.autograd import NestedSquares
from fastsae.backends import resolve
from fastsae.code import SparseCode
from fastsae.ops import upcast, wide_dtype
from fastsae.policies import L1, AuxK, DecoderNormL1, Nested, Tanh, TopK

__all__ = [
    "Charge",
    "Spread",
    "auxk",
    "charge",
    "charge_slopes",
    "error_scale",
    "joined_spread",
    "nested_reconstruction",
    "pre_activation",
    "reconstruction",
    "row_norms",
    "sparsity",
    "spread",
]


class Spread(NamedTuple):
    """How far the rows of a batch lie from their mean.

    n: rows.  mean: [D] fp64, or None where it wasn't asked for.  squares: sum ||target - mean||^2.
    """

    n: int
    mean: Tensor | None
    squares: Tensor

    def scale(self, kind: str) -> Tensor:
        """See :func:`error_scale`."""
        if kind == "squared_error":
            return self.squares.new_full((), 1 / max(self.n, 1))
        return torch.where(self.squares > 0, 1 / self.squares, 0)


def spread(target: Tensor, *, with_mean: bool = False) -> Spread:
    """The :class:`Spread` of a batch [N, D]; ``with_mean`` where :func:`joined_spread` is to join it.

    The mean is then what fp64 makes of the rounded mean and the mean distance from it, so that means of near
    batches far from 0 can be told apart.
    """
    mean = target.mean(0, dtype=wide_dtype(target))
    centred = target - mean  # one [N, D] copy at a time
    squares = torch.linalg.vector_norm(centred).square()
    return Spread(len(target), mean.double() + centred.mean(0).double() if with_mean else None, squares)


def joined_spread(parts: Sequence[Spread]) -> Spread:
    """The :class:`Spread` of all rows of ``parts``, by Chan's rule:

        squares = sum_p squares_p + sum_p n_p ||mean_p - mean||^2

    Summed in fp64 and rounded once; of a single part itself.
    """
    if len(parts) == 1:
        return parts[0]
    total = sum(part.n for part in parts)
    means = [part.mean for part in parts if part.mean is not None]
    weights = [part.n / max(total, 1) for part in parts]
    mean = torch.stack([m * w for m, w in zip(means, weights, strict=True)]).sum(0)
    between = [part.n * (m - mean).square().sum() for m, part in zip(means, parts, strict=True)]
    within = [part.squares.double() for part in parts]
    return Spread(total, mean, torch.stack([*within, *between]).sum().to(parts[0].squares.dtype))


def error_scale(target: Tensor, kind: str) -> Tensor:
    """What the sum of squared errors over a batch [N, D] is multiplied by.

    "fvu": 1 / sum ||target - mean||^2, mean over the batch (0 where the batch has no variance).
    "squared_error": 1 / N.
    """
    target = target.detach()
    if kind == "squared_error":
        return target.new_full((), 1 / max(target.shape[0], 1), dtype=wide_dtype(target))
    return spread(target).scale(kind)


def row_norms(W: Tensor, n_sites: int = 1) -> Tensor:
    """||W[m]||, [M]; of a crosscoder the sum of the lengths of its ``n_sites`` parts."""
    dtype = torch.promote_types(W.dtype, torch.float32)
    return torch.linalg.vector_norm(W.view(len(W), n_sites, -1), dim=2, dtype=dtype).sum(1)


def reconstruction(x_hat: Tensor, target: Tensor, kind: str) -> Tensor:
    """error_scale * sum_n ||x_hat[n] - target[n]||^2, 0-dim."""
    return (upcast(x_hat) - upcast(target)).square().sum() * error_scale(target, kind)


def auxk(
    error: Tensor,
    x: Tensor,
    dead: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    term: AuxK,
    scale: Tensor,
    **options,
) -> Tensor:
    """coefficient * min(n_dead / k_aux, 1) * scale * sum ||error - e_hat||^2, 0-dim; 0 where nothing is dead.

    e_hat decodes each token's k_aux largest dead latents, without b_dec: ``error`` [N, d_out] = target -
    x_hat, detached, already lacks it. ``dead`` [n_dead] int64 ascending; ``x`` [N, d_in] is the encoder's
    input. See :class:`AuxK`.
    """
    if len(dead) == 0:
        return upcast(error).new_zeros(())
    k = term.resolve_k(x.shape[1])
    code = F.encode(x, W_enc, b_enc, TopK(min(k, len(dead))), subset=dead, **options)
    missed = upcast(error.detach()) - upcast(F.decode(code, W_dec, **options))
    return term.coefficient * min(len(dead) / k, 1.0) * scale * missed.square().sum()


def nested_reconstruction(
    code: SparseCode,
    W_dec: Tensor,
    error: Tensor,
    nested: Nested,
    scale: Tensor,
    *,
    sparse_grad: bool,
    backend: str,
) -> Tensor:
    """scale * sum_g weights[g] ||e_g||^2, 0-dim, the errors of partial reconstructions of ``code``.

    ``error`` [N, d_out] is that of the last one. See :mod:`fastsae.nested`.
    """
    chosen = resolve(backend, W_dec)
    parts = code.values, W_dec, error, code.indices, code.offsets, nested, chosen, sparse_grad
    return scale * NestedSquares.apply(*parts)


Charge = L1 | DecoderNormL1 | Tanh
"""Terms that are a sum over activations of a function of each and of its decoder row's length."""


def charge(term: Charge, f: Tensor, lengths: Tensor) -> Tensor:
    """What a term charges, before its coefficient, for activations ``f`` of latents with decoder rows of
    ``lengths``: f (L1), f ||W_dec[i]|| (DecoderNormL1), tanh(scale f ||W_dec[i]||) (Tanh)."""
    if isinstance(term, L1):
        return f
    return f * lengths if isinstance(term, DecoderNormL1) else (term.scale * f * lengths).tanh()


def charge_slopes(term: Charge, f: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of :func:`charge` by f and by the length."""
    if isinstance(term, L1):
        return torch.ones_like(f), torch.zeros_like(f)
    if isinstance(term, DecoderNormL1):
        return lengths.expand_as(f), f
    slope = term.scale * (1 - (term.scale * f * lengths).tanh().square())
    return slope * lengths, slope * f


def sparsity(term: Charge, code: SparseCode, W_dec: Tensor, n_sites: int = 1) -> Tensor:
    """coefficient * mean_n sum_i :func:`charge`, 0-dim."""
    stored = code.rows() < code.n_tokens
    lengths = row_norms(W_dec, n_sites)[torch.where(stored, code.indices, 0).long()]
    charged = charge(term, torch.where(stored, upcast(code.values), 0), lengths)
    return term.coefficient * charged.sum() / max(code.n_tokens, 1)


def pre_activation(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, lengths: Tensor, latents: Tensor | None = None
) -> Tensor:
    """mean_n sum_i relu(theta_i - pre_i) lengths_i, 0-dim, over all latents or where ``latents`` [M] bool.

    Holds all scores of x [N, d_in]; the training step does not.
    """
    pre = torch.nn.functional.linear(upcast(x), upcast(W_enc), upcast(b_enc))
    short = (theta - pre).relu() * lengths
    return (short if latents is None else short * latents).sum() / max(len(x), 1)
