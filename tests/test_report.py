"""The report: what it says, that it stands alone, that nothing in it can break out."""

import base64
import math
import re
import struct
from dataclasses import replace

import pytest
import torch

from fastsae import SAE, AuxK, SAEConfig, TopK
from fastsae.evaluate import Evaluation, Example, LatentExamples, write_report
from fastsae.testing import Page

M = 50


@pytest.fixture
def sae():
    return SAE(SAEConfig(8, M, TopK(4), losses=(AuxK(),)))


@pytest.fixture
def no_plots(monkeypatch):
    """Leave out the plots, which take nearly all of a report's time."""
    monkeypatch.setattr("fastsae.evaluate.report.draw_plots", lambda log, evaluation: [])


def make_evaluation(**changes) -> Evaluation:
    counts = torch.arange(M) ** 2
    counts[10:13] = 0
    numbers = {
        "fvu": 0.1234,
        "l0": 4.0,
        "n_silent": 4,
        "n_latents": M,
        "cosine": 0.91,
        "relative_norm": 0.87,
        "tokens": 16_384,
        "skipped_tokens": 0,
        "firing_counts": counts,
    }
    return Evaluation(**numbers | changes)


LOG = [
    {"step": s, "tokens": 1024 * s, "loss": 2 / s, "fvu": 1 / s, "l0": 4.0, "dead_share": s / 100, "lr": 1e-3}
    for s in range(1, 20)
]


def example(tokens, at, activations=None) -> Example:
    activations = activations or tuple(2.5 if i == at else 0.0 for i in range(len(tokens)))
    return Example(position=at, at=at, tokens=tuple(tokens), activations=activations)


def latent(*examples, index=17, share=0.00321) -> LatentExamples:
    return LatentExamples(latent=index, share=share, mean_activation=1.5, score=3.0, examples=examples)


class MarkedPage(Page):
    """With the marked tokens."""

    def __init__(self, source: str) -> None:
        self.marked = []
        super().__init__(source)

    def handle_data(self, data):
        super().handle_data(data)
        if "mark" in self.open:
            self.marked.append(data)


def read(path) -> MarkedPage:
    return MarkedPage(path.read_text("utf-8"))


def write(directory, sae, *, evaluation=None, log=(), examples=None, **options):
    evaluation = evaluation or make_evaluation()
    return write_report(directory, sae=sae, evaluation=evaluation, log=log, examples=examples, **options)


def test_numbers_and_facts(tmp_path, sae, no_plots):
    facts = {
        "model": "tiny",
        "lr": 2e-3,
        "steps": 12345,
        "losses": ("x", 1 / 32),
        "tokens": 300_000,
        "seconds": 90,
    }
    path = write(tmp_path / "new" / "run", sae, title="A title", facts=facts)
    assert path == tmp_path / "new" / "run" / "report.html"
    page = read(path)
    words = " ".join(page.text.split())
    for expected in (
        "A title", "0.123", "87.7 %", "8 %", "4 of 50 silent on 16,384 tokens", "300,000", "90 s",
        "3,333 tokens per second", "modeltiny", "lr0.002", "steps12,345", "activationTopK(k=4)",
        "lossesx, 0.0312", "0.9100", "0.8700",
    ):  # fmt: skip
        assert expected in words, expected
    assert "AuxK" not in words  # the caller's entry replaces the dictionary's own
    assert "NaN or Inf" not in words
    assert "AuxK" in read(write(tmp_path, sae)).text
    assert "19,456" in read(write(tmp_path, sae, log=LOG[-1:])).text  # tokens of the log's last row
    assert (
        "7 tokens left out" in read(write(tmp_path, sae, evaluation=make_evaluation(skipped_tokens=7))).text
    )


def test_plots_stand_beside_the_page_and_in_it(tmp_path, sae):
    page = read(write(tmp_path, sae, log=LOG))
    names = ("loss", "fvu", "l0", "dead_share", "firing")
    files = {f"{name}{suffix}.png" for name in names for suffix in ("", "-dark")}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == files
    sources = [a["src"] for tag, a in page.tags if tag == "img"]
    dark = [a["srcset"] for tag, a in page.tags if tag == "source"]
    for name, source, other in zip(names, sources, dark, strict=True):
        for url, suffix in ((source, ""), (other, "-dark")):
            png = base64.b64decode(url.removeprefix("data:image/png;base64,"), validate=True)
            assert png == (tmp_path / "plots" / f"{name}{suffix}.png").read_bytes()
            assert png.startswith(b"\x89PNG")
            width, height = struct.unpack(">II", png[16:24])
            assert width > 800
            assert height > 400
    assert len(set(sources + dark)) == 10
    assert "The 4 silent latents0, 10, 11, 12" in page.text
    assert all(a["alt"] for tag, a in page.tags if tag == "img")


