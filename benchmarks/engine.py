"""Runs a plan: the contestants of each case are checked, run once for their memory, and timed in turns.

What is wrong yields no figure, and what there was no time or memory for is listed too.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton.errors import TritonError

from fastsae.benchmarks import contests
from fastsae.benchmarks.cases import Shape
from fastsae.benchmarks.measure import device_peak_mib, interleaved, process_memory, quantiles
from fastsae.benchmarks.trainers import Unavailable

__all__ = ["FAILURES", "Case", "Limits", "empty_row", "failure", "run_plan"]

Case = tuple[Callable[[Shape, torch.dtype, str], Iterator[contests.Entry]], Shape, torch.dtype]

FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    NotImplementedError,
    ImportError,
    TritonError,
)
"""What ends a contestant and not the run; running out of memory is a RuntimeError."""


@dataclass(frozen=True)
class Limits:
    """repeats: timed rounds, at least and at most (exclusive); case_seconds: what the rounds of a case may
    take, where that is more than the fewest; a contestant whose second call takes longer than slow_seconds
    isn't timed."""

    repeats: range = range(5, 21)
    case_seconds: float = 10.0
    slow_seconds: float = 3.0


def run_plan(
    plan: Iterable[Case], device: str, deadline: float, limits: Limits = Limits()
) -> Iterator[dict[str, Any]]:
    """The rows of all cases; after ``deadline`` (of time.monotonic) one row for each case that is left."""
    gemm: dict[Shape, float] = {}  # p50 of the encoder's GEMM
    ceiling: dict[tuple[str, str], float] = {}  # what the machine reaches, by kind and dtype
    for case, shape, dtype in plan:
        if time.monotonic() > deadline:
            entry = contests.Entry(case.__name__, "", lambda: None, note="not reached within the budget")
            yield empty_row(entry, shape, dtype)
            continue
        torch.manual_seed(0)
        for row in _run_case(case, shape, dtype, device, limits):
            if row["p50_ms"] is not None:
                _relate(row, shape, gemm, ceiling)
            yield row
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _relate(row: dict[str, Any], shape: Shape, gemm: dict, ceiling: dict) -> None:
    """Fill in what a row's time is beside: the GEMM of its shape, and the ceilings of the machine."""
    if row["op"] == "square gemm":
        ceiling["tflops", row["dtype"]] = row["tflops"]
    elif row["op"] == "copy":
        ceiling["tb_s", ""] = row["tb_s"]
    elif row["op"] == "gemm":
        gemm.setdefault(shape, row["p50_ms"])
    if row["op"] in ("square gemm", "copy", "topk"):
        return
    if shape in gemm:
        row["ratio_to_gemm"] = row["p50_ms"] / gemm[shape]
    shares = [
        row[name] / ceiling[name, dtype]
        for name, dtype in (("tflops", row["dtype"]), ("tb_s", ""))
        if row[name] and (name, dtype) in ceiling
    ]
    row["ceiling_share"] = max(shares, default=None)


@torch.no_grad()
def _run_case(
    case: Callable, shape: Shape, dtype: torch.dtype, device: str, limits: Limits
) -> Iterator[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    entries: dict[int, contests.Entry] = {}
    seconds = 0.0
    try:
        for entry in case(shape, dtype, device):
            row = empty_row(entry, shape, dtype)
            rows.append(row)
            try:
                if took := _admit(entry, row, device, limits):
                    entries[len(rows) - 1] = entry
                    seconds += took
            except Unavailable as reason:
                row["note"] = f"skipped: {reason}"
            except FAILURES as error:
                row |= failure(error)
    except FAILURES as error:  # the operands themselves
        rows.append(empty_row(contests.Entry(case.__name__, "", lambda: None), shape, dtype) | failure(error))
    fewest, most = limits.repeats[0], limits.repeats[-1]
    repeats = min(max(int(limits.case_seconds / max(seconds, 1e-6)), fewest), most)
    try:
        calls = {i: entry.call for i, entry in entries.items()}
        for i, ms in interleaved(calls, repeats, warmup=1, device=device).items():
            times, entry = quantiles(ms), entries[i]
            rows[i] |= times
            rows[i]["tflops"] = entry.flops / times["p50_ms"] / 1e9 or None
            rows[i]["tb_s"] = entry.bytes / times["p50_ms"] / 1e9 or None
            if entry.op == "step":
                rows[i]["tokens_s"] = 1e3 * shape.N / times["p50_ms"]
    except FAILURES as error:
        for i in entries:
            rows[i] |= failure(error)
        entries = {}
    for i, entry in entries.items():
        try:
            if entry.phases:
                rows[i] |= entry.phases()
            if entry.alone and device == "cpu":
                rows[i] |= process_memory(entry.alone)
        except FAILURES as error:
            rows[i]["note"] = f"{rows[i]['note']}; then {failure(error)['note']}".removeprefix("; ")
    yield from rows


def _admit(entry: contests.Entry, row: dict[str, Any], device: str, limits: Limits) -> float:
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
    if took > limits.slow_seconds:
        row["note"] = f"skipped: one call takes {took:.1f} s"
        return 0
    return took


def empty_row(entry: contests.Entry, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """A row of the benchmark schema without figures."""
    name = str(entry.dtype or dtype).removeprefix("torch.")
    stateful = entry.op in ("step", "row_step", "row_update")
    states = name if entry.backend.startswith("dense") else "float32"
    figures = ("p20_ms", "p50_ms", "p80_ms", "tokens_s", "forward_ms", "backward_ms", "optimizer_ms",
               "peak_mib", "process_mib", "tflops", "tb_s", "ceiling_share", "ratio_to_gemm")  # fmt: skip
    return (
        {"op": entry.op, "backend": entry.backend, "model": shape.model, **shape._asdict()}
        | {"dtype": name, "format": entry.format or (f"{name}/{states}" if stateful else name)}
        | dict.fromkeys(figures)
        | {"note": entry.note, "failed": False}
    )


def failure(error: BaseException) -> dict[str, Any]:
    """What a row says of a contestant that raised; running out of memory is no fault."""
    text = (str(error).strip().splitlines() or [""])[0]
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text
    note = "skipped: out of memory" if memory else f"failed: {type(error).__name__}: {text}"
    return {"note": note, "failed": not memory}
