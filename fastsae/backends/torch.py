"""Portable PyTorch: the operators of :mod:`fastsae.backends.reference` in bounded memory, fast on a CPU.

``encode`` scores a block of columns at a time and keeps, per token, only the scores above its running k-th
best. A block is first reduced to the maxima of strided groups of columns, so
that the threshold is compared with one number in 32; exact, because a group whose maximum fails holds nothing
that passes. Where there are few scores at all, torch.topk does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as nnf

from fastsae.formats import read_rows, write_rows
from fastsae.ops import upcast, wide_dtype

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

BLOCK_SCORES = 2**21
"""Scores held at a time, 8 MiB in fp32: stays in a last-level cache (measured at N = 1024, D = 384)."""
MAX_TOKENS = 1024
"""Tokens encoded at a time, so that a block of scores has enough columns for a good GEMM."""
BLOCK_WEIGHTS = 2**24
"""Weights scored at a time: the copy that a subset or half-precision weights need stays small."""
MIN_COLUMNS = 1024
"""Columns in a block, at least: below, threads have too little to share."""
FEW_SCORES = 2**18
"""So few are selected by torch.topk: encode then takes 1 / 2.8 of the time for one token and 256 latents,
1 / 1.4 for 1024 tokens; of a million it would take more (AMD EPYC, one thread, D = 384, k = 32, 2026-11)."""
GROUP = 32
"""Columns per group maximum, at most."""
LONGEST_SUM = 128
"""Rows that are added up one after the other, at most."""
BLOCK_ELEMENTS = 2**18
"""Elements of the row blocks in which gathers and updates run: a few stay in a second-level cache."""


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor | None,
    subset: Tensor | None,
    rule: str,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastsae.backends.reference.encode`. At most BLOCK_SCORES scores are in memory at a time."""
    narrow, x, latents = x.dtype, upcast(x), _Latents(W_enc, b_enc, subset)
    m = len(latents)
    if rule in ("topk", "groupmax"):
        choose = _encode_topk if rule == "topk" else _encode_groupmax
        blocks = [choose(part, latents, min(k, m)) for part in x.split(MAX_TOKENS)]
        values, columns = (torch.cat(parts).flatten() for parts in zip(*blocks, strict=True))
        offsets = torch.arange(x.shape[0] + 1, device=x.device) * min(k, m)
    elif rule == "batchtopk":
        values, columns, offsets = _encode_batchtopk(x, latents, x.shape[0] * min(k, m))
    else:
        assert threshold is not None
        values, columns, offsets = _encode_threshold(x, latents, upcast(threshold))
    indices = columns if subset is None else subset[columns.long()]
    return values.relu().to(narrow), indices.int(), offsets


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
    """See :func:`fastsae.backends.reference.encode_dead`. Scores the dead latents twice."""
    values, indices, offsets = encode(x, W_enc, b_enc, None, dead.nonzero().flatten(), "topk", k_dead)
    room = (0, x.shape[0] * min(k_dead, W_enc.shape[0]) - len(values))
    main = encode(x, W_enc, b_enc, threshold, None, rule, k)
    return *main, nnf.pad(values, room), nnf.pad(indices, room), offsets


