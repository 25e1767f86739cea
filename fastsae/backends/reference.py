"""The oracle: each operator in its plainest dense form, in any floating dtype (float64 for tests).

Half-precision inputs are computed in float32 and rounded once. The docstrings here define what every backend
computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.ops import upcast

__all__ = ["code_grad", "decode", "encode", "row_grads", "row_update", "transpose"]


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor | None,
    subset: Tensor | None,
    rule: str,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score, select, ReLU.

        pre[n, m] = <x[n], W_enc[m]> + b_enc[m]
        "topk":       the k largest of each row, by (value descending, index ascending), in that order
        "batchtopk":  the N * k largest of all, ties by n * M + m; in order of n, then m
        "threshold":  pre > max(threshold, 0), threshold scalar or [M]; in order of n, then m

    A score of NaN ranks as +Inf. ``subset`` [S] int64, ascending, confines the choice to those latents (k
    becomes min(k, S)). Returns relu(selected) [P] in W_enc's dtype, indices [P] int32, offsets [N + 1] int64.
    """
    if subset is not None:
        W_enc, b_enc = W_enc[subset], None if b_enc is None else b_enc[subset]
    n, m = x.shape[0], W_enc.shape[0]
    pre = upcast(x) @ upcast(W_enc).T
    if b_enc is not None:
        pre = pre + upcast(b_enc)
    rank = pre.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    k = min(k, m)
    if rule == "topk":
        columns = rank.argsort(dim=1, descending=True, stable=True)[:, :k].flatten()
        rows = torch.arange(n, device=x.device).repeat_interleave(k)
    elif rule == "batchtopk":
        flat = rank.flatten().argsort(descending=True, stable=True)[: n * k].sort().values
        rows, columns = flat // max(m, 1), flat % max(m, 1)
    else:
        assert threshold is not None
        rows, columns = (rank > upcast(threshold).clamp_min(0)).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=n)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    indices = columns if subset is None else subset[columns]
    return pre[rows, columns].relu().to(W_enc.dtype), indices.int(), offsets


