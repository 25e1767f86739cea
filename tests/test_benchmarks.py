"""The benchmarks at toy sizes: their rows, their honesty, their files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from fastsae.benchmarks import __main__ as command
from fastsae.benchmarks import checks, contests, engine, growth, readme, results, suites, tables, trainers
from fastsae.benchmarks.cases import MODELS, Shape, encode_work, model_shape, step_work
from fastsae.benchmarks.measure import interleaved, process_memory

TOY = Shape(N=4, D=16, M=64, k=2)
KEYS = {
    "op", "backend", "model", "N", "D", "M", "k", "dtype", "format", "p5_ms", "p20_ms", "p50_ms", "p80_ms",
    "p95_ms", "tokens_s", "forward_ms", "backward_ms", "optimizer_ms", "peak_mib", "process_mib", "tflops",
    "tb_s", "ceiling_share", "ratio_to_gemm", "note", "failed",
}  # fmt: skip
ONCE = engine.Limits(range(1, 2), 0.0)


@pytest.fixture
def small_checks(monkeypatch):
    """Checks on few tokens; a short copy; the parts of one step."""
    monkeypatch.setattr(contests, "phases", partial(trainers.phases, repeats=1))
    monkeypatch.setattr(checks, "TOKENS", 2)
    monkeypatch.setattr(checks, "LATENTS", 32)
    monkeypatch.setattr(contests, "COPY_BYTES", {"cpu": 2**10})


def run_on_cpu(*cases, seconds=1000.0, limits=ONCE, shape=TOY):
    plan = [(case, shape, torch.float32) for case in cases]
    return list(engine.run_plan(plan, "cpu", time.monotonic() + seconds, limits))


# Shapes and their work


def test_shapes_are_named_by_models():
    assert model_shape("GPT-2", 24_576, k=32, N=8) == Shape(8, 768, 24_576, 32)
    assert [Shape(1, width, 1, 1).model for width in (384, 768, 2304, 4096, 100)] == [*MODELS, ""]


def test_work_by_hand():
    s = Shape(N=2, D=3, M=5, k=1)
    assert encode_work(s, 2) == (2 * 2 * 5 * 3, (5 + 2) * 3 * 2)
    flops, moved = step_work(s, 4)
    assert flops == 60 + 8 * 2 * 3
    # one latent of five fires on each of two tokens: 1.8 rows of two matrices, there and back, with moments
    assert moved == pytest.approx(7 * 3 * 4 + 2 * 2 * 1.8 * 3 * 12)


# A case: checked, then timed


@pytest.fixture
def no_processes(monkeypatch):
    monkeypatch.setattr(engine, "process_memory", lambda prepare: {"peak_mib": 1.0, "process_mib": 2.0})


PLANNED = dict.fromkeys(case for suite in suites.SUITES.values() for case, _, _ in suite.plan)
ALL_CASES = [case for case in PLANNED if case is not contests.compiled_step]  # half a minute


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.__name__)
def test_every_case_runs_and_is_right(small_checks, one_thread, no_processes, monkeypatch, case):
    monkeypatch.delitem(contests.TRAINERS, "dense compiled")  # half a minute
    rows = run_on_cpu(case)
    assert rows
    for row in rows:
        assert row.keys() >= KEYS
        assert not row["failed"], row
        if not row["note"].startswith("skipped: "):
            assert row["p5_ms"] <= row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] <= row["p95_ms"]
            assert row["tflops"] or row["tb_s"]


def test_a_step_has_its_parts_memory_and_rate(small_checks, one_thread, no_processes):
    row = next(row for row in run_on_cpu(contests.step) if row["backend"] == "torch")
    assert row["forward_ms"] > 0
    assert row["backward_ms"] > 0
    assert row["optimizer_ms"] is None  # in the backward
    assert (row["peak_mib"], row["process_mib"]) == (1, 2)
    assert row["tokens_s"] == pytest.approx(1e3 * TOY.N / row["p50_ms"])


def test_rows_refer_to_the_gemm_and_to_the_ceilings(small_checks, one_thread):
    rows = run_on_cpu(contests.ceilings, contests.encode)
    copy, gemm = (next(row for row in rows if row["op"] == op) for op in ("copy", "gemm"))
    fastest = max(row["tflops"] for row in rows if row["op"] == "square gemm")
    assert (gemm["backend"], gemm["ratio_to_gemm"]) == ("mm", 1)
    encodes = [row for row in rows if row["op"] == "encode"]
    assert {row["backend"] for row in encodes} >= {"torch", "mm + topk"}
    for row in encodes:
        assert row["ratio_to_gemm"] == row["p50_ms"] / gemm["p50_ms"]
        share = max(row["tflops"] / fastest, row["tb_s"] / copy["tb_s"])
        assert row["ceiling_share"] == pytest.approx(share)


def test_no_figure_on_an_encode_that_is_wrong(small_checks, one_thread, monkeypatch):
    """A deliberately wrong operator: its row says so and nothing else."""
    right = contests.implementation

    def off(op, backend):
        run = right(op, backend)

        def wrong(*operands):
            values, *rest = run(*operands)
            return values * 1.01, *rest

        return wrong if (op, backend) == ("encode", "torch") else run

    monkeypatch.setattr(contests, "implementation", off)
    rows = {row["backend"]: row for row in run_on_cpu(contests.encode) if row["op"] == "encode"}
    assert rows["torch"]["failed"]
    assert rows["torch"]["note"].startswith("failed: AssertionError: off by")
    assert all(rows["torch"][name] is None for name in KEYS if name.endswith(("_ms", "_mib", "flops")))
    assert rows["mm + topk"]["p50_ms"] > 0


def test_no_figure_on_a_step_that_is_wrong(small_checks, one_thread, no_processes, monkeypatch):
    step = checks.train_step

    def wrong(sae, opt, x):
        metrics = step(sae, opt, x)
        return metrics | {"loss": metrics["loss"] * (1.01 if sae.dtype == torch.float32 else 1)}

    monkeypatch.setattr(checks, "train_step", wrong)
    row = next(row for row in run_on_cpu(contests.step) if row["backend"] == "torch")
    assert row["failed"]
    assert row["p50_ms"] is None


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


def test_no_figure_on_a_wrong_result():
    right, *others = run_on_cpu(wrong_case, limits=engine.Limits(range(1, 2), 0.0, 0.04))
    assert right["p50_ms"] > 0
    assert all(row["p50_ms"] is None for row in others)
    assert [(row["note"], row["failed"]) for row in others] == [
        ("failed: AssertionError: off by 1", True),
        ("skipped: out of memory", False),
        ("skipped: one call takes 0.1 s", False),
        ("failed: ValueError: no operands", True),
    ]


def test_a_case_that_fails_while_it_is_timed():
    turns = iter([1, 1])

    def case(shape, dtype, device):
        yield contests.Entry(
            "op", "fails later", lambda: [next(turns, None) or torch.zeros(1).view(2)], flops=1
        )

    (row,) = run_on_cpu(case)
    assert row["p50_ms"] is None
    assert row["failed"]
    assert row["note"].startswith("failed: RuntimeError: shape")


def test_a_contestant_whose_memory_cannot_be_measured_fails_alone(monkeypatch):
    def ends(prepare):
        raise RuntimeError("the process that measures memory ended with exit code -9")

    monkeypatch.setattr(engine, "process_memory", ends)

    def case(shape, dtype, device):
        yield contests.Entry("op", "large", lambda: None, flops=1, alone=lambda: None)
        yield contests.Entry("op", "small", lambda: None, flops=1)

    large, small = run_on_cpu(case)
    assert (large["failed"], large["p50_ms"], small["failed"]) == (True, None, False)
    assert large["note"].endswith("exit code -9")
    assert small["p50_ms"] is not None


def test_what_the_budget_left_out_is_listed():
    (row,) = run_on_cpu(contests.encode, seconds=-1)
    assert (row["op"], row["note"], row["p50_ms"]) == ("encode", "not reached within the budget", None)


def test_passes_are_pooled(no_processes):
    """Times of all passes, each with operands of its own; what fails in a later one loses its figures."""
    made = []

    def case(shape, dtype, device):
        made.append(number := len(made))

        def call():
            time.sleep(0.002 if number else 0.02)

        def sometimes():
            if number == 2:
                raise ValueError("only now")

        yield contests.Entry("op", "slow at first", call, flops=1, alone=lambda: call)
        yield contests.Entry("op", "fails later", sometimes, flops=1)

    rows = run_on_cpu(case, case, limits=engine.Limits(range(2, 3), 0.0, passes=2))
    assert made == [0, 1, 2, 3]  # the plan, then the plan again
    slow, fails, other, also = rows
    assert 20 <= slow["p95_ms"] < 40
    assert slow["p5_ms"] < 10
    assert slow["process_mib"] == 2 * slow["peak_mib"] == 2  # of the first pass, kept
    assert (fails["failed"], fails["p50_ms"], fails["tflops"]) == (True, None, None)
    assert other["p95_ms"] < 10
    assert not also["failed"]


def test_growth_is_the_slope_of_logarithms():
    base = Shape(N=64, D=8, M=256, k=4)
    time_of = lambda s: 1e-3 * s.M * s.N**0.5  # noqa: E731
    rows = [
        {"op": "step", "backend": "ours", "format": "", "dtype": "float32", "p50_ms": time_of(s)}
        | s._asdict()
        for s in growth.growth_shapes(base)
    ]
    found = {row["along"]: row for row in growth.growth_rows(rows, base)}
    want = {"M": 1, "N": 0.5, "D": 0, "k": 0}
    assert {axis: round(row["exponent"], 9) for axis, row in found.items()} == want
    assert all(row["stderr"] == pytest.approx(0, abs=1e-9) for row in found.values())
    rows[0]["p50_ms"] *= 1.3
    assert all(row["stderr"] > 0.01 for row in growth.growth_rows(rows, base))
    assert growth.growth_rows(rows[:1], base) == []


# The command


@pytest.fixture
def toy_suite(monkeypatch, tmp_path):
    """The quick suite of one toy case, and where its files go."""
    toy = suites.Suite("", "cpu", [(wrong_case, TOY, torch.float32)], engine.Limits(range(1, 2), 0.0, 0.04))
    monkeypatch.setitem(suites.SUITES, "quick", toy)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    return tmp_path


def test_rows_are_written_as_json_csv_and_a_page(toy_suite, capsys):
    code = command.main(["--out", str(toy_suite / "out"), "--json", str(toy_suite / "new/rows.json")])
    assert code == 1  # something was wrong
    result = json.loads((toy_suite / "new/rows.json").read_text())
    assert result == json.loads((toy_suite / "out/quick.json").read_text())
    assert {"machine", "commit", "time", "suite", "rows"} <= result.keys()
    assert len(result["rows"]) == 5
    assert all(row.keys() >= KEYS for row in result["rows"])
    with (toy_suite / "out/quick.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["backend"] for line in lines] == [row["backend"] for row in result["rows"]]
    run = {"commit": result["commit"], "time": result["time"], "torch": torch.__version__, "suite": "quick"}
    assert all(line.items() >= run.items() for line in lines)
    assert "wrong" in (toy_suite / "out/quick.html").read_text()
    assert "skipped: out of memory" in capsys.readouterr().out
    assert not (toy_suite / "results").exists()


def test_no_seconds_measure_nothing(toy_suite):
    assert command.main(["--out", str(toy_suite), "--seconds", "0"]) == 0
    (row,) = json.loads((toy_suite / "quick.json").read_text())["rows"]
    assert row["note"] == "not reached within the budget"


def test_recorded_files_are_never_replaced(toy_suite):
    for _ in range(2):
        command.main(["--out", str(toy_suite / "out"), "--record"])
    first, second = sorted((toy_suite / "results").iterdir())
    assert first.name.endswith("-cpu-quick.json")
    assert second.name == first.name.replace("-cpu", "b-cpu", 1)
    assert results.newest("quick", gpu=False, folder=toy_suite / "results") == second
    assert results.newest("peers", gpu=False, folder=toy_suite / "results") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_suite_needs_a_gpu(capsys):
    assert command.main(["--suite", "gpu"]) == 2
    assert capsys.readouterr().err.startswith("error: suite: got 'gpu' on a machine without a CUDA device")


def test_red_gpu_tests_give_no_figures(monkeypatch, toy_suite, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(suites, "gpu_tests_fail", lambda: True)
    assert command.main(["--suite", "gpu", "--out", str(toy_suite / "out")]) == 1
    assert "no figures" in capsys.readouterr().out
    assert not list(toy_suite.iterdir())


def test_green_gpu_tests_give_a_recorded_file(monkeypatch, toy_suite):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(suites, "gpu_tests_fail", lambda: False)
    monkeypatch.setitem(suites.SUITES, "gpu", suites.SUITES["quick"])
    command.main(["--suite", "gpu", "--out", str(toy_suite / "out")])
    (path,) = (toy_suite / "results").iterdir()
    assert path.name.endswith("-nvidia-h200-gpu.json")


@pytest.mark.slow  # each format in a process of its own
def test_wide_rows(monkeypatch):
    monkeypatch.setattr(suites, "WIDE", Shape(N=64, D=16, M=256, k=4))
    monkeypatch.setattr(suites, "FORMATS", [("split32", "int8")])
    monkeypatch.setattr(suites, "WIDE_PROCESSES", 2)
    (row,) = suites._wide_rows([])
    assert row.keys() >= KEYS
    assert row["format"] == "split32/int8"
    assert 0 < row["held_mib"] < row["process_mib"]
    assert row["planned_mib"] > 0


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
import fastsae.benchmarks.suites, fastsae.benchmarks.__main__ as command
from fastsae.benchmarks import tables
tables.show("title", ("a", "b"), [dict(a=1.0, b=None), dict(a="long", b=True)])
"""