def _scores(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    W, b = W.to(x.dtype), None if b is None else b.to(x.dtype)
    # oneDNN's fp32 GEMM: 2.4x MKL's on AMD EPYC (Zen 5, 2 cores, 1024 x 384 x 65,536, 2026-11). Only for
    # round shapes: it keeps a primitive for each of the last 1024 shapes, and odd ones pin gigabytes of heap.
    fp32_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if fp32_on_cpu and x.numel() and x.shape[0] % 256 == 0 and W.shape[0] % 1024 == 0:
        return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")
    return nnf.linear(x, W, b)


class _Latents:
    """The encoder's rows, or a subset of them, scored a block at a time."""

    def __init__(self, W: Tensor, b: Tensor | None, subset: Tensor | None) -> None:
        self.W, self.b, self.subset = W, b, subset

    def __len__(self) -> int:
        return len(self.W if self.subset is None else self.subset)

    def blocks(self, x: Tensor, width: int) -> Iterator[tuple[int, Tensor]]:
        """The first latent and the scores [N, up to width] of one block after the other."""
        for lo in range(0, len(self), width):
            rows = slice(lo, lo + width) if self.subset is None else self.subset[lo : lo + width]
            yield lo, _scores(x, self.W[rows], None if self.b is None else self.b[rows])


def _block_width(n_tokens: int, d_in: int) -> int:
    width = min(BLOCK_SCORES // max(n_tokens, 1), BLOCK_WEIGHTS // max(d_in, 1))
    return max(MIN_COLUMNS, width // GROUP * GROUP)


def score_all(x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> None:
    """Compute all scores, a block at a time, and keep none: what encode costs at least. For benchmarks."""
    latents = _Latents(W_enc, b_enc, None)
    for part in x.split(MAX_TOKENS):
        for _ in latents.blocks(part, _block_width(*part.shape)):
            pass


class _RowBest:
    """Each token's best candidates so far: appended in column order, now and then cut back to k."""

    def __init__(self, n_tokens: int, k: int, like: Tensor) -> None:
        self.k, self.count = k, torch.zeros(n_tokens, dtype=torch.int64, device=like.device)
        self.values = like.new_empty(n_tokens, 0)
        self.columns = torch.empty(n_tokens, 0, dtype=torch.int32, device=like.device)

    def append(self, rows: Tensor, columns: Tensor, values: Tensor) -> None:
        """Add entries sorted by row, then column; columns above all earlier ones of the row."""
        slot, added = _slots(rows, self.count)
        self.count += added
        if (missing := int(self.count.max()) - self.values.shape[1]) > 0:
            missing = max(missing, self.k)
            self.values = nnf.pad(self.values, (0, missing), value=-torch.inf)
            self.columns = nnf.pad(self.columns, (0, missing))
        self.values[rows, slot] = values
        self.columns[rows, slot] = columns

    def tighten(self) -> Tensor:
        """Keep the k best by (value descending, column ascending); return each row's k-th, [N, 1]."""
        # stable, and candidates stand in column order among equals: the lowest column wins
        rank, order = _rank(self.values).sort(dim=1, descending=True, stable=True)
        order = order[:, : self.k]
        self.values, self.columns = self.values.gather(1, order), self.columns.gather(1, order)
        self.count.clamp_max_(self.k)
        return rank[:, self.k - 1 : self.k].clone()


def _encode_topk(x: Tensor, latents: _Latents, k: int) -> tuple[Tensor, Tensor]:
    n, m = x.shape[0], len(latents)
    best = _RowBest(n, k, x)
    if n == 0 or k == 0:
        return best.values.view(n, k), best.columns.view(n, k)
    if n * m <= FEW_SCORES and m <= _block_width(n, x.shape[1]):
        return _best_of_few(x, latents, k)
    # the first block must hold k columns, and 2k groups make a sharp first threshold
    width = max(_block_width(n, x.shape[1]), -(-k // GROUP) * GROUP)
    group = max(g for g in (1, 2, 4, 8, 16, GROUP) if g == 1 or min(width, m) // g >= 2 * k)
    tau: Tensor | None = None
    next_cut = 1

    def threshold(maxima: Tensor) -> Tensor:
        # k groups reach the k-th largest maximum, so at least k scores do
        return maxima.topk(k, dim=1).values[:, -1:] if tau is None else tau

    number = 0
    for lo, scores in latents.blocks(x, width):
        number += 1  # noqa: SIM113  (enumerate would keep the last block alive)
        # >: a later column loses a tie
        rows, columns, values = _candidates(scores, group, threshold, torch.ge if tau is None else torch.gt)
        del scores  # before the next block is made
        best.append(rows, (columns + lo).int(), values)
        if number == next_cut or best.values.shape[1] > 4 * k + 64 or lo + width >= m:
            tau, next_cut = best.tighten(), 2 * number
    return best.values, best.columns


def _best_of_few(x: Tensor, latents: _Latents, k: int) -> tuple[Tensor, Tensor]:
    """The k best by torch.topk; where it finds ties, which it breaks as it likes, by a stable sort."""
    ((_, scores),) = latents.blocks(x, len(latents))
    rank = _rank(scores)
    best, columns = rank.topk(min(k + 1, len(latents)), dim=1)
    if (best[:, 1:] == best[:, :-1]).any():
        columns = rank.argsort(dim=1, descending=True, stable=True)
    columns = columns[:, :k]
    return scores.gather(1, columns), columns.int()


def _encode_groupmax(x: Tensor, latents: _Latents, k: int) -> tuple[Tensor, Tensor]:
    """The largest of each of k groups of neighbours, which blocks of columns may cut."""
    n, size = x.shape[0], len(latents) // k
    values, columns = x.new_empty(n, k), torch.zeros(n, k, dtype=torch.int32, device=x.device)
    best = x.new_full((n, k), -torch.inf)
    width = _block_width(*x.shape)
    for lo, scores in latents.blocks(x, width // size * size or width):
        hi = lo + scores.shape[1]
        for group in range(lo // size, -(-hi // size)) if width < size else ():
            part = scores[:, max(group * size - lo, 0) : (group + 1) * size - lo]
            _keep_best(part, slice(group, group + 1), max(group * size, lo), size, best, values, columns)
        if width >= size:
            _keep_best(scores, slice(lo // size, hi // size), lo, size, best, values, columns)
    return values, columns


def _keep_best(scores, groups, first, size, best, values, columns) -> None:
    """Put the largest of each of ``groups``, whose scores are given from column ``first`` on, in its place
    unless what is there is as large."""
    n, count = len(scores), groups.stop - groups.start
    found, where = _rank(scores).view(n, count, scores.shape[1] // count).max(dim=2)
    where = where + torch.arange(count, device=scores.device) * size
    better = found > best[:, groups]
    if first % size == 0:  # of -Inf alone the first is kept
        better = torch.ones_like(better)
    best[:, groups] = torch.where(better, found, best[:, groups])
    values[:, groups] = torch.where(better, scores.gather(1, where), values[:, groups])
    columns[:, groups] = torch.where(better, (where + first).int(), columns[:, groups])


def _candidates(
    scores: Tensor, group: int, threshold: Callable[[Tensor], Tensor], passes: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values of the scores that pass, by row, then column.

    ``threshold`` makes [N, 1] or a scalar of the groups' maxima [N, groups]; ``passes(score, threshold)``.
    """
    n, width = scores.shape
    padding = -width % group
    if padding:
        scores = nnf.pad(scores, (0, padding), value=-torch.inf)
    stride = scores.shape[1] // group
    grouped = scores.view(n, group, stride)  # group g holds the columns g, g + stride, g + 2 * stride, ...
    maxima = _rank(grouped.amax(1))
    tau = threshold(maxima)
    rows, offset = passes(maxima, tau).nonzero(as_tuple=True)
    hits = grouped[rows, :, offset]  # [groups that may hold a candidate, group]
    hit, member = passes(_rank(hits), tau.expand(n, 1)[rows]).nonzero(as_tuple=True)
    rows, columns, values = rows[hit], member * stride + offset[hit], hits[hit, member]
    if padding:  # it passes where every score is -Inf
        rows, columns, values = (t[columns < width] for t in (rows, columns, values))
    order = (rows * width + columns).argsort()
    return rows[order], columns[order], values[order]


def _encode_batchtopk(x: Tensor, latents: _Latents, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``keep`` largest scores, ties by n * M + m; candidates never pass 2 * keep + one block."""
    n, m = x.shape[0], len(latents)
    rows = torch.empty(0, dtype=torch.int64, device=x.device)
    columns, values, tau = rows.clone(), x.new_empty(0), None

    def threshold(maxima: Tensor) -> Tensor:
        if tau is not None:
            return tau
        enough = maxima.numel() >= keep
        return maxima.flatten().topk(keep).values[-1] if enough else maxima.new_tensor(-torch.inf)

    for tokens in range(0, n, MAX_TOKENS):
        part = x[tokens : tokens + MAX_TOKENS]
        for lo, scores in latents.blocks(part, _block_width(*part.shape)):
            # >=: a later entry equal to the last one kept may have the lower place n * M + m
            found = _candidates(scores, min(GROUP, scores.shape[1]), threshold, torch.ge)
            rows = torch.cat([rows, found[0] + tokens])
            columns, values = torch.cat([columns, found[1] + lo]), torch.cat([values, found[2]])
            if len(values) > (keep if tau is None else 2 * keep):
                rows, columns, values, tau = _cut(rows, columns, values, keep, m)
    rows, columns, values, _ = _cut(rows, columns, values, keep, m)
    order = (rows * m + columns).argsort()
    return _to_csr(rows[order], columns[order], values[order], n)


def _cut(rows, columns, values, keep, m):
    """Keep the best entries by (value descending, place ascending); also return the last one's value."""
    if keep == 0 or len(values) < keep:
        return rows[:keep], columns[:keep], values[:keep], None
    rank = _rank(values)
    tau = rank.topk(keep).values[-1]
    above, equal = (rank > tau).nonzero().flatten(), (rank == tau).nonzero().flatten()
    equal = equal[(rows[equal] * m + columns[equal]).argsort()][: keep - len(above)]
    kept = torch.cat([above, equal])
    return rows[kept], columns[kept], values[kept], tau


def _encode_threshold(x: Tensor, latents: _Latents, cut: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All scores above ``cut``, scalar or [M], by row, then column."""
    parts = [_above(part, latents, cut) for part in x.split(MAX_TOKENS)]
    values, columns, counts = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return values, columns, torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _above(x: Tensor, latents: _Latents, cut: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found, counts = [], torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for lo, scores in latents.blocks(x, _block_width(*x.shape)):
        bar = cut[lo : lo + scores.shape[1]] if cut.ndim else cut
        rows, columns = (_rank(scores) > bar).nonzero(as_tuple=True)
        found.append((rows.int(), (columns + lo).int(), scores[rows, columns]))
        counts += torch.bincount(rows, minlength=len(x))
    total, place = int(counts.sum()), counts.cumsum(0) - counts
    values = x.new_empty(total)
    all_columns = torch.empty(total, dtype=torch.int32, device=x.device)
    for narrow_rows, block_columns, block in found:
        slots, added = _slots(narrow_rows.long(), place)
        values[slots], all_columns[slots] = block, block_columns
        place += added
    return values, all_columns, counts


def _slots(rows: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """Where entries sorted by row go after each row's ``taken`` ones; and entries per row."""
    added = torch.bincount(rows, minlength=len(taken))
    return torch.arange(len(rows), device=rows.device) + (taken - added.cumsum(0) + added)[rows], added


def _to_csr(rows: Tensor, columns: Tensor, values: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    counts = torch.bincount(rows, minlength=n)
    return values, columns, torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def decode(values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """See :func:`fastsae.backends.reference.decode`. Reads P rows of W_dec."""
    return _decode(values, indices, offsets, W_dec, b_dec).to(values.dtype)


def decode_error(
    values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`fastsae.backends.reference.decode_error`."""
    error = _decode(values, indices, offsets, W_dec, b_dec).sub_(target)
    return error.to(target.dtype), torch.linalg.vector_norm(error, dim=1).square_()


def _decode(values, indices, offsets, W_dec, b_dec) -> Tensor:
    """x_hat before it is rounded."""
    stored = int(offsets[-1])
    x_hat = _bag(indices[:stored].long(), W_dec, offsets, upcast(values[:stored]))
    return x_hat if b_dec is None else x_hat.add_(b_dec)


def _bag(rows: Tensor, table: Tensor, offsets: Tensor, coefs: Tensor) -> Tensor:
    """out[n] = sum of coefs[j] * table[rows[j]] over offsets[n] <= j < offsets[n + 1], in the dtype of coefs.

    Long sums are made of sums of LONGEST_SUM, whose error grows less than that of one after the other. Of a
    narrower table the rows are upcast, as many at a time as make a block.
    """
    n = offsets.shape[0] - 1
    if not len(rows):
        return coefs.new_zeros(n, table.shape[1])
    lengths = offsets.diff()
    if lengths.max() > LONGEST_SUM:
        pieces = (-(-lengths // LONGEST_SUM)).clamp_min(1)
        ends = nnf.pad(pieces.cumsum(0), (1, 0))
        owner = torch.arange(n, device=rows.device).repeat_interleave(pieces)
        number = torch.arange(len(owner), device=rows.device)
        starts = nnf.pad(offsets[owner] + LONGEST_SUM * (number - ends[owner]), (0, 1))
        starts[-1] = offsets[-1]
        sums = _bag(rows, table, starts, coefs)
        return _bag(number, sums, ends, coefs.new_ones(len(number)))
    bag = partial(nnf.embedding_bag, mode="sum", include_last_offset=True)
    if table.dtype == coefs.dtype:
        return bag(rows, table, offsets, per_sample_weights=coefs)
    out = coefs.new_empty(n, table.shape[1])
    most = max(1, BLOCK_ELEMENTS // max(1, table.shape[1]))
    tokens = max(1, most * n // len(rows))
    for lo in range(0, n, tokens):
        ends = offsets[lo : lo + tokens + 1]
        first, last = int(ends[0]), int(ends[-1])
        picked = table.index_select(0, rows[first:last]).to(coefs.dtype)
        places = torch.arange(last - first, device=rows.device)
        out[lo : lo + tokens] = bag(places, picked, ends - first, per_sample_weights=coefs[first:last])
    return out


def code_grad(grad_x_hat: Tensor, W_dec: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    """See :func:`fastsae.backends.reference.code_grad`. Gathers a block of rows of W_dec at a time."""
    stored, n = int(offsets[-1]), grad_x_hat.shape[0]
    grad = grad_x_hat.new_zeros(indices.shape[0])
    y, dtype = upcast(grad_x_hat), upcast(grad_x_hat).dtype
    block = max(1, BLOCK_ELEMENTS // max(W_dec.shape[1], 1))
    indices = indices[:stored].long()
    rows = torch.arange(n, device=y.device).repeat_interleave(offsets.diff(), output_size=stored)
    for lo in range(0, stored, block):
        part = slice(lo, min(lo + block, stored))
        picked = W_dec.index_select(0, indices[part]).to(dtype)
        grad[part] = picked.mul_(y.index_select(0, rows[part])).sum(1)
    return grad


def transpose(
    values: Tensor, indices: Tensor, offsets: Tensor, n_latents: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastsae.backends.reference.transpose`. One stable sort; the host waits for nothing."""
    n_entries, device = indices.shape[0], indices.device
    n_rows = min(n_entries, n_latents)
    position = torch.arange(n_entries, device=device)
    live = (values != 0) & (position < offsets[-1])
    latent, order = torch.where(live, indices, n_latents).sort(stable=True)
    used = latent < n_latents
    # the row of each entry, counted from 0; what isn't used goes to a place beyond the end
    first = nnf.pad(latent[1:] != latent[:-1], (1, 0), value=True) & used
    row = torch.where(first, first.cumsum(0) - 1, n_rows)
    latents = position.new_full((n_rows + 1,), n_latents).scatter_(0, row, latent.long())
    starts = used.sum().expand(n_rows + 1).clone().scatter_(0, row, position)
    # the place beyond the end is also the last of starts, which holds the number of used entries
    starts[-1:] = used.sum()
    order = torch.where(used, order, 0)
    tokens = torch.where(used, torch.searchsorted(offsets[1:].contiguous(), order, right=True), 0)
    return latents[:n_rows], starts, tokens, order


def row_grads(coefs: Tensor, x: Tensor, starts: Tensor, tokens: Tensor) -> Tensor:
    """See :func:`fastsae.backends.reference.row_grads`."""
    first, last = int(starts[0]), int(starts[-1])
    return _bag(tokens[first:last], upcast(x), starts - first, upcast(coefs[first:last]))


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
    """See :func:`fastsae.backends.reference.row_update`."""
    step, size, floor, proceed = clock.tolist()
    if not proceed:
        return
    if rows is not None and len(rows) and rows.max() >= len(weight):
        used = rows < len(weight)
        rows, grad = rows[used], None if grad is None else grad[used]
    # views where every row is meant, so that in-place arithmetic is the whole update
    w, m, v = read_rows(weight, remainder, state, rows)
    last = state[2] if rows is None else state[2][rows]
    if coast is not None and (missed := int(step) - (grad is not None) - last).any():
        _coast_(w, m, v, missed, last, coast, beta1, beta2, eps)
    if grad is not None:
        g = grad.to(w.dtype)
        if unit_norm:
            along = _dot(g, w) / _dot(w, w).clamp_min(torch.finfo(w.dtype).tiny)
            g = torch.addcmul(g, w, along, value=-1)
        m.lerp_(g, 1 - beta1)
        if v.shape == g.shape:
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        else:
            v.mul_(beta2).add_(_dot(g, g), alpha=(1 - beta2) / g.shape[1])
        w.addcdiv_(m, v.sqrt().add_(floor), value=-size)
    if unit_norm:
        w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min_(1e-12))
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
    """See :func:`fastsae.backends.reference.row_step`. Gradients exist a block of rows at a time."""
    m, n = len(W_enc), len(x)
    g = upcast(scale)[:, None] * upcast(error)
    grad_values = code_grad(g, W_dec, indices, offsets)
    charged = (torch.arange(len(g), device=g.device) < n).to(g.dtype)[:, None]
    if l1:
        main = slice(int(offsets[n]))
        norms = torch.linalg.vector_norm(W_dec, dim=1, dtype=g.dtype)
        grad_values[main] += l1 * norms[indices[main].long()]
    latents, starts, tokens, order = transpose(values, indices, offsets, m)
    active = int((latents < m).sum())
    latents, starts = latents[:active], starts[: active + 1]
    coefs, d_pre = upcast(values)[order], torch.where(values > 0, grad_values, 0)[order]
    wide_x, inputs = upcast(x), tokens % max(n, 1)
    d_bias = row_grads(d_pre, wide_x.new_ones(n, 1), starts, inputs)
    pull = d_bias.new_zeros(W_enc.shape[1])
    block = max(1, BLOCK_ELEMENTS // max(1, W_enc.shape[1]))
    for rows, part in zip(latents.split(block), d_bias.split(block), strict=True):
        pull += part.flatten() @ upcast(W_enc.index_select(0, rows))

    def dec_grad(lo: int, hi: int) -> Tensor:
        grad = row_grads(coefs, g, starts[lo : hi + 1], tokens)
        if l1:
            total = row_grads(coefs, charged, starts[lo : hi + 1], tokens)
            grad += l1 * total * nnf.normalize(upcast(W_dec[latents[lo:hi]]), dim=1)
        return grad

    def enc_grad(lo: int, hi: int) -> Tensor:
        return row_grads(d_pre, wide_x, starts[lo : hi + 1], inputs)

    for i, (weight, remainder, state, grad) in enumerate((
        (W_enc, enc_remainder, enc_state, enc_grad),
        (b_enc[:, None], None, bias_state, lambda lo, hi: d_bias[lo:hi]),
        (W_dec, dec_remainder, dec_state, dec_grad),
    )):  # fmt: skip
        if state:
            update = partial(
                row_update, coast=coasts[i], clock=clocks[i], beta1=betas[2 * i], beta2=betas[2 * i + 1],
                eps=eps[i], unit_norm=unit_norm and i == 2, seed=seeds[i],
            )  # fmt: skip
            _update_blocks(update, weight, remainder, state, latents, grad, every_row[i])
    return pull


def _update_blocks(
    update: Callable,
    weight: Tensor,
    remainder: Tensor | None,
    state: list[Tensor],
    latents: Tensor,
    grad: Callable,
    every_row: bool,
) -> None:
    """Update the rows ``latents`` (or all), a block at a time, by what ``grad(lo, hi)`` makes."""
    size = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    if not every_row:
        for lo in range(0, len(latents), size):
            rows = latents[lo : lo + size]
            update(weight, remainder, state, rows, grad(lo, lo + len(rows)), first=0)
        return
    for lo in range(0, len(weight), size):
        hi = min(lo + size, len(weight))
        first, last = torch.searchsorted(latents, torch.tensor([lo, hi], device=latents.device)).tolist()
        block = torch.zeros(hi - lo, weight.shape[1], dtype=wide_dtype(weight), device=weight.device)
        if last > first:
            block[latents[first:last] - lo] = grad(first, last).to(block.dtype)
        some = None if remainder is None else remainder[lo:hi]
        update(weight[lo:hi], some, [t[lo:hi] for t in state], None, block, first=lo)


def _coast_(w, m, v, missed, last, coast, beta1, beta2, eps) -> None:
    missed, last = missed.clamp_min(0).double(), last.long()
    owed = coast[last] * (missed > 0)
    # a row never touched has m = v = 0: any divisor but 0 will do
    floor = torch.where(last == 0, 1.0, eps * (1 - beta2 ** last.double()).sqrt())
    owed, floor, decay1, decay2 = (
        t.to(w.dtype)[:, None] for t in (owed, floor, beta1**missed, beta2**missed)
    )
    w.addcdiv_(m * owed, v.sqrt().add_(floor), value=-1)
    m.mul_(decay1)
    v.mul_(decay2)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, [R, 1]."""
    return torch.bmm(a[:, None, :], b[:, :, None])[:, 0]


def _rank(scores: Tensor) -> Tensor:
    """Scores as they are ordered: NaN counts as +Inf."""
    return scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
