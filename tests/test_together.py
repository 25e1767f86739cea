"""Several dictionaries in lockstep: each as if alone, one stream, one set of checkpoints after any end."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import weakref

import pytest
import torch

from fastsae import SAE, AuxK, SAEConfig, TopK
from fastsae.data import Batches
from fastsae.training import NotFinite, TrainConfig, Trainer, fit_together
from fastsae.training.checkpoint import checkpoints
from fastsae.training.logs import read_log
from fastsae.training.together import open_together

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainConfig(lr=1e-2, log_every=1, checkpoint_every=5, progress=False)
WIDTHS = {"a": 8, "b": 6}
# hook, target_hook and the dictionary's widths
KINDS = {
    "a": ("a", None, 8, 8),
    "b": ("b", None, 6, 6),
    "transcoder": ("a", "b", 8, 6),
    "crosscoder": (("a", "b"), None, 14, 14),
}


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(640, width, generator=generator) for name, width in WIDTHS.items()}


def make(kind, out, stream, **changes):
    """A trainer of a new dictionary on ``stream``."""
    hook, target, d_in, d_out = KINDS[kind]
    torch.manual_seed(3)
    sae = SAE(SAEConfig(d_in, 32, TopK(3), d_out=d_out, losses=(AuxK(1 / 8, 4, 200),)))
    out = None if out is None else out / kind
    return Trainer(
        sae, stream, dataclasses.replace(CONFIG, out=out, hook=hook, target_hook=target, **changes)
    )


def make_all(out, stream, kinds=KINDS, **changes):
    return {kind: make(kind, out, stream, **changes) for kind in kinds}


def same(a, b):
    """Whether weights, counters and optimizer states are equal to the bit."""
    states = [
        [*t.sae.state_dict().values(), *(v for s in t.opt.state_dict()["state"].values() for v in s.values())]
        for t in (a, b)
    ]
    return all(
        torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q for p, q in zip(*states, strict=True)
    )


def numbers(out):
    return [
        {name: value for name, value in row.items() if name != "tokens_per_s"}
        for row in read_log(out / "log.jsonl")
    ]


def interrupt(trainer, step, act):
    """Let ``act`` run while ``trainer`` takes its step ``step``."""
    take = trainer._take_step

    def interrupted(batch):
        if trainer.step == step - 1:
            act()
        take(batch)

    trainer._take_step = interrupted


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"state_dtype": "int8"}])
def test_each_is_what_it_would_be_alone(tmp_path, x, changes):
    def stream():
        return Batches(x, 32, seed=1, n_tokens=1280)

    together = make_all(tmp_path / "together", batches := stream(), **changes)
    final = fit_together(together, batches)
    assert final.keys() == KINDS.keys()
    for kind in KINDS:
        alone = make(kind, tmp_path / "alone", stream(), **changes)
        row = alone.fit()
        assert row["loss"] == final[kind]["loss"]
        assert same(together[kind], alone)
        assert numbers(tmp_path / "together" / kind) == numbers(tmp_path / "alone" / kind)
        a, b = (SAE.load(tmp_path / name / kind).state_dict() for name in ("together", "alone"))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_each_batch_is_drawn_once_and_let_go(x):
    class Stream:
        """A list of batches that notes what was drawn, and whether the batch before it is still there."""

        def __init__(self):
            self.drawn, self.kept = 0, []

        def __len__(self):
            return 20

        def __iter__(self):
            last = []
            for rows in torch.arange(640).split(32):
                self.kept.append(sum(ref() is not None for ref in last))
                self.drawn += 1
                batch = {name: t[rows] for name, t in x.items()}
                last = [weakref.ref(t) for t in batch.values()]
                yield batch
                del batch

    rows = fit_together([*make_all(None, stream := Stream()).values()], stream)
    assert [row["step"] for row in rows] == [20] * 4
    assert stream.drawn == 20
    assert stream.kept == [0] * 20


@pytest.mark.parametrize("kind", ["batches", "list"])
def test_an_interrupted_fit_resumes_bit_for_bit(tmp_path, x, kind):
    def stream():
        batches = Batches(x, 32, seed=1)
        return batches if kind == "batches" else list(batches)

    whole = make_all(tmp_path / "whole", s := stream())
    fit_together(whole, s)
    parts = make_all(tmp_path / "parts", s := stream())
    interrupt(parts["b"], 8, ctrl_c)
    fit_together(parts, s)
    assert {(t.step, t.stopped) for t in parts.values()} == {(8, True)}
    assert {max(checkpoints(tmp_path / "parts" / name / "checkpoints")) for name in KINDS} == {8}
    torch.manual_seed(99)
    again = make_all(tmp_path / "parts", s := stream())
    fit_together(again, s, resume=True)
    for name in KINDS:
        assert same(again[name], whole[name])
        assert numbers(tmp_path / "parts" / name) == numbers(tmp_path / "whole" / name)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_between_two_checkpoints_costs_a_few_steps(tmp_path, x, keep):
    """The first dictionary's checkpoint of step 15 is there, the second one's isn't."""

    def stream():
        return Batches(x, 32, seed=1)

    class Killed(BaseException):
        pass

    whole = make_all(tmp_path / "whole", s := stream(), "ab")
    fit_together(whole, s)
    parts = make_all(tmp_path / "parts", s := stream(), "ab", keep_checkpoints=keep)
    save = parts["b"].save_checkpoint

    def killed(**options):
        if parts["b"].step == 15:
            raise Killed
        return save(**options)

    parts["b"].save_checkpoint = killed
    with pytest.raises(Killed):
        fit_together(parts, s)
    steps = [[*checkpoints(tmp_path / "parts" / name / "checkpoints")] for name in "ab"]
    assert (steps[0][-1], steps[1][-1]) == (15, 10)
    again = make_all(tmp_path / "parts", s := stream(), "ab", keep_checkpoints=keep)
    open_together(again, resume=True)
    assert [t.step for t in again.values()] == [10, 10]
    interrupt(again["a"], 12, ctrl_c)
    fit_together(again, s)
    assert [t.step for t in again.values()] == [12, 12]
    steps = [[*checkpoints(tmp_path / "parts" / name / "checkpoints")] for name in "ab"]
    assert steps == [[12]] * 2 if keep == 1 else [[10, 12]] * 2
    again = make_all(tmp_path / "parts", s := stream(), "ab", keep_checkpoints=keep)
    fit_together(again, s, resume=True)
    for name in "ab":
        assert same(again[name], whole[name])
        assert numbers(tmp_path / "parts" / name) == numbers(tmp_path / "whole" / name)


