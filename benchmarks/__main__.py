"""``python -m fastsae.benchmarks``: run a suite, print its table, write its rows and a page of plots.

Nothing beyond torch, triton and numpy is needed; tables and the page are better with the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastsae.benchmarks import tables
from fastsae.checks import FastSAEError

_COLUMNS = ("op", "backend", "model", "N", "D", "M", "k", "format", "p50_ms", "p5_ms", "p95_ms",
            "ratio_to_gemm", "ceiling_share", "peak_mib", "process_mib", "note")  # fmt: skip
_QUALITY_COLUMNS = ("backend", "M", "k", "lr", "at", "tokens", "seconds", "fvu", "dead_share", "l0", "note")
_GATE_COLUMNS = (
    "backend",
    "seed",
    "mmcs",
    "mcc",
    "recovered",
    "f1",
    "shrinkage",
    "fvu",
    "l0",
    "seconds",
    "note",
)
_FAMILY_COLUMNS = ("backend", "M", "lr", "fvu", "l0", "dead_share", "cosine", "seconds", "note")
_GROWTH_COLUMNS = ("backend", "format", "along", "exponent", "stderr", "note")
_COMPILE_COLUMNS = (
    "kernel", "arch", "dtypes", "widths", "config", "registers", "spill_bytes", "shared_bytes", "wgmma",
)  # fmt: skip


def main(arguments: list[str] | None = None, prog: str = "python -m fastsae.benchmarks") -> int:
    """Parse and run. Returns the exit code: 1 where a contestant was wrong or failed, 2 at bad input."""
    from fastsae.benchmarks.suites import SUITES

    suites = "\n".join(f"  {name:<8} {suite.about}" for name, suite in SUITES.items())
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Measure this machine: the fused step and its operators beside what others do.",
        epilog=f"suites:\n{suites}\n\nExample: fastsae bench --suite peers --out runs/bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", choices=SUITES, default="quick", metavar="NAME", help=", ".join(SUITES))
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of the rows and the page"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--record", action="store_true", help="also add the rows to benchmarks/results")
    parser.add_argument("--seconds", type=float, help="after which no further case begins")
    parser.add_argument("--compare", metavar="COMMIT", help="ratios of this checkout's times to a commit's")
    parser.set_defaults(run=_run_suite)
    commands = parser.add_subparsers(title="other commands", metavar="compile, table")

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
    if args.compare:
        return _run_compare(args)
    from fastsae.benchmarks.measure import describe_machine
    from fastsae.benchmarks.results import new_path, newest, write_csv, write_json
    from fastsae.benchmarks.suites import gpu_tests_fail, run_suite

    rows: list[dict[str, Any]] = []
    measured = run_suite(args.suite, args.seconds)
    if args.suite == "gpu" and gpu_tests_fail():
        print("the GPU tests are not green: no figures")
        return 1
    result = {**describe_machine(), "suite": args.suite, "rows": rows}
    paths = [args.out / f"{args.suite}.json", *([args.json] if args.json else [])]
    if args.record or args.suite == "gpu":
        paths.append(new_path(result["machine"]["gpu"] or "cpu", args.suite))
    for row in measured:
        rows.append(row)
        print(_line(row), flush=True)
        for path in paths:  # at once, so that what was measured stays if the machine is taken away
            write_json(path, result)
    _show(args.suite, rows)
    if args.suite == "gates" and (families := newest("families", False)) is not None:
        print(f"as measured before, {families} (make families):")
        _show("families", json.loads(families.read_text())["rows"])
    write_csv(paths[0].with_suffix(".csv"), result)
    print(*_page(paths[0].with_suffix(".html"), result), *paths, sep="\n")
    return int(any(row["failed"] for row in rows))


def _line(row: dict[str, Any]) -> str:
    figures = [f"{row[name]:.4g} {unit}" for name, unit in _FIGURES if row.get(name) is not None]
    return " ".join([row["op"], row["backend"], f"M={row['M']:,}", f"D={row['D']}", *figures, row["note"]])


_FIGURES = (("p50_ms", "ms"), ("fvu", "FVU"), ("exponent", "exponent"))


def _show(suite: str, rows: list[dict[str, Any]]) -> None:
    kinds = {
        "quality": _QUALITY_COLUMNS,
        "growth": _GROWTH_COLUMNS,
        "gate": _GATE_COLUMNS,
        "family": _FAMILY_COLUMNS,
    }
    timed = [row for row in rows if row["op"] not in kinds]
    if timed:
        tables.show(f"suite {suite}", _COLUMNS, timed)
    for op, columns in kinds.items():
        if some := [row for row in rows if row["op"] == op]:
            tables.show(op, columns, some)


def _page(path: Path, result: dict[str, Any]) -> list[Path]:
    """The page of plots, unless what draws it isn't installed."""
    from fastsae.benchmarks.report import write_report

    try:
        return [write_report(result, path)]
    except FastSAEError as error:
        print(error)
        return []


def _run_compare(args: argparse.Namespace) -> int:
    from fastsae.benchmarks.compare import COLUMNS, run_compare

    rows = run_compare(args.compare)
    tables.show(f"this checkout against {args.compare}", COLUMNS, rows)
    if args.json:
        from fastsae.benchmarks.measure import describe_machine
        from fastsae.benchmarks.results import write_json

        write_json(args.json, {**describe_machine(), "suite": "compare", "rows": rows})
    return int(any(row["failed"] for row in rows))


def _run_compile(args: argparse.Namespace) -> int:
    from fastsae.benchmarks.compile import broken_limits, compile_all
    from fastsae.benchmarks.results import write_json

    rows = compile_all(args.arch)
    shown = [row | {"config": " ".join(f"{k}={v}" for k, v in row["config"].items())} for row in rows]
    tables.show("kernels", _COMPILE_COLUMNS, shown)
    if args.json:
        write_json(args.json, {"rows": rows})
    broken = broken_limits(rows)
    print("\n".join(broken) if broken else f"{len(rows)} kernels compile within their limits")
    return 1 if broken else 0


def _run_table(args: argparse.Namespace) -> int:
    from fastsae.benchmarks.readme import refresh

    return refresh(check=args.check)


if __name__ == "__main__":
    sys.exit(main())
