"""``python -m fastsae.benchmarks table``: README.md's figures, from committed results, never typed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastsae.benchmarks.results import RESULTS, newest
from fastsae.checks import reject
from fastsae.ops import BACKENDS

__all__ = ["figures", "refresh"]

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- figures: written by `python -m fastsae.benchmarks table` -->"
END = "<!-- end of figures -->"

CPU_ROWS = {
    ("gemm", "mm"): "encoder GEMM alone, `torch.mm` into a preallocated [N, M]",
    ("gemm", "torch"): "the same scores in our blocks, none kept (oneDNN's GEMM where it is the faster)",
    ("encode", "torch"): "encode with exact top-k",
    ("encode", "mm + topk"): "encode by `torch.addmm` and `torch.topk`",
    ("step", "torch"): "whole training step",
    ("step", "dense"): "whole training step, dense torch with Adam",
}
GPU_ROWS = {
    ("gemm", "cublas"): "encoder GEMM alone (cuBLAS)",
    ("encode", "triton"): "encode, in chunks",
    ("encode", "triton fused"): "encode, fused",
    ("encode", "cublas + topk"): "encode by cuBLAS and `torch.topk`",
    ("encode", "torch"): "encode, backend `torch`",
    ("decode", "triton"): "decode",
    ("decode", "embedding_bag"): "decode by `embedding_bag`",
    ("decode", "dense"): "decode by a dense GEMM",
    ("row_step", "triton"): "backward and RowAdam",
    ("row_step", "dense"): "backward and Adam, dense",
    ("step", "triton"): "whole training step",
    ("step", "torch"): "whole training step, backend `torch`",
    ("step", "dense"): "whole training step, dense",
}
MEMORY = "memory of our step beyond weights and optimizer states"


def refresh(check: bool, readme: Path = ROOT / "README.md", results: Path = RESULTS) -> int:
    """Write the figures between the marks of ``readme``; or with ``check`` only say whether they are there.

    Returns the exit code, 1 where a check finds other text. Raises ValueError without README or marks.
    """
    text = readme.read_text() if readme.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        reject("README.md", f"no {BEGIN} ... {END} in {readme}", "a checkout of the repository")
    fresh = f"{before}{BEGIN}\n{figures(results)}{END}{after}"
    if check and fresh != text:
        print(f"{readme} is stale: run python -m fastsae.benchmarks table")
        return 1
    readme.write_text(fresh)
    return 0


def figures(results: Path) -> str:
    """The newest result of each kind, as markdown."""
    parts = [_cpu(newest("quick", False, results)), _peers(newest("peers", False, results)),
             _quality(newest("quality", False, results)), _families(newest("families", False, results)),
             _gates(newest("gates", False, results)), _gpu(newest("gpu", True, results))]  # fmt: skip
    return "\n".join([*filter(None, parts), ""])


_NO_GPU = """GPUs: not yet measured on a GPU. `make bench-gpu` measures one in under ten minutes.
"""


def _cpu(path: Path | None) -> str:
    if path is None:
        return ""
    result = json.loads(path.read_text())
    rows = [row for row in result["rows"] if "held_mib" not in row]
    sizes = next(row for row in rows if row["op"] == "encode")
    head = (
        f"Measured on {_machine(result)}, fp32, N = {sizes['N']} tokens, "
        f"D = {sizes['D']}, k = {sizes['k']}, medians\nof interleaved rounds ({_link(path)}, `make bench`):"
    )
    columns = {f"M = {m:,}": [row for row in rows if row["M"] == m] for m in _distinct(rows, "M")}
    lines = {label: [_ms(_find(of, *key)) for of in columns.values()] for key, label in CPU_ROWS.items()}
    lines[MEMORY] = [_mib(_find(of, "step", "torch")) for of in columns.values()]
    return f"{head}\n\n{_table(list(columns), lines)}{_wide(result['rows'])}"


def _peers(path: Path | None) -> str:
    """Time and memory of a step of every library."""
    if path is None:
        return ""
    result = json.loads(path.read_text())
    rows = [row for row in result["rows"] if row["op"] == "step"]
    sizes, floors = rows[0], [row for row in result["rows"] if row["op"] == "gemm"]
    head = (
        f"A whole training step of each library, as it recommends, N = {sizes['N']}, D = {sizes['D']}, "
        f"k = {sizes['k']}, fp32, on\n{_machine(result)}; in brackets the peak of its process, imports "
        f"included\n({_link(path)}, `make bench-peers`):"
    )
    columns = {f"M = {m:,}": [row for row in rows if row["M"] == m] for m in sorted(_distinct(rows, "M"))}
    lines = {"encoder GEMM alone": [_ms(_find([f for f in floors if f["M"] == of[0]["M"]], "gemm", "mm"))
                                    for of in columns.values()]}  # fmt: skip
    for key in dict.fromkeys((row["backend"], row["format"]) for row in rows):
        found = [
            next((r for r in of if (r["backend"], r["format"]) == key), _NOTHING) for of in columns.values()
        ]
        lines[_label(*key, found[0]["note"])] = [_step(row) for row in found]
    return f"{head}\n\n{_table(list(columns), lines)}"


def _label(backend: str, form: str, note: str) -> str:
    """A contestant's name with its version, which a note begins with; of ours, with its formats."""
    if backend in BACKENDS:
        return "fastsae" + (f", {form}" if form != "float32/float32" else "")
    known = re.match(r"[\w-]+ (\d[\d.]*\d)", note)
    return f"{backend} {known[1]}" if known else backend


