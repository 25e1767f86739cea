"""What is plotted of a benchmark result: rows become panels of series."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fastsae.evaluate.page import number, percent

__all__ = [
    "Panel",
    "Row",
    "Series",
    "contestant",
    "describe",
    "finite",
    "grouped",
    "has_failed",
    "quality_panels",
    "shape_of",
    "step_panels",
]

Row = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)

_OURS = ("torch", "triton", "cuda", "reference")
_NOT_OURS = ("copy", "square gemm", "gemm", "topk")  # ops whose "torch" is torch itself
_MEMORY = re.compile(r"out of memory|\bneeds [\d.,]+ ?[kMGT]i?B")


@dataclass(frozen=True)
class Series:
    """One contestant: (x, y, low, high) by x, and (x, "out of memory" or "failed") where it has no y."""

    label: str
    points: tuple[tuple[float, float, float, float], ...]
    stops: tuple[tuple[float, str], ...] = ()
    remark: str = ""


@dataclass(frozen=True)
class Panel:
    """A plot of positive numbers on logarithmic axes.

    Args:
        x_label: "latents M", or "seconds of training".
        text: writes a y.
        base: 10, or 2 for ticks at powers of two.
        floor: drawn as a dashed line.
        budget: an x to be marked.
    """

    heading: str
    x_label: str
    series: tuple[Series, ...]
    text: Callable[[float], str] = number
    base: int = 10
    floor: Series | None = None
    budget: float | None = None

    @property
    def over_m(self) -> bool:
        return self.x_label.endswith("M")

    @property
    def at_one_m(self) -> bool:
        return self.over_m and len({x for s in self.series for x, *_ in (*s.points, *s.stops)}) == 1

    @property
    def caption(self) -> str:
        m = next((x for series in self.series for x, *_ in (*series.points, *series.stops)), 0)
        return f"{self.heading}, M = {number(m)}" if self.at_one_m else self.heading

    @property
    def stopped(self) -> list[tuple[Series, str, list[float]]]:
        """Who stopped, for which reason, at which x."""
        return [
            (series, reason, [x for x, why in series.stops if why == reason])
            for series in self.series
            for reason in dict.fromkeys(why for _, why in series.stops)
        ]

    @property
    def shown(self) -> tuple[Series, ...]:
        """All that has points, the floor first."""
        return tuple(s for s in (self.floor, *self.series) if s and s.points)

    def place(self, x: float) -> str:
        return _latents(x) if self.over_m else f"{number(x)} s"


def step_panels(rows: Iterable[Row]) -> dict[str, list[Panel]]:
    """Time and memory of a step against M, for each (D, N, k, dtype) of two M or two contestants."""
    rows, found = list(rows), {}
    steps = [row for row in rows if row.get("op") == "step" and _positive(row, "M") and _says(row)]
    for shape, of in grouped(steps, lambda row: shape_of(row, "DNk")).items():
        named = _variants(of, "format")
        if len(named) < 2 and len({row["M"] for row in of}) < 2:
            continue
        memory, peak = "peak_mib", "Peak memory that a step adds"
        if any(_positive(row, "process_mib") for row in of):
            memory, peak = "process_mib", "Peak memory of the process"
        times = Panel(
            "Time of a step", "latents M", _step_series(named, "p50_ms"), _time, 10, _floor(rows, of)
        )
        panels = (times, Panel(peak, "latents M", _step_series(named, memory), _mib, 2))
        if some := [panel for panel in panels if any(series.points for series in panel.series)]:
            found[shape] = some
    return dict(sorted(found.items(), key=lambda item: item[1][0].at_one_m))


def quality_panels(rows: Iterable[Row]) -> dict[str, list[Panel]]:
    """FVU against seconds for each shape; the budget is that of the rows at equal seconds."""
    found = {}
    trained = [row for row in rows if row.get("op") == "quality"]
    for shape, of in grouped(trained, lambda row: shape_of(row, "MDNk")).items():
        series = tuple(_curve(label, some) for label, some in _variants(of, "lr").items())
        if any(one.points for one in series):
            equal = [_positive(row, "seconds") for row in of if row.get("at") == "equal seconds"]
            budget = max(filter(None, equal), default=None)
            found[shape] = [Panel("FVU on held-out tokens", "seconds of training", series, budget=budget)]
    return found


def _step_series(named: Mapping[str, list[Row]], column: str) -> tuple[Series, ...]:
    """Those that have a point or a stop."""
    edges = ("p20_ms", "p80_ms") if column == "p50_ms" else (column, column)
    series = []
    for label, rows in named.items():
        points, stops = {}, {}
        for row in rows:
            m, value, reason = row["M"], _positive(row, column), _reason(row)
            if reason and not (value and _positive(row, "p50_ms")):
                stops[m] = reason
            elif value:
                low, high = (_positive(row, name) or value for name in edges)
                points[m] = (m, value, min(low, value), max(high, value))
        series.append(Series(label, tuple(sorted(points.values())), tuple(sorted(stops.items()))))
    return tuple(one for one in series if one.points or one.stops)


def _curve(label: str, rows: list[Row]) -> Series:
    """The first run that has a curve, else the first: what it passed through, its end, its dead share."""
    row = next((row for row in rows if row.get("curve")), rows[0])
    passed = {finite(seconds): finite(fvu) for seconds, _, fvu in row.get("curve") or ()}
    passed[finite(row.get("seconds"))] = finite(row.get("fvu"))
    points = sorted((x, y, y, y) for x, y in passed.items() if x and y and x > 0 and y > 0)
    dead = finite(row.get("dead_share"))
    return Series(label, tuple(points), remark="" if dead is None else f"{percent(dead)} dead")


def _floor(rows: list[Row], of: list[Row]) -> Series | None:
    """The GEMM that ratios refer to, at each M of the steps ``of``, in their dtype if it was measured."""
    step, best = of[0], {}
    sizes = {row["M"] for row in of if _positive(row, "p50_ms") or _reason(row)}
    for row in rows:
        alike = row.get("op") == "gemm" and all(row.get(name) == step.get(name) for name in "DN")
        if alike and _positive(row, "p50_ms") and row.get("M") in sizes:
            off = (row.get("dtype") != step.get("dtype"), row.get("ratio_to_gemm") != 1)
            best[row["M"]] = min(best.get(row["M"], (off, row)), (off, row), key=lambda one: one[0])
    others = sorted({f", {row.get('dtype')}" for off, row in best.values() if off[0]})
    points = tuple((m, *[row["p50_ms"]] * 3) for m, (_, row) in sorted(best.items()))
    return Series("encoder GEMM" + "".join(others), points) if points else None


def grouped(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    """Rows by key, in the order of their first."""
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _variants(rows: list[Row], column: str) -> dict[str, list[Row]]:
    """Rows by contestant, and by ``column`` where a contestant has several of it."""
    found = {}
    for name, of in grouped(rows, contestant).items():
        variants = grouped(of, lambda row: row.get(column))
        for value, some in variants.items():
            text = f"lr {number(value)}" if column == "lr" else value or "?"
            found[f"{name}, {text}" if len(variants) > 1 else name] = some
    return found


def contestant(row: Row) -> str:
    """The backend, marked where it is one of fastsae's own; of a case that failed for all, "all"."""
    name = str(row.get("backend") or "all")
    ours = name.split(" ")[0] in _OURS and row.get("op") not in _NOT_OURS
    return f"fastsae {name}" if ours else name


