"""The plots of a run's report, as PNG bytes for a light and a dark page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsae.evaluate.metrics import Evaluation
from fastsae.evaluate.page import DASHES, FONT_SIZE, Palette, annotate, draw_twice

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Plot", "draw_plots"]

_BIN = 0.2  # decades


@dataclass(frozen=True)
class Plot:
    """A plot: file name, heading, a description in words, and the PNG for a light and for a dark page."""

    name: str
    heading: str
    alt: str
    png: tuple[bytes, bytes]


def draw_plots(log: Sequence[Mapping[str, Any]], evaluation: Evaluation) -> list[Plot]:
    """The training curves that ``log`` has, then the histogram of firing frequencies."""
    axis = "tokens" if any("tokens" in row for row in log) else "step"
    panels = (
        ("loss", "Loss", None),
        ("fvu", "FVU", evaluation.fvu),
        ("l0", "L0", evaluation.l0),
        ("dead_share", "Dead share", None),
    )
    plots = []
    for name, heading, evaluated in panels:
        rows = [(row.get(axis), row.get(name)) for row in log]
        points = np.array(
            [p for p in rows if all(v is not None and math.isfinite(v) for v in p)], dtype=float
        )
        if len(points):
            last, first = points[-1], points[0, 1]
            alt = f"{heading} from {first:.3g} to {last[1]:.3g} over {last[0]:,.0f} {axis}"
            draw = partial(
                _curve, points=points, axis=axis, evaluated=evaluated, percent=name == "dead_share"
            )
            plots.append(Plot(name, heading, alt, draw_twice(draw, (5.2, 2.7))))
    alt = (
        f"Histogram of firing frequencies: {evaluation.n_silent} of {evaluation.n_latents} latents are silent"
    )
    png = draw_twice(partial(_histogram, evaluation=evaluation), (9.2, 2.9))
    return [*plots, Plot("firing", "How often latents fire", alt, png)]


def _curve(
    axes: Axes, palette: Palette, *, points: np.ndarray, axis: str, evaluated: float | None, percent: bool
) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator

    x, y = points.T
    if evaluated is not None and math.isfinite(evaluated):
        axes.axhline(evaluated, color=palette.second, linewidth=1.2, linestyle=DASHES)
        where = {"xycoords": axes.get_yaxis_transform(), "xytext": (0, 3), "va": "bottom"}
        annotate(axes, f"evaluated {evaluated:.3g}", (0.01, evaluated), palette.second, **where)
        shown = np.append(y, evaluated)
    else:
        shown = y
    axes.plot(x, y, color=palette.accent, linewidth=1.8, marker="o" if len(x) == 1 else "")
    if shown.min() > 0 and shown.max() > 20 * shown.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    elif np.ptp(shown) <= 0.02 * abs(shown.max()):  # a constant: don't magnify its noise
        low, high = sorted((0.0, 1.25 * float(shown.max()) or 1.0))
        axes.set_ylim(low, high)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g} %" if percent else f"{v:g}"))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(axis, color=palette.muted, fontsize=FONT_SIZE)
    axes.margins(x=0.02)


def _histogram(axes: Axes, palette: Palette, *, evaluation: Evaluation) -> None:
    """Latents by log10 of the share of tokens on which they fire; the silent ones as a bar of their own."""
    from matplotlib.ticker import FuncFormatter

    fired = evaluation.firing_counts[evaluation.firing_counts > 0].double().numpy()
    low = -math.log10(evaluation.tokens)  # one firing
    edges = low + _BIN * np.arange(math.floor(-low / _BIN) + 2)  # the last bin holds log10(1) = 0
    heights, _ = np.histogram(np.log10(fired) + low, bins=edges - 1e-9)
    width = 0.92 * _BIN
    axes.bar(edges[:-1], heights, width=width, align="edge", color=palette.accent)
    silent = low - 2.5 * _BIN
    axes.bar(silent, evaluation.n_silent, width=width, align="edge", color=palette.second)
    at = (silent + width / 2, evaluation.n_silent)
    annotate(
        axes, f"{evaluation.n_silent:,} silent", at, palette.second, xytext=(0, 3), ha="center", va="bottom"
    )
    if evaluation.l0 > 0:
        mean = math.log10(evaluation.l0 / evaluation.n_latents)
        axes.axvline(mean, color=palette.muted, linewidth=1, linestyle=DASHES)
        where = {"xycoords": axes.get_xaxis_transform(), "xytext": (4, -2), "va": "top"}
        annotate(axes, "mean", (mean, 1), palette.muted, **where)
    axes.set_xticks(range(math.ceil(low), 1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * 10.0**v:g} %"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
    axes.set_xlim(silent - 1.5 * _BIN, max(_BIN, edges[-1]))
    axes.set_xlabel("share of tokens on which a latent fires", color=palette.muted, fontsize=FONT_SIZE)
    axes.set_ylabel("latents", color=palette.muted, fontsize=FONT_SIZE)
    axes.margins(y=0.12)
