"""What a dictionary learned, as one HTML page that opens offline."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsae.checks import check_type, reject
from fastsae.evaluate.examples import Example, LatentExamples
from fastsae.evaluate.metrics import Evaluation
from fastsae.evaluate.page import data_url, number, percent, render_page
from fastsae.evaluate.plots import draw_plots
from fastsae.files import write_atomically
from fastsae.sae import SAE

__all__ = ["write_report"]

_SILENT_SHOWN = 200
_CLOSING, _OPENING, _JOINING, _QUOTES = set(".,;:!?)]}%"), set("([{"), set("-/"), set("'’")
_CONTRACTED = {"s", "t", "re", "ve", "ll", "d", "m"}
_VISIBLE = str.maketrans(
    {code: chr(0x2400 + code) for code in range(32)}
    | {"\n": "↵", "\t": "⇥", "\x7f": "␡", "Ġ": " ", "▁": " ", "Ċ": "↵"}
)


def write_report(
    directory: str | os.PathLike,
    *,
    sae: SAE,
    evaluation: Evaluation,
    log: Sequence[Mapping[str, Any]],
    examples: Sequence[LatentExamples] | None = None,
    title: str = "Sparse autoencoder",
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``report.html``, and its plots into ``plots/``, atomically; return the page's path.

    The page holds everything it shows: no script, no font, nothing from elsewhere.

    Args:
        directory: made where it doesn't exist.
        sae: the dictionary, for its own description.
        evaluation: what :func:`evaluate` found.
        log: rows as in log.jsonl: loss, fvu, l0 and dead_share are drawn against tokens (or step), as far as
            rows have them and they are finite.
        examples: from :func:`top_examples`; None leaves out the section.
        title: of the page.
        facts: what was trained (model, hook, lr, ...), for the table; the dictionary's own entries (latents,
            width, activation, losses, normalization) follow where they aren't among them. "tokens" and
            "seconds" of training go to the headline numbers; without the first, the tokens of the log's last
            row do.

    Raises:
        ValueError, TypeError: an evaluation of another number of latents; arguments of another kind.
    """
    check_type("sae", sae, SAE, "an SAE")
    check_type("evaluation", evaluation, Evaluation, "what fastsae.evaluate.evaluate returns")
    if evaluation.n_latents != sae.config.n_latents:
        reject(
            "evaluation",
            f"one of {evaluation.n_latents} latents",
            f"{sae.config.n_latents}, as the dictionary's",
        )
    facts = dict(facts or {})
    tokens = facts.pop("tokens", log[-1].get("tokens") if log else None)
    seconds = facts.pop("seconds", None)
    own = {name: value for name, value in _describe(sae).items() if name not in facts}
    plots = draw_plots(log, evaluation)
    page = render_page(
        "fastsae.evaluate",
        "report.html.j2",
        title=title,
        headline=_headline(evaluation, tokens, seconds),
        facts={name: number(value) for name, value in (facts | own).items()},
        evaluation=evaluation,
        plots=[(plot, *map(data_url, plot.png)) for plot in plots],
        silent=_silent(evaluation),
        latents=None if examples is None else _latents(examples),
    )
    folder = Path(directory)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for plot in plots:
        for png, suffix in zip(plot.png, ("", "-dark"), strict=True):
            write_atomically(folder / "plots" / f"{plot.name}{suffix}.png", png)
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


def _describe(sae: SAE) -> dict[str, Any]:
    config = sae.config
    return {
        "latents": config.n_latents,
        "width": config.d_in if config.d_in == config.d_out else f"{config.d_in:,} → {config.d_out:,}",
        "activation": config.activation,
        "losses": (config.reconstruction, *config.losses),
        "normalization": config.normalization,
    }


def _headline(
    evaluation: Evaluation, tokens: int | None, seconds: float | None
) -> list[tuple[str, str, str]]:
    """Label, number and remark of each tile."""
    e = evaluation
    tiles = [
        ("FVU", number(e.fvu), "fraction of variance unexplained"),
        ("Explained variance", percent(e.explained_variance), "1 − FVU"),
        ("L0", number(e.l0), "latents active per token"),
        (
            "Dead share",
            percent(e.dead_share),
            f"{e.n_silent:,} of {e.n_latents:,} silent on {e.tokens:,} tokens",
        ),
    ]
    if tokens is not None:
        tiles.append(("Trained on", number(tokens), "tokens"))
    if seconds is not None:
        size, unit = (1, "s") if seconds < 120 else (60, "min") if seconds < 7200 else (3600, "h")
        remark = f"{tokens / seconds:,.0f} tokens per second" if tokens and seconds > 0 else "of training"
        tiles.append(("Time", f"{seconds / size:.3g} {unit}", remark))
    return tiles


