"""Selection over chunks of scores: the exact path of ``encode``.

A GEMM (not here) writes scores of n tokens x width latents into a buffer; these kernels keep what may still
be selected, and forget the rest. One program owns one row of scores, so nothing races: no atomics on lists,
and candidates always stand in column order, which makes the lowest column win ties.

TopK. tau[n] is a lower bound on the k-th best score of row n so far.
    seed     tau from the first chunk: the k-th largest of strided column maxima
    append   scores > tau go to the row's candidates; streams the chunk once (4 n width bytes), compares one
             number per score, and branches on blocks of columns that hold a hit
    replay   where the candidates would have overflown: the chunk once more, cutting back to k whenever they
             are full. Seldom needed, and apart from append, which would lose its occupancy
    tighten  cut back to k and raise tau, once a chunk
    finish   order the k candidates, apply the ReLU
Exact for any input: a score is dropped only if k candidates at or above it are kept.

BatchTopK, and rules with a threshold: rows have no fixed number of entries, so they are counted before they
are written.
    tally, merge       count, then write, the entries of a CSR list and of a chunk that pass the cut
    histogram, pick    the K-th largest of both, 8 bits at a time (integer atomics: order doesn't matter)
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from fastsae.kernels.common import LOWEST, float_of, key_of, kth_largest

__all__ = [
    "CONFIGS",
    "EncodeConfig",
    "append",
    "finish",
    "histogram",
    "merge",
    "pick",
    "replay",
    "seed",
    "tally",
    "tighten",
]


@dataclass(frozen=True)
class EncodeConfig:
    """Columns looked at together, and warps: of append and the replay; of the kernels that read a list."""

    block: int = 256
    num_warps: int = 1
    list_block: int = 1024
    list_warps: int = 4


CONFIGS = {(80, 1 << 30): EncodeConfig()}
"""By (lowest arch, largest width). Not measured yet: one warp a row streams without a barrier, in 96
registers, which leaves room for 21 rows an SM, two blocks of 1 KiB each under way (2026-11)."""


@triton.jit
def _scores(scores_ptr, bias_ptr, start, column, width, HAS_BIAS: tl.constexpr):
    """fp32 scores of a row from ``column`` [BLOCK] on; what is beyond the chunk counts as -Inf."""
    score = tl.load(scores_ptr + start + column, mask=column < width, other=-float("inf"))
    if HAS_BIAS:
        score += tl.load(bias_ptr + column, mask=column < width, other=0).to(tl.float32)
    return score  # [BLOCK]


@triton.jit
def _allowed(allowed_ptr, column, width, HAS_ALLOWED: tl.constexpr):
    """Which columns exist and may be chosen."""
    exists = column < width
    if HAS_ALLOWED:
        exists &= tl.load(allowed_ptr + column, mask=exists, other=0) != 0
    return exists  # [BLOCK]


@triton.jit
def seed(
    scores_ptr, bias_ptr, allowed_ptr, n_allowed_ptr, tau_ptr, width, K,
    HAS_BIAS: tl.constexpr, HAS_ALLOWED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """tau[n] just below the K-th largest of LANES maxima, over columns equal mod LANES."""
    pid_n = tl.program_id(0).to(tl.int64)
    if HAS_ALLOWED:
        if tl.load(n_allowed_ptr) == 0:
            return
    offs = tl.arange(0, LANES)
    best = tl.full([LANES], LOWEST, tl.int32)
    for lo in range(0, width, LANES):
        column = lo + offs
        key = key_of(_scores(scores_ptr, bias_ptr, pid_n * width, column, width, HAS_BIAS))
        best = tl.maximum(best, tl.where(_allowed(allowed_ptr, column, width, HAS_ALLOWED), key, LOWEST))
    kth = kth_largest(best, K)
    # the next float down; below 0 it isn't -0. One below the lowest key wraps round, or lies below -Inf: NaN
    # either way, which every score passes
    tl.store(tau_ptr + pid_n, float_of(kth - 1 - (kth == 0).to(tl.int32)))


@triton.jit
def append(
    scores_ptr, bias_ptr, allowed_ptr, n_allowed_ptr, tau_ptr, val_ptr, idx_ptr, count_ptr, lo, width,
    HAS_BIAS: tl.constexpr, HAS_ALLOWED: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Append the columns with a score above tau; count[n] becomes -1 - count[n] where they don't fit."""
    pid_n = tl.program_id(0).to(tl.int64)
    if HAS_ALLOWED:
        if tl.load(n_allowed_ptr) == 0:
            return
    offs = tl.arange(0, BLOCK)
    tau, before = tl.load(tau_ptr + pid_n), tl.load(count_ptr + pid_n)
    count = before
    following = _scores(scores_ptr, bias_ptr, pid_n * width, offs, width, HAS_BIAS)
    for start in range(0, width, BLOCK):
        column, score = start + offs, following
        following = _scores(scores_ptr, bias_ptr, pid_n * width, column + BLOCK, width, HAS_BIAS)
        hit = ~(score <= tau) & _allowed(allowed_ptr, column, width, HAS_ALLOWED)  # NaN, in either, passes
        added = tl.sum(hit.to(tl.int32))
        if added > 0:
            slot = pid_n * CAPACITY + count + tl.cumsum(hit.to(tl.int32)) - 1
            fits = hit & (count + added <= CAPACITY)
            tl.store(val_ptr + slot, score, mask=fits)
            tl.store(idx_ptr + slot, lo + column, mask=fits)
            count += added
    tl.store(count_ptr + pid_n, tl.where(count <= CAPACITY, count, -1 - before))


