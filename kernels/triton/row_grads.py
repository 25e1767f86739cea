"""row_grads: feature-major sums of token rows, and how long runs are shared out.

    grad[r] = sum_j coef[j] * x[tokens[j]]    over starts[r] <= j < starts[r + 1]

One program owns one row and one slice of D: BLOCK_J token rows are asked for at once, 16 bytes a lane, and
summed in fp32 in the order of j. Bytes: P * D elements of x (in part from the L2), 4 * R * D written; 2
FLOPs an element.

A run longer than a chunk would keep one program busy when the others are done. The places j are cut into
chunks of ``split`` places, and a first kernel sums a long run's piece of each chunk into a row of its own,
which the run's program then adds up in order. A chunk touches at most two long runs: the one that it begins
in (slot 2c) and the one that it ends in (slot 2c + 1). So the slots are known on the host, pieces depend on
places alone, and no atomics and no counts are needed: `owner[c]`, the run of place c * split, says it all.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

__all__ = [
    "CHUNKS",
    "CONFIGS",
    "SPLIT",
    "TRIALS",
    "RowGradsConfig",
    "piece",
    "pieces_of",
    "row_grads_kernel",
    "run_sum",
]

SPLIT = 256
"""Longest run that one program sums alone, at least: a chunk."""
CHUNKS = 2048
"""Chunks, at most: where there would be more they are longer, so that 2 * CHUNKS rows hold all pieces."""


@dataclass(frozen=True)
class RowGradsConfig:
    """BLOCK_J tokens gathered at a time; columns a slice, at most; columns a warp."""

    BLOCK_J: int
    most_columns: int
    warp_columns: int = 256


CONFIGS = {
    (80, 1024): RowGradsConfig(BLOCK_J=8, most_columns=512),
    (80, 16384): RowGradsConfig(BLOCK_J=8, most_columns=1024),
}
"""By (lowest arch, largest width). Not measured yet: as decode's (2026-11)."""
TRIALS = (RowGradsConfig(BLOCK_J=4, most_columns=1024), RowGradsConfig(BLOCK_J=16, most_columns=512))
"""What FASTSAE_AUTOTUNE=1 tries beside the table's."""


@triton.jit
def piece(pid, owner_ptr, starts_ptr, R, split):
    """Slot pid's run, and its places [first, last); none where no long run has this slot."""
    chunk = pid // 2
    left, right = chunk * split, (chunk + 1) * split
    row = tl.load(owner_ptr + chunk + pid % 2)
    known = (row >= 0) & (row < R)
    start = tl.load(starts_ptr + row, mask=known, other=0)
    end = tl.load(starts_ptr + row + 1, mask=known, other=0)
    first, last = tl.maximum(start, left), tl.minimum(end, right)
    mine = (start < left) == (pid % 2 == 0)  # slot 2c: begun before the chunk; slot 2c + 1: within it
    return row, first, tl.where(mine & (end - start > split), last, first)


@triton.jit
def pieces_of(start, end, split):
    """A long run's slots: the first, then each even one after it, below the second; none for a short run."""
    head = 2 * (start // split) + 1
    stop = 2 * ((end - 1) // split) + 1
    return tl.where(end - start > split, head, stop), stop


@triton.jit
def gather_sum(acc, coef_ptr, x_ptr, tokens_ptr, first, last, D, offs_d, BLOCK_J: tl.constexpr):
    """acc [BLOCK_D] fp32, and coef[j] * x[tokens[j]] of first <= j < last added to it."""
    offs_j = first + tl.arange(0, BLOCK_J)
    n = tl.load(tokens_ptr + offs_j, mask=offs_j < last, other=0)
    coef = tl.load(coef_ptr + offs_j, mask=offs_j < last, other=0)
    for _ in range(first, last, BLOCK_J):
        mask = (offs_j < last)[:, None] & (offs_d < D)[None, :]
        rows = tl.load(x_ptr + n[:, None] * D + offs_d[None, :], mask=mask, other=0)  # [BLOCK_J, BLOCK_D]
        now = coef.to(tl.float32)
        offs_j += BLOCK_J  # the next names while the rows are under way
        n = tl.load(tokens_ptr + offs_j, mask=offs_j < last, other=0)
        coef = tl.load(coef_ptr + offs_j, mask=offs_j < last, other=0)
        acc += tl.sum(now[:, None] * rows.to(tl.float32), axis=0)
    return acc


@triton.jit
def run_sum(coef_ptr, x_ptr, tokens_ptr, parts_ptr, start, end, D, split, offs_d, BLOCK_J: tl.constexpr):
    """The sum over a run's places, from the rows of ``parts_ptr`` if it is long; [BLOCK_D]."""
    acc = tl.zeros_like(offs_d).to(tl.float32)
    slot, stop = pieces_of(start, end, split)
    last = tl.where(slot < stop, start, end)
    while slot < stop:
        acc += tl.load(parts_ptr + slot * D + offs_d, mask=offs_d < D, other=0)
        slot += 2 - slot % 2
    return gather_sum(acc, coef_ptr, x_ptr, tokens_ptr, start, last, D, offs_d, BLOCK_J)


@triton.jit
def row_grads_kernel(
    coef_ptr, x_ptr, starts_ptr, tokens_ptr, owner_ptr, split_ptr, parts_ptr, out_ptr, R, D,
    PIECES: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row pid of out [R, D]; or, with PIECES, slot pid of parts [slots, D]."""
    pid, split = tl.program_id(0).to(tl.int64), tl.load(split_ptr)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if PIECES:
        _row, first, last = piece(pid, owner_ptr, starts_ptr, R, split)
        if first == last:
            return
        acc = tl.zeros((BLOCK_D,), tl.float32)
        acc = gather_sum(acc, coef_ptr, x_ptr, tokens_ptr, first, last, D, offs_d, BLOCK_J)
        tl.store(parts_ptr + pid * D + offs_d, acc, mask=offs_d < D)
    else:
        start, end = tl.load(starts_ptr + pid), tl.load(starts_ptr + pid + 1)
        acc = run_sum(coef_ptr, x_ptr, tokens_ptr, parts_ptr, start, end, D, split, offs_d, BLOCK_J)
        tl.store(out_ptr + pid * D + offs_d, acc, mask=offs_d < D)
