"""Where a run's numbers go: a JSON-lines file always, TensorBoard and Weights & Biases on request."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastsae.checks import FastSAEError
from fastsae.files import write_atomically

__all__ = ["RunLog", "check_sinks", "read_log"]


class RunLog:
    """Appends one row per logged step to ``directory/log.jsonl`` and hands it to the extra sinks.

    Args:
        directory: the run directory.
        step: rows above this step are dropped, since a resumed run logs them again.
        tensorboard: also write TensorBoard events under ``directory/tensorboard``.
        wandb: also log to this Weights & Biases project.
    """

    def __init__(
        self, directory: Path, step: int = 0, *, tensorboard: bool = False, wandb: str | None = None
    ) -> None:
        self.path = directory / "log.jsonl"
        kept = [row for row in read_log(self.path) if row["step"] <= step]
        write_atomically(self.path, "".join(map(_line, kept)))
        self._file = self.path.open("a", buffering=1)
        self._tensorboard = _tensorboard(directory, step) if tensorboard else None
        self._wandb = _wandb(directory, wandb) if wandb else None

    def write(self, row: dict[str, Any]) -> None:
        """Log one step's numbers; ``row["step"]`` is the step."""
        self._file.write(_line(row))
        if self._tensorboard is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._tensorboard.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(row, step=row["step"])

    def close(self) -> None:
        """Close every sink."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``log.jsonl``; a last line that a killed run left unfinished is passed over."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in _whole(lines)]


def _whole(lines: list[str]) -> Iterable[str]:
    return lines if not lines or lines[-1].endswith("\n") else lines[:-1]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def check_sinks(tensorboard: bool, wandb: str | None) -> None:
    """Raise if an extra log is asked for whose package isn't installed."""
    for wanted, package in ((tensorboard, "tensorboard"), (wandb, "wandb")):
        if wanted and importlib.util.find_spec(package) is None:
            raise FastSAEError(f"{package}: not installed, expected `pip install fastsae[{package}]`")


def _tensorboard(directory: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(directory / "tensorboard", purge_step=step + 1)


def _wandb(directory: Path, project: str) -> Any:
    import wandb

    return wandb.init(project=project, dir=str(directory), name=directory.name, resume="allow")
