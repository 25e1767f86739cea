"""The page of a benchmark result: what it draws and tells, that it stands alone, that gaps don't break it."""

from __future__ import annotations

import json
import math
import sys
from itertools import combinations, pairwise

import pytest

from fastsae.benchmarks import panels, plots, report
from fastsae.benchmarks.panels import Panel, Series, quality_panels, step_panels
from fastsae.benchmarks.plots import draw, size_of, slots_of
from fastsae.benchmarks.results import RESULTS
from fastsae.evaluate.page import Palette
from fastsae.testing import Page

PALETTE = Palette("#ffffff", "#666666", "#dddddd", tuple(f"#0000{i:02x}" for i in range(8)))
SHAPE = {"model": "MiniLM", "N": 1024, "D": 384, "k": 32, "dtype": "float32"}
K, MILLION = 1024, 2**20


@pytest.fixture
def no_plots(monkeypatch):
    """Leave the PNG empty: drawing takes nearly all of a page's time."""
    monkeypatch.setattr(report, "draw_twice", lambda draw, size: (b"", b""))


def row(op="step", backend="torch", M=16 * K, ms=None, **more):
    times = {} if ms is None else {"p20_ms": 0.9 * ms, "p50_ms": ms, "p80_ms": 1.2 * ms}
    return {"op": op, "backend": backend, "M": M, **SHAPE, **times, "note": "", "failed": False, **more}


def quality(backend, end, fvu, **more):
    curve = [[end / 4, 100, 4 * fvu], [end / 2, 200, 2 * fvu], [end, 400, fvu]]
    figures = {"at": "equal tokens", "lr": 1e-3, "seconds": end, "tokens": 400, "fvu": fvu, "l0": 32.0}
    return row("quality", backend) | figures | {"dead_share": 0.059, "curve": curve} | more


GEMMS = [row("gemm", "mm", m, ms, ratio_to_gemm=1.0) for m, ms in ((4 * K, 10.0), (64 * K, 160.0))]
STEPS = [
    row(M=64 * K, ms=400.0, process_mib=500.0, peak_mib=50.0, ratio_to_gemm=2.5),
    row(M=4 * K, ms=30.0, process_mib=300.0, peak_mib=40.0, ratio_to_gemm=3.0),
    row(backend="sae_lens", M=4 * K, ms=90.0, process_mib=700.0, peak_mib=70.0),
    row(backend="sae_lens", M=64 * K, note="skipped: out of memory"),
    row(backend="dense", M=4 * K, ms=60.0, process_mib=600.0, peak_mib=60.0),
    row(backend="dense", M=64 * K, note="failed: RuntimeError: boom", failed=True),
]
QUALITY = [
    quality("torch", 60.0, 0.12),
    quality("sae_lens", 900.0, 0.15, dead_share=0.2),
    quality("torch", 60.0, 0.12, at="equal seconds", curve=None),
]
GROWTH = [
    {
        "op": "growth",
        "backend": "torch",
        **SHAPE,
        "M": 16 * K,
        "along": "N",
        "exponent": 0.971,
        "stderr": 0.02,
    }
]


class TablePage(Page):
    """With the class and the cells of every line of a table."""

    def __init__(self, source: str) -> None:
        self.lines = []
        super().__init__(source)

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        attributes = dict(attrs)
        if tag == "tr":
            self.lines.append((attributes.get("class"), []))
        elif tag in ("th", "td"):
            self.lines[-1][1].append((tag, attributes, []))

    def handle_data(self, data):
        super().handle_data(data)
        if {"th", "td"} & set(self.open):
            self.lines[-1][1][-1][2].append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def rows(self) -> list[tuple[str, list[str]]]:
        """Class and texts of the lines that are rows of the result."""
        return [
            (state, ["".join(text) for *_, text in cells])
            for state, cells in self.lines
            if cells[0][1].get("scope") == "row"
        ]


