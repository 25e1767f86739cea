"""Launcher of the fused encode by TopK: a threshold per row, one filtered GEMM, exact selection.

Nothing here waits for the device: every buffer has a fixed capacity, and which rows need the slow way is
decided where the scores are. See :mod:`fastsae.kernels.encode_fused` for the algorithm.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastsae.backends.triton.support import architecture, factors, launch, score
from fastsae.kernels import encode_fused as kernels
from fastsae.kernels.common import choose

__all__ = ["encode_topk_fused"]

STRIDE = 16  # one column in so many is sampled,
MAX_SAMPLE = 2**15  # or in a large dictionary about so many in all
SAMPLED = 2**26  # sampled scores held at once: 268 MB
LISTED = 2**23  # groups of scores for which there is room, 44 bytes each: 369 MB
BAND_N = 32  # tiles of tokens that run together
UNDERFULL = 1e-6  # how often a row of random scores has fewer than k candidates,
OVERFULL = 1e-8  # or more than its buffer holds


def encode_topk_fused(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``encode`` by the rule "topk" as :func:`fastsae.backends.reference.encode` defines it.

    Exact for the scores that its kernels produce, in fp32 of inputs in fp32, bf16 or fp16 (on a GPU those of
    x rounded to W_enc's dtype, where they differ). Holds a sample of
    the scores and a few hundred candidates a token, never [N, M].
    """
    values, indices, _ = _encode(x, W_enc, b_enc, k)
    offsets = torch.arange(x.shape[0] + 1, device=x.device) * min(k, W_enc.shape[0])
    return values, indices, offsets


