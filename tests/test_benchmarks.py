"""The benchmark suite at toy sizes: its rows, its honesty, its files."""

from __future__ import annotations

import json
import time
from functools import partial

import pytest
import torch

from fastsae.benchmarks import __main__ as command
from fastsae.benchmarks import suites
from fastsae.benchmarks.measure import interleaved, peak_mib

KEYS = {
    "op",
    "backend",
    "N",
    "D",
    "M",
    "k",
    "dtype",
    "format",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "peak_mib",
    "tflops",
    "tb_s",
}


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(suites.SUITES, "quick", ([{"N": 32, "D": 16, "M": 128, "k": 4}], "cpu", 3))


@pytest.mark.slow  # the peak is taken in a process of its own
def test_rows_follow_the_schema(toy, tmp_path):
    command.main(["--json", str(tmp_path / "new/rows.json")])
    result = json.loads((tmp_path / "new/rows.json").read_text())
    assert {"machine", "commit", "time", "rows"} <= result.keys()
    assert [row["op"] for row in result["rows"]] == ["gemm", "gemm", "encode", "step"]
    for row in result["rows"]:
        assert KEYS | {"ratio_to_gemm", "note"} <= row.keys()
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert result["rows"][0]["ratio_to_gemm"] == 1


def test_no_figure_on_a_wrong_result(toy, monkeypatch):
    encode = suites.SAE.encode_sparse

    def wrong(self, x):
        code = encode(self, x)
        code.values = code.values * 1.01
        return code

    monkeypatch.setattr(suites.SAE, "encode_sparse", wrong)
    with pytest.raises(AssertionError, match="no figures"):
        suites.run_suite("quick", lambda row: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_suite_needs_a_gpu():
    with pytest.raises(ValueError, match="without a CUDA device"):
        suites.run_suite("gpu", lambda row: None)


def test_times_are_sorted_and_per_contestant():
    times = interleaved({"long": lambda: time.sleep(0.02), "short": lambda: None}, repeats=3)
    assert all(t == sorted(t) and len(t) == 3 for t in times.values())
    assert times["long"][0] >= 20 > times["short"][1]


@pytest.mark.slow
def test_peak_sees_what_a_call_takes():
    assert 60 < peak_mib(partial(partial, torch.ones, 64 << 18)) < 80
    assert peak_mib(partial(partial, torch.ones, 1)) < 10


@pytest.mark.slow
def test_a_measurement_that_dies_says_so():
    with pytest.raises(RuntimeError, match="ended with exit code 1"):
        peak_mib(partial(partial, torch.ones, -1))
