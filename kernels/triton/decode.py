"""decode and decode_error: one token's entries gathered from W_dec, summed, and maybe less the target.

    x_hat[n] = sum_j val[j] * W_dec[idx[j]] + b_dec;     error[n] = x_hat[n] - target[n],  ||error[n]||^2

One program owns one token and one slice of D. It reads K rows' slices (N * K * D elements in all, 2 FLOPs
each, so bandwidth decides) and writes one; no other program writes there, so nothing races and sums have
one order. BLOCK_K rows are asked for at once, one 16-byte load of half precision a lane and row: BLOCK_K
rows in flight per warp. A lane holds the same columns of each row, so a tile is summed without a word
between lanes. Slices are the grid's slow axis: what is in the L2 at a time is one slice of the rows that
many tokens share.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

__all__ = ["CONFIGS", "TRIALS", "DecodeConfig", "decode_kernel", "slice_width"]


@dataclass(frozen=True)
class DecodeConfig:
    """BLOCK_K entries gathered at a time; columns a slice, at most; columns a warp."""

    BLOCK_K: int
    most_columns: int
    warp_columns: int = 256


CONFIGS = {
    (80, 1024): DecodeConfig(BLOCK_K=8, most_columns=512),
    (80, 16384): DecodeConfig(BLOCK_K=8, most_columns=1024),
}
"""By (lowest arch, largest width). Not measured yet: chosen from registers (2026-11)."""
TRIALS = (
    DecodeConfig(BLOCK_K=4, most_columns=1024),
    DecodeConfig(BLOCK_K=8, most_columns=2048),
    DecodeConfig(BLOCK_K=16, most_columns=512),
)
"""What FASTSAE_AUTOTUNE=1 tries beside the table's."""


def slice_width(width: int, most: int, least: int = 1) -> int:
    """Of ``most``, its half and its quarter, the one that cuts ``width`` with the fewest idle columns.

    None below ``least``, except where that is more than the whole of ``width`` needs.
    """
    choices = [w for w in (most, most // 2, most // 4) if w >= least] or [least]
    best = min(choices, key=lambda w: (-width % w, -w))
    return min(best, triton.next_power_of_2(max(width, 1)))


@triton.jit
def decode_kernel(
    val_ptr, idx_ptr, off_ptr, w_ptr, b_ptr, target_ptr, out_ptr, squares_ptr, D,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [N, D], squares [N, slices]: the slice's share of the squared length. b and target may be None."""
    pid_n, pid_d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    start, end = tl.load(off_ptr + pid_n), tl.load(off_ptr + pid_n + 1)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(start, end, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask_k = offs_k < end
        idx = tl.load(idx_ptr + offs_k, mask=mask_k, other=0).to(tl.int64)
        val = tl.load(val_ptr + offs_k, mask=mask_k, other=0).to(tl.float32)
        rows = tl.load(
            w_ptr + idx[:, None] * D + offs_d[None, :], mask=mask_k[:, None] & mask_d[None, :], other=0
        )  # [BLOCK_K, BLOCK_D]
        acc += tl.sum(val[:, None] * rows.to(tl.float32), axis=0)
    if b_ptr is not None:
        acc += tl.load(b_ptr + offs_d, mask=mask_d, other=0).to(tl.float32)
    if target_ptr is not None:
        acc -= tl.load(target_ptr + pid_n * D + offs_d, mask=mask_d, other=0).to(tl.float32)
        squares = tl.sum(tl.where(mask_d, acc * acc, 0), axis=0)
        tl.store(squares_ptr + pid_n * tl.num_programs(1) + pid_d, squares)
    tl.store(out_ptr + pid_n * D + offs_d, acc.to(out_ptr.dtype.element_ty), mask=mask_d)
