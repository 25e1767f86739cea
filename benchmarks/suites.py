"""The suites: what each measures, on which device, and how long it may take."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastsae.benchmarks import contests
from fastsae.benchmarks.cases import Shape, model_shape
from fastsae.benchmarks.engine import Case, Limits, empty_row, run_plan
from fastsae.benchmarks.growth import growth_rows, growth_shapes
from fastsae.benchmarks.measure import alone, quantiles
from fastsae.benchmarks.processes import first_steps
from fastsae.checks import reject
from fastsae.training.plan import FORMATS

__all__ = ["SUITES", "Suite", "gpu_tests_fail", "run_suite"]

FP32, BF16 = torch.float32, torch.bfloat16
SMALL, LARGE = (model_shape("MiniLM", m, k=32, N=1024) for m in (16_384, 65_536))
"""The README's sizes on a CPU; the first is the demo's."""

QUICK: list[Case] = [
    (contests.ceilings, SMALL, FP32),
    *((case, shape, FP32) for shape in (SMALL, LARGE) for case in (contests.encode, contests.step)),
]
CPU: list[Case] = [
    (contests.ceilings, SMALL, FP32),
    *((contests.encode, shape, FP32) for shape in (SMALL, LARGE)),
    *((contests.step, shape, FP32) for shape in (*growth_shapes(SMALL), LARGE._replace(M=262_144))),
    *((case, SMALL, FP32) for case in (contests.decode, contests.backward, contests.parts)),
    *(
        (case, model_shape(model, m, k, 512), FP32)
        for model, m, k in (("GPT-2", 24_576, 32), ("Gemma-2-2B", 16_384, 64), ("Llama-3-8B", 16_384, 128))
        for case in (contests.encode, contests.step)
    ),
]
PEERS: list[Case] = [
    (contests.ceilings, SMALL, FP32),
    *((contests.peers, SMALL._replace(M=m), FP32) for m in (65_536, 16_384, 4096, 1024)),
]

BIG, NARROW = (model_shape(model, 131_072, 64, 8192) for model in ("Llama-3-8B", "GPT-2"))
HUGE, TINY = BIG._replace(M=1_048_576), NARROW._replace(M=16_384)
VAST = [Shape(8192, 768, 2**24, 64), Shape(8192, 704, 2**25, 64)]
"""16 and 32 M latents: the widest multiples of 64, up to 768, that 139 GiB hold."""
GPU: list[Case] = [
    (contests.ceilings, BIG, BF16),
    *((case, BIG, BF16) for case in (contests.encode, contests.step, contests.backward)),
    *((case, BIG, BF16) for case in (contests.narrow_step, contests.narrow_backward, contests.decode)),
    *((contests.vast_step, shape, BF16) for shape in VAST),
    *((contests.encode, shape, BF16) for shape in (NARROW, HUGE)),
    *((contests.step, shape, BF16) for shape in (HUGE, NARROW)),
    (contests.narrow_step, HUGE, BF16),
    (contests.chunks, BIG, BF16),
    (contests.parts, BIG, BF16),
    *((case, BIG, FP32) for case in (contests.encode, contests.step, contests.backward)),
    *((case, HUGE, BF16) for case in (contests.backward, contests.decode)),
    *((case, NARROW, BF16) for case in (contests.backward, contests.decode, contests.chunks)),
    *((case, TINY, BF16) for case in (contests.encode, contests.step, contests.backward, contests.decode)),
    *((contests.step, shape, FP32) for shape in (NARROW, HUGE)),
    *((contests.step, shape, BF16) for shape in growth_shapes(NARROW)),
]
"""In order of importance."""

WIDE = Shape(N=512, D=64, M=2**20, k=32)
"""A million latents: memory by format."""
WIDE_STEPS, WIDE_PROCESSES = 5, 3


def _growth(base: Shape, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from growth_rows(rows, base)


def _quality(_: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    from fastsae.benchmarks.quality import quality_rows  # activations and what reads them

    yield from quality_rows()


def _gates(_: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    from fastsae.benchmarks.gates import gate_rows

    yield from gate_rows()


def _families(_: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    from fastsae.benchmarks.gates import family_rows

    yield from family_rows()


def _wide_rows(_: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Time and peak memory of the first steps of a process, imports included, beside what the plan says, by
    format; of some processes of each, in turns.

    Where the loss doesn't fall there are no figures.
    """
    runs = [
        alone(partial(first_steps, WIDE, WIDE_STEPS, *formats))
        for _ in range(WIDE_PROCESSES)
        for formats in FORMATS
    ]
    for i, formats in enumerate(FORMATS):
        mine = runs[i :: len(FORMATS)]
        row = empty_row(contests.Entry("step", "torch", lambda: None, format="/".join(formats)), WIDE, FP32)
        first, last = (median(run["losses"][at] for run in mine) for at in (0, -1))
        if last < first:
            times = quantiles(sorted(ms for run in mine for ms in run["ms"]))
            row |= times | {"tokens_s": 1e3 * WIDE.N / times["p50_ms"]}
            row |= {
                name: max(run[name] for run in mine) for name in ("process_mib", "held_mib", "planned_mib")
            }
            row["note"] = f"the first {WIDE_STEPS} steps of a process"
        else:
            row |= {"note": f"failed: the loss goes from {first:.4g} to {last:.4g}", "failed": True}
        yield row


