"""What a run's dictionary does inside its model, on the run's own text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastsae.checks import check_number, reject
from fastsae.data import ModelActivations, load_model, special_ids
from fastsae.evaluate import evaluate_in_model
from fastsae.sae import SAE
from fastsae.training.options import OPTIONS_FILE, load_options
from fastsae.training.run import tokens_wanted

__all__ = ["evaluate_run_in_model"]

_TEXTS = 8  # at a time: fp32 logits of 128 tokens each in 256 Ki words are 1 GiB


def evaluate_run_in_model(directory: str | Path, n_texts: int = 64) -> dict[str, float | int | bool | None]:
    """Metrics of a run's dictionary inside its model: what :func:`evaluate_in_model` gives, for JSON.

    Measured on up to ``n_texts`` windows of the run's text (cut as in training, special tokens left as they
    are): the first ones beyond the tokens that the run collected, where the text goes on after them. Else,
    and so whenever a run took its whole text, on the last windows of the text, which training has seen but
    for the held-out tokens. "texts_unseen" says which.

    Raises:
        ValueError: no run with a model, one hook and a text in ``directory``; see :func:`evaluate_in_model`.
    """
    check_number("texts", n_texts, integer=True, low=1)
    if not (Path(directory) / OPTIONS_FILE).exists():
        reject("directory", f"{directory}, which holds no {OPTIONS_FILE}", "a run of `fastsae train`")
    options = load_options(Path(directory))
    if options.model is None or options.text is None or not isinstance(options.hook, str):
        reject("in_model", f"{directory}, a run without a model's one hook", "one with model, hook and text")
    if options.kind != "autoencoder":
        reject("in_model", f"{directory}, a {options.kind}", "an autoencoder of its hook's output")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sae = SAE.load(directory, device=device)
    model, tokenizer = load_model(options.model)
    stream = ModelActivations(
        model, tokenizer, options.hook, options.text, context=options.context, device=device
    )
    windows, unseen = _choose_windows(stream, tokens_wanted(options), n_texts)
    found = evaluate_in_model(
        model,
        options.hook,
        sae,
        list(_padded(windows)),
        special_ids=special_ids(tokenizer),
        progress=options.progress,
    )
    return {**found.to_dict(), "texts_unseen": unseen}


def _choose_windows(stream: ModelActivations, n_seen: int | None, n_texts: int) -> tuple[list[Tensor], bool]:
    """Up to ``n_texts`` windows after the first ``n_seen`` activations (None: all) of the text, and True;
    where there are none, its last ones, and False."""
    special = special_ids(stream.tokenizer)
    last: deque[Tensor] = deque(maxlen=n_texts)
    unseen: list[Tensor] = []
    tokens = 0
    for ids in stream.windows():
        for window in ids:
            if n_seen is not None and tokens >= n_seen:
                unseen.append(window)
                if len(unseen) == n_texts:
                    return unseen, True
            last.append(window)
            tokens += int((~torch.isin(window, special)).sum())
    return (unseen, True) if unseen else (list(last), False)


def _padded(windows: list[Tensor]) -> Iterator[dict[str, Tensor]]:
    """Batches of windows, of which only the text's last may be shorter."""
    for lo in range(0, len(windows), _TEXTS):
        part = windows[lo : lo + _TEXTS]
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(window) for window in part], batch_first=True)
        yield {"input_ids": pad(part, batch_first=True), "attention_mask": mask}