def test_checkpoints_at_different_steps_are_refused(tmp_path, x):
    s = Batches(x, 32, seed=1)
    make("a", tmp_path, s).fit()
    before = (tmp_path / "a/model.safetensors").read_bytes()
    trainers = make_all(tmp_path, s, "ab")
    with pytest.raises(
        ValueError, match=r"resume: got checkpoints at different steps \(20 for 'a', none for 'b'\)"
    ):
        fit_together(trainers, s, resume=True)
    with pytest.raises(ValueError, match=r"out: got .*/a, which holds a run"):
        fit_together(trainers, s)
    trainers["a"].open(resume=True)
    with pytest.raises(ValueError, match="step: got 20 for 'a', 0 for 'b', expected the same"):
        fit_together(trainers, s)
    assert (tmp_path / "a/model.safetensors").read_bytes() == before


def test_nothing_is_touched_where_one_directory_is_taken(tmp_path, x):
    s = Batches(x, 32, seed=1)
    make("b", tmp_path, s).fit()
    with pytest.raises(ValueError, match=r"out: got .*/b, which holds a run"):
        fit_together(make_all(tmp_path, s, "ab"), s)
    assert not (tmp_path / "a").exists()


def test_trainers_that_do_not_go_together(tmp_path, x):
    s, other = Batches(x, 32, seed=1), Batches(x, 32, seed=1)
    a = make("a", None, s)

    def refused(message, *trainers):
        with pytest.raises(ValueError, match=message):
            fit_together(trainers, s)

    refused("trainers: got none, expected at least one")
    refused("trainers: got other activations in '1'", a, make("b", None, other))
    refused("trainers: got one dictionary in two", a, a)
    refused("n_steps: got 20 for '0', 7 for '1', expected the same", a, make("b", None, s, n_steps=7))
    refused("checkpoint_every: got 5 for '0', 4 for '1'", a, make("b", None, s, checkpoint_every=4))
    refused("accumulate: got 1 for '0', 2 for '1'", a, make("b", None, s, n_steps=20, accumulate=2))
    with pytest.raises(ValueError, match=r"out: got .* expected a folder for each dictionary"):
        fit_together([make("a", tmp_path, s), make("a", tmp_path, s)], s)
    assert a.step == 0
    assert not [*tmp_path.iterdir()]


def test_nan_stops_all_at_one_step(tmp_path, x):
    x["b"][7 * 32] = torch.nan
    batches = list(Batches(x, 32, shuffle=False))
    trainers = make_all(tmp_path, batches, "ab", on_nan="stop")
    with pytest.raises(NotFinite, match="NaN or Inf in the batch of step 8"):
        fit_together(trainers, batches)
    assert {max(checkpoints(tmp_path / name / "checkpoints")) for name in "ab"} == {8}
    with pytest.raises(ValueError, match="a run that NaN or Inf stopped at step 8"):
        fit_together(make_all(tmp_path, batches, "ab", on_nan="stop"), batches, resume=True)
    final = fit_together(make_all(tmp_path, batches, "ab"), batches, resume=True)
    assert [final[name]["skipped"] for name in "ab"] == [0, 1]


def test_progress_is_told_once_for_all(x, caplog):
    s = Batches(x, 32, seed=1)
    with caplog.at_level(logging.INFO, logger="fastsae"):
        fit_together(make_all(None, s, "ab", progress=True), s)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 10
    assert all("FVU" in line and " to " in line for line in lines)
