"""What a training run needs, by arithmetic: bytes by part, and the least time per step."""

from __future__ import annotations

import math
from typing import Any

from fastsae.backends.torch import BLOCK_ELEMENTS as OPERATOR_BLOCK
from fastsae.backends.torch import BLOCK_SCORES
from fastsae.checks import check_choice, check_number, reject
from fastsae.optim.row_adam import BLOCK_ELEMENTS

__all__ = ["GPUS", "plan_run"]

GPUS = {
    # memory in bytes, dense fp32-accumulated bf16 FLOP/s, bytes/s
    "h200": (139 * 2**30, 790e12, 4.3e12),  # rates measured with a large GEMM and a large copy
    "h100": (
        80 * 2**30,
        790e12,
        3.0e12,
    ),  # the H200's GEMM rate (same chip); 90 % of the datasheet's 3.35 TB/s
    "a100": (80 * 2**30, 280e12, 1.8e12),  # 90 % of the datasheet's 312 TFLOP/s and 2.0 TB/s
}
_FP32 = 4


def plan_run(d_in: int, latents: int, k: int, batch: int, gpu: str | None = None) -> dict[str, Any]:
    """Bytes of an fp32 run with RowAdam's fp32 states, and with ``gpu`` whether they fit and a step's floor.

        weights    (2 M D + M + D) * 4                  W_enc, W_dec, b_enc, b_dec
        states     twice the weights, + 12 M + 4 D      two moments; when each row was last updated
        counters   8 M                                  when each latent last fired
        workspace  the operators' blocks, the code, [N, D] inputs and errors: an upper estimate for any M
        floor_ms   2 N D M / FLOP rate + bytes / bandwidth

    with bytes = (4 N k + 12 M (1 - exp(-N k / M))) * 4 D: four gathers of a row per pair, and both matrices
    and their moments read and written at the active rows, latents firing evenly. The floor is the roofline at
    the named GPU's rates: a bound, not a prediction of this version.

    Raises:
        ValueError: a size below 1, k > latents, or an unknown GPU.
    """
    for name, value in (("d_in", d_in), ("latents", latents), ("k", k), ("batch", batch)):
        check_number(name, value, integer=True, low=1)
    if k > latents:
        reject("k", k, f"an integer in 1..{latents} (latents)")
    weights = (2 * latents * d_in + latents + d_in) * _FP32
    parts = {
        "weights": weights,
        "states": 2 * weights + 12 * latents + 4 * d_in,
        "counters": 8 * latents,
        "workspace": 2 * BLOCK_SCORES * _FP32
        + 12 * OPERATOR_BLOCK * _FP32
        + 8 * max(BLOCK_ELEMENTS, d_in) * _FP32
        + batch * k * 64
        + 8 * batch * d_in * _FP32,
    }
    plan: dict[str, Any] = {f"{name}_gib": round(size / 2**30, 3) for name, size in parts.items()}
    plan["total_gib"] = round(sum(parts.values()) / 2**30, 3)
    if gpu is not None:
        check_choice("gpu", gpu, GPUS)
        memory, flops, bandwidth = GPUS[gpu]
        active = latents * -math.expm1(-batch * k / latents)
        traffic = (4 * batch * k + 12 * active) * d_in * _FP32
        plan["fits"] = sum(parts.values()) <= memory
        per_latent = (6 * d_in + 3) * _FP32 + 20
        plan["largest_latents"] = max(0, int((memory - parts["workspace"]) // per_latent))
        plan["floor_ms"] = round(1e3 * (2 * batch * d_in * latents / flops + traffic / bandwidth), 3)
        plan["assumed"] = (
            f"{gpu}: {memory / 2**30:.0f} GiB, {flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.1f} TB/s"
        )
    return plan
