"""Recipes: each makes the run that its source describes; flags override them."""

import dataclasses

import pytest
import torch
import yaml

from fastsae import (
    L0,
    AuxK,
    BatchTopK,
    DecoderNormL1,
    JumpReLU,
    Matryoshka,
    PreActivation,
    ReLU,
    Tanh,
    TargetL0,
    TopK,
)
from fastsae.evaluate import SyntheticDictionary, write_activations
from fastsae.training import RECIPES, recipe_options
from fastsae.training.options import ACTIVATIONS, RunOptions

TOKENS = 10**9
# name -> activation, losses, normalization, unit_norm_decoder, lr, betas
EXPECTED = {
    "scaling-monosemanticity": (ReLU(), (DecoderNormL1(5.0),), "scalar", False, 5e-5, (0.9, 0.999)),
    "anthropic-april-2024": (ReLU(), (DecoderNormL1(5.0),), "mean_norm", False, 5e-5, (0.9, 0.999)),
    "anthropic-january-2025": (
        JumpReLU(0.1, 2.0), (Tanh(10.0, 4.0), PreActivation(3e-6)), "mean_norm", False, 2e-4, (0.9, 0.999),
    ),
    "openai-topk": (
        TopK(32), (AuxK(1 / 32, None, 10_000_000),), "layer_norm", True, 1e-4, (0.9, 0.999),
    ),
    "gemma-scope-jumprelu": (JumpReLU(), (L0(6e-4),), "unit_scalar", True, 7e-5, (0.0, 0.999)),
    "batchtopk": (BatchTopK(32), (AuxK(1 / 32, 512, 20_480),), "layer_norm", True, 3e-4, (0.9, 0.99)),
    "matryoshka": (
        Matryoshka(BatchTopK(32)), (AuxK(1 / 32, 512, 20_480),), "none", True, 3e-4, (0.9, 0.99),
    ),
}  # fmt: skip


def options(**changes):
    return RunOptions(**{"activations": "x.npy", "out": "", "latents": 2**16} | changes)


@pytest.mark.parametrize("name", RECIPES)
def test_it_makes_what_its_source_describes(name):
    found = options(**recipe_options(name))
    config, training = found.sae_config(768, TOKENS), found.train_config()
    activation, losses, normalization, unit_norm, lr, betas = EXPECTED[name]
    assert (config.activation, config.losses) == (activation, losses)
    assert (config.normalization, config.unit_norm_decoder) == (normalization, unit_norm)
    assert training.lr == pytest.approx(lr)
    assert training.betas == betas
    assert found.recipe == name
    assert RECIPES[name].source
    assert RECIPES[name].options.keys() <= {f.name for f in dataclasses.fields(RunOptions)}


def test_every_recipe_has_its_numbers_here():
    assert RECIPES.keys() == EXPECTED.keys()
    with pytest.raises(ValueError, match="recipe: got 'openai', expected one of 'scaling-monosemanticity'"):
        recipe_options("openai")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_has_options(activation):
    config = options(activation=activation, latents=64, k=4).sae_config(16, TOKENS)
    inner = type(getattr(config.activation, "inner", config.activation)).__name__.lower()
    expected = {"matryoshka": "batchtopk", "matryoshka_topk": "topk"}.get(activation, activation)
    assert inner == expected
    assert config.activation.selection(training=False) is not None


@pytest.mark.parametrize(
    ("changes", "losses"),
    [
        ({"activation": "jumprelu", "k": 7}, (TargetL0(1.0, 7),)),
        ({"activation": "jumprelu", "penalty": "l0", "sparsity": 2.0}, (L0(2.0),)),
        ({"activation": "relu", "penalty": "tanh"}, (Tanh(10.0),)),
        ({"activation": "relu", "penalty": "none"}, ()),
        ({"activation": "topk", "auxk": 0.0}, ()),
        ({"activation": "topk", "auxk": 0.5, "k_aux": 3, "dead_after": 9}, (AuxK(0.5, 3, 9),)),
        ({"activation": "jumprelu", "penalty": "none", "pre_activation": 1e-5}, (PreActivation(1e-5),)),
    ],
    ids=str,
)
def test_options_make_losses(changes, losses):
    assert options(**changes).sae_config(16, TOKENS).losses == losses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "topk2"}, "activation: got 'topk2', expected one of 'topk'"),
        ({"penalty": "l2"}, "penalty: got 'l2', expected one of 'none'"),
        ({"initial": "random"}, "initial: got 'random', expected one of 'tied', 'uniform'"),
        ({"activation": "topk", "widths": [4, 8]}, r"widths: got \[4, 8\], expected None"),
        ({"activation": "matryoshka", "widths": [4, 8]}, r"widths: got \(4, 8\), expected widths that end"),
        ({"activation": "relu", "penalty": "target_l0"}, "losses: got TargetL0.*, expected JumpReLU"),
        ({"activation": "groupmax", "k": 3}, "k: got 3, expected a divisor of n_latents"),
        ({"clip": 0.0}, "clip: got 0.0, expected a number > 0"),
        ({"warmup": 0.5, "decay": 0.6}, r"warmup \+ decay: got 1.1"),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_any_work(changes, message):
    with pytest.raises(ValueError, match=message):
        options(**changes)


def test_flags_and_files_come_before_the_recipe(fastsae, tmp_path, two_threads):
    write_activations(tmp_path / "x.safetensors", SyntheticDictionary(16, 20), 4000)
    (tmp_path / "o.yaml").write_text("k: 3\nauxk: 0\n")
    command = (
        "train", "--recipe", "batchtopk", "--activations", tmp_path / "x.safetensors",
        "--out", tmp_path / "run", "--config", tmp_path / "o.yaml", "--latents", 64, "--batch-size", 100,
        "--lr", 1e-3, "--no-progress",
    )  # fmt: skip
    code, _, err = fastsae(*command)
    assert code == 0, err
    saved = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert (saved["recipe"], saved["activation"], saved["beta2"]) == ("batchtopk", "batchtopk", 0.99)
    assert (saved["k"], saved["auxk"], saved["lr"], saved["batch_size"]) == (3, 0, 1e-3, 100)
    code, _, err = fastsae("train", "--recipe", "bathtopk", "--activations", "x", "--out", tmp_path / "no")
    assert code == 1
    assert "recipe: got 'bathtopk', expected one of" in err


@pytest.mark.parametrize(
    "flags",
    [
        ("--recipe", "anthropic-january-2025"),
        ("--recipe", "gemma-scope-jumprelu"),
        ("--activation", "jumprelu", "--threshold-rate", 10),
        ("--activation", "gated", "--resample-every", 5),
        ("--activation", "matryoshka", "--widths", 16, "--widths", 64),
    ],
    ids=str,
)
def test_runs_of_each_kind_learn(fastsae, tmp_path, two_threads, flags):
    import json

    write_activations(tmp_path / "x.safetensors", SyntheticDictionary(16, 20), 12_000)
    code, _, err = fastsae(
        "train", *flags, "--activations", tmp_path / "x.safetensors", "--out", tmp_path / "run",
        "--latents", 64,
        "--k", 4, "--batch-size", 200, "--lr", 3e-3, "--no-progress", "--log-every", 1,
    )  # fmt: skip
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["fvu"] < 0.8 * rows[0]["fvu"]
    assert torch.isfinite(torch.tensor([row["loss"] for row in rows])).all()
