"""``python -m fastsae.benchmarks [--suite NAME] [--json PATH]``: run a suite, print its table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastsae.benchmarks.measure import describe_machine
from fastsae.benchmarks.suites import SUITES, run_suite

_COLUMNS = ("op", "backend", "N", "D", "M", "k", "p50_ms", "p20_ms", "p80_ms", "ratio_to_gemm", "peak_mib")


def main(arguments: list[str] | None = None) -> None:
    """Parse, run, print; with ``--json`` also write the rows and the machine."""
    parser = argparse.ArgumentParser(prog="python -m fastsae.benchmarks", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--json", type=Path, help="write machine, commit, time and rows to this file")
    args = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 110)
    rows = run_suite(
        args.suite, lambda row: console.print(f"{row['op']:>7} M={row['M']:,} {row['p50_ms']:.1f} ms")
    )
    table = Table(title=f"suite {args.suite}", title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(_text(row[column]) for column in _COLUMNS))
    console.print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**describe_machine(), "rows": rows}, indent=2) + "\n")


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
