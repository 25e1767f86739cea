"""The CPU suite, as rows of the benchmark schema."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastsae import SAE, SAEConfig, TopK
from fastsae.backends import torch as portable
from fastsae.benchmarks.measure import alone, interleaved, peak_mib, quantiles, resident_peak_mib
from fastsae.optim import RowAdam
from fastsae.training import train_step
from fastsae.training.plan import FORMATS, plan_run

__all__ = ["SUITES", "run_suite"]

CPU_SHAPES = [{"N": 1024, "D": 384, "M": 16_384, "k": 32}, {"N": 1024, "D": 384, "M": 65_536, "k": 32}]
SUITES = {"quick": (CPU_SHAPES, 9)}
WIDE = {"N": 512, "D": 64, "M": 2**20, "k": 32}
"""A million latents: memory by format."""
WIDE_STEPS = 5


def run_suite(name: str, say: Callable[[dict], None]) -> list[dict[str, Any]]:
    """All rows of the suite, each also handed to ``say``."""
    shapes, repeats = SUITES[name]
    rows = []
    for shape in shapes:
        for row in _rows(shape, repeats):
            rows.append(row)
            say(row)
    for formats in FORMATS:
        rows.append(_wide_row(WIDE, *formats))
        say(rows[-1])
    return rows


def _wide_row(shape: dict[str, int], weight_format: str, state_dtype: str) -> dict[str, Any]:
    """Time and peak memory of the first steps, imports included, beside what the plan says.

    Raises AssertionError where the loss doesn't fall.
    """
    result = alone(partial(_wide_steps, shape, weight_format, state_dtype))
    if not result["losses"][-1] < result["losses"][0]:
        raise AssertionError(f"losses {result['losses']} of {weight_format}/{state_dtype}: no figures")
    d, m, n = (shape[name] for name in "DMN")
    times = quantiles(sorted(result["ms"]))
    return (
        {"op": "step", "backend": "torch", **shape, "dtype": "float32"}
        | {"format": f"{weight_format}/{state_dtype}", **times}
        | {"peak_mib": result["peak_mib"], "held_mib": result["held_mib"]}
        | {"planned_mib": result["planned_mib"]}
        | {"tflops": 2 * n * m * d / times["p50_ms"] / 1e9, "tb_s": None, "ratio_to_gemm": None}
        | {"note": f"the first {WIDE_STEPS} steps of a process; its whole peak"}
    )


def _wide_steps(shape: dict[str, int], weight_format: str, state_dtype: str) -> dict[str, Any]:
    # before anything is allocated: a plan counts what its process has
    planned = plan_run(
        *(shape[name] for name in "DMkN"), weight_format=weight_format, state_dtype=state_dtype
    )
    torch.manual_seed(0)
    sae = SAE(SAEConfig(shape["D"], shape["M"], TopK(shape["k"])), weight_format=weight_format)
    opt = RowAdam(sae, lr=1e-3, state_dtype=state_dtype)
    mixing = torch.randn(16, shape["D"])
    ms, losses = [], []
    for _ in range(WIDE_STEPS):
        x = torch.randn(shape["N"], 16) @ mixing
        start = time.perf_counter()
        losses.append(train_step(sae, opt, x)["loss"].item())
        ms.append(1e3 * (time.perf_counter() - start))
    peak = resident_peak_mib()
    held = [*sae.state_dict().values(), *(t for state in opt.state.values() for t in state.values())]
    held_mib = sum(t.numel() * t.element_size() for t in held) / 2**20
    planned_mib = planned["total_bytes"] / 2**20
    return {"ms": ms, "losses": losses, "peak_mib": peak, "held_mib": held_mib, "planned_mib": planned_mib}


@torch.no_grad()
def _rows(shape: dict[str, int], repeats: int) -> list[dict[str, Any]]:
    n, m, d = (shape[name] for name in "NMD")
    sae, x, step = _prepare(shape)
    _check(sae, x)
    out = torch.empty(n, m)
    times = interleaved(
        {
            ("gemm", "addmm"): partial(torch.addmm, sae.b_enc, x, sae.W_enc.T, out=out),
            ("gemm", "torch"): partial(portable.score_all, x, sae.W_enc, sae.b_enc),
            ("encode", "torch"): partial(sae.encode_sparse, x),
            ("step", "torch"): step,
        },
        repeats,
    )
    del out
    rows = []
    for (op, backend), ms in times.items():
        p50 = quantiles(ms)["p50_ms"]
        peak = peak_mib(partial(_step_alone, shape)) if op == "step" else None
        note = (
            "the scores alone, in the blocks that encode uses" if (op, backend) == ("gemm", "torch") else ""
        )
        rows.append(
            {"op": op, "backend": backend, **shape, "dtype": "float32", "format": "float32/float32"}
            | quantiles(ms)
            | {"peak_mib": peak}
            | {"tflops": 2 * n * m * d / p50 / 1e9, "tb_s": None}
            | {"ratio_to_gemm": p50 / quantiles(times["gemm", "addmm"])["p50_ms"], "note": note}
        )
    return rows


def _prepare(shape: dict[str, int]):
    torch.manual_seed(0)
    sae = SAE(SAEConfig(shape["D"], shape["M"], TopK(shape["k"])))
    opt = RowAdam(sae, lr=1e-4)
    batches = [torch.randn(shape["N"], shape["D"]) for _ in range(4)]
    turn = iter(range(10**9))

    def step() -> None:
        train_step(sae, opt, batches[next(turn) % len(batches)])

    return sae, batches[0], step


def _step_alone(shape: dict[str, int]) -> Callable[[], None]:
    return _prepare(shape)[2]


def _check(sae: SAE, x: torch.Tensor) -> None:
    """No figure on a wrong result: a few tokens' codes against the fp64 oracle, by value."""
    few = x[:8]
    with torch.no_grad():
        got = sae.encode_sparse(few).topk()[0].double()
        pre = (few.double() - sae.b_dec.double()) @ sae.W_enc.double().T + sae.b_enc.double()
    want = pre.topk(sae.config.activation.k).values.relu()
    if not torch.allclose(got, want, rtol=1e-4, atol=1e-5):
        raise AssertionError(f"encode is off by {(got - want).abs().max():g}: no figures")
