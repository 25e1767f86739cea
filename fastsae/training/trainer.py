"""The trainer: fused steps over a stream of activations, with schedules, logs, checkpoints and resume."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from fastsae.checks import FastSAEError, check_choice, check_number, check_type, reject
from fastsae.data import Activations
from fastsae.optim import RowAdam
from fastsae.policies import AuxK, PreActivation
from fastsae.sae import SAE
from fastsae.training.checkpoint import (
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from fastsae.training.logs import check_sinks
from fastsae.training.starts import resample_
from fastsae.training.step import drop_batches, train_step
from fastsae.training.together import fit_together, open_together

__all__ = ["NotFinite", "TrainConfig", "Trainer", "pick"]


class NotFinite(FastSAEError, ArithmeticError):
    """A batch with NaN or Inf met a run that is told to stop there."""


@dataclass(frozen=True)
class TrainConfig:
    """How a dictionary is trained.

    Args:
        out: run directory, see ``Trainer.fit``; None writes nothing.
        hook: which entry of the batches to train on, where they are dicts by hook; several are put side by
        side, [n, sum of their widths], as a crosscoder's input.
        target_hook: which entry is a transcoder's target, where they are dicts by hook.
        n_steps: optimizer steps in all; None takes ``len(activations) // accumulate``.
        accumulate: batches per optimizer step, see :func:`train_step`. Schedules, logs, checkpoints and skips
        go by steps. Where the activations end within a step, its batches are left out.
        lr, betas, eps, mode, state_dtype, seed, host_states: of :class:`fastsae.optim.RowAdam`.
        warmup, decay, sparsity_warmup: over how much of the run the learning rate rises linearly from 0, at
            its end falls linearly to 0, and sparsity coefficients (of all penalties but PreActivation) rise
            linearly from 0: a share of the run up to 1, above it a number of steps.
        threshold_rate: what JumpReLU's thresholds learn at, as a multiple of the learning rate. In log theta
            a step is at most the rate: a short run needs more.
        clip: see :func:`train_step`.
        resample_every: resample dead latents (:func:`fastsae.training.resample_`) by the batch of every so
            many steps, until the learning rate falls; None: never.
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
    hook: str | tuple[str, ...] | None = None
    target_hook: str | None = None
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
    threshold_rate: float = 1.0
    clip: float | None = None
    resample_every: int | None = None
    on_nan: Literal["skip", "stop"] = "skip"
    log_every: int = 10
    checkpoint_every: int | None = 1000
    keep_checkpoints: int = 2
    dead_after: int | None = None
    tensorboard: bool = False
    wandb: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        self._check_hooks()
        for name in ("warmup", "decay", "sparsity_warmup"):
            check_number(name, getattr(self, name), low=0.0)
        if max(self.warmup, self.decay) <= 1 < self.warmup + self.decay:
            reject("warmup + decay", self.warmup + self.decay, "at most 1")
        check_number("threshold_rate", self.threshold_rate, low=0.0)
        if self.clip is not None:
            check_number("clip", self.clip, low=0.0, open_low=True)
        check_choice("on_nan", self.on_nan, ("skip", "stop"))
        for name in ("accumulate", "log_every", "keep_checkpoints"):
            check_number(name, getattr(self, name), integer=True, low=1)
        for name in ("n_steps", "checkpoint_every", "dead_after", "resample_every"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), integer=True, low=1)
        check_sinks(self.tensorboard, self.wandb)

    def _check_hooks(self) -> None:
        if isinstance(self.hook, list):
            object.__setattr__(self, "hook", tuple(self.hook))
        check_type("hook", self.hook, (str, tuple, type(None)), "a hook, several of them, or None")
        check_type("target_hook", self.target_hook, (str, type(None)), "a hook or None")
        if isinstance(self.hook, tuple) and (not self.hook or len(set(self.hook)) < len(self.hook)):
            reject("hook", list(self.hook), "different hooks, at least one")


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
        self._first_random = random_state()
        self._metrics: dict[str, Tensor] = {}
        self._tokens = self._kept_tokens = 0  # trained on since the last row; of batches kept for a step
        self._begin()

    def open(self, *, resume: bool = False) -> None:
        """Make ready ``config.out``; :meth:`fit` does it where it hasn't been done.

        Args:
            resume: continue from the newest checkpoint, bit for bit as if never stopped; none starts anew.

        Raises:
            ValueError: ``config.out`` already holds a run and ``resume`` isn't set, or its checkpoint doesn't
            fit.
        """
        open_together({"": self}, resume=resume)

    def fit(self, *, resume: bool = False) -> dict[str, Any]:
        """Run to the end, or to SIGINT or SIGTERM, which finish the step, write a checkpoint and set
        ``stopped``. See :func:`fit_together` for several dictionaries on the same activations.

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
        return fit_together([self], self.activations, resume=resume)[0]

    # What follows is called by the loop of fastsae.training.together.

    def _begin(self) -> None:
        """Start the interval that the next row is about."""
        self._start, self._since, self._tokens = time.perf_counter(), self.step, 0

    def _keep_batch(self, batch: Any) -> None:
        """Take in a batch of a step that needs more."""
        self._feed(batch, accumulate=True)

    def _take_step(self, batch: Any) -> None:
        """Take a step on ``batch``, its last, and those kept."""
        for group in self.opt.param_groups:
            thresholds = any(p is self.sae._parameters.get("log_threshold") for p in group["params"])
            group["lr"] = self._lr() * (self.config.threshold_rate if thresholds else 1.0)
        self._metrics = self._feed(batch, accumulate=False)
        self._resample(batch)
        self._tokens, self._kept_tokens = self._tokens + self._kept_tokens, 0
        self.step += 1
        self.skipped += int(self._metrics["skipped"])

    def _feed(self, batch: Any, *, accumulate: bool) -> dict[str, Tensor]:
        rise = min(1.0, (self.step + 1) / max(1, self._steps(self.config.sparsity_warmup)))
        losses = self.sae.config.losses
        scale = {term.name: rise for term in losses if not isinstance(term, AuxK | PreActivation)}
        x, target = self._tensors(batch)
        self._kept_tokens += x.shape[:-1].numel()
        clip = None if accumulate else self.config.clip
        return train_step(self.sae, self.opt, x, target, scale, accumulate=accumulate, clip=clip)

    def _tensors(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Input and target of a batch, where and as the weights are."""
        device, dtype = self.sae.W_enc.device, self.sae.dtype
        x, target = pick(batch, self.config.hook, self.config.target_hook)
        return x.to(device, dtype), None if target is None else target.to(device, dtype)

    def _resample(self, batch: Any) -> None:
        """After a step, where it is time to."""
        every, done = self.config.resample_every, self.step + 1
        falling = done > self.n_steps - self._steps(self.config.decay)
        if every and not done % every and not falling and not self._metrics["skipped"]:
            dead = self.sae.dead_mask(self.config.dead_after)
            resample_(self.sae, self.opt, *self._tensors(batch), dead=dead, seed=self.config.seed + done)

    def _steps(self, length: float) -> int:
        """A share of the run, or a number of steps, in steps."""
        return round(length * self.n_steps) if length <= 1 else min(round(length), self.n_steps)

    def _drop_batches(self) -> None:
        """Forget the batches of a step that won't be taken."""
        drop_batches(self.opt)
        self._kept_tokens = 0

    @property
    def _failed(self) -> bool:
        """Whether the last step met NaN or Inf that is to stop the run."""
        return self.config.on_nan == "stop" and bool(self._metrics) and bool(self._metrics["skipped"])

    def _raise_not_finite(self) -> NoReturn:
        batch = "the batch" if self.config.accumulate == 1 else "a batch"
        raise NotFinite(
            f"activations: got NaN or Inf in {batch} of step {self.step}, expected finite numbers"
            " (on_nan = skip leaves such steps out)"
        )

    @property
    def _row_is_due(self) -> bool:
        return self.step % self.config.log_every == 0 or self.step == self.n_steps or self.stopped

    @property
    def _unlogged(self) -> bool:
        """Whether steps were taken since the last row."""
        return self.step > self._since

    def _row(self) -> dict[str, Any]:
        """The row of the last step."""
        seconds = time.perf_counter() - self._start
        self.seconds += seconds
        numbers = {name: t.item() for name, t in self._metrics.items() if name not in ("n_dead", "skipped")}
        return {
            "step": self.step,
            "tokens": int(self.sae.tokens_seen),
            **{name: value if value == value else None for name, value in numbers.items()},  # JSON has no NaN
            "dead_share": len(self.sae.dead_latents(self.config.dead_after)) / self.sae.config.n_latents,
            "lr": self.opt.param_groups[0]["lr"],
            "tokens_per_s": self._tokens / seconds,
            "skipped": self.skipped,
        }

    def _totals(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "seconds": round(self.seconds, 3)}

    def _lr(self) -> float:
        """The rate of the next step: linear warm-up, plateau, linear decay towards 0."""
        done, total = self.step, self.n_steps
        rise = (done + 1) / max(1, self._steps(self.config.warmup))
        fall = (total - done) / max(1, self._steps(self.config.decay))
        return self.config.lr * min(1.0, rise, fall if self.config.decay else 1.0)

    def save_checkpoint(self, *, spare: int = 0) -> Path:
        """Write everything a resume needs to ``config.out/checkpoints``; keep ``spare`` more than it says."""
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
            "stopped_at_nan": self._failed,
        }
        folder = Path(self.config.out or ".") / "checkpoints"
        return save_checkpoint(folder, self.step, tree, self.config.keep_checkpoints + spare)

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
            "threshold_rate", "clip", "resample_every",
        )  # fmt: skip
        return {
            **{name: getattr(self.config, name) for name in names},
            "n_steps": self.n_steps,
            "dtype": str(self.sae.dtype),
            "weight_format": self.sae.weight_format,
            **self.sae.config.to_dict(),
        }


