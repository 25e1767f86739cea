"""Quality at equal tokens and at equal seconds, on the demo's real activations."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fastsae.benchmarks.cases import Shape
from fastsae.benchmarks.engine import failure
from fastsae.benchmarks.measure import now
from fastsae.benchmarks.trainers import TRAINERS, Trainer, Unavailable, build
from fastsae.cli import DEMO
from fastsae.data import ActivationStore, Batches, cached_activations, split_rows
from fastsae.training.options import RunOptions

__all__ = ["LRS", "NAMES", "demo_activations", "evaluate", "quality_rows"]

LRS = {
    "fastsae": 3e-3,
    "fastsae split32/int8": 3e-3,
    "dense": 3e-3,
    "dense compiled": 3e-3,
    "sparsify adam": 3e-3,
    "sae_lens": 3e-3,
    "dictionary_learning": 4e-3,
    "overcomplete": 2e-3,
}
"""Learning rates of a run as short as the demo's; a contestant not named here takes its own default.

Ours is the demo's. Of the others, the one of 2, 3, 4 and 6e-3 with the least FVU where at most 5 % of 4096
latents are silent (one seed, 2026-11-26); overcomplete leaves half of them silent at any.
"""
NAMES = tuple(name for name in TRAINERS if name != "dense compiled")
"""Compiled, the dense step computes the same."""
MOMENTS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)
"""Shares of a run after which it is evaluated: dense at the start, for contestants many times slower."""
CURVE_TOKENS = 4096
"""Held-out tokens at those moments; at the end all of them."""
SAMPLE_TOKENS = 16_384


class _Data(NamedTuple):
    """Batches that every contestant sees alike; tokens for its normalisation; tokens held out."""

    batches: Batches
    sample: Tensor
    held_out: Tensor


def quality_rows(
    names: Iterable[str] = NAMES, *, latents: int = 4096, k: int = DEMO["k"], tokens: int = DEMO["tokens"],
    batch_size: int = DEMO["batch_size"], lrs: Mapping[str, float] = LRS, device: str = "cpu",
    say: Callable[[dict[str, Any]], Any] = lambda row: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train each contestant on the same batches in the same order; rows at equal tokens, then at equal
    seconds: what it had reached, as last evaluated, when the fastest had seen all tokens.

    Seconds are those of the steps alone. Figures at equal tokens are of all held-out tokens, those of the
    curve and at equal seconds of CURVE_TOKENS.
    """
    data = _data(tokens, batch_size)
    shape, steps = Shape(batch_size, data.sample.shape[1], latents, k), len(data.batches)
    rows: list[dict[str, Any]] = []
    runs: dict[str, list[dict[str, Any]]] = {}
    used: dict[str, float | None] = dict(lrs)

    def add(name: str, at: str, found: dict[str, Any]) -> None:
        row = {"op": "quality", "backend": name, **shape._asdict(), "dtype": "float32", "lr": used.get(name)}
        row |= dict.fromkeys(("tokens", "seconds", "fvu", "dead_share", "l0", "curve"))
        rows.append(row | {"at": at, "note": "", "failed": False} | found)
        say(rows[-1])

    for name in names:
        trainer = None  # the last one's memory is free
        gc.collect()
        try:
            trainer = build(name, shape, device, steps=steps, lr=lrs.get(name), sample=data.sample)
            used.setdefault(name, _default_lr(trainer))
            moments = _train(trainer, data, device)
            found = moments[-1] | evaluate(trainer, data.held_out.to(device))
            found["curve"] = [[m["seconds"], m["tokens"], m["fvu"]] for m in moments]
            found["note"] = f"{trainer.note}; on {len(data.held_out):,} held-out tokens"
            runs[name] = moments
        except Unavailable as reason:
            found = {"note": f"skipped: {reason}"}
        except Exception as error:  # another library may raise anything, and ends its own run alone
            found = failure(error)
        add(name, "equal tokens", found)
    budget = min((moments[-1]["seconds"] for moments in runs.values()), default=0.0)
    for name, moments in runs.items():
        add(name, "equal seconds", _reached(moments, budget))
    return rows


def _data(tokens: int, batch_size: int) -> _Data:
    """The demo's activations, split as a run splits them."""
    options = RunOptions(**DEMO | {"out": "", "tokens": tokens, "batch_size": batch_size})
    store, train, held_out = demo_activations(options)
    batches = Batches(store, batch_size, rows=train, seed=options.seed, n_tokens=tokens)
    return _Data(batches, store[train[:SAMPLE_TOKENS]], store[held_out])


def demo_activations(options: RunOptions) -> tuple[ActivationStore, np.ndarray, np.ndarray]:
    """The demo's activations, and which rows of them are trained on and held out."""
    store = cached_activations(
        DEMO["model"], DEMO["hook"], DEMO["text"], context=options.context,
        n_tokens=DEMO["tokens"] + options.held_out, progress=False,
    )  # fmt: skip
    return store, *split_rows(len(store), min(options.held_out, len(store) // 10), options.seed)


def _train(trainer: Trainer, data: _Data, device: str) -> list[dict[str, Any]]:
    """Train on all batches; the figures at MOMENTS, with the seconds that the steps had taken."""
    steps, done, seconds, moments = len(data.batches), 0, 0.0, []
    few, batches = data.held_out[:CURVE_TOKENS].to(device), iter(data.batches)
    for end in sorted({max(1, round(share * steps)) for share in MOMENTS}):
        part = [batch.to(device) for batch in islice(batches, end - done)]
        start = now(device)
        for x in part:
            trainer.step(x)
        seconds, done = seconds + now(device) - start, end
        seen = {"seconds": seconds, "tokens": done * data.batches.batch_size}
        moments.append(seen | evaluate(trainer, few))
    return moments


def evaluate(trainer: Trainer, x: Tensor, batch: int = 1024) -> dict[str, float]:
    """Quality on raw x [T, D]: FVU = sum ||x - x_hat||^2 / sum ||x - mean||^2, the mean that of x; L0; the
    share of latents silent on all of x."""
    error = active = 0.0
    fired: Any = False
    for part in x.split(batch):
        error += (trainer.reconstruct(part).double() - part.double()).square().sum().item()
        on = trainer.encode(part) != 0
        active, fired = active + on.sum().item(), on.any(0) | fired
    spread = (x.double() - x.double().mean(0)).square().sum().item()
    return {"fvu": error / spread, "l0": active / len(x), "dead_share": 1 - fired.double().mean().item()}


def _default_lr(trainer: Trainer) -> float | None:
    """The learning rate that a library chose by itself."""
    group = trainer.optimizer.param_groups[0] if trainer.optimizer else {}
    return group.get("initial_lr", group.get("lr"))


def _reached(moments: list[dict[str, Any]], budget: float) -> dict[str, Any]:
    """The last moment within ``budget`` seconds."""
    within = [m for m in moments if m["seconds"] <= budget]
    if not within:
        return {"note": f"not yet evaluated after {budget:.1f} s"}
    early = within[-1]["tokens"] < moments[-1]["tokens"]
    note = f"on at most {CURVE_TOKENS:,} held-out tokens"
    return within[-1] | {"note": note + early * "; its learning rate had not fully decayed by then"}
