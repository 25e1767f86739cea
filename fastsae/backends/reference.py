"""The oracle: each operator in its plainest dense form, in any floating dtype (float64 for tests).

Half-precision inputs are computed in float32 and rounded once. The docstrings here define what every backend
computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.formats import read_rows, write_rows
from fastsae.ops import upcast

__all__ = [
    "code_grad",
    "decode",
    "decode_error",
    "encode",
    "encode_dead",
    "row_grads",
    "row_step",
    "row_update",
    "transpose",
]


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
        "groupmax":   the largest of each of k groups of M / k neighbours, lowest index first; in order of m
        "threshold":  pre > threshold, scalar or [M]; in order of n, then m

    A score of NaN ranks as +Inf. ``subset`` [S] int64, ascending, confines the choice to those latents (k
    becomes min(k, S)). Returns relu(selected) [P] in x's dtype, indices [P] int32, offsets [N + 1] int64.
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
    elif rule == "groupmax":
        best = rank.view(n, k, m // k).argsort(dim=2, descending=True, stable=True)[:, :, 0]
        columns = (best + torch.arange(0, m, m // k, device=x.device)).flatten()
        rows = torch.arange(n, device=x.device).repeat_interleave(k)
    elif rule == "batchtopk":
        flat = rank.flatten().argsort(descending=True, stable=True)[: n * k].sort().values
        rows, columns = flat // max(m, 1), flat % max(m, 1)
    else:
        assert threshold is not None
        rows, columns = (rank > upcast(threshold)).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=n)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    indices = columns if subset is None else subset[columns]
    return pre[rows, columns].relu().to(x.dtype), indices.int(), offsets


def encode_dead(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor | None,
    dead: Tensor,
    rule: str,
    k: int,
    k_dead: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`encode`, and a second code of the same scores: "topk" among the latents where ``dead`` [M] bool.

    The second code has K = min(k_dead, number of dead latents) entries a token, in any order; its tensors
    have room for min(k_dead, M) a token, of which the first N * K places are used.
    """
    subset, n, m = dead.nonzero().flatten(), x.shape[0], W_enc.shape[0]
    values, indices, offsets = encode(x, W_enc, b_enc, None, subset, "topk", k_dead)
    room = n * min(k_dead, m) - len(values)
    second = torch.cat([values, values.new_zeros(room)]), torch.cat([indices, indices.new_zeros(room)])
    return *encode(x, W_enc, b_enc, threshold, None, rule, k), *second, offsets


def decode(values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """x_hat[n] = sum_j values[j] * W_dec[indices[j]] + b_dec over row n's entries; [N, D], values' dtype."""
    code = _dense(values, indices, offsets, W_dec.shape[0])
    x_hat = code @ upcast(W_dec)
    return (x_hat if b_dec is None else x_hat + upcast(b_dec)).to(values.dtype)


def decode_error(
    values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor]:
    """error[n] = x_hat[n] - target[n] of :func:`decode`'s x_hat before it is rounded; and ||error[n]||^2.

    [N, D] in target's dtype; [N] in float32 (float64 of float64), of the error before it is rounded.
    """
    x_hat = _dense(values, indices, offsets, W_dec.shape[0]) @ upcast(W_dec)
    error = (x_hat if b_dec is None else x_hat + upcast(b_dec)) - upcast(target)
    return error.to(target.dtype), error.square().sum(1)


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
    remainder: Tensor | None,
    state: list[Tensor],
    rows: Tensor | None,
    grad: Tensor | None,
    coast: Tensor | None,
    clock: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    unit_norm: bool,
    seed: int,
    first: int,
) -> None:
    """One Adam step, in place, on the given rows of ``weight`` [M, D] and of its ``state``.

    How both are held is :mod:`fastsae.formats`'s: with ``remainder`` int16 [M, D], weight is the bf16 plane
    of split32; state is what :func:`fastsae.formats.new_state` makes. Arithmetic is in fp32 (fp64 of fp64).

    ``clock`` [4] float64 holds what changes from step to step: the step t, from 1 on; lr sqrt(1 - beta2^t) /
    (1 - beta1^t); eps sqrt(1 - beta2^t); and 1, or 0 where nothing at all is to be done.

    With ``coast`` (float64, indexed by step) a row last brought up to date at step t first makes up for the
    steps it missed, s = step - 1 - t of them (step - t where grad is None), as Adam with zero gradients would
    have moved it:

        w -= coast[t] * m / (sqrt v + eps * sqrt(1 - beta2^t));   m *= beta1^s;   v *= beta2^s

    where coast[t] is the optimizer's running sum of  lr_u r^(u - t) sqrt(1 - beta2^u) / (1 - beta1^u)  over
    the missed steps u, r = beta1 / sqrt(beta2). Then, where ``grad`` [R, D] is given, with g = grad less its
    part along w if ``unit_norm``:

        m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2;   w -= clock[1] m / (sqrt v + clock[2])

    with the mean of g^2 over the row where v is one number for it. ``unit_norm`` last divides each row by its
    length. ``rows`` None means every row in order; a row id that isn't below M is passed over. last_step [M]
    becomes the step. Stochastic rounding is keyed by (seed, step, ``first`` + row, column), since weight may
    be a slice of a larger one.
    """
    step, size, floor, proceed = clock.tolist()
    if not proceed:
        return
    if rows is not None:
        rows = rows[used := rows < weight.shape[0]]
        grad = None if grad is None else grad[used]
    w, m, v = read_rows(weight, remainder, state, rows)
    if coast is not None:
        last = (state[2] if rows is None else state[2][rows]).long()
        w, m, v = _coast(w, m, v, last, coast, beta1, beta2, eps, step - (grad is not None))
    if grad is not None:
        g = grad.to(w.dtype)
        if unit_norm:
            unit = torch.nn.functional.normalize(w, dim=1)
            g = g - unit * (g * unit).sum(1, keepdim=True)
        m = beta1 * m + (1 - beta1) * g
        squares = g * g if v.shape == g.shape else (g * g).mean(1, keepdim=True)
        v = beta2 * v + (1 - beta2) * squares
        w = w - size * m / (v.sqrt() + floor)
    if unit_norm:
        w = torch.nn.functional.normalize(w, dim=1)
    write_rows(weight, remainder, state, rows, (w, m, v), int(step), seed, first)


