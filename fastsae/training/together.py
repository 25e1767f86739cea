"""The training loop: one dictionary, or several in lockstep on one stream of activations."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from fastsae.checks import reject
from fastsae.training.checkpoint import (
    checkpoints,
    latest_checkpoint,
    prune_checkpoints,
    random_state,
    remove_checkpoint,
    restore_random_state,
)
from fastsae.training.logs import RunLog, read_log

if TYPE_CHECKING:
    from fastsae.training.trainer import Trainer

__all__ = ["check_vacant", "fit_together", "open_together"]

_log = logging.getLogger("fastsae")

Row = dict[str, Any]


@overload
def fit_together(
    trainers: Mapping[str, Trainer], activations: Iterable, *, resume: bool = False
) -> dict[str, Row]: ...


@overload
def fit_together(
    trainers: Sequence[Trainer], activations: Iterable, *, resume: bool = False
) -> list[Row]: ...


def fit_together(
    trainers: Mapping[str, Trainer] | Sequence[Trainer], activations: Iterable, *, resume: bool = False
) -> dict[str, Row] | list[Row]:
    """Train several dictionaries in lockstep on one stream: each batch is drawn once and given to all.

    Each learns what ``Trainer.fit`` would teach it alone, bit for bit, in a run directory of its own. SIGINT
    and SIGTERM finish the step of all, write all checkpoints and set ``stopped``.

        stores = cached_activations("minilm", hooks, text)
        batches = Batches(stores, 4096)
        trainers = {hook: Trainer(sae, batches, TrainConfig(out=f"runs/{hook}", hook=hook))
                    for hook, sae in saes.items()}
        fit_together(trainers, batches)

    One batch is in memory at a time, beside what the steps of all dictionaries need.

    Args:
        trainers: by name, or in a list; all over ``activations`` itself, and with the same n_steps,
            accumulate and checkpoint_every.
        activations: see :class:`Trainer`.
        resume: continue from the newest step of which all have a checkpoint, bit for bit as if never stopped;
            no checkpoint at all starts anew.

    Returns:
        For each trainer what ``Trainer.fit`` returns, in a dict by name or in a list.

    Raises:
        ValueError: trainers that don't go together, or no step of which all have a checkpoint; see
            ``Trainer.open``.
        NotFinite: a batch held NaN or Inf and some ``on_nan`` is "stop"; all checkpoints are written first.
    """
    named = dict(trainers) if isinstance(trainers, Mapping) else _numbered(trainers)
    _check_together(named, activations)
    if unopened := {name: trainer for name, trainer in named.items() if not trainer._opened}:
        open_together(unopened, resume=resume)
    _check_same({name: trainer.step for name, trainer in named.items()}, "step")
    rows = _Loop(named, activations).run()
    return rows if isinstance(trainers, Mapping) else list(rows.values())


def open_together(trainers: Mapping[str, Trainer], *, resume: bool = False) -> None:
    """Make ready the run directories of ``trainers``; :func:`fit_together` does it where it hasn't been done.

    Args:
        resume: see :func:`fit_together`.

    Raises:
        ValueError: a directory holds a run and ``resume`` isn't set, two trainers share one, there is no step
            of which all have a checkpoint, or a checkpoint doesn't fit.
    """
    outs = {name: Path(t.config.out) for name, t in trainers.items() if t.config.out is not None}
    if len({out.absolute() for out in outs.values()}) < len(outs):
        reject("out", ", ".join(map(str, outs.values())), "a folder for each dictionary")
    if not resume:
        for out in outs.values():
            check_vacant(out)
    for out in outs.values():
        out.mkdir(parents=True, exist_ok=True)
    found = {name: checkpoints(outs[name] / "checkpoints") if name in outs else {} for name in trainers}
    if any(found.values()):
        step = _newest_common(found)
        for name, trainer in trainers.items():
            trainer.load_checkpoint(found[name][step])
        for later in (path for of_one in found.values() for n, path in of_one.items() if n > step):
            remove_checkpoint(later)  # some had it, and a kill kept it from the others
    for trainer in trainers.values():
        trainer._opened = True


def check_vacant(out: Path) -> None:
    """Raise ValueError if ``out`` already holds a run, or is a file."""
    if out.exists() and not out.is_dir():
        reject("out", f"{out}, which is a file", "a folder")
    if latest_checkpoint(out / "checkpoints") or (out / "log.jsonl").exists():
        reject("out", f"{out}, which holds a run", "another folder, or resume (--resume) to continue it")


class _Loop:
    """A fit under way: the trainers take every step together.

    rows: for each trainer the last one logged.
    """

    def __init__(self, trainers: dict[str, Trainer], activations: Iterable) -> None:
        self.trainers, self.activations = trainers, activations
        self.first = next(iter(trainers.values()))
        self.outs = {name: Path(t.config.out) for name, t in trainers.items() if t.config.out is not None}
        self.rows: dict[str, Row] = {name: {} for name in trainers}
        self.signal: int | None = None
        self.next_line = 0

    def run(self) -> dict[str, Row]:
        """Train to the end or to a signal, and write what each run directory gets."""
        from tqdm import tqdm

        for trainer in self.trainers.values():
            trainer.stopped = False
        progress = any(trainer.config.progress for trainer in self.trainers.values())
        # a bar on a terminal; elsewhere a line now and then
        bar = tqdm(
            total=self.first.n_steps, initial=self.first.step, unit="step", desc="train",
            disable=None if progress else True,
        )  # fmt: skip
        with ExitStack() as stack:
            logs = {}
            for name, out in self.outs.items():
                config = self.trainers[name].config
                log = RunLog(out, self.first.step, tensorboard=config.tensorboard, wandb=config.wandb)
                logs[name] = stack.enter_context(closing(log))
                self.rows[name] = (read_log(log.path) or [{}])[-1]
            stack.enter_context(bar)
            stack.enter_context(_signals(self.request_stop))
            for new in self.steps():
                for name in new & logs.keys():
                    logs[name].write(self.rows[name])
                summary = _summary([*self.rows.values()]) if all(self.rows.values()) else ""
                bar.set_postfix_str(summary, refresh=False)
                bar.update(self.first.step - bar.n)
                if bar.disable and progress and self.first.step >= self.next_line:
                    _log.info("step %d of %d: %s", self.first.step, self.first.n_steps, summary)
                    self.next_line = self.first.step + max(1, self.first.n_steps // 10)
        self.save()
        for name, out in self.outs.items():
            self.trainers[name].sae.save(out)
        return {name: self.rows[name] | trainer._totals() for name, trainer in self.trainers.items()}

    def steps(self) -> Iterator[set[str]]:
        """Train to the end; yield the names of the trainers that have a row to be logged."""
        first, trainers, batches = self.first, self.trainers, self.batches()
        for trainer in trainers.values():
            trainer._drop_batches()  # of a step that an error broke off
            trainer._begin()
        while first.step < first.n_steps and not first.stopped:
            if not self.take_step(batches):
                _log.warning("the activations ended after %d of %d steps", first.step, first.n_steps)
                break
            for trainer in trainers.values():
                trainer.stopped = self.signal is not None
            if failed := [trainer for trainer in trainers.values() if trainer._failed]:
                self.save()
                failed[0]._raise_not_finite()
            if due := {name for name, trainer in trainers.items() if trainer._row_is_due}:
                yield from self.make_rows(due)
            every = first.config.checkpoint_every
            if every and first.step % every == 0:
                self.save()
        yield from self.make_rows({name for name, trainer in trainers.items() if trainer._unlogged})

    def take_step(self, batches: Iterator) -> bool:
        """Give a step's batches to all, one after the other; False where too few are left for one."""
        for left in reversed(range(self.first.config.accumulate)):
            batch = next(batches, None)
            if batch is None:
                for trainer in self.trainers.values():
                    trainer._drop_batches()
                return False
            for trainer in self.trainers.values():
                if left:
                    trainer._keep_batch(batch)
                else:
                    trainer._take_step(batch)
        return True

    def make_rows(self, names: set[str]) -> Iterator[set[str]]:
        if names:
            self.rows |= {name: self.trainers[name]._row() for name in self.trainers if name in names}
            yield names
            for name in names:
                self.trainers[name]._begin()

    def request_stop(self, number: int) -> None:
        self.signal = number

    def batches(self) -> Iterator:
        if not self.first.step:
            now = random_state()
            for trainer in self.trainers.values():
                trainer._first_random = now
        if hasattr(self.activations, "load_state_dict") or not self.first.step:
            return iter(self.activations)
        # draw the used batches again, from the random state in which they were drawn first
        now = random_state()
        restore_random_state(self.first._first_random)
        batches = iter(self.activations)
        for _ in range(self.first.step * self.first.config.accumulate):
            next(batches, None)
        restore_random_state(now)
        return batches

    def save(self) -> None:
        """Write the checkpoints of all and then remove old ones, so that after a kill all share a step."""
        several = len(self.outs) > 1
        for name in self.outs:
            self.trainers[name].save_checkpoint(spare=int(several))
        if several:
            for name, out in self.outs.items():
                prune_checkpoints(out / "checkpoints", self.trainers[name].config.keep_checkpoints)


