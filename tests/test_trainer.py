"""The trainer: schedules, logs, checkpoints, resume after any end, NaN batches."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fastsae import SAE, AuxK, DecoderNormL1, ReLU, SAEConfig, TopK
from fastsae.data import Batches, ShuffleBuffer
from fastsae.training import NotFinite, TrainConfig, Trainer
from fastsae.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from fastsae.training.logs import read_log

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainConfig(lr=1e-2, log_every=1, checkpoint_every=5, progress=False)


def make(out, x, *, batches=None, **changes):
    torch.manual_seed(0)
    sae = SAE(SAEConfig(8, 32, TopK(3), losses=(AuxK(1 / 8, 4, 200),), normalization="scalar")).calibrate_(x)
    batches = Batches(x, 32, seed=1) if batches is None else batches
    return Trainer(sae, batches, dataclasses.replace(CONFIG, out=out, **changes))


@pytest.fixture
def x():
    return torch.randn(640, 8, generator=torch.Generator().manual_seed(0))


def same_weights(a, b):
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


def losses(out):
    return [(row["step"], row["loss"], row["fvu"], row["l0"]) for row in read_log(out / "log.jsonl")]


def stop_after(trainer, n):
    """Interrupt the trainer as Ctrl-C does, while it takes its n-th step."""
    take = trainer._take_step

    def interrupted(batch):
        if trainer.step == n - 1:
            os.kill(os.getpid(), signal.SIGINT)
        take(batch)

    trainer._take_step = interrupted
    return trainer.fit()


def test_fit_writes_the_run_and_learns(tmp_path, x):
    trainer = make(tmp_path / "run", x)
    final = trainer.fit()
    rows = read_log(tmp_path / "run/log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert final["tokens"] == 640
    assert {"loss", "fvu", "l0", "dead_share", "lr", "tokens_per_s", "auxk", "skipped"} <= rows[0].keys()
    assert SAE.load(tmp_path / "run").config == trainer.sae.config
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == [
        "step-000000015",
        "step-000000020",
    ]


def test_an_exported_dictionary_is_flushed_and_the_checkpoint_is_not(tmp_path, x):
    trainer = make(tmp_path / "run", x)
    trainer.fit()
    pending = load_checkpoint(latest_checkpoint(tmp_path / "run/checkpoints"))
    exported = SAE.load(tmp_path / "run")
    assert torch.equal(pending["sae"]["W_enc"], trainer.sae.W_enc)
    assert not torch.equal(exported.W_enc, trainer.sae.W_enc)
    trainer.opt.flush_()
    assert same_weights(exported, trainer.sae)
    steps = pending["optimizer"]["state"][0]["last_step"]
    assert steps.dtype == torch.int32
    assert steps.min() < 20


def test_learning_rate_rises_holds_and_falls(tmp_path, x):
    trainer = make(tmp_path, x, warmup=0.2, decay=0.25)
    trainer.fit()
    rates = [row["lr"] for row in read_log(tmp_path / "log.jsonl")]
    expected = [2.5e-3, 5e-3, 7.5e-3] + [1e-2] * 13 + [8e-3, 6e-3, 4e-3, 2e-3]
    assert rates == pytest.approx(expected)


def test_sparsity_coefficient_warms_up(tmp_path, x):
    torch.manual_seed(0)
    sae = SAE(SAEConfig(8, 32, ReLU(), losses=(DecoderNormL1(5.0),)))
    config = dataclasses.replace(CONFIG, out=tmp_path, lr=0.0, sparsity_warmup=0.5)
    Trainer(sae, [x[:32]] * 20, config).fit()
    terms = [row["decoder_norm_l1"] for row in read_log(tmp_path / "log.jsonl")]
    assert [t / terms[-1] for t in terms[:12]] == pytest.approx([i / 10 for i in range(1, 11)] + [1, 1])


@pytest.mark.parametrize("kind", ["batches", "buffer", "list"])
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, x, kind):
    def source():
        if kind == "batches":
            return Batches(x, 32, seed=1)
        return (
            ShuffleBuffer(list(x.split(50)), 32, size=128, seed=1) if kind == "buffer" else list(x.split(32))
        )

    whole = make(tmp_path / "whole", x, batches=source(), n_steps=20)
    whole.fit()
    parts = make(tmp_path / "parts", x, batches=source(), n_steps=20)
    stop_after(parts, 8)
    assert parts.stopped
    assert parts.step == 8
    assert SAE.load(tmp_path / "parts")  # a stopped run leaves a usable dictionary
    torch.manual_seed(99)
    again = make(tmp_path / "parts", x, batches=source(), n_steps=20)
    again.fit(resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert same_weights(again.sae, whole.sae)


def test_fitting_again_after_a_stop_goes_on_bit_for_bit(tmp_path, x):
    whole = make(tmp_path / "whole", x)
    whole.fit()
    parts = make(tmp_path / "parts", x)
    stop_after(parts, 8)
    parts.activations.load_state_dict(parts.activations.state_dict())
    parts.fit()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert same_weights(parts.sae, whole.sae)


def test_a_loader_that_draws_from_torchs_generator_resumes_bit_for_bit(tmp_path, x):
    def source():
        return DataLoader(TensorDataset(x), batch_size=32, shuffle=True)

    whole = make(tmp_path / "whole", x, batches=source())
    whole.fit()
    stop_after(parts := make(tmp_path / "parts", x, batches=source()), 8)
    assert parts.step == 8
    again = make(tmp_path / "parts", x, batches=source())
    again.fit(resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_activations_that_end_early_are_told(tmp_path, x, caplog):
    trainer = make(tmp_path, x, batches=list(x[:160].split(32)), n_steps=8)
    assert trainer.fit()["step"] == 5
    assert make(None, x, batches=list(x[:160].split(32)), n_steps=8, log_every=3).fit()["step"] == 5
    assert "the activations ended after 5 of 8 steps" in caplog.text


def test_resume_of_a_finished_run_changes_nothing(tmp_path, x):
    first = make(tmp_path, x)
    row = first.fit()
    again = make(tmp_path, x)
    assert again.fit(resume=True)["loss"] == row["loss"]
    assert same_weights(again.sae, first.sae)


def test_resume_with_no_checkpoint_starts_anew(tmp_path, x):
    make(tmp_path, x).fit(resume=True)
    assert len(losses(tmp_path)) == 20


def test_a_run_is_not_overwritten(tmp_path, x):
    make(tmp_path, x).fit()
    before = losses(tmp_path)
    with pytest.raises(ValueError, match=r"out: got .* holds a run, expected another folder, or resume"):
        make(tmp_path, x).fit()
    assert losses(tmp_path) == before


def test_a_checkpoint_of_another_run_is_refused(tmp_path, x):
    make(tmp_path, x).fit()
    before = (tmp_path / "model.safetensors").read_bytes()
    for changes, message in (
        ({"n_steps": 30}, "a checkpoint with n_steps = 20, expected n_steps = 30"),
        ({"lr": 0.5}, "a checkpoint with lr = 0.01, expected lr = 0.5"),
        ({"mode": "dense"}, "a checkpoint with mode = deferred, expected mode = dense"),
    ):
        with pytest.raises(ValueError, match=f"resume: got {message}"):
            make(tmp_path, x, **changes).fit(resume=True)
    sae = SAE(SAEConfig(8, 64, TopK(3)))
    with pytest.raises(ValueError, match="got a checkpoint with n_latents = 32, expected n_latents = 64"):
        Trainer(sae, Batches(x, 32), dataclasses.replace(CONFIG, out=tmp_path)).fit(resume=True)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_nan_batches_are_skipped_and_counted(tmp_path, x):
    bad = [*x.split(32)]
    bad[3] = torch.full((32, 8), torch.nan)
    trainer = make(tmp_path, x, batches=bad)
    final = trainer.fit()
    rows = read_log(tmp_path / "log.jsonl")
    assert final["skipped"] == 1
    assert rows[3]["loss"] is None
    assert all(row["loss"] is not None for row in rows if row["step"] != 4)
    assert all(t.isfinite().all() for t in trainer.sae.parameters())
    assert trainer.sae.tokens_seen == 19 * 32


def test_nan_can_stop_the_run_and_loses_nothing(tmp_path, x):
    bad = [*x.split(32)]
    bad[7] = bad[7] * torch.inf
    with pytest.raises(NotFinite, match="NaN or Inf in the batch of step 8"):
        make(tmp_path, x, batches=bad, on_nan="stop").fit()
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-000000008"
    with pytest.raises(ValueError, match="a run that NaN or Inf stopped at step 8, expected on_nan = skip"):
        make(tmp_path, x, batches=bad, on_nan="stop").fit(resume=True)
    assert make(tmp_path, x, batches=bad, on_nan="skip").fit(resume=True)["skipped"] == 1


def test_batches_may_be_pairs_or_dicts_by_hook(tmp_path, x):
    torch.manual_seed(0)
    plain = make(None, x, batches=list(x.split(32)))
    pairs = make(None, x, batches=[(b, b) for b in x.split(32)])
    hooks = make(None, x, batches=[{"a": b * 2, "b": b} for b in x.split(32)], hook="b")
    for trainer in (plain, pairs, hooks):
        trainer.fit()
    assert same_weights(plain.sae, pairs.sae)
    assert same_weights(plain.sae, hooks.sae)
    with pytest.raises(ValueError, match=r"hook: got None, expected one of the batches' \['a', 'b'\]"):
        make(None, x, batches=hooks.activations).fit()


def of_width(d_in, d_out, batches, **changes):
    torch.manual_seed(0)
    sae = SAE(SAEConfig(d_in, 32, TopK(3), d_out=d_out))
    return Trainer(sae, batches, dataclasses.replace(CONFIG, **changes))


def test_several_hooks_stand_side_by_side_and_one_may_be_the_target(x):
    hooks = [{"a": b[:, :3], "b": b[:, 3:], "c": b[:, 2:6]} for b in x.split(32)]
    whole = of_width(8, None, [torch.cat([h["b"], h["a"]], 1) for h in hooks])
    joined = of_width(8, None, hooks, hook=["b", "a"])
    pairs = of_width(5, 4, [(h["b"], h["c"]) for h in hooks])
    target = of_width(5, 4, hooks, hook="b", target_hook="c")
    for trainer in (whole, joined, pairs, target):
        trainer.fit()
    assert joined.config.hook == ("b", "a")
    assert same_weights(whole.sae, joined.sae)
    assert same_weights(pairs.sae, target.sae)
    assert not torch.equal(whole.sae.W_enc, SAE(whole.sae.config).W_enc)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook": ("a", "z")}, r"hook: got 'z', expected one of the batches' \['a', 'b'\]"),
        (
            {"hook": "a", "target_hook": "z"},
            r"target_hook: got 'z', expected one of the batches' \['a', 'b'\]",
        ),
        ({"pairs": True, "hook": "a", "target_hook": "b"}, "target_hook: got 'b', expected None, since"),
        (
            {"plain": True, "target_hook": "b"},
            "target_hook: got 'b', expected None, since the batches aren't",
        ),
        ({"plain": True, "hook": ("a", "b")}, r"hook: got \['a', 'b'\], expected None, since the batches"),
    ],
)
def test_hooks_that_the_batches_lack(x, changes, message):
    batches = [{"a": b, "b": b} for b in x.split(32)]
    if changes.pop("pairs", False):
        batches = [(b, b["a"]) for b in batches]
    if changes.pop("plain", False):
        batches = list(x.split(32))
    with pytest.raises(ValueError, match=message):
        of_width(8, None, batches, **changes).fit()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook": ("a", "a")}, r"hook: got \['a', 'a'\], expected different hooks"),
        ({"hook": ()}, r"hook: got \[\], expected different hooks, at least one"),
        ({"hook": 3}, "hook: got int"),
        ({"target_hook": ("a",)}, "target_hook: got tuple, expected a hook or None"),
        ({"warmup": 0.75, "decay": 0.5}, r"warmup \+ decay: got 1.25"),
        ({"on_nan": "ignore"}, "on_nan: got 'ignore'"),
        ({"n_steps": 0}, "n_steps: got 0"),
        ({"log_every": 1.5}, "log_every: got float"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TrainConfig(**changes)


def test_length_must_be_known(x):
    with pytest.raises(ValueError, match="n_steps: got None"):
        Trainer(SAE(SAEConfig(8, 32, TopK(3))), iter([x]), TrainConfig())


def test_checkpoint_round_trip(tmp_path):
    tree = {
        "a": torch.arange(3, dtype=torch.int32),
        "b": {0: [1, 2.5, None, "x", True], "c": {}},
        "d": torch.tensor(2.0),
    }
    path = save_checkpoint(tmp_path, 7, tree)
    got = load_checkpoint(path)
    assert torch.equal(got["a"], tree["a"])
    assert got["a"].dtype == torch.int32
    assert got["b"] == tree["b"]
    assert got["d"] == 2


def test_only_the_newest_checkpoints_are_kept_and_leftovers_go(tmp_path):
    (tmp_path / ".step-000000001.tmp").mkdir()
    for step in (1, 2, 10, 3):
        save_checkpoint(tmp_path, step, {}, keep=2)
    assert latest_checkpoint(tmp_path).name == "step-000000010"
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"a": torch.ones(100)})
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match="delete it to resume from the one before"):
        load_checkpoint(path)


def test_what_is_no_plain_value_is_refused(tmp_path):
    with pytest.raises(ValueError, match="checkpoint/a: got set"):
        save_checkpoint(tmp_path, 1, {"a": {1, 2}})
    assert latest_checkpoint(tmp_path) is None


OPTIONS = "--latents 256 --k 4 --batch-size 64 --tokens 25600 --lr 0.003 --log-every 1 --no-progress"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "x.npy", np.random.default_rng(0).standard_normal((4000, 16), dtype=np.float32))
    return folder


def start(folder, *more, options=OPTIONS):
    source = ["--activations", str(folder / "x.npy"), "--checkpoint-every", "7"] if options else []
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "fastsae",
            "train",
            "--out",
            str(folder / "run"),
            *source,
            *options.split(),
            *more,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # small tensors: several threads wait for each other
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


@pytest.fixture(scope="module")
def uninterrupted(folder):
    finish(start(folder))
    rows = losses(folder / "run")
    (folder / "run").rename(folder / "whole")
    return rows


def wait_for_rows(process, log):
    while not log.exists() or len(log.read_text().splitlines()) < 10:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text()) | {"seconds": 0}


def test_a_killed_run_resumes_bit_for_bit(folder, uninterrupted):
    """SIGKILL at random moments, twice; the losses are those of a run that was never stopped."""
    rng = random.Random()
    for more in ([], ["--resume"]):
        process = start(folder, *more)
        wait_for_rows(process, folder / "run/log.jsonl")
        time.sleep(rng.uniform(0, 0.7))
        process.kill()
        process.communicate()
        for checkpoint in (folder / "run/checkpoints").glob("step-*"):
            load_checkpoint(checkpoint)  # whatever has its final name is whole
    finish(start(folder, "--resume"))
    assert losses(folder / "run") == uninterrupted
    assert metrics(folder / "run") == metrics(folder / "whole")
    (folder / "run").rename(folder / "killed")


def test_sigterm_ends_cleanly_and_resume_needs_no_flags(folder, uninterrupted):
    process = start(folder)
    wait_for_rows(process, folder / "run/log.jsonl")
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "continue with --resume" in output
    finish(start(folder, "--resume", options=""))
    assert losses(folder / "run") == uninterrupted
