"""--compare: what it flags, what it leaves alone, and what it gives no figures for."""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastsae import SAE, FastSAEError, SAEConfig, TopK
from fastsae.benchmarks import compare
from fastsae.optim import RowAdam
from fastsae.training import train_step

ROOT = Path(__file__).resolve().parents[1]
TOY = (128, 32, 1024, 4)
SLOW = """
import time as _time
right_encode = encode
def encode(*args):
    start = _time.perf_counter()
    result = right_encode(*args)
    _time.sleep(2 * (_time.perf_counter() - start))
    return result
"""
WRONG = """
right_decode = decode
def decode(*args):
    return 1.001 * right_decode(*args)
"""


def git(root, *arguments):
    identity = "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"
    subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A checkout of this library with one commit, and short requests for times."""
    monkeypatch.setattr(compare, "REQUEST_MS", 20.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("fastsae", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skip)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "base")
    return tmp_path


def append(path, text):
    path.write_text(path.read_text() + text)


def compared(root, base="HEAD", rounds=8):
    """Rows by operator."""
    rows = compare.run_compare(
        base, root=root, rounds=rounds, shapes=[TOY], device="cpu", say=lambda line: None
    )
    assert [row["op"] for row in rows] == ["encode", "decode", "step"]
    return {row["op"]: row for row in rows}


def test_identical_code_is_the_same(repository):
    for row in compared(repository, rounds=9).values():
        assert (row["verdict"], row["note"], row["failed"]) == ("same", "", False), row
        assert row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"]
        assert row["base_ms"] > 0 < row["this_ms"]
        assert row["this"] == row["base"]


def test_a_slowed_operator_is_flagged_and_a_wrong_one_has_no_figure(repository):
    step = repository / "fastsae/training/__init__.py"
    good = step.read_text()
    append(step, "\ndef train_step(sae, x):\n    pass\n")
    git(repository, "commit", "-qam", "a step with other arguments")
    step.write_text(good)
    append(repository / "fastsae/backends/torch.py", SLOW + WRONG)
    rows = compared(repository)
    assert rows["encode"]["verdict"] == "slower", rows["encode"]
    assert rows["encode"]["ratio"] > 2
    assert rows["encode"]["this"] == f"{rows['encode']['base']}-dirty"
    for op, note in (
        ("decode", "no figures: this: AssertionError: its result is off by "),
        ("step", "no figures: base: TypeError: train_step() takes 2 positional arguments but 3 were given"),
    ):
        assert rows[op]["note"].startswith(note)
        assert rows[op]["failed"]
        assert {rows[op][name] for name in ("base_ms", "this_ms", "ratio", "verdict")} == {None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("print('not an answer')", "base: ImportError: cannot import name 'SAE' from 'fastsae' "),
        ("import os; os._exit(3)", "base: its process ended with exit code 3"),
    ],
)
def test_a_base_that_cannot_be_imported_is_one_sentence(repository, source, reason):
    package = repository / "fastsae/__init__.py"
    good = package.read_text()
    package.write_text(source)
    git(repository, "commit", "-qam", "old")
    package.write_text(good)
    with pytest.raises(FastSAEError) as caught:
        compared(repository)
    expected = f"BASE: got 'HEAD', expected a commit with the public names that are timed; {reason}"
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_no_other_library_is_timed(tmp_path, monkeypatch):
    """Neither the editable install of this checkout, which every process has, nor one on its path."""
    (tmp_path / "empty").mkdir()
    with compare._Side("base", tmp_path) as side, pytest.raises(compare._SideError, match="No module named"):
        side.ask("load", str(tmp_path / "empty"), "cpu")
    shutil.copytree(ROOT / "fastsae", tmp_path / "other/fastsae")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    refused = pytest.raises(compare._SideError, match=r"came from .*other.*, not from the library")
    with compare._Side("base", tmp_path) as side, refused:
        side.ask("load", str(tmp_path / "empty"), "cpu")


def test_a_wrong_base_is_one_sentence(repository):
    with pytest.raises(FastSAEError) as caught:
        compared(repository, base="nowhere")
    assert str(caught.value) == "BASE: got 'nowhere', expected a commit, branch or tag of this repository"
    with pytest.raises(FastSAEError, match=r"^root: got .*/kernels, expected the top of a git checkout"):
        compared(repository / "kernels")
    with pytest.raises(FastSAEError, match=r"^rounds: got 7, expected an integer >= 8"):
        compared(repository, rounds=7)
    git(repository, "rm", "-rq", "--cached", "fastsae")
    git(repository, "commit", "-qm", "empty")
    with pytest.raises(
        FastSAEError, match=r"^base: got \w+, expected a tree with the package fastsae in it$"
    ):
        compared(repository)


def noisy(center, seed, rounds=9, noise=0.05):
    generator = torch.Generator().manual_seed(seed)
    return (center * torch.exp(noise * torch.randn(rounds, generator=generator))).tolist()


def test_noise_is_seldom_flagged_and_a_change_always():
    verdicts = [[compare.judge(noisy(c, seed))["verdict"] for seed in range(100)] for c in (1, 1.2, 1 / 1.2)]
    assert verdicts[0].count("same") >= 95
    assert verdicts[1] == ["slower"] * 100
    assert verdicts[2] == ["faster"] * 100


def test_a_certain_but_small_change_is_no_finding():
    assert compare.judge([1.02] * 9)["verdict"] == "same"
    assert compare.judge([1.04] * 9)["verdict"] == "slower"
    assert compare.judge([1.2] * 8 + [0.9])["verdict"] == "same"
    assert compare.judge([1.2] * 11 + [0.9])["verdict"] == "slower"
    result = compare.judge([1.25, 1.0625, 1.125, 1.5, 1.375, 1.75, 1.625, 1.875, 1.3125])
    assert result == {"ratio": 1.375, "ratio_p20": 1.25, "ratio_p80": 1.625, "verdict": "slower"}


@pytest.fixture
def small(one_thread):
    torch.manual_seed(0)
    sae = SAE(SAEConfig(32, 256, TopK(4)), backend="torch")
    return sae, torch.randn(8, 32)


def test_the_check_of_a_step(small):
    start, x = small

    def check(lr, target):
        sae = copy.deepcopy(start)
        compare._check_step(sae, x, lambda: train_step(sae, RowAdam(sae, lr=lr), x, target))

    with torch.no_grad():
        check(compare.LR, x)
        for lr, target in ((0.0, x), (1.1 * compare.LR, x), (compare.LR, -x)):
            with pytest.raises(AssertionError, match="its step is off by"):
                check(lr, target)


def test_the_check_of_a_code(small):
    sae, x = small
    with torch.no_grad():
        code = sae.encode_sparse(x)
        compare._check_encode(sae, x, code)
        values, indices = code.topk()
        values[3, 0] *= 1.0001
        with pytest.raises(AssertionError, match="its result is off by"):
            compare._check_encode(sae, x, code)
        code.values[:] = sae.encode_sparse(x).values
        worst = (x[0] @ sae.W_enc.T).argmin()
        indices[0, 0], values[0, 0] = worst, 0  # agrees with itself, but isn't among the largest
        with pytest.raises(AssertionError, match="its result is off by"):
            compare._check_encode(sae, x, code)
