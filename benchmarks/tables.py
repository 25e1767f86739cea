"""Tables on a terminal: rich's where it is installed, plain text where it isn't."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["show"]


def show(title: str, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Print the named columns of the rows; what a row lacks stays empty."""
    cells = [[_text(row.get(column)) for column in columns] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(f"{title}\n{_plain([list(columns), *cells])}")
        return
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for line in cells:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else max(110, _width([list(columns), *cells]))).print(table)


def _plain(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in lines)


def _width(lines: list[list[str]]) -> int:
    return 1 + sum(3 + max(map(len, column)) for column in zip(*lines, strict=True))


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