def row_step(
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    enc_remainder: Tensor | None,
    dec_remainder: Tensor | None,
    enc_state: list[Tensor],
    bias_state: list[Tensor],
    dec_state: list[Tensor],
    coasts: list[Tensor | None],
    clocks: list[Tensor],
    betas: list[float],
    eps: list[float],
    seeds: list[int],
    every_row: list[bool],
    unit_norm: bool,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor,
    x: Tensor,
    error: Tensor,
    scale: Tensor,
    l1: float,
) -> Tensor:
    """Backward and optimizer in one: :func:`row_update` of both matrices and b_enc, no gradient kept.

    With g[n] = scale[n] error[n] the loss's derivative at decoded row n (n < R, entry j in row n, latent m),
    ||.|| a decoder row's length, and l1 = dL / d(f ||W_dec[m]||) at the first N = len(x) rows, else 0:

        d_val[j]    = <g[n], W_dec[m]> + l1 ||W_dec[m]||;      d_pre[j] = d_val[j] where values[j] > 0, else 0
        d_W_dec[m]  = sum_j values[j] (g[n] + l1 W_dec[m] / ||W_dec[m]||)
        d_W_enc[m]  = sum_j d_pre[j] x[n mod N];               d_b_enc[m] = sum_j d_pre[j]

    all by the weights as they were, of split32 the planes, by which the code was made. Latents with an entry
    other than 0 are updated; all of them where ``every_row``. Lists of three stand for W_enc, b_enc, W_dec
    (``betas`` has their six); a state is row_update's, of b_enc of [M, 1], or empty where that parameter
    stays. Returns sum_m d_b_enc[m] W_enc[m] [D] in float32 (float64 of float64): what b_dec's gradient loses
    where it is subtracted from x.
    """
    rows, stored = _rows(offsets), int(offsets[-1])
    g, dec = upcast(scale)[:, None] * upcast(error), upcast(W_dec)
    code = _dense(values, indices, offsets, W_dec.shape[0])
    lengths = dec.norm(dim=1)
    charged = (torch.arange(len(g), device=g.device) < len(x)).to(g.dtype)[:, None]
    d_values = g @ dec.T + l1 * charged * lengths
    entry = torch.zeros_like(code, dtype=torch.bool)
    entry[rows, indices[:stored].long()] = values[:stored] > 0
    d_pre = torch.where(entry, d_values, 0)
    d_enc, d_bias = d_pre.T @ upcast(x).repeat(len(g) // max(len(x), 1), 1), d_pre.sum(0)
    d_dec = code.T @ g + l1 * (code * charged).sum(0)[:, None] * torch.nn.functional.normalize(dec, dim=1)
    pull = d_bias @ upcast(W_enc)
    live = (code != 0).any(0).nonzero().flatten()
    for i, (weight, remainder, state, grad) in enumerate((
        (W_enc, enc_remainder, enc_state, d_enc),
        (b_enc[:, None], None, bias_state, d_bias[:, None]),
        (W_dec, dec_remainder, dec_state, d_dec),
    )):  # fmt: skip
        if state:
            touched, its_grad = (None, grad) if every_row[i] else (live, grad[live])
            row_update(
                weight, remainder, state, touched, its_grad, coasts[i], clocks[i], betas[2 * i],
                betas[2 * i + 1], eps[i], unit_norm and i == 2, seeds[i], 0,
            )  # fmt: skip
    return pull


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