@triton.jit
def _tighten(val_ptr, idx_ptr, row, count, K, CAPACITY: tl.constexpr):
    """Cut a row's candidates back to the K best, in column order; return the K-th best score."""
    offs = tl.arange(0, CAPACITY)
    mask = offs < count
    value = tl.load(val_ptr + row + offs, mask=mask, other=0)
    key = tl.where(mask, key_of(value), LOWEST)
    kth = kth_largest(key, K)
    index = tl.load(idx_ptr + row + offs, mask=mask, other=0)
    equal = mask & (key == kth)
    above = mask & (key > kth)
    spare = K - tl.sum(above.to(tl.int32))
    keep = above | (equal & (tl.cumsum(equal.to(tl.int32)) <= spare))
    slot = tl.cumsum(keep.to(tl.int32)) - 1
    tl.debug_barrier()  # all of the row is read before any of it is overwritten
    tl.store(val_ptr + row + slot, value, mask=keep)
    tl.store(idx_ptr + row + slot, index, mask=keep)
    tl.debug_barrier()
    return float_of(kth)


@triton.jit
def replay(
    scores_ptr, bias_ptr, allowed_ptr, n_allowed_ptr, tau_ptr, val_ptr, idx_ptr, count_ptr, replays_ptr, lo,
    width, K, HAS_BIAS: tl.constexpr, HAS_ALLOWED: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Append once more where the chunk didn't fit, cutting back to K before it overflows again.

    CAPACITY >= K + BLOCK.
    """
    pid_n = tl.program_id(0).to(tl.int64)
    if HAS_ALLOWED:
        if tl.load(n_allowed_ptr) == 0:
            return
    count = tl.load(count_ptr + pid_n)
    if count >= 0:
        return
    row, offs = pid_n * CAPACITY, tl.arange(0, BLOCK)
    tau, count = tl.load(tau_ptr + pid_n), -1 - count
    tl.store(replays_ptr + pid_n, tl.load(replays_ptr + pid_n) + 1)
    for start in range(0, width, BLOCK):
        column = start + offs
        score = _scores(scores_ptr, bias_ptr, pid_n * width, column, width, HAS_BIAS)
        exists = _allowed(allowed_ptr, column, width, HAS_ALLOWED)
        hit = ~(score <= tau) & exists
        if count + tl.sum(hit.to(tl.int32)) > CAPACITY:
            tau = _tighten(val_ptr, idx_ptr, row, count, K, CAPACITY)
            count = tl.minimum(count, K)
            hit = ~(score <= tau) & exists
        slot = row + count + tl.cumsum(hit.to(tl.int32)) - 1
        tl.store(val_ptr + slot, score, mask=hit)
        tl.store(idx_ptr + slot, lo + column, mask=hit)
        tl.debug_barrier()  # another thread may load them
        count += tl.sum(hit.to(tl.int32))
    tl.store(tau_ptr + pid_n, tau)
    tl.store(count_ptr + pid_n, count)


@triton.jit
def tighten(tau_ptr, val_ptr, idx_ptr, count_ptr, K, CAPACITY: tl.constexpr):
    """Keep K candidates, and raise tau to the worst of them."""
    pid_n = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + pid_n)
    if count < K:
        return
    tl.store(tau_ptr + pid_n, _tighten(val_ptr, idx_ptr, pid_n * CAPACITY, count, K, CAPACITY))
    tl.store(count_ptr + pid_n, tl.minimum(count, K))


@triton.jit
def finish(
    val_ptr, idx_ptr, count_ptr, subset_ptr, per_row_ptr, out_val_ptr, out_idx_ptr,
    HAS_SUBSET: tl.constexpr, ORDERED: tl.constexpr, CAPACITY: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Row n's candidates, by (score descending, column ascending) if ORDERED, from place n * per_row on."""
    pid_n = tl.program_id(0).to(tl.int64)
    row, offs, count = pid_n * CAPACITY, tl.arange(0, KEPT), tl.load(count_ptr + pid_n)
    value = tl.load(val_ptr + row + offs, mask=offs < count, other=0)
    index = tl.load(idx_ptr + row + offs, mask=offs < count, other=0)
    place = offs
    if ORDERED:
        key, place = key_of(value)[:, None], tl.zeros([KEPT], tl.int32)
        for start in range(0, KEPT, BLOCK):
            other = (start + tl.arange(0, BLOCK))[None, :]
            rival = key_of(tl.load(val_ptr + row + other, mask=other < count, other=0))
            ahead = (rival > key) | ((rival == key) & (other < offs[:, None]))  # [KEPT, BLOCK]
            place += tl.sum((ahead & (other < count)).to(tl.int32), axis=1)
    if HAS_SUBSET:
        index = tl.load(subset_ptr + index, mask=offs < count, other=0)
    out = pid_n * tl.load(per_row_ptr) + place
    value = tl.where(value <= 0, 0, value)  # NaN stays
    tl.store(out_val_ptr + out, value.to(out_val_ptr.dtype.element_ty), mask=offs < count)
    tl.store(out_idx_ptr + out, index.to(tl.int32), mask=offs < count)


@triton.jit
def tally(
    scores_ptr, bias_ptr, cut_ptr, proceed_ptr, list_ptr, starts_ptr, above_ptr, equal_ptr, row_lo, n_rows,
    width, cut_stride, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """above[n], equal[n]: how many of row n's list entries and of its scores in the chunk are >, == the cut.

    The chunk holds the rows from row_lo on. The list is CSR; all of it is held against cut[0].
    """
    if tl.load(proceed_ptr) == 0:
        return
    pid_n = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    above, equal = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    first, last = tl.load(starts_ptr + pid_n), tl.load(starts_ptr + pid_n + 1)
    cut = key_of(tl.load(cut_ptr))
    for place in range(first, last, BLOCK):
        mask = place + offs < last
        key = key_of(tl.load(list_ptr + place + offs, mask=mask, other=0))
        above += (mask & (key > cut)).to(tl.int32)
        equal += (mask & (key == cut)).to(tl.int32)
    if (pid_n >= row_lo) & (pid_n < row_lo + n_rows):
        for start in range(0, width, BLOCK):
            column = start + offs
            mask = column < width
            key = key_of(_scores(scores_ptr, bias_ptr, (pid_n - row_lo) * width, column, width, HAS_BIAS))
            cuts = key_of(tl.load(cut_ptr + column * cut_stride, mask=mask, other=0))
            above += (mask & (key > cuts)).to(tl.int32)
            equal += (mask & (key == cuts)).to(tl.int32)
    tl.store(above_ptr + pid_n, tl.sum(above))
    tl.store(equal_ptr + pid_n, tl.sum(equal))


@triton.jit
def merge(
    scores_ptr, bias_ptr, cut_ptr, list_ptr, list_idx_ptr, starts_ptr, allowance_ptr, base_ptr, out_val_ptr,
    out_idx_ptr, row_lo, n_rows, lo, width, cut_stride, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what :func:`tally` counted from place base[n] on: the list's entries, then the chunk's, whose
    columns are higher; of those equal to the cut only the first allowance[n]."""
    pid_n = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    base, allowance = tl.load(base_ptr + pid_n), tl.load(allowance_ptr + pid_n)
    first, last = tl.load(starts_ptr + pid_n), tl.load(starts_ptr + pid_n + 1)
    cut = key_of(tl.load(cut_ptr))
    for place in range(first, last, BLOCK):
        mask = place + offs < last
        value = tl.load(list_ptr + place + offs, mask=mask, other=0)
        index = tl.load(list_idx_ptr + place + offs, mask=mask, other=0)
        base, allowance = _write(
            value, index, key_of(value), cut, mask, allowance, base, out_val_ptr, out_idx_ptr
        )
    if (pid_n >= row_lo) & (pid_n < row_lo + n_rows):
        for start in range(0, width, BLOCK):
            column = start + offs
            mask = column < width
            value = _scores(scores_ptr, bias_ptr, (pid_n - row_lo) * width, column, width, HAS_BIAS)
            cuts = key_of(tl.load(cut_ptr + column * cut_stride, mask=mask, other=0))
            base, allowance = _write(
                value, lo + column, key_of(value), cuts, mask, allowance, base, out_val_ptr, out_idx_ptr
            )


@triton.jit
def _write(value, index, key, cut, mask, allowance, base, out_val_ptr, out_idx_ptr):
    equal = (mask & (key == cut)).to(tl.int32)
    keep = (mask & (key > cut)) | ((equal != 0) & (tl.cumsum(equal) <= allowance))
    slot = base + tl.cumsum(keep.to(tl.int32)) - 1
    tl.store(out_val_ptr + slot, value, mask=keep)
    tl.store(out_idx_ptr + slot, index, mask=keep)
    return base + tl.sum(keep.to(tl.int32)), allowance - tl.minimum(allowance, tl.sum(equal))


@triton.jit
def histogram(
    scores_ptr, bias_ptr, proceed_ptr, list_ptr, starts_ptr, prefix_ptr, counts_ptr, row_lo, n_rows, width,
    shift, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to counts[256] the digits (bits shift .. shift + 7) of the keys whose higher bits are the prefix's.

    Keys are shifted to unsigned order and held in int64. Every entry of the list and of the chunk counts.
    """
    if tl.load(proceed_ptr) == 0:
        return
    pid_n = tl.program_id(0).to(tl.int64)
    offs, prefix = tl.arange(0, BLOCK), tl.load(prefix_ptr)
    total = tl.zeros([512], tl.int32)
    first, last = tl.load(starts_ptr + pid_n), tl.load(starts_ptr + pid_n + 1)
    for place in range(first, last, BLOCK):
        mask = place + offs < last
        total += _digits(tl.load(list_ptr + place + offs, mask=mask, other=0), mask, prefix, shift)
    if (pid_n >= row_lo) & (pid_n < row_lo + n_rows):
        for start in range(0, width, BLOCK):
            column = start + offs
            score = _scores(scores_ptr, bias_ptr, (pid_n - row_lo) * width, column, width, HAS_BIAS)
            total += _digits(score, column < width, prefix, shift)
    bins = tl.arange(0, 512)
    tl.atomic_add(counts_ptr + bins, total, mask=(bins < 256) & (total > 0))


@triton.jit
def _digits(score, mask, prefix, shift):
    """How often each digit 0..255 occurs; bin 256 takes the keys that don't count."""
    key = key_of(score).to(tl.int64) + 2**31
    counts = mask & ((key >> (shift + 8)) == (prefix >> (shift + 8)))
    return tl.histogram(tl.where(counts, (key >> shift) & 255, 256).to(tl.int32), 512)


@triton.jit
def pick(counts_ptr, proceed_ptr, prefix_ptr, wanted_ptr, cut_ptr, shift):
    """Fix the prefix's next digit so that the wanted-th largest key begins with it; last, write it to cut."""
    if tl.load(proceed_ptr) == 0:
        return
    bins = tl.arange(0, 256)
    count = tl.load(counts_ptr + bins)
    wanted, prefix = tl.load(wanted_ptr), tl.load(prefix_ptr)
    above = tl.sum(count) - tl.cumsum(count)  # keys with a higher digit
    chosen = (above < wanted) & (above + count >= wanted)
    prefix += tl.sum(tl.where(chosen, bins, 0)).to(tl.int64) << shift
    tl.store(wanted_ptr, wanted - tl.sum(tl.where(chosen, above, 0)))
    tl.store(prefix_ptr, prefix)
    tl.store(counts_ptr + bins, tl.zeros_like(count))
    if shift == 0:
        tl.store(cut_ptr, float_of((prefix - 2**31).to(tl.int32)))
