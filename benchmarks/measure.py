"""Timing and memory: contestants interleaved in one process; a CPU's peak memory in a process of its own."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Callable, Hashable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

__all__ = [
    "alone",
    "describe_machine",
    "device_peak_mib",
    "interleaved",
    "now",
    "process_memory",
    "quantiles",
    "resident_peak_mib",
    "stopwatch",
]


FLUSH_BYTES = 2**28
"""Written between calls on a GPU: several times the largest L2."""


def interleaved(
    contestants: dict[Key, Callable[[], Any]], repeats: int, warmup: int = 2, device: str = "cpu"
) -> dict[Key, list[float]]:
    """Milliseconds of each call, sorted: a round runs each contestant once, so drift hits all alike."""
    times: dict[Key, list[float]] = {name: [] for name in contestants}
    milliseconds = stopwatch(device)
    for i in range(warmup + repeats):
        for name, call in contestants.items():
            ms = milliseconds(call)
            if i >= warmup:
                times[name].append(ms)
    return {name: sorted(t) for name, t in times.items()}


def stopwatch(device: str) -> Callable[[Callable[[], Any]], float]:
    """A function that gives the milliseconds of one call: wall clock on a CPU; on a GPU the time between two
    events, with an L2 that holds nothing of use."""
    if device != "cuda":
        return _wall_ms
    waste = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def event_ms(call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        waste.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    return event_ms


def now(device: str) -> float:
    """Seconds on the wall clock, after all that was queued on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _wall_ms(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


QUANTILES = (5, 20, 50, 80, 95)


def quantiles(ms: list[float]) -> dict[str, float]:
    """The QUANTILES of sorted times, by the names of a row: p5_ms and so on."""
    return {f"p{q}_ms": ms[round(q / 100 * (len(ms) - 1))] for q in QUANTILES}


def device_peak_mib(call: Callable[[], Any]) -> float:
    """MiB by which a GPU's allocated memory rises at most during one call."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def process_memory(prepare: Callable[[], Callable[[], Any]], repeats: int = 3) -> dict[str, float]:
    """What the calls that ``prepare()`` returns take in a process of their own, in MiB of resident memory:
    ``peak_mib``, by which it rises at most over what it was before, and ``process_mib``, the whole process at
    its peak, imports included.

    On Linux with glibc. One call goes before: what it allocates for good (optimizer states) isn't in the
    first; what it freed is given back to the system, so that the calls' own workspace is.
    """
    return alone(partial(_peak, prepare, repeats))


def alone(work: Callable[[], Result]) -> Result:
    """What ``work()`` returns, in a fresh process of its own."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(work, send))
    child.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        child.join()
        raise RuntimeError(
            f"the process that measures memory ended with exit code {child.exitcode}"
        ) from None
    finally:
        child.join()


def _send(work, send) -> None:
    send.send(work())


def resident_peak_mib() -> float:
    """MiB that this process has ever had in memory at a time, imports included."""
    return _status("VmHWM") / 1024


def _peak(prepare: Callable[[], Callable[[], Any]], repeats: int) -> dict[str, float]:
    call = prepare()
    call()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    first = resident_peak_mib()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS") / 1024
    for _ in range(repeats):
        call()
    then = resident_peak_mib()
    return {"peak_mib": then - before, "process_mib": max(first, then)}


def _status(field: str) -> int:
    return next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )


_CHANGES = ("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
"""Those that may make a difference."""


def describe_machine() -> dict[str, Any]:
    """What a figure depends on: processor, GPU, threads, versions, commit, time."""
    return {
        "machine": {
            "cpu": next(_cpu_names(), platform.processor()),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
        },
        "commit": (_git("rev-parse", "HEAD") or "unknown") + ("-dirty" if _git(*_CHANGES) else ""),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_names() -> Iterator[str]:
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.startswith("model name"):
            yield line.split(":", 1)[1].strip()


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parent
    result = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip()
