"""The benchmarks at toy sizes: their rows, their honesty, their files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from fastsae.benchmarks import __main__ as command
from fastsae.benchmarks import checks, contests, gpu, readme, suites, tables
from fastsae.benchmarks.measure import Shape, interleaved, peak_mib

TOY = Shape(N=4, D=16, M=64, k=2)
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
    monkeypatch.setitem(suites.SUITES, "quick", ([{"N": 32, "D": 16, "M": 128, "k": 4}], 3))
    monkeypatch.setattr(suites, "WIDE", {"N": 64, "D": 16, "M": 256, "k": 4})
    monkeypatch.setattr(suites, "FORMATS", [("split32", "int8")])


@pytest.mark.slow  # the peak is taken in a process of its own
def test_rows_follow_the_schema(toy, tmp_path):
    command.main(["--json", str(tmp_path / "new/rows.json")])
    result = json.loads((tmp_path / "new/rows.json").read_text())
    assert {"machine", "commit", "time", "rows"} <= result.keys()
    assert [row["op"] for row in result["rows"]] == ["gemm", "gemm", "encode", "step", "step"]
    for row in result["rows"]:
        assert KEYS | {"ratio_to_gemm", "note"} <= row.keys()
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert result["rows"][0]["ratio_to_gemm"] == 1
    wide = result["rows"][-1]
    assert wide["format"] == "split32/int8"
    assert 0 < wide["held_mib"] < wide["peak_mib"]


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
def test_gpu_suite_needs_a_gpu(capsys):
    assert command.main(["--suite", "gpu"]) == 2
    assert capsys.readouterr().err.startswith("error: suite: got 'gpu' on a machine without a CUDA device")


@pytest.fixture
def small_checks(monkeypatch):
    """The GPU suite's control flow on a CPU: one timed round, checks on few tokens."""
    monkeypatch.setattr(gpu, "REPEATS", range(1, 2))
    monkeypatch.setattr(gpu, "CASE_SECONDS", 0.0)
    monkeypatch.setattr(checks, "TOKENS", 2)
    monkeypatch.setattr(checks, "LATENTS", 32)


def run_on_cpu(*cases, seconds=1000.0):
    plan = [(case, TOY, torch.float32) for case in cases]
    return list(gpu.run_plan(plan, "cpu", time.monotonic() + seconds))


ALL_CASES = dict.fromkeys(case for case, _, _ in gpu.PLAN)


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.__name__)
def test_every_gpu_case_runs_and_is_right(small_checks, one_thread, case):
    rows = run_on_cpu(case)
    assert rows
    for row in rows:
        assert KEYS | {"ratio_to_gemm", "note", "failed"} <= row.keys()
        assert not row["failed"], row
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["tflops"] or row["tb_s"]


def test_gpu_rows_refer_to_the_half_precision_gemm(small_checks, one_thread, monkeypatch):
    monkeypatch.setattr(contests, "implementation", lambda op, backend: contests._gemm_and_topk)
    gemm, *encodes = run_on_cpu(contests.encode)
    assert (gemm["op"], gemm["dtype"], gemm["ratio_to_gemm"]) == ("gemm", "bfloat16", 1)
    assert all(row["ratio_to_gemm"] == row["p50_ms"] / gemm["p50_ms"] for row in encodes)
    assert {row["backend"] for row in encodes} >= {"triton", "triton fused", "torch", "cublas + topk"}


def wrong_case(shape, dtype, device):
    def refuse(result):
        raise AssertionError("off by 1")

    def raises():
        raise torch.OutOfMemoryError("CUDA out of memory")

    yield contests.Entry("op", "right", lambda: torch.ones(1000).sum(), flops=1)
    yield contests.Entry("op", "wrong", lambda: 1, flops=1, check=refuse)
    yield contests.Entry("op", "too large", raises, flops=1)
    yield contests.Entry("op", "slow", lambda: time.sleep(0.05), flops=1)
    raise ValueError("no operands")


def test_no_gpu_figure_on_a_wrong_result(small_checks, monkeypatch):
    monkeypatch.setattr(gpu, "SLOW_SECONDS", 0.04)
    right, *others = run_on_cpu(wrong_case)
    assert right["p50_ms"] > 0
    assert all(row["p50_ms"] is None for row in others)
    assert [(row["note"], row["failed"]) for row in others] == [
        ("failed: AssertionError: off by 1", True),
        ("skipped: out of memory", False),
        ("skipped: one call takes 0.1 s", False),
        ("failed: ValueError: no operands", True),
    ]