def _silent(evaluation: Evaluation) -> str:
    indices = (evaluation.firing_counts == 0).nonzero().flatten().tolist()
    more = f" and {len(indices) - _SILENT_SHOWN:,} more" if len(indices) > _SILENT_SHOWN else ""
    return ", ".join(map(str, indices[:_SILENT_SHOWN])) + more


def _latents(examples: Sequence[LatentExamples]) -> list[dict[str, Any]]:
    """What the template shows of each latent."""
    tokens = [token for latent in examples for example in latent.examples for token in example.tokens]
    own_spaces = any(token[:1] in {" ", "Ġ", "▁"} for token in tokens)
    shown = []
    for latent in examples:
        highest = max((a for example in latent.examples for a in example.activations), default=0.0)
        lines = [_line(example, highest, own_spaces) for example in latent.examples]
        names = list(dict.fromkeys(_word(line) for line in lines))
        shown.append(
            {
                "index": latent.latent,
                "names": names[:4],
                "share": percent(latent.share),
                "mean": number(latent.mean_activation),
                "lines": lines,
            }
        )
    return shown


def _line(example: Example, highest: float, own_spaces: bool) -> dict[str, Any]:
    """An example cut at its marked token, in pieces: the space before, the text, its strength in 0..1."""
    pieces = []
    for i, activation in enumerate(example.activations):
        space, text = _spell(example.tokens, i, own_spaces)
        strength = round(activation / highest, 2) if activation > 0 else 0
        pieces.append({"space": space, "text": text, "strength": strength, "activation": number(activation)})
    return {"before": pieces[: example.at], "peak": pieces[example.at], "after": pieces[example.at + 1 :]}


def _word(line: dict[str, Any]) -> tuple[str, str, str]:
    """The word around the marked token, cut in three: what comes before it, the token, what comes after."""
    before, after, inside = "", "", line["peak"]["text"] or "␣"
    space, edge = line["peak"]["space"], inside[0]
    for piece in reversed(line["before"]):
        if space or not (edge.isalnum() and piece["text"][-1:].isalnum()):
            break
        before, space, edge = piece["text"] + before, piece["space"], piece["text"][0]
    edge = inside[-1]
    for piece in line["after"]:
        if piece["space"] or not (edge.isalnum() and piece["text"][:1].isalnum()):
            break
        after, edge = after + piece["text"], piece["text"][-1]
    return before, inside, after


def _spell(tokens: Sequence[str], i: int, own_spaces: bool) -> tuple[str, str]:
    """The space before token i, and its text, so that all of them read as natural text."""
    token = tokens[i]
    if own_spaces:
        text = token.translate(_VISIBLE)
        bare = text.lstrip(" ")
        return (" " * (len(text) - len(bare)), bare) if bare else ("", text)
    if token.startswith("##") and len(token) > 2:
        return "", token[2:].translate(_VISIBLE)
    return "" if i == 0 or _touches(tokens, i) else " ", token.translate(_VISIBLE)


def _touches(tokens: Sequence[str], i: int) -> bool:
    """Whether no space belongs before the whole word or sign ``tokens[i]``, as far as a rule can know."""
    before, token = tokens[i - 1], tokens[i]
    last = tokens[i - 2] if i > 1 else ""
    following = tokens[i + 1] if i + 1 < len(tokens) else ""
    if token in _CLOSING or before in _OPENING:
        return True
    if "_" in (before, token):  # a_b and __a__: every other pair of underscores closes
        pairs = sum(tokens[j] == tokens[j + 1] == "_" for j in range(i - 1))
        starts, follows = token == following == "_" != before, before == last == "_" != token
        return not (starts and pairs % 2 == 0) and not (follows and pairs % 2 == 0)
    if token == before and not token.isalnum():  # ==, --, >>>
        return True
    if token in _JOINING:
        return _is_word(before) and _is_word(following)
    if before in _JOINING:
        return token == ">" or (_is_word(last) and _is_word(token))
    if before == ".":
        return token.isdigit() and last.isdigit()
    if token in _QUOTES:
        return following in _CONTRACTED and _is_word(before)
    return before in _QUOTES and token in _CONTRACTED and _is_word(last)


def _is_word(token: str) -> bool:
    return token.removeprefix("##").isalnum()
