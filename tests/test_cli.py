"""The command line, as a user meets it: what it prints, writes and returns, mistakes included."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from fastsae import SAE, SAEConfig, TopK, cli
from fastsae.training.logs import read_log

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.random.default_rng(0).standard_normal((1000, 16), dtype=np.float32))
    return path


SMALL = ("--latents", 64, "--k", 4, "--batch-size", 32, "--lr", 0.003, "--no-progress")


@pytest.mark.parametrize("command", ["demo", "train", "eval", "plan", "doctor", "bench"])
def test_help_shows_an_example(fastsae, command):
    code, out, _ = fastsae(command, "--help")
    assert code == 0
    assert f"Example: fastsae {command}" in " ".join(out.split())


def test_train_then_eval(fastsae, data, tmp_path):
    run = tmp_path / "run"
    code, out, err = fastsae("train", "--activations", data, "--out", run, *SMALL)
    assert code == 0, err
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"fvu", "l0", "dead_share", "tokens", "seconds", "held_out_tokens"} <= metrics.keys()
    assert metrics["tokens"] == 896
    assert metrics["held_out_tokens"] == 100
    assert SAE.load(run).config.n_latents == 64
    assert "report.html" in out
    assert (run / "report.html").stat().st_size > 10_000
    code, out, _ = fastsae("eval", run, "--json", tmp_path / "eval.json")
    assert code == 0
    assert json.loads((tmp_path / "eval.json").read_text())["fvu"] == pytest.approx(metrics["fvu"], rel=1e-5)
    code, out, _ = fastsae("eval", run, "--activations", data, "--json", tmp_path / "all.json")
    assert json.loads((tmp_path / "all.json").read_text())["tokens"] == 1000


def test_yaml_is_equal_in_power_to_flags(fastsae, data, tmp_path):
    options = {
        "activations": str(data),
        "latents": 64,
        "k": 4,
        "batch-size": 32,
        "lr": 0.003,
        "progress": False,
    }
    (tmp_path / "options.yaml").write_text(
        yaml.safe_dump(options | {"seed": 7, "log_every": 1}) + "lr: 3e-3\n"
    )
    code, _, err = fastsae(
        "train", "--config", tmp_path / "options.yaml", "--out", tmp_path / "a", "--seed", 3
    )
    assert code == 0, err
    fastsae("train", "--activations", data, "--out", tmp_path / "b", *SMALL, "--seed", 3, "--log-every", 1)
    losses = [[row["loss"] for row in read_log(tmp_path / name / "log.jsonl")] for name in "ab"]
    assert losses[0] == losses[1]
    assert yaml.safe_load((tmp_path / "a/run.yaml").read_text())["seed"] == 3


def test_tokens_beyond_the_file_repeat_it(fastsae, data, tmp_path):
    fastsae("train", "--activations", data, "--out", tmp_path / "run", *SMALL, "--tokens", 3200)
    assert json.loads((tmp_path / "run/metrics.json").read_text())["tokens"] == 3200


def test_every_option_of_a_run_is_a_flag():
    """The flags, the YAML keys and the dataclass name the same options with the same defaults."""
    import dataclasses
    import inspect

    from fastsae.training.run import RunOptions

    flags = {name: p.default for name, p in inspect.signature(cli.train).parameters.items()}
    for name in ("ctx", "resume", "config", "out"):
        flags.pop(name)
    fields = {f.name: f.default for f in dataclasses.fields(RunOptions) if f.name != "out"}
    assert flags == fields


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "model, hook, text: got no model and no hook and no text, expected all three, or activations"),
        (
            ("--activations", "X", "--model", "gpt2"),
            "activations: got 'X' beside ['model'], expected one source",
        ),
        (("--activations", "nothing.npy"), "nothing.npy"),
        (("--model", "minilm", "--hook", "a", "--hook", "b", "--text", "t"), "hook: got list, expected str"),
        (("--activations", "DATA", "--k", 0), "k: got 0, expected an integer >= 1"),
        (
            ("--activations", "DATA", "--k", 65, "--latents", 64),
            "k: got 65, expected an integer in 1..64 (n_latents)",
        ),
        (("--activations", "DATA", "--activation", "gelu"), "activation: got 'gelu', expected one of 'topk'"),
        (("--activations", "DATA", "--backend", "cuda"), "backend: got 'cuda', expected a usable one"),
        (("--activations", "DATA", "--weight-format", "int3"), "weight_format: got 'int3'"),
        (("--activations", "DATA", "--batch-size", 5000), "batch_size: got 5000, expected at most"),
        (("--activations", "DATA", "--config", "missing.yaml"), "missing.yaml: got no readable YAML file"),
    ],
)
def test_mistakes_get_one_sentence_and_leave_nothing(fastsae, data, tmp_path, options, message):
    options = [data if o == "DATA" else o for o in options]
    code, _, err = fastsae("train", "--out", tmp_path / "run", *options)
    assert code == 1
    assert message in err.replace(str(tmp_path) + "/", "")
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k: many", "k: got str, expected int"),
        ("latnets: 3", "unknown options ['latnets']"),
        ("- 1", "expected a YAML mapping"),
        ("a: [", "got no readable YAML file"),
    ],
)
def test_bad_yaml(fastsae, data, tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    code, _, err = fastsae(
        "train", "--activations", data, "--out", tmp_path / "run", "--config", tmp_path / "bad.yaml"
    )
    assert code == 1
    assert message in err


def test_an_unknown_flag_is_refused(fastsae):
    code, _, err = fastsae("train", "--latnets", 3)
    assert code == 2
    assert "No such option" in err


def test_a_run_is_not_overwritten(fastsae, data, tmp_path):
    arguments = ("train", "--activations", data, "--out", tmp_path / "run", *SMALL)
    assert fastsae(*arguments)[0] == 0
    before = (tmp_path / "run/metrics.json").read_bytes()
    code, _, err = fastsae(*arguments, "--seed", 5)
    assert code == 1
    assert "holds a run" in err
    assert (tmp_path / "run/metrics.json").read_bytes() == before
    assert "seed: 0" in (tmp_path / "run/run.yaml").read_text()


def test_demo_replaces_only_a_demo(fastsae, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    code, _, err = fastsae("demo", "--out", tmp_path)
    assert code == 1
    assert "which holds other files" in err
    assert (tmp_path / "thesis.tex").exists()


def test_demo_replaces_no_other_run(fastsae, data, tmp_path):
    fastsae("train", "--activations", data, "--out", tmp_path / "run", *SMALL)
    code, _, err = fastsae("demo", "--out", tmp_path / "run")
    assert code == 1
    assert "which holds other files" in err
    assert SAE.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("device", "message"), [("tpu9", "device: got 'tpu9'"), ("meta", "device: got 'meta'")]
)
def test_bad_device(fastsae, data, tmp_path, device, message):
    code, _, err = fastsae("train", "--activations", data, "--out", tmp_path / "run", "--device", device)
    assert (code, message in err) == (1, True)
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_refused_before_the_model_runs(fastsae, data, tmp_path, monkeypatch):
    from fastsae.training import run

    fastsae("train", "--activations", data, "--out", tmp_path / "run", *SMALL)
    monkeypatch.setattr(run, "_activations", lambda options: pytest.fail("the activations were computed"))
    code, _, err = fastsae("train", "--activations", data, "--out", tmp_path / "run", *SMALL)
    assert (code, "holds a run" in err) == (1, True)


def test_a_missing_extra_is_named_before_any_work(fastsae, data, tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = fastsae("train", "--activations", data, "--out", tmp_path / "run", "--tensorboard", *SMALL)
    assert (code, "pip install fastsae[tensorboard]" in err) == (1, True)
    assert not (tmp_path / "run").exists()


def test_eval_of_no_run(fastsae, tmp_path):
    code, _, err = fastsae("eval", tmp_path)
    assert code == 1
    assert "which holds no run.yaml, expected a run of `fastsae train`, or --activations" in err


def test_eval_of_any_saved_dictionary(fastsae, data, tmp_path):
    SAE(SAEConfig(16, 32, TopK(2))).save(tmp_path / "sae")
    code, _, err = fastsae(
        "eval", tmp_path / "sae", "--activations", data, "--json", tmp_path / "new/eval.json"
    )
    assert code == 0, err
    assert json.loads((tmp_path / "new/eval.json").read_text())["tokens"] == 1000


def test_resume_of_nothing(fastsae, tmp_path):
    code, _, err = fastsae("train", "--out", tmp_path / "run", "--resume")
    assert (code, "which holds no run of `fastsae train`" in err) == (1, True)


def test_out_is_a_file(fastsae, data):
    code, _, err = fastsae("train", "--activations", data, "--out", data)
    assert (code, "which is a file, expected a folder" in err) == (1, True)


def test_plan(fastsae, tmp_path):
    arguments = ("plan", "--d-in", 4096, "--latents", 2**20, "--k", 64, "--batch", 8192, "--gpu", "h200")
    code, _, _ = fastsae(*arguments, "--weight-format", "split32", "--json", tmp_path / "plan.json")
    assert code == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["weights_gib"] == pytest.approx(32, rel=1e-3)
    assert plan["states_gib"] == pytest.approx(64, rel=1e-2)
    assert plan["fits"] is True
    # 2 N D M FLOP at 790 TFLOP/s is 89 ms, the rest are gathers and rows
    assert 89 < plan["floor_ms"] < 130
    code, _, err = fastsae("plan", "--d-in", 8, "--latents", 4, "--k", 5)
    assert (code, "k: got 5, expected an integer in 1..4" in err) == (1, True)
    code, _, err = fastsae("plan", "--d-in", 8, "--latents", 40, "--gpu", "tpu")
    assert (code, "gpu: got 'tpu', expected one of" in err) == (1, True)


def test_doctor_names_every_backend(fastsae, tmp_path):
    code, out, _ = fastsae("doctor", "--json", tmp_path / "doctor.json")
    assert code == 0
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert report["backend torch"] == "ok"
    for name in ("reference", "torch", "triton", "cuda"):
        assert f"backend {name}" in out
