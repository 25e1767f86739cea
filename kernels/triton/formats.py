"""Weights and optimizer states in fewer bytes than fp32: :mod:`fastsae.formats` in registers, bit for bit.

    split32   (plane << 16) + remainder             bf16   (bits of x + 16 random ones) >> 16
    int8      code = (|bits of x| >> 20, rounded) - 8 (scale - top), a scale for 256 columns of a row

A row is read, joined or unpacked, updated, rounded and written by the program that owns it, in one pass: a
split32 weight is 4 bytes each way, an int8 moment 1 and a 256th. All of it is integer arithmetic in 32 bits,
per element two ``mix`` (14 instructions) for what is rounded stochastically, some 10 to unpack and round a
code, and one maximum over the block: less than Adam's root and division, under loads that fewer bytes have
made shorter. What a format doesn't need isn't compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "BLOCK",
    "high_half",
    "join",
    "low_half",
    "more_bits",
    "random_bits",
    "read_moment",
    "write_moment",
    "write_weight",
]

BLOCK = tl.constexpr(256)
"""Columns of a row that share a scale."""
TOP_SIGNED, TOP_UNSIGNED = tl.constexpr(15), tl.constexpr(31)
"""The exponents that codes have."""


@triton.jit
def _mix(h):
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def random_bits(seed, step, numbers, columns):
    """32 random bits, uint32 [R, D]: the low half is the weight's, the high one exp_avg's.

    seed, step: int32. numbers: [R]. columns: [D].
    """
    start = _mix(seed.to(tl.uint32, bitcast=True)) ^ step.to(tl.uint32, bitcast=True)
    key = _mix(_mix(start) ^ numbers.to(tl.uint32))
    return _mix(key[:, None] ^ (columns.to(tl.uint32) * 0x9E3779B9)[None, :])


@triton.jit
def more_bits(random):
    """As many bits made of :func:`random_bits`'s; the low half is exp_avg_sq's."""
    return _mix(random + 0x9E3779B9)


@triton.jit
def low_half(random):
    return (random & 0xFFFF).to(tl.int32, bitcast=True)


@triton.jit
def high_half(random):
    return (random >> 16).to(tl.int32, bitcast=True)


@triton.jit
def _to_bfloat16(x, bits):
    return ((x.to(tl.int32, bitcast=True) + bits) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def join(plane, remainder):
    """The fp32 weight of a bf16 plane, here in fp32, and its int16 remainder."""
    return (plane.to(tl.int32, bitcast=True) + remainder.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def write_weight(w_ptr, remainder_ptr, places, w, bits, mask):
    """fp32 w as a plane and a remainder, where there is one; bf16 by ``bits``; else rounded to nearest."""
    if remainder_ptr is not None:
        whole = w.to(tl.int32, bitcast=True)
        plane = ((whole + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        tl.store(w_ptr + places, plane, mask=mask)
        tl.store(remainder_ptr + places, whole.to(tl.int16), mask=mask)
    elif w_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(w_ptr + places, _to_bfloat16(w, bits), mask=mask)
    else:
        tl.store(w_ptr + places, w.to(w_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _spread(scale, W: tl.constexpr, B: tl.constexpr):
    """Each block's scale [R, W / B] at each of its columns, [R, W]."""
    R: tl.constexpr = scale.shape[0]
    return tl.reshape(tl.broadcast_to(scale[:, :, None], [R, W // B, B]), [R, W])


@triton.jit
def read_moment(ptr, scale_ptr, rows, start, mask_r, D, W: tl.constexpr, SIGNED: tl.constexpr):
    """Columns ``start``.. of a moment's rows in any format, fp32 [R, W]; 0 beyond the row."""
    columns = start + tl.arange(0, W)
    mask = mask_r[:, None] & (columns < D)[None, :]
    stored = tl.load(ptr + rows[:, None] * D + columns[None, :], mask=mask, other=0)
    if scale_ptr is None:
        x = stored.to(tl.float32)
    else:
        B: tl.constexpr = BLOCK if W > BLOCK else W
        block = start // BLOCK + tl.arange(0, W // B)
        places = rows[:, None] * tl.cdiv(D, BLOCK) + block[None, :]
        scale = tl.load(scale_ptr + places, mask=mask_r[:, None] & (block * BLOCK < D)[None, :], other=0)
        shift = 8 * (scale.to(tl.int32) - (TOP_SIGNED if SIGNED else TOP_UNSIGNED))
        code = stored.to(tl.int32)
        size = (code & 0x7F) if SIGNED else code
        bits = tl.where(size > 0, (size + _spread(shift, W, B)) << 20, 0)
        if SIGNED:
            bits |= (code & 0x80) << 24
        x = bits.to(tl.float32, bitcast=True)
    return x


@triton.jit
def write_moment(ptr, scale_ptr, x, bits, rows, start, mask_r, D, SIGNED: tl.constexpr):
    """Columns ``start``.. of a moment's rows, from fp32 x [R, W]; codes with the scales of their blocks.

    W and, unless W spans the row, start are multiples of BLOCK where there are scales. x is 0 beyond the row.
    """
    R: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    columns = start + tl.arange(0, W)
    places, mask = rows[:, None] * D + columns[None, :], mask_r[:, None] & (columns < D)[None, :]
    if scale_ptr is not None:
        B: tl.constexpr = BLOCK if W > BLOCK else W
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        highest = tl.max(tl.reshape(magnitude, [R, W // B, B]), axis=2)  # [R, blocks]
        scale = tl.where(highest > 0, (highest >> 23) + 1, 0)
        shift = 8 * (scale - (TOP_SIGNED if SIGNED else TOP_UNSIGNED))
        code = ((magnitude + (bits << 4)) >> 20) - _spread(shift, W, B)
        if SIGNED:
            code = tl.maximum(code, 0) | tl.where(x < 0, 0x80, 0)
        else:
            code = tl.where(magnitude > 0, tl.maximum(code, 1), 0)
        tl.store(ptr + places, code.to(tl.uint8), mask=mask)
        block = start // BLOCK + tl.arange(0, W // B)
        places = rows[:, None] * tl.cdiv(D, BLOCK) + block[None, :]
        within = mask_r[:, None] & (block * BLOCK < D)[None, :]
        tl.store(scale_ptr + places, scale.to(tl.uint8), mask=within)
    elif ptr.dtype.element_ty == tl.bfloat16:
        tl.store(ptr + places, _to_bfloat16(x, bits), mask=mask)
    else:
        tl.store(ptr + places, x, mask=mask)
