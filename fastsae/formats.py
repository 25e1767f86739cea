"""How weights and optimizer states are held in fewer bytes than fp32, in bit arithmetic that every backend
repeats exactly.

    split32     an fp32 weight as the bf16 number nearest to it and the int16 that is missing: exact
    bfloat16    rounded stochastically, so that a small update is lost on no average
    int8        an optimizer state as 8-bit floats with three bits of mantissa, whose exponents count from
                the largest in a block of 256 columns: 1 + 4 + 3 bits for exp_avg, 5 + 3 for exp_avg_sq
    int8_row    exp_avg as int8; one fp32 second moment for the whole row, of its mean squared gradient

A state's code must have the same steps everywhere: on a linear scale that follows the block's maximum, each
write would move all others to a new grid, and nothing below 1/255 of the maximum would be told from 0, by
whose root Adam divides. Running averages move by less than a step at a time, so they are rounded
stochastically too, or they would stand still.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.ops import upcast

__all__ = [
    "BLOCK",
    "STATE_DTYPES",
    "WEIGHT_FORMATS",
    "join",
    "new_state",
    "pack",
    "random_bits",
    "read_rows",
    "split",
    "unpack",
    "write_rows",
]

WEIGHT_FORMATS = ("float32", "split32", "bfloat16")
STATE_DTYPES = ("float32", "bfloat16", "int8", "int8_row")
BLOCK = 256
"""Columns of a row that share a scale; the last block of a row may be shorter."""


def split(w: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 as a bf16 plane, rounded to nearest (ties away from 0), and the int16 remainder of its bits."""
    bits = w.view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join(plane: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 number that :func:`split` took apart, bit for bit."""
    return ((plane.view(torch.int16).to(torch.int32) << 16) + remainder).view(torch.float32)


def random_bits(seed: int, step: int, rows: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """16 random bits each for weight, exp_avg and exp_avg_sq of the given rows [R]: int32 [R, width].

    A function of (seed, step, row, column) alone, so it needs no state and any part can be repeated:

        key = mix(mix(mix(seed) ^ step) ^ row);   first = mix(key ^ (column * 0x9E3779B9))
        second = mix(first + 0x9E3779B9);         bits: low half of first, its high half, low half of second

    ``mix`` is Wellons' "lowbias32" (github.com/skeeto/hash-prospector, public domain).
    """
    start = _mix(torch.tensor([_int32(seed)], dtype=torch.int32, device=rows.device))
    key = _mix(_mix(start ^ _int32(step)) ^ rows.to(torch.int32))
    columns = torch.arange(width, dtype=torch.int32, device=rows.device) * _GOLDEN
    first = _mix(key[:, None] ^ columns)
    second = _mix(first + _GOLDEN)
    return first & 0xFFFF, (first >> 16) & 0xFFFF, second & 0xFFFF


def _int32(n: int) -> int:
    """``n`` modulo 2^32, as the signed number of those bits."""
    return (n + 2**31) % 2**32 - 2**31


_GOLDEN = _int32(0x9E3779B9)


def _mix(h: Tensor) -> Tensor:
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    h = (h ^ ((h >> 15) & 0x1FFFF)) * _int32(0x846CA68B)
    return h ^ ((h >> 16) & 0xFFFF)


def _to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 rounded to one of its two bf16 neighbours, up with the probability of the part that is cut."""
    return ((x.view(torch.int32) + bits) >> 16).to(torch.int16).view(torch.bfloat16)


def pack(x: Tensor, bits: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """uint8 codes [R, D] of fp32 rows, and the scale of each block, uint8 [R, blocks].

        scale = exponent of the block's largest + 1, as fp32 has it (with room to round up); 0 where all are 0
        code  = (|bits of x| >> 20) - 8 (scale - top),   top = 15 if signed, else 31

    after 16 random ``bits`` were added below the three that remain of the mantissa. 0 stays 0; a value too
    small for a code becomes 0 if signed, else, being one that Adam divides by, the smallest.
    """
    magnitude = x.view(torch.int32) & 0x7FFFFFFF
    blocks = torch.nn.functional.pad(magnitude, (0, -x.shape[1] % BLOCK)).view(len(x), -1, BLOCK)
    highest = blocks.amax(2)
    scale = torch.where(highest > 0, (highest >> 23) + 1, 0)
    code = ((magnitude + (bits << 4)) >> 20) - 8 * (_spread(scale, x.shape[1]) - _top(signed))
    if signed:
        code = code.clamp_min_(0) | ((x < 0).to(torch.int32) << 7)
    else:
        code = torch.where(magnitude > 0, code.clamp_min_(1), 0)
    return code.to(torch.uint8), scale.to(torch.uint8)


def unpack(codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """The fp32 numbers of :func:`pack`'s codes."""
    code = codes.to(torch.int32)
    size = code & 0x7F if signed else code
    bits = (size + 8 * (_spread(scale.to(torch.int32), codes.shape[1]) - _top(signed))) << 20
    x = torch.where(size > 0, bits, 0).view(torch.float32)
    return torch.where(code > 0x7F, -x, x) if signed else x


def _top(signed: bool) -> int:
    return 15 if signed else 31


def _spread(scale: Tensor, width: int) -> Tensor:
    """Each block's scale at each of its columns, [R, width]."""
    return scale.repeat_interleave(BLOCK, dim=1, output_size=scale.shape[1] * BLOCK)[:, :width]


def new_state(weight: Tensor, kind: str, on_host: bool = False) -> list[Tensor]:
    """What Adam keeps of ``weight`` [M, D], all 0, in one of STATE_DTYPES, in the order operators take it:

    exp_avg, exp_avg_sq ([M, 1] for int8_row), last_step [M] int32; and of codes the scales, of exp_avg first.
    Its memory is taken now, not page by page: what fits a run's first step fits its last. ``on_host``: all
    but last_step in pinned host memory, which a GPU's kernels read and write where it is.
    """
    (m, d), eight = weight.shape, kind.startswith("int8")
    wide = torch.float64 if weight.dtype == torch.float64 and kind == "float32" else torch.float32
    dtype = torch.uint8 if eight else torch.bfloat16 if kind == "bfloat16" else wide

    def zeros(width: int, dtype: torch.dtype) -> Tensor:
        pinned = on_host and weight.is_cuda
        device = "cpu" if on_host else weight.device
        return torch.empty(m, width, dtype=dtype, device=device, pin_memory=pinned).zero_()

    per_row = kind == "int8_row"
    second = zeros(1, torch.float32) if per_row else zeros(d, dtype)
    last_step = torch.zeros(m, dtype=torch.int32, device=weight.device)
    scales = [zeros(-(-d // BLOCK), torch.uint8) for _ in range((2 - per_row) * eight)]
    return [zeros(d, dtype), second, last_step, *scales]


def read_rows(
    weight: Tensor, remainder: Tensor | None, state: list[Tensor], rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, exp_avg and exp_avg_sq of the rows [R] (None: all), in fp32 or, of fp64, in fp64.

    Views where nothing is to be gathered or converted.
    """

    def take(t: Tensor) -> Tensor:
        picked = t if rows is None else t.index_select(0, rows.to(t.device))
        return picked.to(weight.device)

    exp_avg, exp_avg_sq, _, *scales = state
    w = upcast(take(weight)) if remainder is None else join(take(weight), take(remainder))
    m = unpack(take(exp_avg), take(scales[0]), signed=True) if scales else take(exp_avg).to(w.dtype)
    if len(scales) == 2:
        return w, m, unpack(take(exp_avg_sq), take(scales[1]), signed=False)
    return w, m, take(exp_avg_sq).to(w.dtype)


def write_rows(
    weight: Tensor,
    remainder: Tensor | None,
    state: list[Tensor],
    rows: Tensor | None,
    new: tuple[Tensor, Tensor, Tensor],
    step: int,
    seed: int,
    first: int = 0,
) -> None:
    """Store what :func:`read_rows` gave, changed: the inverse, with last_step = ``step``.

    bf16 and codes are rounded by :func:`random_bits`, in which row i goes by the number ``first`` + i.
    """
    (w, m, v), (exp_avg, exp_avg_sq, last_step, *scales) = new, state
    rounded = {exp_avg.dtype, exp_avg_sq.dtype} | ({weight.dtype} if remainder is None else set())
    for_w = for_m = for_v = w  # unused, unless
    if rounded & {torch.bfloat16, torch.uint8}:
        numbers = first + (torch.arange(len(w), device=w.device) if rows is None else rows)
        for_w, for_m, for_v = random_bits(seed, step, numbers, w.shape[1])
    if remainder is None:
        pairs = [(weight, _narrow(w, weight.dtype, for_w))]
    else:
        pairs = list(zip((weight, remainder), split(w), strict=True))
    if scales:
        pairs += zip((exp_avg, scales[0]), pack(m, for_m, signed=True), strict=True)
    else:
        pairs.append((exp_avg, _narrow(m, exp_avg.dtype, for_m)))
    if len(scales) == 2:
        pairs += zip((exp_avg_sq, scales[1]), pack(v, for_v, signed=False), strict=True)
    else:
        pairs.append((exp_avg_sq, _narrow(v, exp_avg_sq.dtype, for_v)))
    for tensor, its in pairs:
        if rows is not None:
            tensor.index_copy_(0, rows.to(tensor.device), its.to(tensor.device))
        elif its.data_ptr() != tensor.data_ptr():
            tensor.copy_(its)
    if rows is None:
        last_step.fill_(step)
    else:
        last_step[rows] = step


def _narrow(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    return _to_bfloat16(x.float(), bits) if dtype == torch.bfloat16 else x.to(dtype)
