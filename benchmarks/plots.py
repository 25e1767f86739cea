"""The plots of a benchmark result, drawn from panels of series."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import TYPE_CHECKING, Any

from fastsae.benchmarks.panels import Panel, Series
from fastsae.evaluate.page import DASHES, FONT_SIZE, Palette, annotate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "size_of", "slots_of"]

_MARKERS = "osD^vPXh"
_LINE, _MARGIN = 0.18, 0.55  # inches: a line of text; what the x axis takes below a plot


def slots_of(panels: Iterable[Panel]) -> dict[str, int]:
    """A number for each label, for its colour and marker: never one that another label in its panels has."""
    panels, slots = [panel for panel in panels if not panel.at_one_m], {}
    labels = dict.fromkeys(series.label for panel in panels for series in panel.series)
    for label in sorted(labels, key=lambda label: not _is_ours(label)):
        beside = [panel for panel in panels if any(series.label == label for series in panel.series)]
        taken = {slots.get(series.label) for panel in beside for series in panel.series}
        slots[label] = next(slot for slot in count() if slot not in taken)
    return slots


def size_of(panel: Panel) -> tuple[float, float]:
    """In inches."""
    if panel.at_one_m:
        return 5.2, 0.75 + 0.25 * len(panel.series)
    return 5.2 if panel.over_m else 9.2, 3.5 + _LINE * len(panel.stopped)


def draw(axes: Axes, palette: Palette, *, panel: Panel, slots: Mapping[str, int]) -> None:
    """Draw a panel, with the colours of ``slots``."""
    axes.set_xscale("log")
    styles = {series: _style(series, panel, palette, slots) for series in (*panel.shown, *panel.series)}
    (_draw_one if panel.at_one_m else _draw_many)(axes, palette, panel, styles)


def _style(series: Series, panel: Panel, palette: Palette, slots: Mapping[str, int]) -> dict[str, Any]:
    if series is panel.floor:
        return {"color": palette.muted, "linestyle": DASHES, "linewidth": 1.3}
    width = 2.2 if _is_ours(series.label) else 1.4
    if panel.at_one_m:
        color = palette.accent if _is_ours(series.label) else palette.second
        return {"color": color, "linewidth": width, "marker": "o", "markersize": 5}
    slot, n = slots[series.label], len(palette.series)
    marker = _MARKERS[(slot + slot // n) % len(_MARKERS)]
    return {"color": palette.series[slot % n], "linewidth": width, "marker": marker, "markersize": 5}


def _is_ours(label: str) -> bool:
    return label.startswith("fastsae")


def _draw_one(axes: Axes, palette: Palette, panel: Panel, styles: dict[Series, dict[str, Any]]) -> None:
    """Contestants at a single M, the lowest on top."""
    ranked = sorted(panel.series, key=lambda series: series.points[0][1] if series.points else math.inf)
    ends = [y for series in panel.shown for y in series.points[0][1:]]
    span = math.log(max(ends) / min(ends)) + 0.5
    axes.set_xlim(min(ends) / math.exp(0.06 * span), max(ends) * math.exp(0.3 * span))
    for i, series in enumerate(ranked):
        style = styles[series]
        for _, x, low, high in series.points:
            axes.plot(x, i, **style)
            axes.hlines(i, low, high, color=style["color"], linewidth=3.2, alpha=0.35)
            annotate(axes, panel.text(x), (high, i), palette.muted, xytext=(9, -0.5), va="center")
        for _, reason in () if series.points else series.stops:
            _mark(axes, series, reason, [axes.get_xlim()[1]], i, axes.transData, style["color"])
    if panel.floor:
        _, x, *_ = panel.floor.points[0]
        axes.axvline(x, **styles[panel.floor])
        text = f"{panel.floor.label} {panel.text(x)}"
        annotate(axes, text, (x, -0.6), palette.muted, xytext=(0, 3), ha="center", va="bottom")
    axes.set_yticks(range(len(ranked)), [_plain(series.label) for series in ranked], parse_math=False)
    axes.set_ylim(len(ranked) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=palette.line, linewidth=0.8)
    _set_ticks(axes.xaxis, _ticks(*axes.get_xlim(), panel.base, most=5), panel.text)


def _draw_many(axes: Axes, palette: Palette, panel: Panel, styles: dict[Series, dict[str, Any]]) -> None:
    """A line for each contestant, its label in the right margin; on top, a row for each that stopped."""
    axes.set_yscale("log")
    line = _LINE / (size_of(panel)[1] - _MARGIN)  # as a share of the height
    room = 1 - line * (len(panel.stopped) + bool(panel.stopped))
    xs = [x for series in (*panel.shown, *panel.series) for x, *_ in (*series.points, *series.stops)]
    xs += filter(None, [panel.budget])
    _scale(axes, xs, [y for series in panel.shown for point in series.points for y in point[1:]], room)
    for series in panel.shown:
        x, y, low, high = zip(*series.points, strict=True)
        axes.plot(x, y, **styles[series], markevery=None if panel.over_m else [-1])
        axes.vlines(x, low, high, color=styles[series]["color"], linewidth=3.2, alpha=0.35)
    _label(axes, panel, styles, line, room)
    for i, (series, reason, at) in enumerate(panel.stopped):
        height = 1 - line * (i + 0.5)
        _mark(axes, series, reason, at, height, axes.get_xaxis_transform(), styles[series]["color"])
    if panel.budget:
        axes.axvline(panel.budget, color=palette.muted, linewidth=1, linestyle=DASHES)
        where = {"xycoords": axes.get_xaxis_transform(), "xytext": (4, -2), "va": "top"}
        annotate(axes, "equal seconds", (panel.budget, 1), palette.muted, **where)
    _set_ticks(axes.xaxis, sorted(set(xs)) if panel.over_m else _ticks(*axes.get_xlim(), 10), panel.place)
    bottom, top = axes.get_ylim()
    _set_ticks(axes.yaxis, _ticks(bottom, bottom * (top / bottom) ** room, panel.base), panel.text)
    axes.set_xlabel(panel.x_label, color=palette.muted, fontsize=FONT_SIZE)


def _scale(axes: Axes, xs: list[float], ys: list[float], room: float) -> None:
    """Limits that leave the data the lowest ``room`` of the height, and don't magnify small differences."""
    wide, high = math.log(max(xs) / min(xs)) or 1, math.log(max(ys) / min(ys))
    axes.set_xlim(min(xs) / math.exp(0.05 * wide), max(xs) * math.exp(0.05 * wide))
    beyond = math.exp(max(0.08 * high, (math.log(4) - high) / 2))
    bottom, top = min(ys) / beyond, max(ys) * min(beyond, 2)
    axes.set_ylim(bottom, bottom * (top / bottom) ** (1 / room))


