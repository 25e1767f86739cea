"""encode by TopK, fused: scores are kept only near those above a threshold; [N, M] is never in memory.

    pre[n, m] = <x[n], W_enc[m]> + b_enc[m];  the K largest of each row by (value descending, index ascending)

Five kernels; all but the second are small:

    sample_cut      a threshold tau per row, from the scores of a sample of the columns
    filter_scores   the GEMM; appends to a row's list every group of 8 scores of which one exceeds tau
    settle          the scores above tau become the row's candidates; certifies the row, or has it rescued
    rescue          the candidates of rows without a certificate, exactly, whatever they hold
    finish          the K best candidates in order

A candidate is one int64: the bits of its fp32 score above its column. Groups and candidates of a row lie in
any order, as atomics raced for their places; (score, column) is a total order: the result is always the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from fastsae.kernels.common import LOWEST, float_of, key_of, kth_largest

__all__ = [
    "FILTER", "FILTER_FP32", "GROUP", "RESCUE", "RESCUE_M", "FilterConfig", "RescueConfig",
    "filter_scores", "finish", "rescue", "sample_cut", "settle",
]  # fmt: skip

LARGEST_KEY = tl.constexpr(2139095039)  # of the largest finite number
GROUP = tl.constexpr(8)  # scores that are listed together


@dataclass(frozen=True)
class FilterConfig:
    """One tile of ``filter_scores``: block_n a multiple of 16, best 16 * num_warps; block_m of 64."""

    block_n: int
    block_m: int
    block_d: int
    num_warps: int
    num_stages: int


# Not measured on a GPU. As compiled for sm_90 (Triton 3.7.1): 114 registers, 98 KB, no spills, so that one of
# two blocks on an SM can filter while the other multiplies; about 9 instructions per score after the product.
FILTER = {
    (80, 1024): FilterConfig(128, 128, 64, 8, 3),
    (90, 1024): FilterConfig(128, 128, 64, 8, 3),
}
FILTER_FP32 = {(80, 1024): FilterConfig(64, 64, 32, 4, 3)}


@dataclass(frozen=True)
class RescueConfig:
    """One tile of ``rescue``, by RESCUE_M columns; num_warps where buffers are small."""

    block_n: int
    block_d: int
    num_warps: int


RESCUE_M = 64  # a row's buffer has places for K + RESCUE_M candidates at least
RESCUE = {(80, 1024): RescueConfig(16, 64, 4)}


@triton.jit
def _pack(score, column):
    return (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | column.to(tl.int64)


@triton.jit
def _score_of(packed):
    return (packed >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _column_of(packed):
    return (packed & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _cut_of(keys, columns, K):
    """(key, column) of the K-th best candidate, by key descending, then column; empty places hold LOWEST."""
    key = kth_largest(keys, K)
    ties = keys == key
    need = K - tl.sum((keys > key).to(tl.int32), 0)
    column = tl.full([], 0x7FFFFFFF, tl.int32)
    if tl.sum(ties.to(tl.int32), 0) > need:
        below = tl.full([], 0, tl.int32)  # the largest number with fewer than `need` ties below it
        for bit in range(31):
            trial = below | (1 << (30 - bit))
            below = tl.where(tl.sum((ties & (columns < trial)).to(tl.int32), 0) < need, trial, below)
        column = below
    return key, column


@triton.jit
def _beats(keys, columns, cut_key, cut_column):
    """Which candidates are the one at the cut, or better."""
    return (keys > cut_key) | ((keys == cut_key) & (columns <= cut_column))


@triton.jit
def _keep_best(row_ptr, count, K, BLOCK_C: tl.constexpr):
    """Move the K best of ``count`` >= K candidates to the front; returns the worst of them, (key, column)."""
    offs_c = tl.arange(0, BLOCK_C)
    packed = tl.load(row_ptr + offs_c, mask=offs_c < count, other=0)
    keys = tl.where(offs_c < count, key_of(_score_of(packed)), LOWEST)
    columns = _column_of(packed)
    cut_key, cut_column = _cut_of(keys, columns, K)
    kept = _beats(keys, columns, cut_key, cut_column)
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.debug_barrier()  # all have loaded before any stores
    tl.store(row_ptr + place, packed, mask=kept)
    tl.debug_barrier()  # all have stored before any loads again
    return cut_key, cut_column


@triton.jit
def sample_cut(
    scores_ptr, b_ptr, tau_ptr, S, stride_b, J, HAS_BIAS: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """tau[n] = the J-th largest of S sampled scores, or a little less; NaN, which no score is <=, if J > S.

    One program owns one row and reads it once, 4 * S bytes: each of BLOCK_S lanes keeps the best of its
    columns, and the J-th largest lane is at most the J-th largest column. Where S > BLOCK_S the difference
    costs a few candidates, nothing else. +Inf, and NaN as +Inf, become the largest finite number: whatever
    ranks as +Inf must exceed tau.
    """
    row = tl.program_id(0).to(tl.int64)
    best = tl.full([BLOCK_S], LOWEST, tl.int32)
    for start in range(0, S, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask_s = offs_s < S
        score = tl.load(scores_ptr + row * S + offs_s, mask=mask_s, other=0.0)  # [BLOCK_S]
        if HAS_BIAS:
            score += tl.load(b_ptr + offs_s.to(tl.int64) * stride_b, mask=mask_s, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.where(mask_s, key_of(score), LOWEST))
    key = kth_largest(best, J)
    tl.store(tau_ptr + row, float_of(tl.minimum(key, LARGEST_KEY)))


@triton.jit
def _by_thread(tile, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile [BLOCK_N, BLOCK_M] as [GROUP, BLOCK_M / 16 * 2 * BLOCK_N], in the order of Hopper's threads.

    Its tensor cores leave a tile so that a warp has 16 rows, a thread two of them, 8 apart, and of each the
    columns 2t, 2t + 1 of every 8, t = 0..3. With BLOCK_N = 16 * num_warps the thread is the last part of the
    last axis here. Triton deals a one-dimensional tensor out to threads in the same way, so nothing moves.
    Elsewhere scores move through shared memory, and the result is the same.
    """
    tile = tl.reshape(tile, [BLOCK_N // 16, 2, 8, BLOCK_M // 64, GROUP, 4, 2])
    tile = tl.permute(tile, [4, 3, 6, 1, 0, 2, 5])
    return tl.reshape(tile, [GROUP, BLOCK_N * BLOCK_M // GROUP])


@triton.jit
def filter_scores(
    x_ptr, W_ptr, b_ptr, tau_ptr, score_ptr, column_ptr, count_ptr, N, D, M, C,
    HAS_BIAS: tl.constexpr, EVEN_M: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BAND_N: tl.constexpr,
):  # fmt: skip
    """Append groups of 8 scores of a row, and their lowest column, where one of pre[n, m] isn't <= tau[n].

    One program owns a tile of BLOCK_N tokens by BLOCK_M columns: 2 * BLOCK_N * BLOCK_M * D FLOPs on
    (BLOCK_N + BLOCK_M) * D elements. These come from L2: programs that run together share BAND_N tiles of
    tokens and a few of columns. The 8 columns of a group are 8 apart, which one thread holds after a product
    (see _by_thread), and are written whole: per score a compare, an `or` and a store seldom taken, per group
    kept one atomic and 36 bytes; no ranking, and nothing hides behind better ones. Counts go on where there
    is no more room. Columns from M on score -Inf, or NaN if column M - 1 is odd: ``settle`` drops them.
    """
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    first = pid // (BAND_N * tiles_m) * BAND_N
    within = pid % (BAND_N * tiles_m)
    width = tl.minimum(tl.cdiv(N, BLOCK_N) - first, BAND_N)
    start_n, start_m = (first + within % width) * BLOCK_N, within // width * BLOCK_M
    offs_n, offs_m = start_n + tl.arange(0, BLOCK_N), start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + tl.minimum(offs_n, N - 1).to(tl.int64)[:, None] * D + offs_d[None, :]
    W_ptrs = W_ptr + tl.minimum(offs_m, M - 1).to(tl.int64)[None, :] * D + offs_d[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for d in range(0, D, BLOCK_D):
        if EVEN_D:
            x = tl.load(x_ptrs + d)  # [BLOCK_N, BLOCK_D]
            w = tl.load(W_ptrs + d)  # [BLOCK_D, BLOCK_M]
        else:
            x = tl.load(x_ptrs + d, mask=offs_d[None, :] < D - d, other=0.0)
            w = tl.load(W_ptrs + d, mask=offs_d[:, None] < D - d, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    if EVEN_M:
        if HAS_BIAS:
            acc += tl.load(b_ptr + offs_m).to(tl.float32)[None, :]
    else:
        bias = tl.zeros([BLOCK_M], tl.float32)
        if HAS_BIAS:
            bias = tl.load(b_ptr + offs_m, mask=offs_m < M, other=0.0).to(tl.float32)
        acc += tl.where(offs_m < M, bias, float("-inf"))[None, :]
    tau = tl.load(tau_ptr + tl.minimum(offs_n, N - 1))
    hits = _by_thread(tl.where(acc <= tau[:, None], 0, 1), BLOCK_N, BLOCK_M)

    group = tl.arange(0, BLOCK_N * BLOCK_M // GROUP)
    thread, place = group % (2 * BLOCK_N), group // (2 * BLOCK_N)
    row = start_n + thread // 32 * 16 + place % 2 * 8 + thread // 4 % 8
    column = start_m + place // 4 * 64 + thread % 4 * 2 + place // 2 % 2
    found = (tl.max(hits, 0) > 0) & (row < N)  # all these are [BLOCK_N * BLOCK_M / GROUP]
    slot = tl.atomic_add(count_ptr + row, 1, mask=found, sem="relaxed")
    found = found & (slot < C)
    slot += row.to(tl.int64) * C
    tl.store(column_ptr + slot, column, mask=found)
    scores = _by_thread(acc, BLOCK_N, BLOCK_M)
    places = slot[None, :] * GROUP + tl.arange(0, GROUP)[:, None]  # [GROUP, BLOCK_N * BLOCK_M / GROUP]
    flat: tl.constexpr = [BLOCK_N * BLOCK_M]
    mask = tl.reshape(tl.broadcast_to(found[None, :], scores.shape), flat)
    tl.store(score_ptr + tl.reshape(places, flat), tl.reshape(scores, flat), mask=mask)


@triton.jit
def settle(
    tau_ptr, score_ptr, column_ptr, buf_ptr, count_ptr, list_ptr, stat_ptr, M, C, K, BLOCK_G: tl.constexpr
):
    """Make a row's scores above tau its candidates; certify the row, or put it on the rescue's list.

    If K scores exceed tau the K best do, and all of them are candidates if there was room for every group and
    every candidate. That is the certificate: it supposes nothing about tau.

    One program owns one row: 36 bytes per group, 8 per candidate.
    """
    row = tl.program_id(0).to(tl.int64)
    groups = tl.load(count_ptr + row)
    tau = tl.load(tau_ptr + row)
    total = tl.full([], 0, tl.int32)
    for start in range(0, tl.minimum(groups, C), BLOCK_G):
        offs_g = start + tl.arange(0, BLOCK_G)
        mask_g = offs_g < tl.minimum(groups, C)
        column = tl.load(column_ptr + row * C + offs_g, mask=mask_g, other=M)
        member = tl.arange(0, GROUP)[None, :]
        column = column[:, None] + member * 8  # [BLOCK_G, GROUP]
        score = tl.load(
            score_ptr + (row * C + offs_g)[:, None] * GROUP + member, mask=mask_g[:, None], other=0.0
        )
        hit = tl.reshape((~(score <= tau) & (column < M)).to(tl.int32), [BLOCK_G * GROUP])
        place = total + tl.cumsum(hit, 0) - 1
        packed = tl.reshape(_pack(score, column), [BLOCK_G * GROUP])
        tl.store(buf_ptr + row * C + place, packed, mask=(hit > 0) & (place < C))
        total += tl.sum(hit, 0)
    tl.store(count_ptr + row, total)
    if (groups > C) | (total > C) | (total < K):
        tl.store(list_ptr + tl.atomic_add(stat_ptr, 1, sem="relaxed"), row.to(tl.int32))


@triton.jit
def rescue(
    x_ptr, W_ptr, b_ptr, buf_ptr, count_ptr, list_ptr, stat_ptr, D, M, C, K,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The candidates of the listed rows anew, with a cut that rises: exact for any scores.

    One program owns BLOCK_N rows of the list and all M columns: 2 * BLOCK_N * M * D FLOPs, M * D elements. It
    always launches and most often finds no rows: what the list holds only the device knows. A row's scores
    that beat its cut are appended; before its buffer would overflow its K best so far are moved to the front,
    and the worst of them becomes the cut. C must be at least K + BLOCK_M.
    """
    n_rows = tl.load(stat_ptr)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(0) * BLOCK_N < n_rows:
        mask_n = offs_n < n_rows
        rows = tl.load(list_ptr + offs_n, mask=mask_n, other=0).to(tl.int64)
        counts = tl.zeros([BLOCK_N], tl.int32)
        cut_keys = tl.full([BLOCK_N], LOWEST, tl.int32)
        cut_columns = tl.full([BLOCK_N], 0, tl.int32)
        lane = tl.arange(0, BLOCK_N)
        for start in range(0, M, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            mask_m = offs_m < M
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for d in range(0, D, BLOCK_D):
                offs_d = d + tl.arange(0, BLOCK_D)
                mask_d = offs_d < D
                x = tl.load(
                    x_ptr + rows[:, None] * D + offs_d[None, :],
                    mask=mask_n[:, None] & mask_d[None, :],
                    other=0.0,
                )  # [BLOCK_N, BLOCK_D]
                w = tl.load(
                    W_ptr + offs_m.to(tl.int64)[None, :] * D + offs_d[:, None],
                    mask=mask_m[None, :] & mask_d[:, None],
                    other=0.0,
                )  # [BLOCK_D, BLOCK_M]
                acc = tl.dot(x, w, acc, input_precision=PRECISION)
            if HAS_BIAS:
                acc += tl.load(b_ptr + offs_m, mask=mask_m, other=0.0).to(tl.float32)[None, :]
            columns = offs_m[None, :]
            better = _beats(key_of(acc), columns, cut_keys[:, None], cut_columns[:, None])
            new = (better & mask_n[:, None] & mask_m[None, :]).to(tl.int32)  # [BLOCK_N, BLOCK_M]
            full = (counts + tl.sum(new, 1) > C).to(tl.int32)  # [BLOCK_N]
            if tl.sum(full, 0) > 0:
                tl.debug_barrier()  # what was appended is visible
                for r in range(BLOCK_N):
                    if tl.sum(tl.where(lane == r, full, 0), 0) > 0:
                        row = tl.sum(tl.where(lane == r, rows, 0), 0)
                        count = tl.sum(tl.where(lane == r, counts, 0), 0)
                        key, column = _keep_best(buf_ptr + row * C, count, K, BLOCK_C)
                        counts = tl.where(lane == r, K, counts)
                        cut_keys = tl.where(lane == r, key, cut_keys)
                        cut_columns = tl.where(lane == r, column, cut_columns)
            place = counts[:, None] + tl.cumsum(new, 1) - 1
            tl.store(
                buf_ptr + rows[:, None] * C + place,
                _pack(acc, tl.broadcast_to(columns, place.shape)),
                mask=new > 0,
            )
            counts += tl.sum(new, 1)
        tl.store(count_ptr + rows, counts, mask=mask_n)


@triton.jit
def finish(
    buf_ptr, count_ptr, val_ptr, idx_ptr, C, K,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Write relu(score) and column of a row's K best candidates in order.

    One program owns one row: 8 bytes per candidate. An entry's place is the number of better ones: K * K
    compares.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = buf_ptr + row * C
    _keep_best(row_ptr, tl.load(count_ptr + row), K, BLOCK_C)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    packed = tl.load(row_ptr + offs_k, mask=mask_k, other=0)
    score, column = _score_of(packed), _column_of(packed)
    rank = (key_of(score).to(tl.int64) << 32) - column  # [BLOCK_K], all different
    place = tl.zeros([BLOCK_K], tl.int32)
    for start in range(0, K, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        rival = tl.load(row_ptr + offs_j, mask=offs_j < K, other=0)
        rival_rank = (key_of(_score_of(rival)).to(tl.int64) << 32) - _column_of(rival)  # [BLOCK_J]
        better = (rival_rank[None, :] > rank[:, None]) & (offs_j < K)[None, :]
        place += tl.sum(better.to(tl.int32), 1)
    value = tl.where(score <= 0, 0.0, score)  # NaN stays
    tl.store(val_ptr + row * K + place, value.to(val_ptr.dtype.element_ty), mask=mask_k)
    tl.store(idx_ptr + row * K + place, column, mask=mask_k)
