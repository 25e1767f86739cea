"""code_grad: the decoder's gradient of each stored entry.

    grad_val[j] = <dy[n], W_dec[idx[j]]>    for each entry j of token n

One program owns one token: its entries are taken BLOCK_K at a time, the columns BLOCK_D. W_dec is read once
an entry (N * K * D elements, 2 FLOPs each: bandwidth decides), dy[n] once a tile, from the L1 after the
first. A row's slice lies within one warp, its products are summed lane by lane and the lanes only when the
row is through: a fixed order, five shuffles a row, and no barrier.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

__all__ = ["CONFIGS", "TRIALS", "CodeGradConfig", "code_grad_kernel"]


@dataclass(frozen=True)
class CodeGradConfig:
    """BLOCK_K entries by BLOCK_D columns at a time."""

    BLOCK_K: int
    BLOCK_D: int
    num_warps: int


CONFIGS = {(80, 16384): CodeGradConfig(BLOCK_K=16, BLOCK_D=256, num_warps=4)}
"""By (lowest arch, largest width). Not measured yet: four rows of 512 bytes in flight per warp (2026-11)."""
TRIALS = (
    CodeGradConfig(BLOCK_K=8, BLOCK_D=512, num_warps=4),
    CodeGradConfig(BLOCK_K=16, BLOCK_D=512, num_warps=8),
)
"""What FASTSAE_AUTOTUNE=1 tries beside the table's."""


@triton.jit
def code_grad_kernel(
    dy_ptr, w_ptr, idx_ptr, off_ptr, out_ptr, D, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    pid_n = tl.program_id(0).to(tl.int64)
    start, end = tl.load(off_ptr + pid_n), tl.load(off_ptr + pid_n + 1)
    for first in range(start, end, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask_k = offs_k < end
        idx = tl.load(idx_ptr + offs_k, mask=mask_k, other=0).to(tl.int64)
        acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D
            dy = tl.load(dy_ptr + pid_n * D + offs_d, mask=mask_d, other=0).to(tl.float32)
            rows = tl.load(
                w_ptr + idx[:, None] * D + offs_d[None, :], mask=mask_k[:, None] & mask_d[None, :], other=0
            )  # [BLOCK_K, BLOCK_D]
            acc += rows.to(tl.float32) * dy[None, :]
        tl.store(out_ptr + offs_k, tl.sum(acc, axis=1).to(out_ptr.dtype.element_ty), mask=mask_k)
