"""Timing and memory: contestants interleaved in one process, medians; peak memory in a process of its own."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Callable, Hashable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)

__all__ = ["describe_machine", "interleaved", "peak_mib"]


def interleaved(
    contestants: dict[Key, Callable[[], Any]], repeats: int, warmup: int = 2
) -> dict[Key, list[float]]:
    """Milliseconds of each call, sorted: a round runs each contestant once, so drift hits all alike."""
    times: dict[Key, list[float]] = {name: [] for name in contestants}
    for i in range(warmup + repeats):
        for name, call in contestants.items():
            _wait()
            start = time.perf_counter()
            call()
            _wait()
            if i >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: sorted(t) for name, t in times.items()}


def peak_mib(prepare: Callable[[], Callable[[], Any]], repeats: int = 3) -> float:
    """MiB by which resident memory rises at most, over what it was before, during the calls ``prepare()``
    returns.

    Runs in a fresh process, on Linux with glibc. One call goes before: what it allocates for good (optimizer
    states) isn't counted; what it freed is given back to the system first, so that the calls' own workspace
    is.
    """
    receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=_peak, args=(prepare, repeats, send))
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


def _peak(prepare, repeats, send) -> None:
    call = prepare()
    call()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for _ in range(repeats):
        call()
    send.send((_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    return next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
        },
        "commit": (_git("rev-parse", "HEAD") or "unknown")
        + ("-dirty" if _git("status", "--porcelain") else ""),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_names() -> Iterator[str]:
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.startswith("model name"):
            yield line.split(":", 1)[1].strip()


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parent
    result = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip()