def pick(
    batch: Any, hook: str | tuple[str, ...] | None = None, target_hook: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Input [n, d_in] and target [n, d_out] of a batch, None where the input is its own target.

    Args:
        batch: a tensor, a dict of tensors by hook, or a pair of either and a target.
        hook, target_hook: see :class:`TrainConfig`.

    Raises:
        ValueError: another number of parts, or no such entry in the dict.
    """
    parts = batch if isinstance(batch, tuple | list) else [batch]
    if len(parts) not in (1, 2):
        reject("activations", f"a batch of {len(parts)} parts", "a tensor, or a pair of input and target")
    x, target = (*parts, None)[:2]
    x = x.x if isinstance(x, Activations) else x
    if target_hook is not None:
        if target is not None or not isinstance(x, dict):
            reject("target_hook", repr(target_hook), "None, since the batches aren't dicts by hook alone")
        target = _entry(x, target_hook, "target_hook")
    if isinstance(hook, tuple):
        if not isinstance(x, dict):
            reject("hook", list(hook), "None, since the batches aren't dicts by hook")
        return torch.cat([_entry(x, one, "hook") for one in hook], -1), target
    return _entry(x, hook, "hook") if isinstance(x, dict) else x, target


def _entry(by_hook: dict[str, Tensor], hook: str | None, name: str) -> Tensor:
    if hook not in by_hook:
        reject(name, repr(hook), f"one of the batches' {sorted(by_hook)}")
    return by_hook[hook]


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
