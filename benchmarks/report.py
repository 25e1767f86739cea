"""A benchmark result as one HTML page that opens offline: plots, then every row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from fastsae.benchmarks.panels import (
    Panel,
    Row,
    contestant,
    describe,
    finite,
    grouped,
    has_failed,
    quality_panels,
    shape_of,
    step_panels,
)
from fastsae.benchmarks.plots import draw, size_of, slots_of
from fastsae.checks import reject
from fastsae.evaluate.page import data_url, draw_twice, number, percent, render_page
from fastsae.files import write_atomically

__all__ = ["Line", "Table", "tables", "write_report"]

_WHOLE_PEAK = "; its whole peak"  # in notes from before there was process_mib
_OPS = {
    "copy": "a large copy, the ceiling of bytes",
    "square gemm": "the ceiling of arithmetic",
    "topk": "torch.topk over dense scores",
    "gemm": "the encoder's scores alone",
    "encode": "tokens to their active latents",
    "decode": "active latents to tokens",
    "decode_error": "decode, less the target",
    "code_grad": "gradient of the active latents",
    "transpose": "active latents ordered by latent",
    "row_grads": "gradients of the rows that were active",
    "row_update": "the optimizer on the rows that were active",
    "row_step": "backward and optimizer of both matrices",
    "step": "a whole training step",
    "growth": "exponent of a step's time in each size",
    "quality": "after training on real activations",
    "gate": "what was found of known features",
    "family": "each architecture after training on real activations",
    "overhead": "a call's time on the host",
}


class Line(NamedTuple):
    """A row's cells; one without ``figures`` has its note in place of them."""

    state: str  # "", "failed" or "skipped"
    names: list[str]
    figures: list[str]
    note: str


class Table(NamedTuple):
    """Rows of one op by shape, and the headings of their cells."""

    op: str
    about: str
    names: list[str]
    figures: list[str]
    noted: bool
    groups: dict[str, list[Line]]


