"""The CPU suite, as rows of the benchmark schema."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastsae import SAE, SAEConfig, TopK
from fastsae.backends import torch as portable
from fastsae.benchmarks.measure import interleaved, peak_mib, quantiles
from fastsae.optim import RowAdam
from fastsae.training import train_step

__all__ = ["SUITES", "run_suite"]

CPU_SHAPES = [{"N": 1024, "D": 384, "M": 16_384, "k": 32}, {"N": 1024, "D": 384, "M": 65_536, "k": 32}]
SUITES = {"quick": (CPU_SHAPES, 9)}


def run_suite(name: str, say: Callable[[dict], None]) -> list[dict[str, Any]]:
    """All rows of the suite, each also handed to ``say``."""
    shapes, repeats = SUITES[name]
    rows = []
    for shape in shapes:
        for row in _rows(shape, repeats):
            rows.append(row)
            say(row)
    return rows


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