def test_a_case_that_fails_while_it_is_timed(small_checks):
    turns = iter([1, 1])

    def case(shape, dtype, device):
        yield contests.Entry(
            "op", "fails later", lambda: [next(turns, None) or torch.zeros(1).view(2)], flops=1
        )

    (row,) = run_on_cpu(case)
    assert row["p50_ms"] is None
    assert row["failed"]
    assert row["note"].startswith("failed: RuntimeError: shape")


def test_what_the_budget_left_out_is_listed():
    (row,) = run_on_cpu(contests.encode, seconds=-1)
    assert (row["op"], row["note"], row["p50_ms"]) == ("encode", "not reached within the budget", None)


def test_red_gpu_tests_give_no_figures(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "_run_tests", lambda: 1)
    assert command.main(["--suite", "gpu", "--json", str(tmp_path / "a.json")]) == 1
    assert "no figures" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_green_gpu_tests_give_a_file(small_checks, one_thread, monkeypatch, tmp_path, capsys):
    """The whole command, on the CPU: each row is on disk as soon as it is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "_run_tests", lambda: 0)
    monkeypatch.setattr(gpu, "PLAN", [(wrong_case, TOY, torch.float32)])
    plan = gpu.run_plan
    monkeypatch.setattr(gpu, "run_plan", lambda cases, device, deadline: plan(cases, "cpu", deadline))
    assert command.main(["--suite", "gpu"]) == 1  # something was wrong
    (path,) = (tmp_path / "results").iterdir()
    assert path.name.endswith("-nvidia-h200.json")
    result = json.loads(path.read_text())
    assert {"machine", "commit", "time"} <= result.keys()
    assert len(result["rows"]) == 5
    assert "skipped: out of memory" in capsys.readouterr().out


BLOCKED = (
    "filelock", "jinja2", "matplotlib", "platformdirs", "psutil", "rich", "safetensors", "tqdm",
    "transformers", "typer", "yaml",
)  # fmt: skip
WITHOUT = """
import sys
class Block:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import fastsae.benchmarks.gpu, fastsae.benchmarks.__main__ as command
from fastsae.benchmarks import tables
tables.show("title", ("a", "b"), [dict(a=1.0, b=None), dict(a="long", b=True)])
"""


def test_the_gpu_suite_needs_torch_triton_and_numpy_only():
    code = WITHOUT.format(blocked=BLOCKED)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "title\n   a    b\n   1\nlong  yes\n"


def test_tables_with_rich(capsys):
    tables.show("title", ("a", "b"), [{"a": 1234, "b": ["x", "y"]}])
    out = capsys.readouterr().out
    assert "1,234" in out
    assert "x y" in out


def test_readme_is_fresh():
    assert readme.refresh(check=True) == 0, "run python -m fastsae.benchmarks table"


def test_readme_takes_figures_from_results(tmp_path):
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    copy, results = tmp_path / "README.md", tmp_path / "results"
    copy.write_text(text)
    results.mkdir()
    cpu = {
        "op": "gemm",
        "backend": "addmm",
        "N": 4,
        "D": 8,
        "M": 1024,
        "k": 2,
        "p50_ms": 1.25,
        "peak_mib": None,
    }
    machine = {"threads": 2, "cpu": "Abacus", "gpu": "NVIDIA H200"}
    (results / "2026-01-01-cpu.json").write_text(json.dumps({"machine": machine, "rows": [cpu]}))
    assert readme.refresh(True, copy, results) == 1
    assert copy.read_text() == text
    assert readme.refresh(False, copy, results) == 0
    assert readme.refresh(True, copy, results) == 0
    fresh = copy.read_text()
    assert fresh.startswith("before\n")
    assert fresh.endswith("after\n")
    assert "| 1.25 ms |" in fresh
    assert "not yet measured on a GPU" in fresh
    gpu_rows = [
        {**cpu, "backend": "cublas", "dtype": "bfloat16", "p50_ms": 10.0, "ratio_to_gemm": 1.0},
        {
            **cpu,
            "op": "encode",
            "backend": "triton",
            "dtype": "bfloat16",
            "p50_ms": 11.3,
            "ratio_to_gemm": 1.13,
        },
    ]
    (results / "2026-01-02-nvidia-h200.json").write_text(json.dumps({"machine": machine, "rows": gpu_rows}))
    assert readme.refresh(False, copy, results) == 0
    assert "| encode, in chunks | 11.30 ms (1.13) |" in copy.read_text()
    assert "not yet measured" not in copy.read_text()


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