def test_suites_need_torch_triton_and_numpy_only():
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
        "backend": "mm",
        "N": 4,
        "D": 8,
        "M": 1024,
        "k": 2,
        "p50_ms": 1.25,
        "peak_mib": None,
    }
    machine = {"threads": 2, "cpu": "Abacus", "gpu": None}
    result = {"machine": machine, "suite": "quick", "rows": [cpu, cpu | {"op": "encode"}]}
    (results / "2026-01-01-cpu.json").write_text(json.dumps(result))
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
    result = {"machine": machine | {"gpu": "NVIDIA H200"}, "suite": "gpu", "rows": gpu_rows}
    (results / "2026-01-02-nvidia-h200.json").write_text(json.dumps(result))
    assert readme.refresh(False, copy, results) == 0
    assert "| encode, in chunks | 11.30 ms (1.13) |" in copy.read_text()
    assert "not yet measured" not in copy.read_text()


def test_times_are_sorted_and_per_contestant():
    times = interleaved({"long": lambda: time.sleep(0.02), "short": lambda: None}, repeats=3)
    assert all(t == sorted(t) and len(t) == 3 for t in times.values())
    assert times["long"][0] >= 20 > times["short"][1]


@pytest.mark.slow
def test_peak_sees_what_a_call_takes():
    memory = process_memory(partial(partial, torch.ones, 64 << 18))
    assert 60 < memory["peak_mib"] < 80
    assert memory["peak_mib"] < memory["process_mib"] - 100
    assert process_memory(partial(partial, torch.ones, 1))["peak_mib"] < 10


@pytest.mark.slow
def test_a_measurement_that_dies_says_so():
    with pytest.raises(RuntimeError, match="ended with exit code 1"):
        process_memory(partial(partial, torch.ones, -1))
