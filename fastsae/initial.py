"""Where training starts: initial weights, and the point that most data lie about."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsae.config import SAEConfig

__all__ = ["INITIAL_ROWS", "geometric_median", "initial_rows"]

INITIAL_ROWS = 1024
"""Rows whose initial weights come from one generator."""


def initial_rows(
    config: SAEConfig, lo: int, hi: int, seed: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Rows lo..hi of the initial W_enc and W_dec, fp32: the same for a seed, however they are asked for.

    (On a CPU and on a GPU they differ, as torch's generators do.) See :class:`SAE` for what they are.
    """
    generator, blocks = torch.Generator(device), []
    for block in range(lo // INITIAL_ROWS, -(-hi // INITIAL_ROWS)):
        generator.manual_seed((seed + block * 0x9E3779B97F4A7C15) % 2**63)
        sizes = (config.d_in,) if config.d_in == config.d_out else (config.d_in, config.d_out)
        drawn = (torch.randn(INITIAL_ROWS, d, generator=generator, device=device) for d in sizes)
        unit = [nn.functional.normalize(rows, dim=1) for rows in drawn]
        first = block * INITIAL_ROWS
        blocks.append([rows[max(lo - first, 0) : hi - first] for rows in unit])
    enc, *rest = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    length = 1.0 if config.unit_norm_decoder else 0.1
    dec = rest[0] if rest else enc
    return (
        enc * length,
        dec * length if config.unit_norm_decoder or not config.transcoder else torch.zeros_like(dec),
    )


def geometric_median(x: Tensor, iterations: int = 30) -> Tensor:
    """The point with the least sum of distances to the rows of x [n, D], by Weiszfeld's iteration."""
    median = x.mean(0)
    for _ in range(iterations):
        weight = 1 / (x - median).norm(dim=1).clamp_min(1e-6)
        median = (weight[:, None] * x).sum(0) / weight.sum()
    return median
