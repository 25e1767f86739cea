"""How a step's time grows with each size: exponents fitted to rows that differ in that size alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastsae.benchmarks.cases import Shape

__all__ = ["growth_rows", "growth_shapes"]


def growth_shapes(base: Shape) -> list[Shape]:
    """``base``, and it with one size at a time a quarter and four times as large; of D, half and twice."""
    factors = {axis: 2 if axis == "D" else 4 for axis in "MNDk"}
    smaller = [base._replace(**{axis: getattr(base, axis) // f}) for axis, f in factors.items()]
    return [base, *smaller, *(base._replace(**{a: getattr(base, a) * f}) for a, f in factors.items())]


def growth_rows(rows: Sequence[dict[str, Any]], base: Shape) -> list[dict[str, Any]]:
    """For each contestant of the steps at growth_shapes(base) and each size S the exponent a of the time's
    fit, c S^a, by least squares of the logarithms, with its standard error (0 of two points)."""
    steps = [row for row in rows if row["op"] == "step" and row["p50_ms"] is not None]
    fitted = []
    for backend in dict.fromkeys((row["backend"], row["format"]) for row in steps):
        mine = [row for row in steps if (row["backend"], row["format"]) == backend]
        for axis in base._fields:
            others = [name for name in base._fields if name != axis]
            line = [row for row in mine if all(row[name] == getattr(base, name) for name in others)]
            sizes = [row[axis] for row in line]
            if len(set(sizes)) < 2:
                continue
            exponent, error = _slope(np.log(sizes), np.log([row["p50_ms"] for row in line]))
            fitted.append(
                {"op": "growth", "backend": backend[0], "format": backend[1], "model": base.model}
                | base._asdict()
                | {"dtype": line[0]["dtype"], "along": axis, "exponent": exponent, "stderr": error}
                | {"note": f"{axis} {min(sizes):,} to {max(sizes):,}", "failed": False}
            )
    return fitted


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    centred = x - x.mean()
    slope = (centred @ y) / (centred @ centred)
    residual = y - y.mean() - slope * centred
    freedom = max(len(x) - 2, 1)
    return float(slope), float((residual @ residual / freedom / (centred @ centred)) ** 0.5)
