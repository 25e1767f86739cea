"""What every launcher shares: where kernels run, for which architecture, and the launch itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from fastsae.kernels.common import choose

__all__ = ["WITHOUT_GPU", "architecture", "factors", "interpreting", "launch", "score", "true_fp32", "tuned"]

Config = TypeVar("Config")
Result = TypeVar("Result")

WITHOUT_GPU = 90
"""The architecture of tensors that aren't on a GPU; ``fastsae.benchmarks compile`` sets it to others."""


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when they were imported)."""
    return triton.knobs.runtime.interpret


def architecture(device: torch.device) -> int:
    """10 * major + minor of the GPU; WITHOUT_GPU where there is none."""
    return _capability(device) if device.type == "cuda" else WITHOUT_GPU


@lru_cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 1, **constants):
    """Run ``kernel`` on ``grid`` programs, on the device of its first tensor; not if there are none."""
    if 0 in grid:
        return
    flat = [t for a in args for t in (a if isinstance(a, tuple) else (a,)) if isinstance(t, Tensor)]
    assert all(t.is_contiguous() for t in flat), f"{kernel.__name__} reads tensors as contiguous"
    device = flat[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)


def factors(x: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """x and W in one dtype: on a GPU W's, so that a GEMM reads W as it stands; on a CPU, of two, fp32."""
    if x.dtype == W.dtype:
        return x, W
    return (x.to(W.dtype), W) if x.device.type == "cuda" else (x.float(), W.float())


@torch.no_grad()
def score(x: Tensor, W: Tensor, out: Tensor) -> None:
    """out = x W^T in fp32, summed in fp32, of :func:`factors`; neither is copied on a GPU."""
    if x.device.type == "cuda" and x.dtype != torch.float32:
        torch.mm(x, W.T, out_dtype=torch.float32, out=out)
    else:
        with true_fp32():
            torch.mm(x.float(), W.float().T, out=out)


@contextmanager
def true_fp32() -> Iterator[None]:
    """No TF32, whatever the user allows elsewhere."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


_FASTEST: dict[tuple, Any] = {}


def tuned(
    table: Mapping[tuple[int, int], Config], trials: Iterable[Config], like: Tensor, width: int,
    run: Callable[[Config], Result],
) -> Result:  # fmt: skip
    """``run`` with the table's config for ``width`` columns of ``like``'s dtype on its device.

    With FASTSAE_AUTOTUNE=1, on a GPU, with the fastest of it and ``trials``, timed when first wanted; ``run``
    must then bear being repeated.
    """
    arch = architecture(like.device)
    config = choose(table, arch, width)
    if os.environ.get("FASTSAE_AUTOTUNE", "0") == "1" and not interpreting():
        key = id(table), arch, width, like.dtype
        if key not in _FASTEST:
            _FASTEST[key] = min((config, *trials), key=lambda c: _milliseconds(lambda: run(c)))
        config = _FASTEST[key]
    return run(config)


def _milliseconds(call: Callable[[], Any]) -> float:
    return triton.testing.do_bench(call, return_mode="median")