def _step(row: dict[str, Any]) -> str:
    if row["p50_ms"] is None:
        return "–"
    memory = row.get("process_mib")
    return _ms(row) + (f" ({memory:,.0f} MiB)" if memory else "")


def _quality(path: Path | None) -> str:
    """FVU, silent share and time of every library on the demo's activations."""
    if path is None:
        return ""
    result = json.loads(path.read_text())
    rows = [row for row in result["rows"] if row.get("fvu") is not None]
    final = [row for row in rows if row["at"] == "equal tokens"]
    s = final[0]
    head = (
        f"What it learns in that time: the demo's activations, M = {s['M']:,}, k = {s['k']}, "
        f"{s['tokens']:,} tokens in batches of {s['N']:,},\neach at its own learning rate ({_link(path)}, "
        "`fastsae bench --suite quality`):"
    )
    columns = ["lr", "seconds", "FVU", "silent", f"FVU after {_fastest(final):.0f} s"]
    lines = {}
    for row in final:
        then = next((r for r in rows if r["backend"] == row["backend"] and r["at"] == "equal seconds"), None)
        lines[row["backend"]] = [
            "default" if row["lr"] is None else f"{row['lr']:g}",
            f"{row['seconds']:.0f}",
            f"{row['fvu']:.3f}",
            f"{100 * row['dead_share']:.1f} %",
            f"{then['fvu']:.3f}" if then else "–",
        ]
    return f"{head}\n\n{_table(columns, lines)}"


def _families(path: Path | None) -> str:
    """FVU, L0 and silent share of every architecture on the demo's activations."""
    if path is None:
        return ""
    rows = json.loads(path.read_text())["rows"]
    s = rows[0]
    head = (
        f"Every architecture on the demo's activations, M = {s['M']:,}, k = {s['k']}, one pass in batches of "
        f"{s['N']:,}, on held-out\ntokens ({_link(path)}, `make families`):"
    )
    lines = {
        row["backend"]: [f"{row['fvu']:.3f}", f"{row['l0']:.1f}", f"{100 * row['dead_share']:.1f} %"]
        for row in rows
    }
    return f"{head}\n\n{_table(['FVU', 'L0', 'silent'], lines)}"


