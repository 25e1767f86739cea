"""Loss terms as functions of tensors: in normalised space, in fp32 (fp64 of fp64)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae import functional as F
from fastsae.code import SparseCode
from fastsae.config import AuxK, TopK
from fastsae.ops import upcast, wide_dtype

__all__ = ["auxk", "decoder_norm_l1", "error_scale", "reconstruction", "row_norms"]


def error_scale(target: Tensor, kind: str) -> Tensor:
    """What the sum of squared errors over a batch [N, D] is multiplied by.

    "fvu": 1 / sum ||target - mean||^2, mean over the batch (0 where the batch has no variance).
    "squared_error": 1 / N.
    """
    target, dtype = target.detach(), wide_dtype(target)
    if kind == "squared_error":
        return target.new_full((), 1 / max(target.shape[0], 1), dtype=dtype)
    centred = target - target.mean(0, dtype=dtype)  # one [N, D] copy at a time
    variance = torch.linalg.vector_norm(centred).square()
    return torch.where(variance > 0, 1 / variance, 0)


def row_norms(W: Tensor) -> Tensor:
    """||W[m]||, [M]."""
    return torch.linalg.vector_norm(W, dim=1, dtype=torch.promote_types(W.dtype, torch.float32))


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


def decoder_norm_l1(code: SparseCode, W_dec: Tensor, coefficient: float) -> Tensor:
    """coefficient * mean_n sum_i f_i ||W_dec[i]||, 0-dim. See :class:`fastsae.DecoderNormL1`."""
    stored = code.rows() < code.n_tokens
    norms = row_norms(W_dec)[torch.where(stored, code.indices, 0).long()]
    return coefficient * (torch.where(stored, upcast(code.values), 0) * norms).sum() / max(code.n_tokens, 1)
