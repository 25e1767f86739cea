"""row_step: both matrices' backward with the optimizer in it, one latent at a time; no gradient is kept.

For a latent m with rows w of W_dec and u of W_enc, and its entries j (token n, value val, and g = scale[n]
times error[n]):

    decoder:   d_val = <g, w> + l1 ||w|| [n < N];   d_pre[j] = d_val where val > 0, else 0
               db = sum_j d_pre[j];   Adam on w with sum_j val g + l1 (sum_j val [n < N]) w / ||w||
    encoder:   pull += db u;   Adam on u with sum_j d_pre[j] x[n mod N]

The gradient is a sum in registers, and a row is loaded once, for the products and for its update
(adam_rows); of split32 the remainder follows when the products are through, and the decoder's halves come
a second time, from a cache, rather than be kept in two layouts. Two kernels, because a latent's two rows
share nothing but d_pre, 4 bytes an entry. The decoder's products and norms need its whole row, so one
program owns that: 16 elements a lane, which at D = 4096 lets two programs share an SM, one loading while the
other reduces. The encoder's needs no sum over D: one program owns slices of rows pid, pid + programs, ...,
and their share of pull, summed in that order; whole rows, in the decoder's tiles, where a row has one second
moment. In one kernel the two need over 190 registers.

Bytes: P * D elements of error and as many of x, in part from the L2, and 24 an element of each active row
(fp32 weights and moments; 12 as split32 and int8, 8 as bf16 and int8): at P = 524,288, D = 4096 and 131k
latents 8.6 GB of tokens in half precision and 26 GB of rows. 6 FLOPs an element of a token, some 30 of a
row: bandwidth decides. BLOCK_J tokens are asked for at once, and the next ones' names before the products
are reduced. Runs longer than a chunk are summed in pieces (see row_grads).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from fastsae.kernels.row_grads import piece, pieces_of, run_sum
from fastsae.kernels.row_update import adam_rows

__all__ = [
    "DECODER",
    "ENCODER",
    "DecoderStepConfig",
    "EncoderStepConfig",
    "decoder_step_kernel",
    "encoder_step_kernel",
]


@dataclass(frozen=True)
class DecoderStepConfig:
    """BLOCK_J tokens of two bytes an element at a time, half as many of four."""

    BLOCK_J: int
    num_warps: int


@dataclass(frozen=True)
class EncoderStepConfig:
    """BLOCK_J tokens at a time; columns a slice, at most; columns a warp; programs a slice, at most."""

    BLOCK_J: int
    most_columns: int
    warp_columns: int = 256
    programs: int = 2048


DECODER = {
    (80, 512): DecoderStepConfig(BLOCK_J=2, num_warps=1),
    (80, 1024): DecoderStepConfig(BLOCK_J=2, num_warps=2),
    (80, 2048): DecoderStepConfig(BLOCK_J=2, num_warps=4),
    (80, 4096): DecoderStepConfig(BLOCK_J=2, num_warps=8),
    (80, 8192): DecoderStepConfig(BLOCK_J=2, num_warps=16),
    (80, 16384): DecoderStepConfig(BLOCK_J=2, num_warps=32),
}
"""By (lowest arch, largest width). Not measured yet: chosen from registers (2026-11). Above 8192 columns a
lane has 64 registers and spills 100 to 220 bytes."""
ENCODER = {
    (80, 1024): EncoderStepConfig(BLOCK_J=4, most_columns=512),
    (80, 16384): EncoderStepConfig(BLOCK_J=4, most_columns=1024),
}
"""By (lowest arch, largest width). Not measured yet: chosen from registers (2026-11). Programs: several times
what the GPU holds at once, so that the hardware evens out unequal runs; few enough rows of pull to add up.
"""


@triton.jit
def _walk(
    w, first, last, entries, D, N, charge, DEC: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Of the entries first <= j < last: acc [1, BLOCK_D] = sum val g, db, and the sum of val [n < N].

    w: [1, BLOCK_D] fp32. entries: tokens, values, scale, error, d_pre (written). charge: l1 ||w||.
    """
    tokens_ptr, val_ptr, scale_ptr, error_ptr, d_pre_ptr = entries
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((1, BLOCK_D), tl.float32)
    db, total = 0.0, 0.0
    offs_j = first + tl.arange(0, BLOCK_J)
    n = tl.load(tokens_ptr + offs_j, mask=offs_j < last, other=0)
    val = tl.load(val_ptr + offs_j, mask=offs_j < last, other=0)
    for _ in range(first, last, BLOCK_J):
        here = offs_j < last
        mask = here[:, None] & (offs_d < D)[None, :]
        error = tl.load(error_ptr + n[:, None] * D + offs_d[None, :], mask=mask, other=0)  # [BLOCK_J, D]
        scale = tl.load(scale_ptr + n, mask=here, other=0)
        f, charged, places = val.to(tl.float32), n < N, offs_j
        offs_j += BLOCK_J  # the next names while the rows are under way
        n = tl.load(tokens_ptr + offs_j, mask=offs_j < last, other=0)
        val = tl.load(val_ptr + offs_j, mask=offs_j < last, other=0)
        error = error.to(tl.float32)
        d_val = scale * tl.sum(error * w, axis=1) + tl.where(charged, charge, 0)  # [BLOCK_J]
        d_pre = tl.where(f > 0, d_val, 0)
        tl.store(d_pre_ptr + places, d_pre, mask=here)
        if DEC:
            acc += tl.sum((f * scale)[:, None] * error, axis=0, keep_dims=True)
        db += tl.sum(d_pre, axis=0)
        total += tl.sum(tl.where(charged, f, 0), axis=0)
    return acc, db, total