def write_report(result: dict[str, Any], path: Path) -> Path:
    """Write the page of a result, as those in benchmarks/results, atomically; return ``path``.

    It holds everything it shows: no script, no font, nothing from elsewhere. A section without rows is left
    out, and so is a value that is missing or not finite.

    Raises ValueError where matplotlib or jinja2 isn't installed.
    """
    for package in ("jinja2", "matplotlib"):
        if find_spec(package) is None:
            reject("report", f"no {package} on this machine", "both: pip install jinja2 matplotlib")
    rows = [_with_process(row) for row in result["rows"]]
    plots = {"step": step_panels(rows), "quality": quality_panels(rows)}
    panels = [panel for groups in plots.values() for group in groups.values() for panel in group]
    figure = partial(_figure, slots=slots_of(panels))
    page = render_page(
        "fastsae.benchmarks",
        "report.html.j2",
        title=": ".join(filter(None, ["fastsae benchmarks", result.get("suite")])),
        facts=_facts(result),
        plots={op: {shape: list(map(figure, of)) for shape, of in plots[op].items()} for op in plots},
        tables=tables(rows),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def _with_process(row: Row) -> Row:
    if _WHOLE_PEAK in str(row.get("note")) and row.get("process_mib") is None:
        return {**row, "process_mib": row.get("peak_mib"), "peak_mib": None}
    return row


def _facts(result: dict[str, Any]) -> dict[str, str]:
    machine = dict(result.get("machine") or {})
    facts = {"suite": result.get("suite"), "GPU": machine.pop("gpu", None), "CPU": machine.pop("cpu", None)}
    for name, value in machine.items():
        facts |= value if isinstance(value, dict) else {name: value}
    facts |= {name: result.get(name) for name in ("commit", "time")}
    return {name: number(value) for name, value in facts.items() if value not in (None, "")}


def _figure(panel: Panel, slots: Mapping[str, int]) -> dict[str, Any]:
    light, dark = draw_twice(partial(draw, panel=panel, slots=slots), size_of(panel))
    urls = {"light": data_url(light), "dark": data_url(dark)}
    return {"heading": panel.caption, "alt": describe(panel), "wide": not panel.over_m, **urls}


def tables(rows: list[Row]) -> list[Table]:
    """All rows by op, then by shape; columns that no row of the op has are left out."""
    return [_table(op, of) for op, of in grouped(rows, lambda row: str(row.get("op") or "other")).items()]


def _table(op: str, rows: list[Row]) -> Table:
    groups = grouped(rows, lambda row: shape_of(row, "MDNk"))
    cells = {shape: [_cells(row, of) for row in of] for shape, of in groups.items()}
    used = {name for of in cells.values() for row in of for name, text in row.items() if text}
    if all(set(str(row.get("format") or "").split("/")) <= {"", row.get("dtype")} for row in rows):
        used.discard("weights/states")  # they say nothing beyond the dtype
    names = [name for name in _NAMES if name in used or name == "contestant"]
    figures = [name for name in _FIGURES if name in used]
    lines = {
        shape: [_line(row, text, names, figures) for row, text in zip(of, cells[shape], strict=True)]
        for shape, of in groups.items()
    }
    noted = not figures or any(line.figures and line.note for of in lines.values() for line in of)
    return Table(op, _OPS.get(op, ""), names, figures, noted, lines)


def _line(row: Row, text: dict[str, str], names: list[str], figures: list[str]) -> Line:
    told, figured = [text[name] for name in figures], any(text[name] for name in figures)
    state = "failed" if has_failed(row) else "" if figured else "skipped"
    return Line(state, [text[name] for name in names], told if figured else [], text["note"] or state)


def _cells(row: Row, alike: list[Row]) -> dict[str, str]:
    """Every column's text; ``alike`` are the rows of the same op and shape."""
    times = [ms for other in alike if (ms := finite(other.get("p50_ms")))]
    cells = {heading: text(row) for heading, text in (_NAMES | _FIGURES).items()}
    if len(times) > 1 and finite(row.get("p50_ms")):
        cells["to the fastest"] = f"{row['p50_ms'] / min(times):.2f}"
    return cells | {"note": str(row.get("note") or "")}


def _of(name: str, write: Callable[[float], str] = number) -> Callable[[Row], str]:
    return lambda row: "" if finite(row.get(name)) is None else write(row[name])


def _range(row: Row) -> str:
    low, high = (_of(f"p{q}_ms")(row) for q in (20, 80))
    return f"{low} – {high}" if low and high else ""


def _phases(row: Row) -> str:
    parts = [_of(f"{name}_ms")(row) for name in ("forward", "backward", "optimizer")]
    return " + ".join(part or "?" for part in parts) if any(parts) else ""


def _exponent(row: Row) -> str:
    error = _of("stderr", lambda value: f" ± {value:.2f}")(row)
    return _of("exponent", lambda value: f"{value:.2f}{error}")(row)


_NAMES: dict[str, Callable[[Row], str]] = {
    "contestant": contestant,
    "weights/states": lambda row: str(row.get("format") or ""),
    "at": lambda row: str(row.get("at") or ""),
    "lr": _of("lr"),
    "along": lambda row: str(row.get("along") or ""),
}
"""What tells the rows of a shape apart."""
_FIGURES: dict[str, Callable[[Row], str]] = {
    "p50, ms": _of("p50_ms"),
    "p20 – p80": _range,
    "to the fastest": lambda row: "",
    "to the GEMM": _of("ratio_to_gemm", lambda ratio: f"{ratio:.2f}"),
    "of the ceiling": _of("ceiling_share", lambda share: f"{100 * share:.{0 if share >= 0.0995 else 1}f} %"),
    "adds, MiB": _of("peak_mib"),
    "process, MiB": _of("process_mib"),
    "held, MiB": _of("held_mib"),
    "planned, MiB": _of("planned_mib"),
    "tokens/s": _of("tokens_s", lambda rate: f"{rate:,.0f}"),
    "TFLOP/s": _of("tflops"),
    "TB/s": _of("tb_s"),
    "forward + backward + optimizer": _phases,
    "tokens": _of("tokens"),
    "seconds": _of("seconds"),
    "FVU": _of("fvu"),
    "dead": _of("dead_share", percent),
    "L0": _of("l0"),
    "exponent": _exponent,
}
