"""What pages that open offline share: their frame and style, numbers as text, plots for light and dark."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "DASHES",
    "FONT_SIZE",
    "Palette",
    "annotate",
    "data_url",
    "draw_twice",
    "number",
    "percent",
    "render_page",
]

FONT_SIZE = 8.5
DASHES = (0, (4, 3))
_DOTS_PER_INCH = 160  # about two for each pixel of a page, for sharp screens
_FRAME = "page.html.j2"


@dataclass(frozen=True)
class Palette:
    """Colours of a plot.

    Those of ``series``, in order of use, stay apart for red-, green- and blue-blind readers: at least 9.9 in
    CIELAB by Machado's simulation, of the first seven 15; on the background their contrast is 4.4 or more.
    """

    background: str
    muted: str
    line: str
    series: tuple[str, ...]

    @property
    def accent(self) -> str:
        return self.series[0]

    @property
    def second(self) -> str:
        return self.series[1]


_LIGHT = Palette(
    "#ffffff",
    "#686d76",
    "#e7e7e3",
    ("#2b62d6", "#c2571a", "#0d5c4b", "#c047aa", "#4a0f8f", "#5c1010", "#8f6f52", "#3a3f47"),
)
_DARK = Palette(
    "#1b1d22",
    "#9da2ab",
    "#30333a",
    ("#86abff", "#f0a35e", "#2fe3cb", "#ef5fbc", "#d6da3a", "#4aa58c", "#9d8f10", "#8b74fe"),
)


def render_page(package: str, name: str, **content: Any) -> bytes:
    """The page that ``package``'s template makes of ``content``; everything is text unless marked safe.

    A template extends page.html.j2, which holds the style and shows ``title``.
    """
    from jinja2 import DictLoader, Environment, StrictUndefined

    sources = {
        file: resources.files(home).joinpath(file).read_text("utf-8")
        for home, file in (("fastsae.evaluate", _FRAME), (package, name))
    }
    environment = Environment(
        loader=DictLoader(sources),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(content).encode("utf-8", "replace")


def number(value: Any) -> str:
    """Three digits, thousands apart; a sequence's joined by commas; anything else as it prints."""
    if isinstance(value, list | tuple):
        return ", ".join(map(number, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if abs(value) < 1000 or not math.isfinite(value) else f"{value:,.0f}"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def draw_twice(draw: Callable[[Axes, Palette], None], size: tuple[float, float]) -> tuple[bytes, bytes]:
    """The PNG of a drawing for a light and for a dark page; ``size`` in inches."""
    return _render(draw, size, _LIGHT), _render(draw, size, _DARK)


def _render(draw: Callable[[Axes, Palette], None], size: tuple[float, float], palette: Palette) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained", facecolor=palette.background)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=palette.background)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(palette.muted)
    axes.grid(axis="y", color=palette.line, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=palette.muted, labelsize=FONT_SIZE, length=0, pad=5, which="both")
    draw(axes, palette)
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor=palette.background, metadata={"Software": None})
    return out.getvalue()


def annotate(axes: Axes, text: str, at: tuple[float, float], color: str, **options: Any) -> None:
    """Write at a place in data coordinates, offset by ``xytext`` points unless ``options`` say otherwise."""
    placed: dict[str, Any] = {"textcoords": "offset points", "fontsize": FONT_SIZE} | options
    axes.annotate(text, at, color=color, **placed)