def test_nothing_comes_from_elsewhere(tmp_path, sae):
    shown = [latent(example(["see", "https://example.org/a.js", "now"], 1))]
    path = write(tmp_path, sae, examples=shown, facts={"text": "http://example.org"})
    page, source = read(path), path.read_text("utf-8")
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "video",
        "form",
    }
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href", "action", "background", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
        assert not any(name.startswith("on") for name in attributes)
    style = "".join(re.findall(r"<style>(.*?)</style>", source, re.S))
    assert style
    assert "url(" not in style
    assert "@import" not in style
    assert any(a.get("http-equiv") == "Content-Security-Policy" for tag, a in page.tags if tag == "meta")


def test_marked_tokens_with_their_strength(tmp_path, sae, no_plots):
    first = example(["the", "big", "##gest", "cat", "sat"], 2, (0.0, 1.0, 4.0, 0.0, 2.0))
    page = read(write(tmp_path, sae, examples=[latent(first, example(["a", "dog"], 1, (0.0, 2.0)))]))
    marks = [(a["style"], a["title"]) for tag, a in page.tags if tag == "mark"]
    assert page.marked == ["big", "gest", "sat", "dog"]
    assert marks == [("--s: 0.25", "1"), ("--s: 1.0", "4"), ("--s: 0.5", "2"), ("--s: 0.5", "2")]
    words = " ".join(page.text.split())
    assert "the biggest cat sat" in words
    assert "biggest·dog" in words  # the heading: whole words
    assert "latent 17, fires on 0.321 % of tokens, mean 1.5" in words


ATTACK = "\"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'{{ 7 * 7 }}"


def test_markup_in_tokens_titles_and_facts_is_text(tmp_path, sae):
    shown = [latent(example([ATTACK, ATTACK], 0, (2.0, 1.0)))]
    path = write(tmp_path, sae, examples=shown, title=ATTACK, facts={ATTACK: ATTACK})
    page, source = read(path), path.read_text("utf-8")
    assert "<script" not in source
    assert "script" not in {tag for tag, _ in page.tags}
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 1
    assert page.text.count(ATTACK) == 7  # title, h1, fact and its name, the latent's heading, two tokens
    assert page.marked == [ATTACK, ATTACK]


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("the un ##believ ##able don ' t ( x _ y ) , v 3 . 10 = = end . Yes", "the unbelievable don't (x_y), v 3.10 == end. Yes"),  # noqa: E501
        ("call _ _ init _ _ and _ _ len _ _ ( self ) - > int", "call __init__ and __len__ (self) -> int"),
        ("well - known i / o > > > f [ 0 ] : 5 % ok . - no", "well-known i/o >>> f [0]: 5% ok. - no"),
        ("' quoted ' and the cat ' s # 1 * 2", "' quoted ' and the cat's # 1 * 2"),
        ([" the", " cat", "'s", "\n", "\t", "  a", "\x00"], " the cat's↵⇥  a␀"),
        (["Ġthe", "Ġcat", "'s", "Ċ"], " the cat's↵"),
        (["▁the", "▁cat", "s"], " the cats"),
    ],
)  # fmt: skip
def test_tokens_read_as_text(tmp_path, sae, no_plots, tokens, text):
    tokens = tokens.split() if isinstance(tokens, str) else tokens
    for at in (0, len(tokens) - 1):
        page = read(write(tmp_path, sae, examples=[latent(example(tokens, at))]))
        line = page.text.split("mean 1.5")[1].split("What the numbers mean")[0]
        assert line.strip("\n").removeprefix("2.5").rstrip("\n") == text


def test_what_no_file_can_hold_is_replaced(tmp_path, sae, no_plots):
    page = read(write(tmp_path, sae, title="\udc80", examples=[latent(example(["a", "\ud800", " "], 2))]))
    assert "?" in page.text
    assert page.marked == [" "] or page.marked == [""]