def _label(axes: Axes, panel: Panel, styles: dict[Series, dict[str, Any]], line: float, top: float) -> None:
    """Labels in the right margin, at the heights of the lines' ends as far as they leave each other room."""
    low, high = map(math.log, axes.get_ylim())
    ends = [((math.log(s.points[-1][1]) - low) / (high - low), s) for s in panel.shown]
    ends.sort(key=lambda end: end[0])
    gap = min(line, top / len(ends))
    heights = [ends[0][0]]
    for height, _ in ends[1:]:
        heights.append(max(height, heights[-1] + gap))
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], heights[i + 1] - gap if i + 1 < len(heights) else top)
    for height, (_, series) in zip(heights, ends, strict=True):
        color = styles[series]["color"]
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.7, "linestyle": ":", "relpos": (0, 0.5)}
        text = ": ".join(filter(None, [_plain(series.label), series.remark]))
        where = {"xytext": (1.03, height), "textcoords": "axes fraction", "va": "center"}
        arrow = leader | {"shrinkA": 2, "shrinkB": 5}
        annotate(axes, text, series.points[-1][:2], color, arrowprops=arrow, parse_math=False, **where)


def _mark(
    axes: Axes, series: Series, reason: str, at: list[float], height: float, transform: Any, color: str
) -> None:
    """A cross where memory ran out, a hollow diamond where a contestant failed, and what that means."""
    cross, diamond = {"marker": "x", "markeredgewidth": 2}, {"marker": "D", "markerfacecolor": "none"}
    shape = cross if reason == "out of memory" else diamond
    axes.plot(at, [height] * len(at), transform=transform, linestyle="", color=color, clip_on=False, **shape)
    low, high = map(math.log, axes.get_xlim())
    left = math.log(at[0]) - low > 0.45 * (high - low)
    where = {"xytext": (-7 if left else 7, 0), "ha": "right" if left else "left", "va": "center"}
    text = reason if transform is axes.transData else f"{_plain(series.label)} {reason}"
    place = (at[0 if left else -1], height)
    annotate(axes, text, place, color, xycoords=transform, parse_math=False, **where)


def _ticks(low: float, high: float, base: int, most: int = 8) -> list[float]:
    """Round numbers, ``most`` of them at the most."""
    steps = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)) if base == 10 else ((1, 1.5), (1,))
    for jump, some in ((j, s) for j in range(1, 400) for s in (steps if j == 1 else steps[-1:])):
        powers = range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)
        found = [step * base**p for p in powers if p % jump == 0 for step in some]
        if len(found := [tick for tick in found if low <= tick <= high]) <= most:
            break
    return found


def _set_ticks(axis: Any, ticks: list[float], text: Callable[[float], str]) -> None:
    ticks = ticks[:: -(-len(ticks) // 8) or 1]
    axis.set_ticks(ticks, labels=[text(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def _plain(label: str) -> str:
    """What every font can show."""
    label = label.encode("ascii", "replace").decode()
    return label if len(label) <= 40 else f"{label[:37]}..."
