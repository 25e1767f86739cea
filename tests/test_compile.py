"""Every kernel, compiled with its default configs for GPUs that aren't here."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[1] / "kernels/triton"


def run(code: str | list[str], **env: str) -> subprocess.CompletedProcess[str]:
    """Python in a process that hasn't got the interpreter that these tests run Triton in."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "2"}
    arguments = ["-c", code] if isinstance(code, str) else code
    return subprocess.run(
        [sys.executable, *arguments], env=clean | env, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of one run of the command, which found no limit broken."""
    path = tmp_path_factory.mktemp("compile") / "rows.json"
    result = run(["-m", "fastsae.benchmarks", "compile", "--json", str(path)])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    return json.loads(path.read_text())["rows"]


def entries() -> set[tuple[str, str]]:
    """(file, kernel) of the kernels that no other one calls: those that must be launched."""
    kernels, called = set(), set()
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("fastsae.kernels."):
                called |= {(node.module.rpartition(".")[2], alias.name) for alias in node.names}
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list
            ):
                kernels.add((path.stem, node.name))
                names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - {node.name}
                called |= {(path.stem, name) for name in names}
    return kernels - called


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_is_launched_and_compiled(rows, arch):
    assert {tuple(row["kernel"].split(".")) for row in rows if row["arch"] == arch} == entries()


def test_the_fused_encode_uses_hoppers_matrix_instructions(rows):
    main = [
        row
        for row in rows
        if row["kernel"] == "encode_fused.filter_scores" and row["arch"] == 90 and row["wgmma"]
    ]
    assert {dtype for row in main for dtype in row["dtypes"]} == {"float16", "bfloat16"}


def test_rows_say_what_was_compiled(rows):
    for row in rows:
        assert row["registers"] > 0
        assert row["ops"]
        assert row["dtypes"]
        assert row["config"]["num_warps"] >= 1


def test_interpreted_kernels_are_refused():
    result = run(["-m", "fastsae.benchmarks", "compile"], TRITON_INTERPRET="1")
    assert result.returncode != 0
    assert "TRITON_INTERPRET: got 1, expected 0 or unset" in result.stderr


KERNEL = """
import triton, triton.language as tl

@triton.jit
def spill(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    block = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(x_ptr + tl.arange(0, BLOCK), (block - tl.sum(block)) * n)
    if y_ptr is not None:
        tl.store(y_ptr, n)
"""
RECORD = """
import torch
from fastsae.backends.triton import support
from fastsae.benchmarks import compile
import kernel

def call(n, dtype, block, y=None, offset=0):
    x = torch.zeros(block + 1, dtype=dtype)
    return lambda: support.launch(kernel.spill, (1,), x[offset:], y, n, BLOCK=block, num_warps=1)

seen = []
def ask():
    seen.append(support.architecture(torch.device("cpu")))

calls = [
    call(16, torch.float32, 64),
    call(32, torch.float32, 64),  # the same: n is a multiple of 16
    call(1, torch.float32, 64),
    call(7, torch.float32, 64),
    call(16, torch.bfloat16, 64),
    call(16, torch.float32, 64, offset=1),  # unaligned
    call(16, torch.float32, 64, torch.zeros(1)),
    call(16, torch.float32, 16384),
    ask,
]
launches = compile.record(80, [((f"call {i}", "float32", 8), c) for i, c in enumerate(calls)])
rows = [compile._compile(launch) for launch in launches]
callers = [row["ops"] for row in rows]
assert callers == [["call 0", "call 1"], *([f"call {i}"] for i in range(2, 8))], callers
assert seen == [80] and support.WITHOUT_GPU == 90
assert [row["config"].get("n") for row in rows] == [None, 1, None, None, None, None, None]
assert [row["config"].get("y_ptr", 0) for row in rows] == [None] * 5 + [0, None]
assert rows[3]["pointers"] == ["*bf16"] and all(row["registers"] > 8 for row in rows)
(broken,) = compile.broken_limits(rows)
assert broken.startswith("kernel.spill for sm_80 (float32): ") and "spilled" in broken, broken
greedy = rows[0] | {"shared_bytes": 200_000}
assert len(compile.broken_limits([greedy])) == 1 and not compile.broken_limits([greedy | {"arch": 90}])
fused = rows[0] | {"kernel": "encode_fused.filter_scores", "arch": 90, "dtypes": ["bfloat16"]}
assert compile.broken_limits([fused])[0].endswith("scores for sm_90 (bfloat16): no wgmma in its PTX")
assert not compile.broken_limits([fused | {"wgmma": True}, fused | {"dtypes": ["float32"]}])
failed = rows[0] | {"error": "CompilationError: at 17:4"}
(broken,) = compile.broken_limits([failed])
assert broken == "kernel.spill for sm_80 (float32) doesn't compile. CompilationError: at 17:4"
"""


def test_recorder(tmp_path):
    """Launches are told apart as Triton tells them apart, nothing runs, and broken limits are named."""
    (tmp_path / "kernel.py").write_text(KERNEL)
    result = run(RECORD, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