def _gates(path: Path | None) -> str:
    """What was found of known features, by gate: the least and the most over the seeds."""
    if path is None:
        return ""
    rows = json.loads(path.read_text())["rows"]
    head = (
        "What is found of 128 known features in 64 dimensions, 3 active, in 2000 steps of 512 tokens, data "
        f"and dictionary from\nindependent seeds, {len(_distinct(rows, 'seed'))} of them ({_link(path)}, "
        "`make quality`).\nTopK and BatchTopK are helped by AuxK, BatchTopK by resampling too; the controls "
        "must fail:"
    )
    lines = {}
    for name in _distinct(rows, "backend"):
        some = [row for row in rows if row["backend"] == name]
        lines[name] = [_span(some, key) for key in ("mmcs", "recovered", "fvu", "l0", "shrinkage")]
    return f"{head}\n\n{_table(['MMCS', 'share > .9', 'FVU', 'L0', 'shrinkage slope'], lines)}"


def _span(rows: list[dict[str, Any]], key: str) -> str:
    low, high = (f"{extreme(row[key] for row in rows):.3f}" for extreme in (min, max))
    return low if low == high else f"{low}–{high}"


def _fastest(rows: list[dict[str, Any]]) -> float:
    return min(row["seconds"] for row in rows)


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['threads']} threads of an {machine['cpu']}"


def _wide(rows: list[dict[str, Any]]) -> str:
    """A table of memory by format."""
    rows = [row for row in rows if "held_mib" in row]
    if not rows:
        return ""
    s = rows[0]
    head = (
        f"M = {s['M']:,} latents, D = {s['D']}, N = {s['N']}, k = {s['k']}, by how weights and states are "
        "held (the first five\nsteps of a process, its whole peak with Python and torch in it):"
    )
    table = [
        "| weights/states | held | peak of the process | `fastsae plan` said | step |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = " | ".join(f"{row[name]:,.0f} MiB" for name in ("held_mib", "process_mib", "planned_mib"))
        table.append(f"| {row['format']} | {sizes} | {_ms(row)} |")
    return "\n".join(["", head, "", *table, ""])


def _gpu(path: Path | None) -> str:
    if path is None:
        return _NO_GPU
    result = json.loads(path.read_text())
    rows = [row for row in result["rows"] if row["dtype"] == "bfloat16"]
    shapes = list(dict.fromkeys((row["M"], row["D"]) for row in rows))
    columns = {
        f"M = {m:,}, D = {d}": [row for row in rows if (row["M"], row["D"]) == (m, d)] for m, d in shapes
    }
    head = (
        f"Measured on an {result['machine']['gpu']}, bf16 weights and fp32 optimizer states, "
        f"N = {rows[0]['N']}, k = {rows[0]['k']},\nmedians of interleaved rounds with a cold L2, "
        f"and their ratio to the GEMM ({_link(path)},\n`make bench-gpu`):"
    )
    lines = {}
    for key, label in GPU_ROWS.items():
        lines[label] = [_ratio(_find(of, *key)) for of in columns.values()]
    lines[MEMORY] = [_mib(_find(of, "step", "triton")) for of in columns.values()]
    return f"{head}\n\n{_table(list(columns), lines)}"


def _find(rows: list[dict[str, Any]], op: str, backend: str) -> dict[str, Any]:
    found = (row for row in rows if (row["op"], row["backend"]) == (op, backend))
    return next(found, _NOTHING)


_NOTHING = {"p50_ms": None, "peak_mib": None, "ratio_to_gemm": None, "note": ""}


def _distinct(rows: list[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _ms(row: dict[str, Any]) -> str:
    return "–" if row["p50_ms"] is None else f"{row['p50_ms']:.{0 if row['p50_ms'] >= 20 else 2}f} ms"


def _ratio(row: dict[str, Any]) -> str:
    ratio = row["ratio_to_gemm"]
    return _ms(row) if ratio in (None, 1.0) else f"{_ms(row)} ({ratio:.2f})"


def _mib(row: dict[str, Any]) -> str:
    return "–" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f} MiB"


def _link(path: Path) -> str:
    return f"[rows](benchmarks/results/{path.name})"


def _table(columns: list[str], lines: dict[str, list[str]]) -> str:
    head = [f"| | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    body = [f"| {label} | {' | '.join(cells)} |" for label, cells in lines.items() if set(cells) != {"–"}]
    return "\n".join([*head, *body, ""])
