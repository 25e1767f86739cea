"""The trainer: fused steps over a stream of activations, with schedules, logs, checkpoints and resume."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fastsae.checks import FastSAEError, check_choice, check_number, reject
from fastsae.data import Activations
from fastsae.optim import RowAdam
from fastsae.sae import SAE
from fastsae.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from fastsae.training.logs import RunLog, check_sinks, read_log
from fastsae.training.step import drop_batches, train_step

__all__ = ["NotFinite", "TrainConfig", "Trainer"]

_log = logging.getLogger("fastsae")
_SPARSITY_TERMS = ("decoder_norm_l1",)


class NotFinite(FastSAEError, ArithmeticError):
    """A batch with NaN or Inf met a run that is told to stop there."""


@dataclass(frozen=True)
class TrainConfig:
    """How a dictionary is trained.

    Args:
        out: run directory, see ``Trainer.fit``; None writes nothing.
        hook: which entry of the batches to train on, where they are dicts by hook.
        n_steps: optimizer steps in all; None takes ``len(activations) // accumulate``.
        accumulate: batches per optimizer step, see :func:`train_step`. Schedules, logs, checkpoints and skips
        go by steps. Where the activations end within a step, its batches are left out.
        lr, betas, eps, mode, state_dtype, seed, host_states: of :class:`fastsae.optim.RowAdam`.
        warmup: share of the run over which the learning rate rises linearly from 0.
        decay: share of the run, at its end, over which it falls linearly to 0.
        sparsity_warmup: share of the run over which sparsity coefficients (DecoderNormL1) rise linearly from
        0.
        on_nan: "skip" leaves a step with NaN or Inf out and counts it; "stop" ends the run with an error.
        log_every, checkpoint_every: in steps; None for checkpoints writes only the last one.
        keep_checkpoints: how many of the newest to keep.
        dead_after: tokens without firing that make a latent dead in the logs; None: as AuxK says, else 10 M.
        tensorboard, wandb: extra logs: a flag, and a project name.
        progress: show a progress bar.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """

    out: str | Path | None = None
    hook: str | None = None
    n_steps: int | None = None
    accumulate: int = 1
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    mode: str = "deferred"
    state_dtype: str = "float32"
    seed: int = 0
    host_states: bool = False
    warmup: float = 0.05
    decay: float = 0.2
    sparsity_warmup: float = 0.05
    on_nan: Literal["skip", "stop"] = "skip"
    log_every: int = 10
    checkpoint_every: int | None = 1000
    keep_checkpoints: int = 2
    dead_after: int | None = None
    tensorboard: bool = False
    wandb: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("warmup", "decay", "sparsity_warmup"):
            check_number(name, getattr(self, name), low=0.0, high=1.0)
        if self.warmup + self.decay > 1:
            reject("warmup + decay", self.warmup + self.decay, "at most 1")
        check_choice("on_nan", self.on_nan, ("skip", "stop"))
        for name in ("accumulate", "log_every", "keep_checkpoints"):
            check_number(name, getattr(self, name), integer=True, low=1)
        for name in ("n_steps", "checkpoint_every", "dead_after"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), integer=True, low=1)
        check_sinks(self.tensorboard, self.wandb)


class Trainer:
    """Trains ``sae`` on ``activations`` with the fused step.

    Args:
        sae: the dictionary; calibrated already where it should be (:meth:`fastsae.SAE.calibrate_`).
        activations: any iterable of [n, d_in] tensors, of (x, target) pairs, or of dicts of tensors by hook.
            Where it has ``state_dict`` and ``load_state_dict``, a resumed run continues it there; otherwise
            the batches already used are skipped.
        config: see :class:`TrainConfig`.
    """

    def __init__(self, sae: SAE, activations: Iterable, config: TrainConfig | None = None) -> None:
        config = TrainConfig() if config is None else config
        self.sae, self.activations, self.config = sae, activations, config
        self.n_steps = _total_steps(activations, config)
        self.opt = RowAdam(
            sae,
            config.lr,
            config.betas,
            config.eps,
            config.mode,
            config.state_dtype,
            sae.backend,
            config.seed,
            config.host_states,
        )
        self.step = self.skipped = 0
        self.seconds = 0.0
        self.stopped = self._opened = False
        self._signal: int | None = None
        self._next_line = 0
        self._first_random = random_state()

    def open(self, *, resume: bool = False) -> None:
        """Make ready ``config.out``; :meth:`fit` does it where it hasn't been done.

        Args:
            resume: continue from the newest checkpoint, bit for bit as if never stopped; none starts anew.

        Raises:
            ValueError: ``config.out`` already holds a run and ``resume`` isn't set, or its checkpoint doesn't
            fit.
        """
        self._opened = True
        if self.config.out is None:
            return
        out = Path(self.config.out)
        if not resume:
            check_vacant(out)
        out.mkdir(parents=True, exist_ok=True)
        if found := latest_checkpoint(out / "checkpoints"):
            self.load_checkpoint(found)

    def fit(self, *, resume: bool = False) -> dict[str, Any]:
        """Run to the end, or to SIGINT or SIGTERM, which finish the step, write a checkpoint and set
        ``stopped``.

        With ``config.out`` the run directory gets log.jsonl, checkpoints/ and at the end config.json and
        model.safetensors (with the coasts of RowAdam's idle rows paid; the checkpoint keeps them pending).

        Args:
            resume: see :meth:`open`.

        Returns:
            The last logged row, with ``skipped`` and ``seconds``.

        Raises:
            ValueError: see :meth:`open`.
            NotFinite: a batch held NaN or Inf and ``config.on_nan`` is "stop"; a checkpoint is written first.
        """
        from tqdm import tqdm

        if not self._opened:
            self.open(resume=resume)
        self.stopped, self._signal = False, None
        out = None if self.config.out is None else Path(self.config.out)
        log, row = None, {}
        if out is not None:
            log = RunLog(out, self.step, tensorboard=self.config.tensorboard, wandb=self.config.wandb)
            row = (read_log(log.path) or [{}])[-1]
        # a bar on a terminal; elsewhere a line now and then
        disable = None if self.config.progress else True
        bar = tqdm(total=self.n_steps, initial=self.step, unit="step", desc="train", disable=disable)
        try:
            with bar, _signals(self._request_stop):
                for row in self._steps():
                    if log is not None:
                        log.write(row)
                    bar.set_postfix_str(_summary(row), refresh=False)
                    bar.update(self.step - bar.n)
                    if bar.disable and self.config.progress and self.step >= self._next_line:
                        _log.info("step %d of %d: %s", self.step, self.n_steps, _summary(row))
                        self._next_line = self.step + max(1, self.n_steps // 10)
        finally:
            if log is not None:
                log.close()
        if out is not None:
            self.save_checkpoint()
            self.sae.save(out)
        return row | {"skipped": self.skipped, "seconds": round(self.seconds, 3)}

    def _steps(self) -> Iterator[dict[str, Any]]:
        """Train to the end; yield the rows to be logged."""
        config, start, since, tokens = self.config, time.perf_counter(), self.step, 0
        batches, metrics = self._batches(), {}
        drop_batches(self.opt)  # of a step that an error broke off
        while self.step < self.n_steps and not self.stopped:
            taken = self._take_step(batches)
            if taken is None:
                _log.warning("the activations ended after %d of %d steps", self.step, self.n_steps)
                break
            metrics, tokens = taken[0], tokens + taken[1]
            self.step += 1
            self.stopped = self._signal is not None
            if metrics["skipped"]:
                self._skip()
            if self.step % config.log_every == 0 or self.step == self.n_steps or self.stopped:
                yield self._row(metrics, tokens, start)
                start, since, tokens = time.perf_counter(), self.step, 0
            if config.out and config.checkpoint_every and self.step % config.checkpoint_every == 0:
                self.save_checkpoint()
        if self.step > since:  # the activations ended between two rows
            yield self._row(metrics, tokens, start)

    def _take_step(self, batches: Iterator) -> tuple[dict[str, Tensor], int] | None:
        """Take a step; return its metrics and tokens, or None where too few batches are left for one."""
        rise = min(1.0, (self.step + 1) / max(1, round(self.config.sparsity_warmup * self.n_steps)))
        scale = {term.name: rise for term in self.sae.config.losses if term.name in _SPARSITY_TERMS}
        metrics, tokens = {}, 0
        for left in reversed(range(self.config.accumulate)):
            batch = next(batches, None)
            if batch is None:
                drop_batches(self.opt)
                return None
            x, target = self._unpack(batch)
            tokens += x.shape[:-1].numel()
            if not left:
                for group in self.opt.param_groups:
                    group["lr"] = self._lr()
            metrics = train_step(self.sae, self.opt, x, target, scale, accumulate=left > 0)
        return metrics, tokens

    def _unpack(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Input and target of a batch, where and as the weights are."""
        parts = batch if isinstance(batch, tuple | list) else [batch]
        if len(parts) not in (1, 2):
            reject("activations", f"a batch of {len(parts)} parts", "a tensor, or a pair of input and target")
        x, target = (*parts, None)[:2]
        x = x.x if isinstance(x, Activations) else x
        if isinstance(x, dict):
            if self.config.hook not in x:
                reject("hook", repr(self.config.hook), f"one of the batches' {sorted(x)}")
            x = x[self.config.hook]
        device, dtype = self.sae.W_enc.device, self.sae.dtype
        x = x.to(device, dtype)
        return x, None if target is None else target.to(device, dtype)

    def _skip(self) -> None:
        self.skipped += 1
        if self.config.on_nan == "stop":
            if self.config.out:
                self.save_checkpoint(stopped_at_nan=True)
            batch = "the batch" if self.config.accumulate == 1 else "a batch"
            raise NotFinite(
                f"activations: got NaN or Inf in {batch} of step {self.step}, expected finite numbers"
                " (on_nan = skip leaves such steps out)"
            )

    def _row(self, metrics: dict[str, Tensor], tokens: int, start: float) -> dict[str, Any]:
        """The row of the last step; ``tokens``: how many were trained on since ``start``."""
        seconds = time.perf_counter() - start
        self.seconds += seconds
        numbers = {name: t.item() for name, t in metrics.items() if name not in ("n_dead", "skipped")}
        return {
            "step": self.step,
            "tokens": int(self.sae.tokens_seen),
            **{name: value if value == value else None for name, value in numbers.items()},  # JSON has no NaN
            "dead_share": len(self.sae.dead_latents(self.config.dead_after)) / self.sae.config.n_latents,
            "lr": self.opt.param_groups[0]["lr"],
            "tokens_per_s": tokens / seconds,
            "skipped": self.skipped,
        }

    def _lr(self) -> float:
        """The rate of the next step: linear warm-up, plateau, linear decay towards 0."""
        done, total = self.step, self.n_steps
        rise = (done + 1) / max(1, round(self.config.warmup * total))
        fall = (total - done) / max(1, round(self.config.decay * total))
        return self.config.lr * min(1.0, rise, fall if self.config.decay else 1.0)

    def _request_stop(self, number: int) -> None:
        self._signal = number

    def _batches(self) -> Iterator:
        if hasattr(self.activations, "load_state_dict") or not self.step:
            return iter(self.activations)
        # draw the used batches again, from the random state in which they were drawn first
        now = random_state()
        restore_random_state(self._first_random)
        batches = iter(self.activations)
        for _ in range(self.step * self.config.accumulate):
            next(batches, None)
        restore_random_state(now)
        return batches

    def save_checkpoint(self, *, stopped_at_nan: bool = False) -> Path:
        """Write everything a resume needs to ``config.out/checkpoints``."""
        data = self.activations.state_dict() if hasattr(self.activations, "state_dict") else None
        tree = {
            "step": self.step,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "run": self._identity(),
            "sae": dict(self.sae.state_dict()),
            "optimizer": self.opt.state_dict(),
            "activations": data,
            "random": random_state(),
            "first_random": self._first_random,
            "stopped_at_nan": stopped_at_nan,
        }
        folder = Path(self.config.out or ".") / "checkpoints"
        return save_checkpoint(folder, self.step, tree, self.config.keep_checkpoints)

    def load_checkpoint(self, path: Path) -> None:
        """Restore :meth:`save_checkpoint`'s; ValueError if it is of another dictionary or length."""
        tree = load_checkpoint(path)
        for name, value in _plain(self._identity()).items():
            if tree["run"].get(name) != value:
                reject("resume", f"a checkpoint with {name} = {tree['run'].get(name)}", f"{name} = {value}")
        if tree["stopped_at_nan"] and self.config.on_nan == "stop":
            reject(
                "resume", f"a run that NaN or Inf stopped at step {tree['step']}", "on_nan = skip to go on"
            )
        self.sae.load_state_dict(tree["sae"])
        self.opt.load_state_dict(tree["optimizer"])
        if hasattr(self.activations, "load_state_dict"):
            self.activations.load_state_dict(tree["activations"])
        self.step, self.skipped, self.seconds = tree["step"], tree["skipped"], tree["seconds"]
        self._first_random = tree["first_random"]
        restore_random_state(tree["random"])

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it continues, or its numbers would differ."""
        names = (
            "accumulate", "lr", "betas", "eps", "mode", "state_dtype", "warmup", "decay", "sparsity_warmup",
        )  # fmt: skip
        return {
            **{name: getattr(self.config, name) for name in names},
            "n_steps": self.n_steps,
            "dtype": str(self.sae.dtype),
            "weight_format": self.sae.weight_format,
            **self.sae.config.to_dict(),
        }


def check_vacant(out: Path) -> None:
    """Raise ValueError if ``out`` already holds a run, or is a file."""
    if out.exists() and not out.is_dir():
        reject("out", f"{out}, which is a file", "a folder")
    if latest_checkpoint(out / "checkpoints") or (out / "log.jsonl").exists():
        reject("out", f"{out}, which holds a run", "another folder, or resume (--resume) to continue it")


def _summary(row: dict[str, Any]) -> str:
    numbers = "NaN batch skipped" if row["fvu"] is None else f"FVU {row['fvu']:.3f}, L0 {row['l0']:.1f}"
    return f"{row['tokens_per_s']:,.0f} tok/s, {numbers}, dead {row['dead_share']:.1%}"


def _plain(value: Any) -> Any:
    """Tuples as lists, as they come back from a checkpoint."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _total_steps(activations: Iterable, config: TrainConfig) -> int:
    if config.n_steps is not None:
        return config.n_steps
    if not isinstance(activations, Sized):
        reject("n_steps", None, "a number of steps, since the activations have no length")
    if 0 < len(activations) < config.accumulate:
        reject("accumulate", config.accumulate, f"at most the {len(activations)} batches of activations")
    return len(activations) // config.accumulate


@contextmanager
def _signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Let SIGINT and SIGTERM ask for a stop; a second one acts as usual. Only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old: dict[int, Any] = {}

    def once(number: int, _frame: Any) -> None:
        signal.signal(number, old[number])
        handle(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        old[number] = signal.signal(number, once)
    try:
        yield
    finally:
        for stop, handler in old.items():
            signal.signal(stop, handler)