def write(folder, rows, **more) -> TablePage:
    machine = {
        "cpu": "A CPU",
        "gpu": None,
        "threads": 2,
        "cores": 4,
        "torch": "2.13",
        "versions": {"x": "1.3"},
    }
    result = {
        "machine": machine,
        "commit": "abc-dirty",
        "time": "2026-11-28T10:00:00+00:00",
        "suite": "peers",
    }
    path = report.write_report(result | {"rows": rows} | more, folder / "new" / "page.html")
    assert path == folder / "new" / "page.html"
    return TablePage(path.read_text("utf-8"))


def drawn(panel):
    """Axes on which the panel was drawn and laid out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_of(panel), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes, PALETTE, panel=panel, slots=slots_of([panel]))
    figure.canvas.draw()
    return axes


def lines_of(axes, **wanted):
    """Data of the lines whose properties are as wanted."""
    return [
        [tuple(float(v) for v in xy) for xy in line.get_xydata()]
        for line in axes.get_lines()
        if all(getattr(line, f"get_{name}")() == value for name, value in wanted.items())
    ]


def texts_of(axes):
    return [text.get_text() for text in axes.texts]


# The page


@pytest.mark.parametrize(
    ("rows", "headings", "images"),
    [
        ([*GEMMS, *STEPS, *QUALITY, *GROWTH], ["A training step", "Quality"], 3),
        ([*GEMMS, *STEPS], ["A training step"], 2),
        (QUALITY, ["Quality"], 1),
        ([*GEMMS, *GROWTH], [], 0),
        (STEPS[:1], [], 0),  # one contestant at one M
        ([], [], 0),
    ],
)
def test_sections_come_and_go_with_their_rows(tmp_path, no_plots, rows, headings, images):
    page = write(tmp_path, rows)
    assert [name for name in ("A training step", "Quality") if name in page.text] == headings
    assert len(page.all("img")) == images
    assert len(page.rows) == len(rows)
    assert ("There is none" in page.text) == (not rows)


def test_the_head_says_what_ran_where(tmp_path, no_plots):
    text = write(tmp_path, STEPS).text
    for said in (
        "fastsae benchmarks: peers",
        "A CPU",
        "threads2",
        "cores4",
        "torch2.13",
        "x1.3",
        "abc-dirty",
    ):
        assert said in text, said
    assert "GPU" not in text
    assert "fastsae benchmarks" in write(tmp_path, [], suite=None, machine=None, commit=None).text


def test_tables_hold_every_figure(tmp_path, no_plots):
    timed = row(
        ms=1234.0, M=64 * K, format="split32/int8", ceiling_share=0.425, tokens_s=829.8, tflops=0.0123,
        held_mib=800.0, planned_mib=1105.0, process_mib=1095.0, forward_ms=1.5, backward_ms=2.5,
        note="five steps",
    )  # fmt: skip
    page = write(tmp_path, [timed, *STEPS, *QUALITY, *GROWTH])
    cells = [texts for _, texts in page.rows]
    assert cells[0][:6] == ["fastsae torch", "split32/int8", "1,234", "1,111 – 1,481", "3.08", ""]
    for text in ("42 %", "830", "0.0123", "800", "1,105", "1,095", "1.5 + 2.5 + ?", "five steps"):
        assert text in cells[0], text
    assert cells[1][4] == "1.00"  # the fastest of its shape
    assert ["fastsae torch", "N", "0.97 ± 0.02"] in cells
    assert ["sae_lens", "equal tokens", "0.001", "400", "900", "0.15", "20 %", "32"] in cells


def test_a_column_that_says_nothing_is_left_out(tmp_path, no_plots):
    assert "weights/states" not in write(tmp_path, [row(ms=1.0, format="float32/float32")]).text
    text = write(tmp_path, [row(ms=1.0, format="float32/float32"), row(ms=1.0, format="float32/int8")]).text
    assert "weights/states" in text
    assert "TB/s" not in text


def test_failed_and_skipped_rows_stand_out(tmp_path, no_plots):
    rows = [
        row(ms=1.0, note="fine"),
        row(backend="dense", note="failed: boom"),
        row(backend="a", failed=True),
        row(backend="b", note="skipped: not installed"),
        row(backend="", note="not reached within the budget"),
        row(backend="c", ms=2.0, failed=True, note="wrong at the end"),
    ]
    lines = write(tmp_path, rows).rows
    assert [state for state, _ in lines] == ["", "failed", "failed", "skipped", "skipped", "failed"]
    assert lines[1][1] == ["dense", "failed: boom"]
    assert lines[2][1] == ["a", "failed"]
    assert lines[3][1] == ["b", "skipped: not installed"]
    assert lines[4][1] == ["all", "not reached within the budget"]
    assert lines[5][1][-1] == "wrong at the end"


def test_tables_can_be_read_by_ear(tmp_path, no_plots):
    page = write(tmp_path, [*GEMMS, *STEPS, row(ms=1.0, note="noted"), *QUALITY, *GROWTH])
    assert len(page.all("caption")) == len(page.all("table")) == 4
    assert all(a["scope"] in ("col", "row", "rowgroup") for a in page.all("th"))
    assert all(a["alt"] for a in page.all("img"))
    named = {a.get("id") for a in page.all("caption")}
    assert {a["aria-labelledby"] for a in page.all("div") if a.get("role") == "region"} == named
    widths = []
    for _, cells in page.lines:
        width = sum(int(a.get("colspan", 1)) for _, a, _ in cells)
        if all(a.get("scope") == "col" for _, a, _ in cells):
            widths.append(width)
        assert width == widths[-1]


def test_plots_are_told_in_words(tmp_path, no_plots):
    time, memory, fvu = (a["alt"] for a in write(tmp_path, [*GEMMS, *STEPS, *QUALITY]).all("img"))
    assert time == (
        "Time of a step against latents M. fastsae torch: 30 ms at 4k, 400 ms at 65k; "
        "sae_lens: 90 ms at 4k, out of memory at 65k; dense: 60 ms at 4k, failed at 65k; "
        "encoder GEMM: 10 ms at 4k, 160 ms at 65k."
    )
    assert memory.startswith("Peak memory of the process against latents M. fastsae torch: 300 MiB at 4k")
    assert fvu.endswith("fastsae torch: 0.12 at 60 s, 5.9 % dead; sae_lens: 0.15 at 900 s, 20 % dead.")


def test_nothing_comes_from_elsewhere(tmp_path):
    page = write(tmp_path, [*GEMMS, *STEPS, *QUALITY, row(note="see https://example.org/a.js", ms=1.0)])
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href", "action", "background", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
        assert not any(name.startswith("on") for name in attributes)
    source = (tmp_path / "new" / "page.html").read_text("utf-8")
    assert "url(" not in source
    assert "@import" not in source
    assert any(a.get("http-equiv") == "Content-Security-Policy" for a in page.all("meta"))
    urls = [a["src"] for a in page.all("img")] + [a["srcset"] for a in page.all("source")]
    assert len(set(urls)) == 6  # three plots, for light and for dark
    assert all(url.startswith("data:image/png;base64,iVBOR") for url in urls)


ATTACK = "\"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'{{ 7 * 7 }} $x_{ \\frac \u4e16 \ud800"


def test_markup_in_a_result_is_text(tmp_path):
    hostile = dict.fromkeys(("backend", "model", "note", "dtype", "format"), ATTACK)
    rows = [row(M=m, ms=float(m)) | hostile for m in (4 * K, 64 * K)]
    rows += [row(backend="$\\frac$", M=4 * K, ms=1.0), row(backend="$\\frac$", M=64 * K, failed=True)]
    rows += [row(backend="$\\frac$", k=7, ms=1.0), row(backend="b", k=7, ms=1.0)]
    rows += [
        quality(ATTACK, 60.0, 0.12) | {"at": ATTACK},
        row(op=ATTACK),
        row(M=4 * K) | hostile | {"failed": True},
    ]
    page = write(tmp_path, rows, suite=ATTACK, commit=ATTACK, machine={ATTACK: ATTACK})
    assert "<script" not in (tmp_path / "new" / "page.html").read_text("utf-8")
    assert len(page.all("img")) == 4
    shown = ATTACK.replace("\ud800", "?")
    assert any(cells[-1] == shown for _, cells in page.rows)
    assert page.text.count(shown) > 12


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_render(tmp_path, path):
    result = json.loads(path.read_text())
    page = write(tmp_path, **result)
    assert len(page.rows) == len(result["rows"])
    assert ("A training step" in page.text) == any(r["op"] == "step" and r["p50_ms"] for r in result["rows"])


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=f"^report: got no {package} on this machine, expected both: pip install"
    ):
        write(tmp_path, STEPS)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_the_old_page_survives_a_failed_write(tmp_path, no_plots, monkeypatch, step):
    write(tmp_path, STEPS)
    path = tmp_path / "new" / "page.html"
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(f"os.{step}", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, QUALITY)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


# Series


def test_steps_become_series():
    (shape, (time, memory)), *more = step_panels([*GEMMS, *STEPS]).items()
    assert (shape, more) == ("MiniLM, D = 384, N = 1,024, k = 32, float32", [])
    ours, lens, dense = time.series
    assert ours == Series("fastsae torch", ((4 * K, 30.0, 27.0, 36.0), (64 * K, 400.0, 360.0, 480.0)))
    assert lens == Series("sae_lens", ((4 * K, 90.0, 81.0, 108.0),), ((64 * K, "out of memory"),))
    assert dense.stops == ((64 * K, "failed"),)
    assert time.floor == Series("encoder GEMM", ((4 * K, *[10.0] * 3), (64 * K, *[160.0] * 3)))
    assert memory.heading == "Peak memory of the process"
    assert memory.series[0].points == ((4 * K, *[300.0] * 3), (64 * K, *[500.0] * 3))
    assert memory.series[1].stops == ((64 * K, "out of memory"),)
    assert memory.floor is None


@pytest.mark.parametrize(
    ("note", "stop"),
    [
        ("skipped: out of memory", "out of memory"),
        ("skipped: needs 137 GB, 60 are free", "out of memory"),
        ("failed: RuntimeError: CUDA out of memory", "out of memory"),
        ("failed: AssertionError: off by 3", "failed"),
        ("skipped: not installed; it needs torch 2.9", None),
        ("skipped: one call takes 9.1 s", None),
        ("", None),
        (None, None),
    ],
)
def test_why_a_contestant_stopped(note, stop):
    rows = [row(M=m, ms=1.0) for m in (4 * K, 64 * K)] + [row(backend="other", M=4 * K, note=note)]
    (time,) = step_panels(rows)["MiniLM, D = 384, N = 1,024, k = 32, float32"]
    assert [s.stops for s in time.series[1:]] == ([((4 * K, stop),)] if stop else [])


def test_a_row_with_its_figures_did_not_stop():
    """Its note may be of memory that was measured afterwards."""
    rows = [row(M=m, ms=1.0, peak_mib=5.0, note="; then skipped: out of memory") for m in (4 * K, 64 * K)]
    (found,) = step_panels(rows).values()
    assert [panel.series[0].stops for panel in found] == [(), ()]
    rows[1]["peak_mib"] = None
    (found,) = step_panels(rows).values()
    assert [panel.series[0].stops for panel in found] == [(), ((64 * K, "out of memory"),)]


def test_groups_of_one_contestant_at_one_size_are_not_drawn():
    assert not step_panels([row(ms=1.0), row(backend="x", note="skipped: not installed"), row(N=5, ms=1.0)])
    assert len(step_panels([row(ms=1.0), row(backend="x", ms=2.0), row(N=5, ms=1.0)])) == 1
    assert len(step_panels([row(ms=1.0), row(M=4 * K, ms=2.0), row(dtype="bfloat16", ms=1.0)])) == 1


def test_formats_of_a_contestant_are_told_apart():
    rows = [row(ms=1.0, format="float32/float32"), row(ms=2.0, format="split32/int8")]
    rows += [row(backend="dense", ms=3.0, format="float32/float32")]
    (found,) = step_panels(rows).values()
    labels = ["fastsae torch, float32/float32", "fastsae torch, split32/int8", "dense"]
    assert [series.label for series in found[0].series] == labels
    assert found[0].caption == "Time of a step, M = 16,384"


def test_memory_is_of_the_process_only_where_it_was_measured():
    rows = [row(M=m, ms=1.0, peak_mib=float(m)) for m in (4 * K, 64 * K)]
    ((_, memory),) = step_panels(rows).values()
    assert memory.heading == "Peak memory that a step adds"
    assert memory.series[0].points[0][1] == 4 * K
    rows[1]["process_mib"] = 900.0
    ((_, memory),) = step_panels(rows).values()
    assert [point[:2] for point in memory.series[0].points] == [(64 * K, 900.0)]


def test_the_whole_peak_of_early_results_is_the_process(tmp_path, no_plots):
    early = {"peak_mib": 900.0, "note": "the first 5 steps of a process; its whole peak"}
    page = write(tmp_path, [row(ms=1.0, format="float32/int8", **early), row(ms=2.0, format="a", **early)])
    assert any("Peak memory of the process" in a["alt"] for a in page.all("img"))
    assert "process, MiB" in page.text.replace("\xa0", " ").split("What the numbers mean")[0]
    assert "adds, MiB" not in page.text.replace("\xa0", " ")


def test_the_floor_is_the_gemm_that_ratios_refer_to():
    blocks = [row("gemm", "torch", m, 1.0, ratio_to_gemm=0.4) for m in (4 * K, 64 * K)]
    foreign = [row("gemm", "mm", m, 2.0, ratio_to_gemm=1.0, D=768) for m in (4 * K, 64 * K)]
    elsewhere = [row("gemm", "mm", 16 * K, 3.0, ratio_to_gemm=1.0)]  # no step there
    for rows in ([*blocks, *GEMMS], [*GEMMS, *blocks]):
        (found,) = step_panels([*foreign, *elsewhere, *rows, *STEPS]).values()
        assert [point[:2] for point in found[0].floor.points] == [(4 * K, 10.0), (64 * K, 160.0)]
    assert next(iter(step_panels(STEPS).values()))[0].floor is None
    half = [g | {"dtype": "bfloat16", "p50_ms": 4.0} for g in GEMMS]
    (found,) = step_panels([*half, *STEPS]).values()
    assert found[0].floor.label == "encoder GEMM, bfloat16"
    (found,) = step_panels([*half, *GEMMS, *STEPS]).values()
    assert found[0].floor.points[0][1] == 10.0


def test_quality_becomes_curves():
    ((panel,),) = quality_panels(QUALITY).values()
    ours, lens = panel.series
    assert [point[:2] for point in ours.points] == [(15.0, 0.48), (30.0, 0.24), (60.0, 0.12)]
    assert (ours.label, ours.remark) == ("fastsae torch", "5.9 % dead")
    assert lens.points[-1][:2] == (900.0, 0.15)
    assert panel.budget == 60.0
    ((panel,),) = quality_panels(
        [quality("a", 60.0, 0.12, curve=None), quality("a", 6.0, 0.2, lr=2e-3)]
    ).values()
    assert [series.label for series in panel.series] == ["a, lr 0.001", "a, lr 0.002"]
    assert [len(series.points) for series in panel.series] == [1, 3]
    assert panel.budget is None


BAD = [None, math.nan, math.inf, -math.inf, 0, -1.0, "1.0", True]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_what_is_no_figure_is_no_point(tmp_path, no_plots, bad):
    names = (
        "p20_ms",
        "p50_ms",
        "p80_ms",
        "peak_mib",
        "process_mib",
        "ceiling_share",
        "tokens_s",
        "ratio_to_gemm",
    )
    spoilt = row(backend="dense", M=64 * K) | dict.fromkeys(names, bad)
    bare = {"op": "step", "backend": "x", "M": bad}
    curve = [[1.0, 10, bad], [bad, 20, 0.5], [3.0, 30, 0.3]]
    learnt = (
        quality("a", 1.0, 1.0) | dict.fromkeys(("seconds", "fvu", "dead_share", "lr"), bad) | {"curve": curve}
    )
    growth = GROWTH[0] | {"exponent": bad, "stderr": bad}
    page = write(tmp_path, [*STEPS[:5], spoilt, bare, {}, learnt, growth])
    assert len(page.rows) == 10
    assert "nan" not in page.text
    assert "inf" not in page.text
    (found,) = step_panels([*STEPS[:5], spoilt, bare]).values()
    assert all(math.isfinite(v) for p in found for s in p.series for point in s.points for v in point)
    assert [len(s.points) for s in found[0].series] == [2, 1, 1]
    ((panel,),) = quality_panels([learnt]).values()
    assert [point[:2] for point in panel.series[0].points] == [(3.0, 0.3)]
    assert not step_panels([spoilt, spoilt | {"M": 4 * K}])


def test_missing_quantiles_leave_the_median():
    rows = [row(M=m, ms=10.0) | {"p20_ms": math.nan, "p80_ms": None} for m in (4 * K, 64 * K)]
    assert next(iter(step_panels(rows).values()))[0].series[0].points[0] == (4 * K, 10.0, 10.0, 10.0)


# What is drawn


def test_lines_bars_and_the_floor_are_drawn():
    panel = next(iter(step_panels([*GEMMS, *STEPS]).values()))[0]
    axes = drawn(panel)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert lines_of(axes, linestyle="--") == [[(4 * K, 10.0), (64 * K, 160.0)]]
    for series in panel.series:
        assert [point[:2] for point in series.points] in lines_of(axes, linestyle="-")
    bars = [tuple(map(tuple, path.vertices)) for c in axes.collections for path in c.get_paths()]
    assert ((4 * K, 27.0), (4 * K, 36.0)) in bars
    assert {"fastsae torch", "sae_lens", "dense", "encoder GEMM"} <= set(texts_of(axes))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4k", "65k"]


def test_small_differences_are_not_magnified():
    for first, second in ((40.0, 43.0), (40.0, 40.0)):
        rows = [row(M=m, ms=1.0, peak_mib=mib) for m, mib in ((4 * K, first), (64 * K, second))]
        axes = drawn(next(iter(step_panels(rows).values()))[1])
        low, high = axes.get_ylim()
        assert high / low == pytest.approx(4)
        assert low < first / 1.8
        assert [label.get_text() for label in axes.get_yticklabels()] == [
            "24 MiB",
            "32 MiB",
            "48 MiB",
            "64 MiB",
        ]


def test_stops_are_marked_and_named():
    for panel in next(iter(step_panels([*GEMMS, *STEPS]).values())):
        axes = drawn(panel)
        (cross,), (diamond,) = lines_of(axes, marker="x")[0], lines_of(axes, marker="D", linestyle="None")[0]
        assert cross[0] == diamond[0] == 64 * K
        assert {"sae_lens out of memory", "dense failed"} <= set(texts_of(axes))
        top = axes.transAxes.inverted().transform(axes.transData.transform((1, 480.0)))[1]
        assert max(top, 0.5) < min(cross[1], diamond[1]) < 1  # above all that was measured


def test_contestants_at_one_size_are_ranked():
    rows = [*GEMMS[:1], row(M=4 * K, ms=20.0), row(backend="slow", M=4 * K, ms=90.0)]
    rows += [
        row(backend="big", M=4 * K, note="skipped: out of memory"),
        row(backend="fast", M=4 * K, ms=15.0),
    ]
    axes = drawn(next(iter(step_panels(rows).values()))[0])
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["fast", "fastsae torch", "slow", "big"]
    assert [line[0] for line in lines_of(axes, marker="o")] == [(15.0, 0), (20.0, 1), (90.0, 2)]
    assert lines_of(axes, linestyle="--") == [[(10.0, 0.0), (10.0, 1.0)]]
    assert {"15 ms", "20 ms", "90 ms", "out of memory", "encoder GEMM 10 ms"} == set(texts_of(axes))
    assert len(lines_of(axes, marker="x")) == 1


def test_curves_end_in_their_dead_share():
    axes = drawn(next(iter(quality_panels(QUALITY).values()))[0])
    assert {"fastsae torch: 5.9 % dead", "sae_lens: 20 % dead", "equal seconds"} == set(texts_of(axes))
    assert lines_of(axes, linestyle="--") == [[(60.0, 0.0), (60.0, 1.0)]]


def contestants(n, spread, stops=0, remark="", start=10.0):
    series = [
        Series(f"contestant {i}", tuple((m, y, y, y) for m, y in ends), remark=remark)
        for i in range(n)
        for ends in [((4 * K, start), (64 * K, 10 + spread * i))]
    ]
    stopped = [
        Series(f"stopped {i}", ((4 * K, 5.0, 5.0, 5.0),), ((64 * K if i % 2 else 16 * K, "out of memory"),))
        for i in range(stops)
    ]
    return (*series, *stopped)


@pytest.mark.parametrize(
    "panel",
    [
        Panel("", "latents M", contestants(7, 1e-6)),
        Panel("", "latents M", contestants(4, 300.0, stops=4)),
        Panel("", "latents M", contestants(6, 0.0, stops=3), floor=contestants(1, 0)[0]),
        Panel("", "seconds of training", contestants(8, 0.01, remark="5.9 % dead"), budget=9000.0),
        Panel("", "latents M", contestants(8, 0.01, start=1000.0)),
        Panel("", "latents M", tuple(Series(f"c{i}", ((4 * K, i + 1, i + 1, i + 1),)) for i in range(8))),
    ],
)
def test_texts_do_not_overlap(panel):
    from matplotlib.text import Text

    axes = drawn(panel)
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in axes.texts]  # without its leader
    figure = axes.figure.bbox
    for (one, a), (other, b) in combinations(boxes, 2):
        apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, (one, other)
    assert all(figure.x0 <= box.x0 and box.x1 <= figure.x1 and box.y1 <= figure.y1 for _, box in boxes)
    assert all(box.y1 > axes.bbox.y0 for _, box in boxes)


def test_colours_differ_within_a_panel_and_hold_across():
    first = Panel("", "latents M", contestants(5, 1.0))
    second = Panel(
        "", "seconds of training", (Series("fastsae", ((1.0, 1.0, 1.0, 1.0),)), *contestants(3, 1.0))
    )
    slots = slots_of([first, second])
    assert slots["fastsae"] == 0
    for panel in (first, second):
        used = [slots[series.label] for series in panel.series]
        assert len(set(used)) == len(used)
    assert max(slots.values()) == 4  # a colour is used again where it can't be mistaken


@pytest.mark.parametrize("base", [2, 10])
@pytest.mark.parametrize("low", [1e-5, 0.7, 3.0, 1e9])
@pytest.mark.parametrize("factor", [1.05, 2.0, 30.0, 1e4, 1e20])
def test_ticks_are_few_and_inside(base, low, factor):
    ticks = plots._ticks(low, low * factor, base)
    assert len(ticks) <= 8
    assert len(plots._ticks(low, low * factor, base, most=5)) <= 5
    assert len(ticks) >= 2 or factor < 4
    assert all(a < b for a, b in pairwise(ticks))
    assert all(low <= tick <= low * factor for tick in ticks)


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (panels._time, 0.0123, "12.3 µs"), (panels._time, 0.5, "0.5 ms"), (panels._time, 999.0, "999 ms"),
        (panels._time, 999.9, "1 s"), (panels._time, 12_345.0, "12.3 s"), (panels._time, 2e6, "2,000 s"),
        (panels._mib, 512, "512 MiB"), (panels._mib, 1023, "0.999 GiB"), (panels._mib, 3e6, "2,930 GiB"),
        (panels._latents, 64, "64"), (panels._latents, 4096, "4k"), (panels._latents, 65_536, "65k"),
        (panels._latents, 524_288, "524k"), (panels._latents, MILLION, "1M"),
        (panels._latents, 4 * MILLION, "4.2M"),
        (panels._latents, 32 * MILLION, "34M"), (panels._latents, 128 * MILLION, "134M"),
    ],
)  # fmt: skip
def test_numbers_on_axes(write, value, text):
    assert write(value) == text
