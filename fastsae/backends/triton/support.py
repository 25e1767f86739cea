"""What every launcher shares: where kernels run, for which architecture, and the launch itself."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["WITHOUT_GPU", "architecture", "interpreting", "launch"]

WITHOUT_GPU = 90
"""The architecture taken for tensors that aren't on a GPU; ``fastsae.benchmarks compile`` sets it to others."""


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when they were imported): on a CPU."""
    return triton.knobs.runtime.interpret


def architecture(device: torch.device) -> int:
    """10 * major + minor of the GPU; WITHOUT_GPU where there is none."""
    return _capability(device) if device.type == "cuda" else WITHOUT_GPU


@lru_cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 1, **constants):
    """Run ``kernel`` on ``grid`` programs, on the device of its first tensor; nothing where the grid is empty."""
    if 0 in grid:
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, **constants, **options)
    else:
        kernel[grid](*args, **constants, **options)
