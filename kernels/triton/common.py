"""What every kernel file shares: choosing a launch config, and floats in an order that integers have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import triton
import triton.language as tl

__all__ = ["LOWEST", "choose", "float_of", "key_of", "kth_largest"]

LOWEST = tl.constexpr(-(2**31))
"""Below the key of every score."""

Config = TypeVar("Config")


def choose(table: Mapping[tuple[int, int], Config], arch: int, width: int) -> Config:
    """The config for ``width`` on ``arch`` (80, 90, ...) of a table keyed by (lowest arch, largest width).

    The highest arch that isn't above wins, then the smallest width that isn't below; a wider problem takes
    the widest entry.
    """
    generation = max((a for a, _ in table if a <= arch), default=min(a for a, _ in table))
    widths = sorted(w for a, w in table if a == generation)
    return table[generation, next((w for w in widths if w >= width), widths[-1])]


@triton.jit
def key_of(score):
    """int32 keys of fp32 scores in the same order; NaN ranks as +Inf."""
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(score != score, 0x7F800000, bits)
    return tl.where(score == 0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))  # -0 equals 0


@triton.jit
def float_of(key):
    """The fp32 number that :func:`key_of` maps to ``key``; one below the key of -Inf is a NaN."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def kth_largest(keys, K):
    """The K-th largest of the int32 ``keys`` [L], bit by bit; LOWEST where there are fewer above it."""
    kth = tl.where(tl.sum((keys >= 0).to(tl.int32), 0) >= K, 0, LOWEST)
    for bit in range(31):
        trial = kth | (1 << (30 - bit))
        kth = tl.where(tl.sum((keys >= trial).to(tl.int32), 0) >= K, trial, kth)
    return kth
