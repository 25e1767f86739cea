"""The plots of a report, as PNG bytes for a light and a dark page."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsae.evaluate.metrics import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Plot", "draw_plots"]

DOTS_PER_INCH = 160  # twice a page's pixels, for sharp screens
_BIN = 0.2  # decades


@dataclass(frozen=True)
class Plot:
    """A plot: file name, heading, a description in words, and the PNG for a light and for a dark page."""

    name: str
    heading: str
    alt: str
    png: tuple[bytes, bytes]


@dataclass(frozen=True)
class _Palette:
    background: str
    ink: str
    muted: str
    line: str
    accent: str
    second: str


_PALETTES = (
    _Palette("#ffffff", "#1d1f23", "#686d76", "#e7e7e3", "#2b62d6", "#c2571a"),
    _Palette("#1b1d22", "#e9e9e6", "#9da2ab", "#30333a", "#86abff", "#f0a35e"),
)


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
    for name, heading, held_out in panels:
        rows = [(row.get(axis), row.get(name)) for row in log]
        points = np.array([p for p in rows if all(v is not None and math.isfinite(v) for v in p)], dtype=float)
        if len(points):
            alt = f"{heading} from {points[0, 1]:.3g} to {points[-1, 1]:.3g} over {points[-1, 0]:,.0f} {axis}"
            draw = lambda axes, p, curve=(points, axis, held_out, name == "dead_share"): _curve(axes, p, *curve)  # noqa: E731
            plots.append(Plot(name, heading, alt, _both(draw, (5.2, 2.7))))
    alt = f"Histogram of firing frequencies; {evaluation.n_silent} of {evaluation.n_latents} latents are silent"
    draw = lambda axes, p: _histogram(axes, p, evaluation)  # noqa: E731
    return [*plots, Plot("firing", "How often latents fire", alt, _both(draw, (10.6, 3.2)))]


def _both(draw, size: tuple[float, float]) -> tuple[bytes, bytes]:
    light, dark = (_render(draw, size, palette) for palette in _PALETTES)
    return light, dark


def _render(draw, size: tuple[float, float], palette: _Palette) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained", facecolor=palette.background)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=palette.background)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(palette.muted)
    axes.grid(axis="y", color=palette.line, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=palette.muted, labelsize=8.5, length=0, pad=5, which="both")
    draw(axes, palette)
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor=palette.background, metadata={"Software": None})
    return out.getvalue()


def _curve(
    axes: Axes, palette: _Palette, points: np.ndarray, axis: str, held_out: float | None, percent: bool
) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator

    x, y = points.T
    axes.plot(x, y, color=palette.accent, linewidth=1.8, marker="o" if len(x) == 1 else "")
    shown = y if held_out is None or not math.isfinite(held_out) else np.append(y, held_out)
    if len(shown) > len(y):
        axes.axhline(held_out, color=palette.second, linewidth=1.2, linestyle=(0, (4, 3)))
        label = {"color": palette.second, "fontsize": 8.5, "ha": "left", "va": "bottom"}
        axes.annotate(
            f"evaluated {held_out:.3g}", (0.01, held_out), (0, 3), axes.get_yaxis_transform(),
            textcoords="offset points", **label,
        )  # fmt: skip
    if shown.min() > 0 and shown.max() > 20 * shown.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    elif np.ptp(shown) < 0.02 * abs(shown.max()):  # a constant: don't magnify its noise
        axes.set_ylim(sorted((0, 1.25 * shown.max())) if shown.any() else (0, 1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g} %" if percent else f"{v:g}"))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(axis, color=palette.muted, fontsize=8.5)
    axes.margins(x=0.02)


def _histogram(axes: Axes, palette: _Palette, evaluation: Evaluation) -> None:
    """Latents by log10 of the share of tokens on which they fire; the silent ones as a bar of their own."""
    from matplotlib.ticker import FuncFormatter

    fired = evaluation.firing_counts[evaluation.firing_counts > 0].double().numpy()
    low = -math.log10(evaluation.tokens)  # one firing
    edges = np.arange(low, _BIN, _BIN)
    edges = np.append(edges, edges[-1] + _BIN) if edges[-1] < 0 else edges
    heights, _ = np.histogram(np.log10(fired) + low, bins=edges - 1e-9)
    axes.bar(edges[:-1], heights, width=0.92 * _BIN, align="edge", color=palette.accent)
    silent = low - 2.5 * _BIN
    axes.bar(silent, evaluation.n_silent, width=0.92 * _BIN, align="edge", color=palette.second)
    note = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 8.5}
    axes.annotate(
        f"{evaluation.n_silent:,} silent", (silent + _BIN / 2, evaluation.n_silent), (0, 3),
        color=palette.second, **note,
    )  # fmt: skip
    if evaluation.l0 > 0:
        mean = math.log10(evaluation.l0 / evaluation.n_latents)
        axes.axvline(mean, color=palette.muted, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "mean", (mean, 1), (4, -2), axes.get_xaxis_transform(), textcoords="offset points", ha="left",
            va="top", fontsize=8.5, color=palette.muted,
        )  # fmt: skip
    axes.set_xticks(range(math.ceil(low), 1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * 10.0**v:g} %"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
    axes.set_xlim(silent - 1.5 * _BIN, max(_BIN, edges[-1]))
    axes.set_xlabel("share of tokens on which a latent fires", color=palette.muted, fontsize=8.5)
    axes.set_ylabel("latents", color=palette.muted, fontsize=8.5)
    axes.margins(y=0.12)
