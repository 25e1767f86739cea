"""``make bench-gpu``: one run on a machine with a CUDA GPU, within a budget of time.

First the GPU tests, and nothing on red. Then cases in order of importance: the contestants of each are
checked, run once for their memory, and timed in turns. What there was no time or memory for is listed too.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from fastsae.benchmarks import contests, tables
from fastsae.benchmarks.measure import Shape, describe_machine, device_peak_mib, interleaved, quantiles
from fastsae.checks import reject

__all__ = ["PLAN", "run_gpu", "run_plan"]

ROOT = Path(__file__).resolve().parent
BIG = Shape(8192, 4096, 131_072, 64)
NARROW = Shape(8192, 768, 131_072, 64)
HUGE = Shape(8192, 4096, 1_048_576, 64)
SMALL = Shape(8192, 768, 16_384, 64)
VAST = [Shape(8192, 768, 2**24, 64), Shape(8192, 704, 2**25, 64)]
"""16 and 32 M latents: the widest multiples of 64, up to 768, that 139 GiB hold."""
BF16, FP32 = torch.bfloat16, torch.float32

Case = tuple[Callable[[Shape, torch.dtype, str], Iterator[contests.Entry]], Shape, torch.dtype]

PLAN: list[Case] = [
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
    *((case, SMALL, BF16) for case in (contests.encode, contests.step, contests.backward, contests.decode)),
    *((contests.step, shape, FP32) for shape in (NARROW, HUGE)),
]
"""In order of importance."""

REPEATS = range(5, 21)
"""Timed rounds, at least and at most."""
CASE_SECONDS = 10.0
"""What the rounds of a case may take, where that is more than the fewest of them."""
SLOW_SECONDS = 3.0
"""A contestant whose second call takes longer isn't timed."""
FAILURES = (RuntimeError, ValueError, AssertionError, NotImplementedError, TritonError)
"""What ends a contestant and not the run; running out of memory is a RuntimeError."""


def run_gpu(path: Path | None, budget: float) -> int:
    """Test, measure, print and write; ``path`` None writes benchmarks/results/<date>-<gpu>.json.

    Returns the exit code: 1 on a red test, or where a contestant was wrong or failed. Raises ValueError
    without a CUDA device.
    """
    if not torch.cuda.is_available():
        reject("suite", "'gpu' on a machine without a CUDA device", "an NVIDIA GPU (or 'quick', on a CPU)")
    deadline = time.monotonic() + budget
    if _run_tests():
        print("the GPU tests are not green: no figures")
        return 1
    if path is None:
        slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        path = ROOT / "results" / f"{datetime.now(UTC):%Y-%m-%d}-{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    result = {**describe_machine(), "rows": rows}
    for row in run_plan(PLAN, "cuda", deadline):
        rows.append(row)
        print(_line(row), flush=True)
        # at once, so that what was measured stays if the machine is taken away
        path.write_text(json.dumps(result, indent=2) + "\n")
    tables.show(str(path), _COLUMNS, rows)
    return int(any(row["failed"] for row in rows))


_COLUMNS = ("op", "backend", "N", "D", "M", "k", "format", "p50_ms", "p20_ms", "p80_ms", "ratio_to_gemm",
            "tflops", "tb_s", "peak_mib", "note")  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    figure = "" if row["p50_ms"] is None else f"{row['p50_ms']:.3f} ms"
    return " ".join([row["op"], row["backend"], f"M={row['M']} D={row['D']}", figure, row["note"]])


def _run_tests() -> int:
    """pytest's exit code over the files that hold GPU tests; others may need packages that aren't here."""
    tests = ROOT.parent / "tests"
    files = [path for path in sorted(tests.glob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        print(f"no GPU tests in {tests}: run this from a checkout")
        return 1
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files]
    return subprocess.run(command, cwd=ROOT.parent, check=False).returncode


def run_plan(plan: list[Case], device: str, deadline: float) -> Iterator[dict[str, Any]]:
    """The rows of all cases; after ``deadline`` (of time.monotonic) one row for each case that is left."""
    gemm: dict[Shape, float] = {}  # p50 of the half-precision GEMM
    for case, shape, dtype in plan:
        if time.monotonic() > deadline:
            entry = contests.Entry(case.__name__, "", lambda: None, note="not reached within the budget")
            yield _row(entry, shape, dtype)
            continue
        torch.manual_seed(0)
        for row in _run_case(case, shape, dtype, device):
            if row["op"] == "gemm" and row["p50_ms"] is not None:
                gemm.setdefault(shape, row["p50_ms"])
            if shape in gemm and row["p50_ms"] is not None and case is not contests.ceilings:
                row["ratio_to_gemm"] = row["p50_ms"] / gemm[shape]
            yield row
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


@torch.no_grad()
def _run_case(case: Callable, shape: Shape, dtype: torch.dtype, device: str) -> Iterator[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    entries: dict[int, contests.Entry] = {}
    seconds = 0.0
    try:
        for entry in case(shape, dtype, device):
            row = _row(entry, shape, dtype)
            rows.append(row)
            try:
                if took := _admit(entry, row, device):
                    entries[len(rows) - 1] = entry
                    seconds += took
            except FAILURES as error:
                row |= _failure(error)
    except FAILURES as error:  # the operands themselves
        rows.append(_row(contests.Entry(case.__name__, "", lambda: None), shape, dtype) | _failure(error))
    repeats = min(max(int(CASE_SECONDS / max(seconds, 1e-6)), REPEATS[0]), REPEATS[-1])
    try:
        calls = {i: entry.call for i, entry in entries.items()}
        for i, ms in interleaved(calls, repeats, warmup=1, device=device).items():
            times = quantiles(ms)
            rows[i] |= times
            rows[i]["tflops"] = entries[i].flops / times["p50_ms"] / 1e9 or None
            rows[i]["tb_s"] = entries[i].bytes / times["p50_ms"] / 1e9 or None
    except FAILURES as error:
        for i in entries:
            rows[i] |= _failure(error)
    yield from rows


def _admit(entry: contests.Entry, row: dict[str, Any], device: str) -> float:
    """Seconds that a call of a contestant takes, 0 if it mustn't be timed; its memory goes to ``row``."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if entry.needs > 0.95 * free:
            row["note"] = f"skipped: needs {entry.needs / 1e9:.0f} GB, {free / 1e9:.0f} are free"
            return 0
    result = entry.call()  # compiles
    if entry.check:
        entry.check(result)
    del result
    start = time.monotonic()
    row["peak_mib"] = device_peak_mib(entry.call, device)
    if device != "cuda":
        entry.call()
    took = time.monotonic() - start
    if took > SLOW_SECONDS:
        row["note"] = f"skipped: one call takes {took:.1f} s"
        return 0
    return took


def _row(entry: contests.Entry, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """A row of the benchmark schema without figures."""
    name = str(entry.dtype or dtype).removeprefix("torch.")
    stateful = entry.op in ("step", "row_step", "row_update")
    states = name if entry.backend == "dense" else "float32"
    return (
        {"op": entry.op, "backend": entry.backend, **shape._asdict()}
        | {"dtype": name, "format": entry.format or (f"{name}/{states}" if stateful else name)}
        | dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "peak_mib", "tflops", "tb_s", "ratio_to_gemm"))
        | {"note": entry.note, "failed": False}
    )


def _failure(error: Exception) -> dict[str, Any]:
    text = (str(error).strip().splitlines() or [""])[0]
    memory = isinstance(error, torch.OutOfMemoryError)
    note = "skipped: out of memory" if memory else f"failed: {type(error).__name__}: {text}"
    return {"note": note, "failed": not memory}
