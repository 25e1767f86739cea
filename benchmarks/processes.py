"""What a process of its own does, on a CPU, for its memory to be measured: whole steps and nothing else.

Little is imported here, since the peak of a process counts what it imports.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch

from fastsae import SAE, SAEConfig, TopK
from fastsae.benchmarks.cases import Shape
from fastsae.benchmarks.measure import resident_peak_mib
from fastsae.benchmarks.trainers import LONG, build
from fastsae.optim import RowAdam
from fastsae.training import train_step
from fastsae.training.plan import plan_run

__all__ = ["first_steps", "repeated_step"]


def repeated_step(name: str, shape: Shape) -> Callable[[], Any]:
    """A call that takes a contestant's step, on a few batches in turn."""
    trainer = build(name, shape, steps=LONG, lr=1e-6)
    batches = cycle([torch.randn(shape.N, shape.D) for _ in range(3)])
    return lambda: trainer.step(next(batches))


def first_steps(shape: Shape, steps: int, weight_format: str, state_dtype: str) -> dict[str, Any]:
    """Our first steps: ``ms`` and ``losses`` of each; and MiB: ``process_mib`` of the process at its peak,
    ``held_mib`` of weights and states, ``planned_mib`` as :mod:`fastsae.training.plan` has it."""
    # before anything is allocated: a plan counts what its process has
    planned = plan_run(
        shape.D, shape.M, shape.k, shape.N, weight_format=weight_format, state_dtype=state_dtype
    )
    torch.manual_seed(0)
    sae = SAE(SAEConfig(shape.D, shape.M, TopK(shape.k)), weight_format=weight_format)
    opt = RowAdam(sae, lr=1e-3, state_dtype=state_dtype)
    mixing = torch.randn(16, shape.D)
    ms, losses = [], []
    for _ in range(steps):
        x = torch.randn(shape.N, 16) @ mixing
        start = time.perf_counter()
        losses.append(train_step(sae, opt, x)["loss"].item())
        ms.append(1e3 * (time.perf_counter() - start))
    peak = resident_peak_mib()
    held = [*sae.state_dict().values(), *(t for state in opt.state.values() for t in state.values())]
    return {
        "ms": ms,
        "losses": losses,
        "process_mib": peak,
        "held_mib": sum(t.nbytes for t in held) / 2**20,
        "planned_mib": planned["total_bytes"] / 2**20,
    }