def decode(values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """x_hat[n] = sum_j values[j] * W_dec[indices[j]] + b_dec over row n's entries; [N, D], W_dec's dtype."""
    code = _dense(values, indices, offsets, W_dec.shape[0])
    x_hat = code @ upcast(W_dec)
    return (x_hat if b_dec is None else x_hat + upcast(b_dec)).to(W_dec.dtype)


def code_grad(grad_x_hat: Tensor, W_dec: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    """grad_values[j] = <grad_x_hat[row of j], W_dec[indices[j]]>; [P], 0 beyond offsets[-1]."""
    dense = upcast(grad_x_hat) @ upcast(W_dec).T
    rows, stored = _rows(offsets), int(offsets[-1])
    grad = grad_x_hat.new_zeros(indices.shape[0])
    grad[:stored] = dense[rows, indices[:stored].long()].to(grad.dtype)
    return grad


def transpose(
    values: Tensor, indices: Tensor, offsets: Tensor, n_latents: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Order the entries whose value isn't 0 by latent, tokens ascending within one.

    Returns, with R = min(P, n_latents), all int64:
        latents: [R] active latents ascending, then ``n_latents`` in unused places.
        starts: [R + 1]; row r owns ``tokens[starts[r] : starts[r + 1]]`` (empty in unused places).
        tokens: [P] the row of each entry.
        order: [P] the entry's place in ``values``. Beyond starts[-1] both hold 0.
    """
    n_entries, stored = indices.shape[0], int(offsets[-1])
    rows = _rows(offsets)
    live = values[:stored].nonzero().flatten()
    order = live[indices[live].argsort(stable=True)]
    found, counts = torch.unique_consecutive(indices[order].long(), return_counts=True)
    n_rows = min(n_entries, n_latents)
    latents = found.new_full((n_rows,), n_latents)
    latents[: len(found)] = found
    starts = found.new_full((n_rows + 1,), len(order))
    starts[0] = 0
    starts[1 : len(found) + 1] = counts.cumsum(0)
    padded = torch.zeros(2, n_entries, dtype=torch.int64, device=indices.device)
    padded[0, : len(order)], padded[1, : len(order)] = rows[order], order
    return latents, starts, padded[0].clone(), padded[1].clone()


def row_grads(coefs: Tensor, x: Tensor, starts: Tensor, tokens: Tensor) -> Tensor:
    """grad[r] = sum of coefs[j] * x[tokens[j]] over starts[r] <= j < starts[r + 1].

    ``starts`` may be a slice of a longer one, so it needn't begin at 0. [R, D] in float32 (float64 of
    float64).
    """
    x, coefs = upcast(x), upcast(coefs)
    first, last = int(starts[0]), int(starts[-1])
    rows = torch.arange(starts.shape[0] - 1, device=x.device).repeat_interleave(starts.diff())
    grad = x.new_zeros(starts.shape[0] - 1, x.shape[1])
    return grad.index_add_(0, rows, coefs[first:last, None].to(x.dtype) * x[tokens[first:last]])


def row_update(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    last_step: Tensor,
    rows: Tensor | None,
    grad: Tensor | None,
    coast: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    unit_norm: bool,
) -> None:
    """One Adam step, in place, on the given rows of ``weight`` [M, D] and its two moments.

    With ``coast`` (float64, indexed by step) a row last brought up to date at step t first makes up for the
    steps it missed, s = step - 1 - t of them (step - t where grad is None), as Adam with zero gradients would
    have moved it:

        w -= coast[t] * m / (sqrt v + eps * sqrt(1 - beta2^t));   m *= beta1^s;   v *= beta2^s

    where coast[t] is the optimizer's running sum of  lr_u r^(u - t) sqrt(1 - beta2^u) / (1 - beta1^u)  over
    the missed steps u, r = beta1 / sqrt(beta2). Then, where ``grad`` [R, D] is given, with g = grad less its
    part along w if ``unit_norm``:

        m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
        w -= lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)

    ``unit_norm`` last divides each row by its length. ``rows`` None means every row in order. ``last_step``
    [M] int32 becomes ``step``.
    """
    index = slice(None) if rows is None else rows
    w, m, v = (upcast(t[index]) for t in (weight, exp_avg, exp_avg_sq))
    if coast is not None:
        w, m, v = _coast(
            w, m, v, last_step[index].long(), coast, beta1, beta2, eps, step - (grad is not None)
        )
    if grad is not None:
        g = grad.to(w.dtype)
        if unit_norm:
            unit = torch.nn.functional.normalize(w, dim=1)
            g = g - unit * (g * unit).sum(1, keepdim=True)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        w = w - lr / (1 - beta1**step) * m / ((v / (1 - beta2**step)).sqrt() + eps)
    if unit_norm:
        w = torch.nn.functional.normalize(w, dim=1)
    for tensor, new in ((weight, w), (exp_avg, m), (exp_avg_sq, v)):
        tensor[index] = new.to(tensor.dtype)
    last_step[index] = step


def _coast(w, m, v, last, coast, beta1, beta2, eps, until):
    missed = (until - last).clamp_min(0).double()
    owed = coast[last] * (missed > 0)
    # a row never touched has m = v = 0: any divisor but 0 will do
    floor = torch.where(last == 0, 1.0, eps * (1 - beta2 ** last.double()).sqrt())
    owed, floor, decay1, decay2 = (
        t.to(w.dtype)[:, None] for t in (owed, floor, beta1**missed, beta2**missed)
    )
    return w - owed * m / (v.sqrt() + floor), decay1 * m, decay2 * v


def _rows(offsets: Tensor) -> Tensor:
    return torch.arange(offsets.shape[0] - 1, device=offsets.device).repeat_interleave(offsets.diff())


def _dense(values: Tensor, indices: Tensor, offsets: Tensor, n_latents: int) -> Tensor:
    stored = int(offsets[-1])
    code = upcast(values).new_zeros(offsets.shape[0] - 1, n_latents)
    code[_rows(offsets), indices[:stored].long()] = upcast(values[:stored])
    return code
