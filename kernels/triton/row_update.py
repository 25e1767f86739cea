"""row_update: Adam on rows, and all of a row's arithmetic, which row_step shares.

    coast:   w -= owed m / (sqrt v + floor);  m *= beta1^missed;  v *= beta2^missed
    step:    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;  w -= size m / (sqrt v + eps')

One program owns BLOCK_R rows (one, unless they are short), whole, in registers: every norm and product is
then a sum within the program, and weight and moments are read and written once, for about 20 FLOPs an
element: bandwidth decides. They are 24 bytes an element in fp32, 12 in split32 with int8 moments, 6 in bf16
with int8_row (see formats.py), and 4 more for the gradient. A lane holds 16 elements of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from fastsae.kernels.formats import (
    high_half,
    join,
    low_half,
    more_bits,
    random_bits,
    read_moment,
    write_moment,
    write_weight,
)

__all__ = ["CONFIGS", "WIDEST", "RowUpdateConfig", "adam_rows", "row_update_kernel"]

WIDEST = 16384
"""The longest row that one program holds."""


@dataclass(frozen=True)
class RowUpdateConfig:
    """Elements that a program holds of each tensor, at least; the row itself if it is longer."""

    elements: int
    num_warps: int


CONFIGS = {
    (80, 64): RowUpdateConfig(elements=512, num_warps=4),
    (80, 1024): RowUpdateConfig(elements=1024, num_warps=2),
    (80, 2048): RowUpdateConfig(elements=2048, num_warps=4),
    (80, 4096): RowUpdateConfig(elements=4096, num_warps=8),
    (80, 8192): RowUpdateConfig(elements=8192, num_warps=16),
    (80, 16384): RowUpdateConfig(elements=16384, num_warps=32),
}
"""By (lowest arch, largest width). Not measured yet: 16 elements a lane (2026-11). No spills up to
8192 columns; above, a lane has 64 registers and spills 120 to 240 bytes."""


@triton.jit
def _one_minus_power(log2_beta, n):
    """1 - beta^n in fp32, without cancellation where beta^n is near 1: there the series of expm1."""
    z = n * log2_beta * 0.6931471805599453
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6))))
    return tl.where(z > -0.3, -z * series, 1 - tl.exp2(n * log2_beta))


@triton.jit
def _coast(w, m, v, last, until, coast_ptr, eps, log2_beta1, log2_beta2, mask_r):
    """The steps after ``last`` [R] up to ``until``, at which the rows' gradient was 0."""
    missed = tl.maximum(until - last, 0)
    owed = tl.load(coast_ptr + last, mask=mask_r, other=0).to(tl.float32)
    owed = tl.where(missed > 0, owed, 0)
    floor = eps * tl.sqrt(_one_minus_power(log2_beta2, last.to(tl.float32)))
    floor = tl.where(last == 0, 1, floor)  # never touched: m = v = 0, so any divisor but 0 will do
    w -= owed[:, None] * m / (tl.sqrt(v) + floor[:, None])
    decay1, decay2 = tl.exp2(missed * log2_beta1), tl.exp2(missed * log2_beta2)
    return w, m * decay1[:, None], v * decay2[:, None]