@triton.jit(do_not_specialize=["seed"])
def decoder_step_kernel(
    w_ptr, rows_ptr, starts_ptr, owner_ptr, split_ptr, entries, parts_ptr, sums_ptr, db_ptr, state, hyper,
    seed, R, M, D, N, l1, DEC: tl.constexpr, PIECES: tl.constexpr, UNIT_NORM: tl.constexpr,
    PER_ROW: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row pid of the R that rows_ptr names (below M; None: all), into w, its ``state`` and db [M].

    With PIECES instead slot pid of parts [slots, D] and sums [slots, 2]. state is row_update's; without DEC
    w stays, and there are no parts.
    """
    pid, split = tl.program_id(0).to(tl.int64), tl.load(split_ptr)
    if PIECES:
        r, first, last = piece(pid, owner_ptr, starts_ptr, R, split)
        if first == last:
            return
        slot, stop = pid, pid
    else:
        r = pid
        first, last = tl.load(starts_ptr + r), tl.load(starts_ptr + r + 1)
        slot, stop = pieces_of(first, last, split)
    active = first < last
    row = r
    if rows_ptr is not None:
        row = tl.load(rows_ptr + r)
        if row >= M:
            return
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    w = tl.load(w_ptr + row * D + offs_d, mask=mask_d, other=0).to(tl.float32)[None, :]
    length = tl.sqrt(tl.sum(w * w))
    if slot < stop:
        last = first
    acc, db, total = _walk(w, first, last, entries, D, N, l1 * length, DEC, BLOCK_J, BLOCK_D)
    if PIECES:
        if DEC:
            tl.store(parts_ptr + pid * D + offs_d[None, :], acc, mask=mask_d[None, :])
        tl.store(sums_ptr + pid * 2, db)
        tl.store(sums_ptr + pid * 2 + 1, total)
    else:
        while slot < stop:
            if DEC:
                acc += tl.load(parts_ptr + slot * D + offs_d, mask=mask_d, other=0)[None, :]
            db += tl.load(sums_ptr + slot * 2)
            total += tl.load(sums_ptr + slot * 2 + 1)
            slot += 2 - slot % 2
        tl.store(db_ptr + row, db, mask=active)
        if DEC:
            if w_ptr.dtype.element_ty != tl.float32:
                # again, from a cache: kept, it would stay in registers in two layouts
                w = tl.load(w_ptr + row * D + offs_d, mask=mask_d, other=0).to(tl.float32)[None, :]
            acc += w * (l1 * total / tl.maximum(length, 1e-12))
            rows = row + tl.zeros((1,), tl.int64)
            adam_rows(w, acc, w_ptr, rows, 0, rows == row, D, state, hyper, seed, 0, True, UNIT_NORM, PER_ROW)


@triton.jit(do_not_specialize=["seed"])
def encoder_step_kernel(
    w_ptr, rows_ptr, starts_ptr, split_ptr, tokens_ptr, d_pre_ptr, x_ptr, parts_ptr, db_ptr, pull_ptr, state,
    hyper, seed, R, M, D, ENC: tl.constexpr, PER_ROW: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A slice of rows pid, pid + programs, ... of the R that rows_ptr names (below M; None: all); pull[pid].

    state is row_update's; without ENC w stays. parts: row_grads' of d_pre and x.
    """
    start_d = tl.program_id(1) * BLOCK_D
    offs_d = start_d + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    pull = tl.zeros((BLOCK_D,), tl.float32)
    for r in range(tl.program_id(0).to(tl.int64), R, tl.num_programs(0)):
        row = r if rows_ptr is None else tl.load(rows_ptr + r)
        if row < M:
            w = tl.load(w_ptr + row * D + offs_d, mask=mask_d, other=0).to(tl.float32)
            if ENC:
                start, end = tl.load(starts_ptr + r), tl.load(starts_ptr + r + 1)
                split = tl.load(split_ptr)  # here, for want of a register
                g = run_sum(d_pre_ptr, x_ptr, tokens_ptr, parts_ptr, start, end, D, split, offs_d, BLOCK_J)
                if PER_ROW:  # again, as the decoder's
                    w = tl.load(w_ptr + row * D + offs_d, mask=mask_d, other=0).to(tl.float32)
            pull += tl.load(db_ptr + row) * w
            if ENC:
                rows = row + tl.zeros((1,), tl.int64)
                adam_rows(
                    w[None, :], g[None, :], w_ptr, rows, start_d, rows == row, D, state, hyper, seed, 0,
                    True, False, PER_ROW,
                )  # fmt: skip
    tl.store(pull_ptr + tl.program_id(0) * D + offs_d, pull, mask=mask_d)