def shape_of(row: Row, sizes: str) -> str:
    """In words, the model first."""
    parts = [f"{name} = {number(row[name])}" for name in sizes if finite(row.get(name)) is not None]
    return ", ".join(str(part) for part in (row.get("model"), *parts, row.get("dtype")) if part)


def has_failed(row: Row) -> bool:
    return bool(row.get("failed")) or str(row.get("note")).startswith("failed")


def _says(row: Row) -> bool:
    return bool(_reason(row)) or any(_positive(row, name) for name in ("p50_ms", "peak_mib", "process_mib"))


def _reason(row: Row) -> str:
    return "out of memory" if _MEMORY.search(str(row.get("note"))) else "failed" if has_failed(row) else ""


def finite(value: Any) -> float | None:
    """``value`` if it is a finite number."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and math.isfinite(value) else None


def _positive(row: Row, name: str) -> float | None:
    value = finite(row.get(name))
    return value if value is not None and value > 0 else None


def _time(ms: float) -> str:
    return f"{1e3 * ms:.3g} µs" if ms < 0.0995 else f"{ms:.3g} ms" if ms < 999.5 else f"{number(ms / 1e3)} s"


def _mib(mib: float) -> str:
    return f"{mib:.3g} MiB" if mib < 999.5 else f"{number(mib / 1024)} GiB"


def _latents(m: float) -> str:
    """As widths are named: 65,536 is 65k."""
    if m < 1e6:
        return f"{m // 1000:.0f}k" if m >= 1000 else f"{m:.0f}"
    return f"{m / 1e6:.{1 if m < 9.95e6 else 0}f}".removesuffix(".0") + "M"


def describe(panel: Panel) -> str:
    """The panel in words, with its figures."""
    told = []
    for series in (*panel.series, *filter(None, [panel.floor])):
        points = series.points if panel.over_m else series.points[-1:]
        places = [f"{panel.text(y)} at {panel.place(x)}" for x, y, *_ in points]
        places += [f"{reason} at {panel.place(x)}" for x, reason in series.stops]
        told.append(f"{series.label}: {', '.join([*places, *filter(None, [series.remark])])}")
    return f"{panel.caption} against {panel.x_label}. {'; '.join(told)}."