def _encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """values [N * k], indices [N * k] and how many rows were rescued, [1] int32."""
    x, W_enc, b_enc = x.contiguous(), W_enc.contiguous(), None if b_enc is None else b_enc.contiguous()
    n, m, device = x.shape[0], W_enc.shape[0], x.device
    k = min(k, m)
    values = x.new_empty(n * k)
    x, W_enc = factors(x, W_enc)
    indices = torch.empty(n * k, dtype=torch.int32, device=device)
    n_rescued = torch.zeros(1, dtype=torch.int32, device=device)
    if n and k:
        plan = _plan(m, k)
        rows = max(LISTED // plan.capacity // 128 * 128, 128)
        for part in zip(x.split(rows), values.split(rows * k), indices.split(rows * k), strict=True):
            n_rescued += _encode_part(*part, W_enc, b_enc, k, plan)
    return values, indices, n_rescued


def _encode_part(
    x: Tensor, values: Tensor, indices: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, plan: Plan
) -> Tensor:
    """Write the code of x into ``values`` and ``indices``; returns [1] int32, how many rows were rescued."""
    (n, d), m, device = x.shape, W_enc.shape[0], x.device
    single = x.dtype == torch.float32
    tile = choose(kernels.FILTER_FP32 if single else kernels.FILTER, architecture(device), d)
    slow = choose(kernels.RESCUE, architecture(device), d)
    capacity, block_c = plan.capacity, triton.next_power_of_2(plan.capacity)
    warps = min(max(block_c // 256, 1), 16)
    bias = {"HAS_BIAS": b_enc is not None}
    precision: dict[str, Any] = {"PRECISION": "ieee" if single else "tf32"}  # of halves there is but one
    operands = (x, W_enc, W_enc if b_enc is None else b_enc)

    tau = _thresholds(x, W_enc, b_enc, plan)
    scores = torch.empty(n, capacity, kernels.GROUP.value, dtype=torch.float32, device=device)
    columns = torch.empty(n, capacity, dtype=torch.int32, device=device)
    buffer = torch.empty(n, capacity, dtype=torch.int64, device=device)
    counts = torch.zeros(n, dtype=torch.int32, device=device)
    n_rescued = torch.zeros(1, dtype=torch.int32, device=device)
    listed = torch.empty(n, dtype=torch.int32, device=device)
    launch(
        kernels.filter_scores, (triton.cdiv(n, tile.block_n) * triton.cdiv(m, tile.block_m),),
        *operands, tau, scores, columns, counts, n, d, m, capacity,
        **bias, **precision, EVEN_M=m % tile.block_m == 0, EVEN_D=d % tile.block_d == 0,
        BLOCK_N=tile.block_n, BLOCK_M=tile.block_m, BLOCK_D=tile.block_d, BAND_N=BAND_N,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    launch(
        kernels.settle, (n,), tau, scores, columns, buffer, counts, listed, n_rescued, m, capacity, k,
        BLOCK_G=64, num_warps=1,
    )  # fmt: skip
    slow_warps = max(slow.num_warps, warps)
    launch(
        kernels.rescue, (triton.cdiv(n, slow.block_n),), *operands, buffer, counts, listed, n_rescued,
        d, m, capacity, k, **bias, **precision, BLOCK_N=slow.block_n, BLOCK_M=kernels.RESCUE_M,
        BLOCK_D=slow.block_d, BLOCK_C=block_c, num_warps=slow_warps,
        maxnreg=min(200, 2**16 // (32 * slow_warps)),  # else the compiler spills to fit more blocks
    )  # fmt: skip
    block_k = triton.next_power_of_2(k)
    block_j = min(block_k, 512 * warps // block_k)  # 16 compares a thread at a time
    launch(
        kernels.finish, (n,), buffer, counts, values, indices, capacity, k,
        BLOCK_C=block_c, BLOCK_K=block_k, BLOCK_J=block_j, num_warps=warps,
    )  # fmt: skip
    return n_rescued


def _thresholds(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, plan: Plan) -> Tensor:
    """tau [N]: the place-th largest score of every stride-th column."""
    tau = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    sample = W_enc[:: plan.stride]
    size = sample.shape[0]
    bias = tau if b_enc is None else b_enc
    # as many lanes as make two of the best in one lane rare
    lanes = min(triton.next_power_of_2(size), max(1024, triton.next_power_of_2(8 * plan.place)))
    rows = max(SAMPLED // size, 1)
    for part, cut in zip(x.split(rows), tau.split(rows), strict=True):
        scores = torch.empty(len(part), size, dtype=torch.float32, device=x.device)
        score(part, sample, scores)
        launch(
            kernels.sample_cut, (part.shape[0],), scores, bias, cut, size, plan.stride,
            plan.place, HAS_BIAS=b_enc is not None, BLOCK_S=lanes, num_warps=min(max(lanes // 256, 1), 8),
        )  # fmt: skip
    return tau


class Plan(NamedTuple):
    """Sample every ``stride``-th column, cut at the ``place``-th best, keep up to ``capacity`` candidates."""

    stride: int
    place: int
    capacity: int


@lru_cache
def _plan(m: int, k: int) -> Plan:
    """The cheapest plan whose odds are as above for scores in random order.

    Candidates are the scores strictly above the place-th best of the sample. So there are fewer than k only
    if `place` of the k best are in the sample: never where place = k + 1.
    """
    stride = max(min(max(STRIDE, m // MAX_SAMPLE), m // (4 * k)), 1)
    places = range(1, k + 1) if stride > 1 else ()
    place = next((j for j in places if 1 - _at_most(j - 1, k, 1 / stride) <= UNDERFULL), k + 1)
    capacity = 64 * triton.cdiv(k + kernels.RESCUE_M, 64)
    while stride > 1 and _at_most(place - 1, capacity, 1 / stride) > OVERFULL:
        capacity += 64
    return Plan(stride, place, capacity)


def _at_most(j: int, n: int, p: float) -> float:
    """P(Bin(n, p) <= j)."""
    log_odds = math.log(p) - math.log1p(-p)
    log_none, log_n = n * math.log1p(-p), math.lgamma(n + 1)
    terms = (log_n - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * log_odds for i in range(j + 1))
    return math.fsum(math.exp(log_none + t) for t in terms)