def _numbered(trainers: Sequence[Trainer]) -> dict[str, Trainer]:
    return {str(i): trainer for i, trainer in enumerate(trainers)}


def _check_together(trainers: dict[str, Trainer], activations: Iterable) -> None:
    if not trainers:
        reject("trainers", "none", "at least one")
    for name, trainer in trainers.items():
        if trainer.activations is not activations:
            reject("trainers", f"other activations in {name!r}", "the same object in all, and as activations")
    if len({id(trainer.sae) for trainer in trainers.values()}) < len(trainers):
        reject("trainers", "one dictionary in two of them", "a dictionary for each")
    _check_same({name: trainer.n_steps for name, trainer in trainers.items()}, "n_steps")
    for option in ("accumulate", "checkpoint_every"):
        _check_same({name: getattr(t.config, option) for name, t in trainers.items()}, option)


def _check_same(values: dict[str, Any], name: str) -> None:
    if len(set(values.values())) > 1:
        got = ", ".join(f"{value} for {key!r}" for key, value in values.items())
        reject(name, got, "the same for all dictionaries that are trained together")


def _newest_common(found: dict[str, dict[int, Path]]) -> int:
    """The newest step of which all have a checkpoint."""
    if not (common := set.intersection(*(set(steps) for steps in found.values()))):
        newest = {name: max(steps, default="none") for name, steps in found.items()}
        got = ", ".join(f"{step} for {name!r}" for name, step in newest.items())
        reject("resume", f"checkpoints at different steps ({got})", "one step of which all have a checkpoint")
    return max(common)


def _summary(rows: list[Row]) -> str:
    """The numbers of a row; of several the range."""
    speed = f"{min(row['tokens_per_s'] for row in rows):,.0f} tok/s"
    dead = _range([row["dead_share"] for row in rows], "{:.1%}")
    if any(row["fvu"] is None for row in rows):
        return f"{speed}, NaN batch skipped, dead {dead}"
    fvu, l0 = (
        _range([row[name] for row in rows], form) for name, form in (("fvu", "{:.3f}"), ("l0", "{:.1f}"))
    )
    return f"{speed}, FVU {fvu}, L0 {l0}, dead {dead}"


def _range(values: list[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


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