@triton.jit
def adam_rows(
    w, g, w_ptr, rows, start, mask_r, D, state, hyper, seed, first,
    HAS_GRAD: tl.constexpr, UNIT_NORM: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """Update columns ``start``.. of the rows [R] int64 of w_ptr where ``mask_r`` [R].

    w, g: [R, W] fp32, as loaded from w_ptr (of split32 the plane) and the gradient; 0 beyond the row. W
    covers the row where UNIT_NORM or PER_ROW needs sums over it.
    state: remainder*, exp_avg, exp_avg_sq ([M, 1] with PER_ROW), last_step, the scales of both*, a copy of
    last_step to read where several programs share a row*, coast*, clock; * may be None.
    hyper: beta1, 1 - beta1, log2 beta1, beta2, 1 - beta2, log2 beta2, eps.
    seed, first: int32, of the random numbers, in which row i goes by first + i.
    """
    rest_ptr, m_ptr, v_ptr, last_ptr, m_scale_ptr, v_scale_ptr, before_ptr, coast_ptr, clock_ptr = state
    beta1, rest1, log2_beta1, beta2, rest2, log2_beta2, eps = hyper
    columns = start + tl.arange(0, w.shape[1])
    step = tl.load(clock_ptr).to(tl.int32)
    mask_r = tl.where(tl.load(clock_ptr + 3) != 0, mask_r, False)
    mask = mask_r[:, None] & (columns < D)[None, :]  # [R, W]
    places = rows[:, None] * D + columns[None, :]
    if rest_ptr is not None:
        w = join(w, tl.load(rest_ptr + places, mask=mask, other=0))
    m = read_moment(m_ptr, m_scale_ptr, rows, start, mask_r, D, w.shape[1], True)
    if PER_ROW:
        v = tl.load(v_ptr + rows, mask=mask_r, other=0)[:, None]
    else:
        v = read_moment(v_ptr, v_scale_ptr, rows, start, mask_r, D, w.shape[1], False)
    if coast_ptr is not None:
        last = tl.load((last_ptr if before_ptr is None else before_ptr) + rows, mask=mask_r, other=0)
        until = step - (1 if HAS_GRAD else 0)
        w, m, v = _coast(w, m, v, last, until, coast_ptr, eps, log2_beta1, log2_beta2, mask_r)
    if HAS_GRAD:
        if UNIT_NORM:
            inverse = 1 / tl.maximum(tl.sqrt(tl.sum(w * w, axis=1)), 1e-12)
            along = tl.sum(g * w, axis=1) * inverse * inverse
            g -= along[:, None] * w
        m = beta1 * m + rest1 * g
        if PER_ROW:
            v = beta2 * v + rest2 * (tl.sum(g * g, axis=1) / D)[:, None]
        else:
            v = beta2 * v + rest2 * g * g
        size, floor = tl.load(clock_ptr + 1).to(tl.float32), tl.load(clock_ptr + 2).to(tl.float32)
        w -= size * m / (tl.sqrt(v) + floor)
    if UNIT_NORM:
        length = tl.maximum(tl.sqrt(tl.sum(w * w, axis=1)), 1e-12)
        w /= length[:, None]
    tl.debug_barrier()  # all warps have read last_step, and the row, before any of them writes
    random_m: tl.constexpr = m_ptr.dtype.element_ty != tl.float32
    random_v: tl.constexpr = v_ptr.dtype.element_ty != tl.float32
    random_w: tl.constexpr = w_ptr.dtype.element_ty == tl.bfloat16 and rest_ptr is None
    random, bits = rows, rows  # unused where nothing is rounded at random
    if random_w or random_m or random_v:
        random = random_bits(seed, step, rows + first, columns)
    # one after the other, each with its bits, to let go of its registers
    if random_w:
        bits = low_half(random)
    write_weight(w_ptr, rest_ptr, places, w, bits, mask)
    if random_m:
        bits = high_half(random)
    write_moment(m_ptr, m_scale_ptr, m, bits, rows, start, mask_r, D, True)
    if PER_ROW:
        tl.store(v_ptr + rows[:, None], v, mask=mask_r[:, None])
    else:
        if random_v:
            bits = low_half(more_bits(random))
        write_moment(v_ptr, v_scale_ptr, v, bits, rows, start, mask_r, D, False)
    tl.store(last_ptr + rows, tl.zeros_like(rows).to(tl.int32) + step, mask=mask_r)


@triton.jit(do_not_specialize=["seed", "first"])
def row_update_kernel(
    w_ptr, rows_ptr, grad_ptr, state, hyper, seed, first, R, M, D,
    UNIT_NORM: tl.constexpr, PER_ROW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """R rows, those that rows_ptr names or, without it, all in order; grad [R, D] or None."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    rows, mask_r = offs_r, offs_r < R
    if rows_ptr is not None:
        rows = tl.load(rows_ptr + offs_r, mask=mask_r, other=0)
        mask_r &= rows < M
    mask = mask_r[:, None] & (offs_d < D)[None, :]  # [BLOCK_R, BLOCK_D]
    w = tl.load(w_ptr + rows[:, None] * D + offs_d[None, :], mask=mask, other=0).to(tl.float32)
    g = w  # unused without a gradient
    if grad_ptr is not None:
        g = tl.load(grad_ptr + offs_r[:, None] * D + offs_d[None, :], mask=mask, other=0).to(tl.float32)
    adam_rows(
        w, g, w_ptr, rows, 0, mask_r, D, state, hyper, seed, first, grad_ptr is not None, UNIT_NORM, PER_ROW
    )