def test_gaps_in_the_log(tmp_path, sae):
    log = [
        {"step": 1, "loss": math.nan, "fvu": None},
        {"step": 2, "loss": 3.0, "l0": math.inf},
        {"step": 3, "loss": -1.0, "other": "x"},
    ]
    page = read(write(tmp_path, sae, log=log))
    alts = [a["alt"] for tag, a in page.tags if tag == "img"]
    assert alts[0] == "Loss from 3 to -1 over 3 step"
    assert len(alts) == 2
    assert "There is no log" in read(write(tmp_path, sae)).text


@pytest.mark.parametrize(
    "changes",
    [
        {"fvu": math.nan, "cosine": math.nan, "relative_norm": math.nan},
        {"fvu": 900.0},
        {"tokens": 1, "l0": 1.0, "firing_counts": torch.cat([torch.ones(1), torch.zeros(M - 1)]).long()},
        {"tokens": 7, "l0": M, "n_silent": 0, "firing_counts": torch.full((M,), 7)},
        {"l0": 0.0, "n_silent": M, "firing_counts": torch.zeros(M, dtype=torch.int64)},
        {"tokens": 10**12},
    ],
)
def test_extreme_evaluations_are_drawn(tmp_path, sae, changes):
    page = read(
        write(tmp_path, sae, evaluation=make_evaluation(**changes), log=[{"tokens": 1024, "fvu": 0.5}])
    )
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 2


def test_extreme_logs_are_drawn(tmp_path, sae):
    log = [{"tokens": 10**i, "loss": 10.0 ** (3 - i), "fvu": 0.0, "l0": -1e5 / (i + 1)} for i in range(9)]
    page = read(write(tmp_path, sae, log=log))
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 4


def test_each_bar_of_the_histogram_counts_its_latents(tmp_path, sae, monkeypatch):
    """Every latent lies in one bin, those that fire once or always too."""
    from matplotlib.axes import Axes

    heights, inner = [], Axes.bar
    monkeypatch.setattr(Axes, "bar", lambda self, x, h, **kw: heights.append(h) or inner(self, x, h, **kw))
    for tokens in (1, 9, 10, 1000, 123_457):
        counts = torch.tensor([0, 1, tokens, 1, tokens] * (M // 5))
        write(
            tmp_path,
            sae,
            log=[],
            evaluation=make_evaluation(tokens=tokens, firing_counts=counts, n_silent=M // 5),
        )
        fired, silent = heights[-2:]
        assert fired.sum() == 4 * M // 5
        assert fired[0] >= 2 * M // 5
        assert fired[-1] == (4 if tokens == 1 else 2) * M // 5
        assert silent == M // 5


def test_examples_may_be_absent_or_empty(tmp_path, sae, no_plots):
    assert "What it learned" not in read(write(tmp_path, sae)).text
    assert "No latent fired in enough different places" in read(write(tmp_path, sae, examples=[])).text


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_the_old_report_survives_a_failed_write(tmp_path, sae, no_plots, monkeypatch, step):
    path = write(tmp_path, sae, title="old")
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(f"os.{step}", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, sae, title="new")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert "old" not in read(write(tmp_path, sae, title="new")).text


def test_same_input_same_page(tmp_path, sae):
    one, two = (write(tmp_path / name, sae, log=LOG[:2]) for name in ("a", "b"))
    assert one.read_bytes() == two.read_bytes()


def test_no_global_state_of_matplotlib(tmp_path, sae):
    import matplotlib
    import matplotlib._pylab_helpers as helpers

    before = dict(matplotlib.rcParams)
    write(tmp_path, sae)
    assert dict(matplotlib.rcParams) == before
    assert not helpers.Gcf.figs


def test_bad_arguments_are_named(tmp_path, sae):
    with pytest.raises(ValueError, match="evaluation: got one of 49 latents, expected 50"):
        write(tmp_path, sae, evaluation=replace(make_evaluation(), n_latents=49))
    with pytest.raises(TypeError, match="evaluation: got dict"):
        write(tmp_path, sae, evaluation={"fvu": 1.0})
    with pytest.raises(TypeError, match="sae: got"):
        write(tmp_path, None)
    assert not any(tmp_path.iterdir())
