"""``python -m fastsae.benchmarks``: run a suite, print its table. ``compile`` and ``table``: see there.

Nothing beyond torch, triton and numpy is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastsae.benchmarks import tables
from fastsae.checks import FastSAEError

_COLUMNS = ("op", "backend", "N", "D", "M", "k", "p50_ms", "p20_ms", "p80_ms", "ratio_to_gemm", "peak_mib")
_COMPILE_COLUMNS = (
    "kernel", "arch", "dtypes", "widths", "config", "registers", "spill_bytes", "shared_bytes", "wgmma",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print; with ``--json`` also write the rows and the machine. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastsae.benchmarks", description=__doc__)
    parser.add_argument("--suite", choices=("quick", "gpu"), default="quick")
    parser.add_argument("--json", type=Path, help="write machine, commit, time and rows to this file")
    parser.add_argument("--budget", type=float, default=540, help="seconds that the GPU suite may take")
    parser.set_defaults(run=_run_suite)
    commands = parser.add_subparsers(title="other commands")

    compiling = commands.add_parser("compile", help="compile every Triton kernel for GPUs not at hand")
    compiling.add_argument("--arch", type=int, nargs="+", choices=(80, 90, 100), default=(80, 90, 100))
    compiling.add_argument("--json", type=Path, help="write the rows to this file")
    compiling.set_defaults(run=_run_compile)

    table = commands.add_parser("table", help="write README.md's performance part from benchmarks/results")
    table.add_argument("--check", action="store_true", help="only say whether it is up to date")
    table.set_defaults(run=_run_table)
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except FastSAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run_suite(args: argparse.Namespace) -> int:
    if args.suite == "gpu":
        from fastsae.benchmarks.gpu import run_gpu

        return run_gpu(args.json, args.budget)
    from fastsae.benchmarks.measure import describe_machine
    from fastsae.benchmarks.suites import run_suite

    rows = run_suite(args.suite, lambda row: print(f"{row['op']:>7} M={row['M']:,} {row['p50_ms']:.1f} ms"))
    tables.show(f"suite {args.suite}", _COLUMNS, rows)
    if args.json:
        _write(args.json, {**describe_machine(), "rows": rows})
    return 0


def _run_compile(args: argparse.Namespace) -> int:
    from fastsae.benchmarks.compile import broken_limits, compile_all

    rows = compile_all(args.arch)
    shown = [row | {"config": " ".join(f"{k}={v}" for k, v in row["config"].items())} for row in rows]
    tables.show("kernels", _COMPILE_COLUMNS, shown)
    if args.json:
        _write(args.json, {"rows": rows})
    broken = broken_limits(rows)
    print("\n".join(broken) if broken else f"{len(rows)} kernels compile within their limits")
    return 1 if broken else 0


def _run_table(args: argparse.Namespace) -> int:
    from fastsae.benchmarks.readme import refresh

    return refresh(check=args.check)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