@dataclass(frozen=True)
class Suite:
    """about: one line. device: "cpu", "cuda" or None, which is a GPU where there is one. plan, limits: see
    :mod:`fastsae.benchmarks.engine`. more: what makes further rows from those before them. seconds: after
    which no case begins."""

    about: str
    device: str | None
    plan: list[Case]
    limits: Limits
    more: tuple[Callable[[list[dict[str, Any]]], Iterator[dict[str, Any]]], ...] = ()
    seconds: float = 540


ON_CPU = Limits(repeats=range(5, 12), case_seconds=20, slow_seconds=40)
SUITES = {
    "quick": Suite(
        "the README's sizes on a CPU, in under 5 minutes",
        "cpu",
        QUICK,
        Limits(range(3, 8), 3, 40, passes=5),
        (_wide_rows,),
    ),
    "cpu": Suite(
        "every operator on a CPU, more models, and how a step grows",
        "cpu",
        CPU,
        ON_CPU,
        (_wide_rows, partial(_growth, SMALL)),
        3600,
    ),
    "gpu": Suite(
        "every operator and the step on an NVIDIA GPU, after the tests, in under 10 minutes",
        "cuda",
        GPU,
        Limits(),
        (partial(_growth, NARROW),),
    ),
    "peers": Suite(
        "a training step of each library that is installed (pip install 'fastsae[peers]')",
        None,
        PEERS,
        ON_CPU,
        (),
        1200,
    ),
    "quality": Suite(
        "FVU and silent latents of each, at equal tokens and equal seconds, on real activations",
        None,
        [],
        ON_CPU,
        (_quality,),
    ),
    "gates": Suite(
        "what ours find of known features, over three seeds, in under 6 minutes; fails where a gate does",
        "cpu",
        [],
        ON_CPU,
        (_gates,),
    ),
    "families": Suite(
        "FVU, L0 and silent latents of each of our architectures, on the demo's activations",
        None,
        [],
        ON_CPU,
        (_families,),
    ),
}


def run_suite(name: str, seconds: float | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a suite as they are measured; ``seconds`` in place of its own.

    Raises ValueError where the suite needs a GPU and there is none.
    """
    suite = SUITES[name]
    device = suite.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        reject(
            "suite", f"{name!r} on a machine without a CUDA device", "an NVIDIA GPU (or 'quick', on a CPU)"
        )
    return _rows(suite, device, time.monotonic() + (suite.seconds if seconds is None else seconds))


def _rows(suite: Suite, device: str, deadline: float) -> Iterator[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for row in run_plan(suite.plan, device, deadline, suite.limits):
        rows.append(row)
        yield row
    for more in suite.more if time.monotonic() < deadline else ():
        yield from more(rows)


def gpu_tests_fail() -> bool:
    """Run the tests that need a GPU, of the files that hold some; others may need packages not here."""
    tests = Path(__file__).resolve().parents[1] / "tests"
    files = [path for path in sorted(tests.glob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        print(f"no GPU tests in {tests}: run this from a checkout")
        return True
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files]
    return subprocess.run(command, cwd=tests.parent, check=False).returncode != 0
