"""Files of results: one schema as JSON, a run with its rows, and as CSV, with the run in every row."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "new_path", "newest", "write_csv", "write_json"]

RESULTS = Path(__file__).resolve().parent / "results"
"""What was committed. Files are added, never changed."""


def new_path(machine: str, suite: str) -> Path:
    """A file of RESULTS that isn't there yet, named by date, machine and suite."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    names = (f"{day}{mark}-{slug}-{suite}.json" for mark in _marks())
    return next(path for path in map(RESULTS.joinpath, names) if not path.exists())


def _marks() -> Iterator[str]:
    """Nothing, b, c, ...: files of a day in order of their names."""
    yield ""
    yield from "bcdefghijklmnopqrstuvwxyz"


def newest(suite: str, gpu: bool, folder: Path | None = None) -> Path | None:
    """The last file of a suite, by name, that was measured on a GPU or on a CPU."""
    found = [path for path in sorted((folder or RESULTS).glob("*.json")) if _is_of(path, suite, gpu)]
    return found[-1] if found else None


def _is_of(path: Path, suite: str, gpu: bool) -> bool:
    result = json.loads(path.read_text())
    on_gpu = bool(result["machine"]["gpu"])
    return on_gpu == gpu and result.get("suite", "gpu" if on_gpu else "quick") == suite


def write_json(path: Path, result: dict[str, Any]) -> None:
    """{"machine", "commit", "time", "suite", "rows"} to a file whose folder may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def write_csv(path: Path, result: dict[str, Any]) -> None:
    """The rows, each with its run's machine, versions, commit and time; lists are left to the JSON."""
    run = {"suite": result["suite"], "commit": result["commit"], "time": result["time"], **result["machine"]}
    rows = [{k: v for k, v in row.items() if not isinstance(v, list)} | run for row in result["rows"]]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
