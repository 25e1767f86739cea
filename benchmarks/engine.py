"""Runs a plan: the contestants of each case are checked, run once for their memory, and timed in turns.

What is wrong yields no figure, and what there was no time or memory for is listed too.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton.errors import TritonError

from fastsae.benchmarks import contests
from fastsae.benchmarks.cases import Shape
from fastsae.benchmarks.measure import (
    QUANTILES,
    device_peak_mib,
    interleaved,
    process_memory,
    quantiles,
)
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
    """repeats: timed rounds of a pass, at least and at most (exclusive); case_seconds: what the rounds of a
    case may take, where that is more than the fewest; a contestant whose second call takes longer than
    slow_seconds isn't timed. passes: over the whole plan, each with operands of its own: on a CPU, where
    memory happens to lie and the minute make more of a difference than the rounds of a pass show."""

    repeats: range = range(5, 21)
    case_seconds: float = 10.0
    slow_seconds: float = 3.0
    passes: int = 1


def run_plan(
    plan: Sequence[Case], device: str, deadline: float, limits: Limits = Limits()
) -> Iterator[dict[str, Any]]:
    """The rows of all cases; after ``deadline`` (of time.monotonic) one row for each case that is left.

    With one pass each case's rows come as soon as they are there, else all at the end.
    """
    gemm: dict[Shape, float] = {}  # p50 of the encoder's GEMM
    ceiling: dict[tuple[str, str], float] = {}  # what the machine reaches, by kind and dtype
    for group in [plan] if limits.passes > 1 else [[case] for case in plan]:
        runs = [_CaseRun(*case, device, limits) for case in group]
        for number in range(limits.passes):
            for run in runs:
                if time.monotonic() < deadline:
                    run.measure(whole=number == 0)
        for run in runs:
            for row in run.finish():
                if row["p50_ms"] is not None:
                    _relate(row, run.shape, gemm, ceiling)
                yield row


def _relate(row: dict[str, Any], shape: Shape, gemm: dict, ceiling: dict) -> None:
    """Fill in what a row's time is beside: the GEMM of its shape, and the ceilings of the machine."""
    if row["op"] == "square gemm":
        ceiling["tflops", row["dtype"]] = max(row["tflops"], ceiling.get(("tflops", row["dtype"]), 0.0))
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


class _CaseRun:
    """A case's contestants, with the rows and times of the passes so far."""

    def __init__(self, case: Callable, shape: Shape, dtype: torch.dtype, device: str, limits: Limits) -> None:
        self.case, self.shape, self.dtype, self.device, self.limits = case, shape, dtype, device, limits
        self.rows: list[dict[str, Any]] = []
        self.work: list[tuple[float, float]] = []
        self.times: dict[int, list[float]] = {}  # by row

    @torch.no_grad()
    def measure(self, whole: bool) -> None:
        """One pass; the ``whole`` one makes the rows and also measures parts and memory."""
        torch.manual_seed(0)
        entries: dict[int, contests.Entry] = {}
        seconds = 0.0
        try:
            for i, entry in enumerate(self.case(self.shape, self.dtype, self.device)):
                if whole:
                    self._add(entry)
                elif i not in self.times:
                    continue
                try:
                    if took := _admit(entry, self.rows[i], self.device, self.limits):
                        entries[i] = entry
                        seconds += took
                except Unavailable as reason:
                    self._drop(i, {"note": f"skipped: {reason}"})
                except FAILURES as error:
                    self._drop(i, failure(error))
        except FAILURES as error:  # the operands themselves
            self._add(contests.Entry(self.case.__name__, "", lambda: None))
            self._drop(-1, failure(error))
        fewest, most = self.limits.repeats[0], self.limits.repeats[-1]
        repeats = min(max(int(self.limits.case_seconds / max(seconds, 1e-6)), fewest), most)
        try:
            calls = {i: entry.call for i, entry in entries.items()}
            for i, ms in interleaved(calls, repeats, warmup=1, device=self.device).items():
                self.times.setdefault(i, []).extend(ms)
        except FAILURES as error:
            for i in entries:
                self._drop(i, failure(error))
        for i, entry in entries.items() if whole else ():
            self._look_closer(i, entry)
        del entries, calls
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _add(self, entry: contests.Entry) -> None:
        self.rows.append(empty_row(entry, self.shape, self.dtype))
        self.work.append((entry.flops, entry.bytes))

    def _drop(self, i: int, why: dict[str, Any]) -> None:
        """A contestant without figures."""
        self.times.pop(i, None)
        self.rows[i] |= why | dict.fromkeys(name for name in _FIGURES if self.rows[i][name] is not None)

    def _look_closer(self, i: int, entry: contests.Entry) -> None:
        """The parts of a step, and on a CPU its memory; a contestant that fails in this fails alone."""
        try:
            if i in self.times and entry.phases:
                self.rows[i] |= entry.phases()
            if i in self.times and entry.alone and self.device == "cpu":
                self.rows[i] |= process_memory(entry.alone)
        except FAILURES as error:
            self._drop(i, failure(error))

    def finish(self) -> list[dict[str, Any]]:
        """The rows with the times of all passes; of a case that had no pass, one that says so."""
        if not self.rows:
            self._add(
                contests.Entry(self.case.__name__, "", lambda: None, note="not reached within the budget")
            )
        for i, ms in self.times.items():
            row, (flops, moved), times = self.rows[i], self.work[i], quantiles(sorted(ms))
            row |= times
            row["tflops"] = flops / times["p50_ms"] / 1e9 or None
            row["tb_s"] = moved / times["p50_ms"] / 1e9 or None
            if row["op"] == "step":
                row["tokens_s"] = 1e3 * self.shape.N / times["p50_ms"]
        return self.rows


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
    if device == "cuda":
        row["peak_mib"] = device_peak_mib(entry.call)
    else:
        entry.call()
    took = time.monotonic() - start
    if took > limits.slow_seconds:
        row["note"] = f"skipped: one call takes {took:.1f} s"
        return 0
    return took


_FIGURES = (
    *(f"p{q}_ms" for q in QUANTILES), "tokens_s", "forward_ms", "backward_ms", "optimizer_ms", "peak_mib",
    "process_mib", "tflops", "tb_s", "ceiling_share", "ratio_to_gemm",
)  # fmt: skip


def empty_row(entry: contests.Entry, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """A row of the benchmark schema without figures."""
    name = str(entry.dtype or dtype).removeprefix("torch.")
    stateful = entry.op in ("step", "row_step", "row_update")
    states = name if entry.backend.startswith("dense") else "float32"
    return (
        {"op": entry.op, "backend": entry.backend, "model": shape.model, **shape._asdict()}
        | {"dtype": name, "format": entry.format or (f"{name}/{states}" if stateful else name)}
        | dict.fromkeys(_FIGURES)
        | {"note": entry.note, "failed": False}
    )


def failure(error: BaseException) -> dict[str, Any]:
    """What a row says of a contestant that raised; running out of memory is no fault."""
    text = (str(error).strip().splitlines() or [""])[0]
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text
    note = "skipped: out of memory" if memory else f"failed: {type(error).__name__}: {text}"
    return {"note": note, "failed": not memory}
