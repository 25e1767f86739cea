"""A whole run: activations, a dictionary trained on them, its metrics and its report, in one directory."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsae.checks import reject
from fastsae.config import SAEConfig
from fastsae.data import (
    ActivationStore,
    Batches,
    cached_activations,
    load_model,
    open_activations,
    split_rows,
)
from fastsae.data.store import SideBySide
from fastsae.evaluate import Evaluation, evaluate, top_examples, write_report
from fastsae.files import write_json
from fastsae.sae import SAE
from fastsae.training.logs import read_log
from fastsae.training.options import DTYPES, OPTIONS_FILE, RunOptions, load_options, read_yaml, save_options
from fastsae.training.plan import check_fits
from fastsae.training.starts import start_thresholds_, start_uniformly_
from fastsae.training.together import check_vacant, fit_together, open_together
from fastsae.training.trainer import TrainConfig, Trainer, pick

__all__ = ["evaluate_run", "new_trainer", "run", "tokens_wanted"]

log = logging.getLogger("fastsae")

_CALIBRATION_TOKENS = 16_384
_EVALUATION_TOKENS = 1024  # at a time
_THRESHOLD_TOKENS = 1024


def run(options: RunOptions, *, resume: bool = False) -> dict[str, Any] | None:
    """Train a dictionary and write its run directory: what :class:`Trainer` writes, run.yaml, metrics.json,
    report.html. Of several autoencoders each gets one, ``out``/hook; the model runs once for all of them, and
    they are trained in lockstep.

    Returns:
        The contents of metrics.json, of several autoencoders by hook; None where a signal stopped the
        training (``resume`` continues it).
    """
    runs = options.dictionaries()
    if not resume:
        for each in (options, *runs):
            check_vacant(Path(each.out))
    stores = _activations(options)
    train_rows, held_out = _split(stores, options)
    batches = Batches(stores, options.batch_size, rows=train_rows, seed=options.seed, n_tokens=options.tokens)
    _warn(options, [_sae_config(one, stores, batches.n_tokens) for one in runs])
    trainers = {one.hooks[0]: new_trainer(one, stores, batches, train_rows) for one in runs}
    open_together(trainers, resume=resume)
    for each in (options, *runs):
        save_options(each)
    for trainer in trainers.values():
        log.info("training %s on %s tokens", trainer.sae, f"{batches.n_tokens:,}")
    finals = fit_together(trainers, batches)
    if any(trainer.stopped for trainer in trainers.values()):
        return None
    log.info("evaluating on %s held-out tokens", f"{len(held_out):,}")
    metrics = {one.hooks[0]: _finish(one, stores, held_out, finals[one.hooks[0]]) for one in runs}
    return metrics if len(runs) > 1 else metrics[runs[0].hooks[0]]


def _sae_config(options: RunOptions, stores: dict[str, ActivationStore], n_tokens: int) -> SAEConfig:
    widths = [stores[hook].d_in for hook in options.hooks]
    if len(set(widths)) > 1:
        reject("hook", f"modules of widths {widths}", "modules of one width for a crosscoder")
    d_out = None if options.target_hook is None else stores[options.target_hook].d_in
    return options.sae_config(sum(widths), n_tokens, d_out)


def _warn(options: RunOptions, configs: list[SAEConfig]) -> None:
    """Warn of what won't fit into memory, or won't learn well, before anything is allocated."""
    # together they take what one does that is as wide as all
    widths = {name: sum(getattr(config, name) for config in configs) for name in ("d_in", "d_out")}
    check_fits(
        dataclasses.replace(configs[0], **widths),
        options.batch_size,
        accumulate=options.accumulate,
        weight_format=options.weight_format,
        state_dtype=options.state_dtype,
        mode=options.mode,
        dtype=options.dtype,
        device=_device(options),
    )
    if options.dtype == "float16" and options.weight_format == "float32":
        log.warning("float16 weights round to nearest: small updates are lost, bfloat16 trains better")


def _device(options: RunOptions) -> str:
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def new_trainer(
    options: RunOptions, stores: dict[str, ActivationStore], batches: Batches, train_rows: np.ndarray
) -> Trainer:
    """The trainer of one new, calibrated dictionary."""
    torch.manual_seed(options.seed)  # so that it is the same whatever is trained beside it
    sae = SAE(
        _sae_config(options, stores, batches.n_tokens),
        device=_device(options),
        dtype=DTYPES[options.dtype],
        weight_format=options.weight_format,
        backend=options.backend,
    )
    sample = _inputs(options, stores)[train_rows[:_CALIBRATION_TOKENS]]
    sample = sample[sample.isfinite().all(1)]
    sample = sample.to(sae.W_enc.device, sae.dtype)
    sae.calibrate_(sample)
    if options.activation == "jumprelu" and options.threshold is None:
        start_thresholds_(sae, sample[:_THRESHOLD_TOKENS], options.k, options.bandwidth)
    if options.initial == "uniform":
        start_uniformly_(sae, sample, options.seed)
    dead_after = options.resolve_dead_after(batches.n_tokens)
    return Trainer(sae, batches, dataclasses.replace(options.train_config(), dead_after=dead_after))


def _finish(
    options: RunOptions, stores: dict[str, ActivationStore], held_out: np.ndarray, final: dict[str, Any]
) -> dict[str, Any]:
    """Evaluate a trained dictionary; write metrics.json and report.html."""
    out = Path(options.out)
    sae = SAE.load(out, device=_device(options))
    evaluation = _evaluate(sae, stores, held_out, options)
    metrics = {**evaluation.to_dict(), "held_out_tokens": len(held_out), "tokens": final["tokens"]}
    metrics |= {"seconds": final["seconds"], "skipped_batches": final["skipped"]}
    write_json(out / "metrics.json", metrics)
    _report(options, sae, _inputs(options, stores), evaluation, metrics)
    return metrics


def evaluate_run(directory: str | Path, activations: str | None = None) -> Evaluation:
    """Metrics of a run's dictionary on its held-out tokens, or on another ``activations`` file.

    Raises:
        ValueError: no run, a run of several dictionaries, or a file for a transcoder, whose targets it lacks.
    """
    file = Path(directory) / OPTIONS_FILE
    if activations is not None:
        if file.exists() and read_yaml(file).get("target_hook") is not None:
            reject("activations", repr(activations), "None for a transcoder, whose targets no file has")
        return _evaluate(SAE.load(directory), {"": open_activations(activations)}, None, None)
    if not file.exists():
        reject(
            "directory",
            f"{directory}, which holds no {OPTIONS_FILE}",
            "a run of `fastsae train`, or --activations",
        )
    options = load_options(Path(directory))
    if len(runs := options.dictionaries()) > 1:
        folders = ", ".join(one.out for one in runs)
        reject("directory", f"{directory}, which holds {len(runs)} runs", f"one of {folders}")
    sae = SAE.load(directory, device=options.device)
    stores = _activations(options)
    return _evaluate(sae, stores, _split(stores, options)[1], options)


def tokens_wanted(options: RunOptions) -> int | None:
    """How many tokens of the text a run collects at most; None: all."""
    return None if options.tokens is None else options.tokens + options.held_out


def _activations(options: RunOptions) -> dict[str, ActivationStore]:
    """The activations of all inputs and targets by name, row i the same token in all."""
    if options.activations is not None:
        stores = {options.activations: open_activations(options.activations)}
    else:
        assert options.model is not None
        assert options.text is not None
        targets = [] if options.target_hook is None else [options.target_hook]
        stores = cached_activations(
            options.model,
            list(dict.fromkeys([*options.hooks, *targets])),
            options.text,
            context=options.context,
            n_tokens=tokens_wanted(options),
            cache_dir=options.cache_dir,
            device=options.device,
            progress=options.progress,
        )
    for store in stores.values():
        log.info("activations: %s tokens of width %d, %s", f"{len(store):,}", store.d_in, store.path)
    return stores


def _inputs(options: RunOptions, stores: dict[str, ActivationStore]) -> ActivationStore:
    """The inputs of one dictionary, [n, d_in]."""
    sites = [stores[hook] for hook in options.hooks]
    return sites[0] if len(sites) == 1 else SideBySide(sites)


def _split(stores: dict[str, ActivationStore], options: RunOptions) -> tuple[np.ndarray, np.ndarray]:
    n = len(next(iter(stores.values())))
    if n < 10:
        reject("activations", f"{n} tokens", "at least 10")
    return split_rows(n, min(options.held_out, n // 10), options.seed)


def _evaluate(
    sae: SAE, stores: dict[str, ActivationStore], rows: np.ndarray | None, options: RunOptions | None
) -> Evaluation:
    """Metrics on ``rows``; ``options`` None: of the only store."""
    config = TrainConfig(hook=next(iter(stores))) if options is None else options.train_config()
    batches = Batches(stores, _EVALUATION_TOKENS, rows=rows, shuffle=False, drop_last=False)
    pairs = (pick(batch, config.hook, config.target_hook) for batch in batches)
    return evaluate(sae, (x if target is None else (x, target) for x, target in pairs))


def _report(
    options: RunOptions, sae: SAE, store: ActivationStore, evaluation: Evaluation, metrics: dict
) -> None:
    examples = None
    if store.token_ids is not None and options.model is not None:
        log.info("looking for the texts that fire each latent most")
        _, tokenizer = load_model(options.model)
        examples = top_examples(
            sae,
            store,
            store.token_ids,
            decode_token=tokenizer.convert_ids_to_tokens,
            window=options.context,
            progress=options.progress,
        )
    shown = (
        "model",
        "hook",
        "target_hook",
        "structure",
        "activations",
        "batch_size",
        "mode",
        "seed",
        "dtype",
    )
    values = {name: getattr(options, name) for name in shown}
    facts = {name: value for name, value in values.items() if value is not None}
    if isinstance(options.hook, list):
        facts["hook"] = ", ".join(options.hook)
    facts |= {"lr": options.train_config().lr, "tokens": metrics["tokens"], "seconds": metrics["seconds"]}
    path = write_report(
        options.out,
        sae=sae,
        evaluation=evaluation,
        log=read_log(Path(options.out) / "log.jsonl"),
        examples=examples,
        title=f"{options.latents:,} latents of {_subject(options)}",
        facts=facts,
    )
    log.info("report: %s", path)


def _subject(options: RunOptions) -> str:
    if options.activations is not None:
        return Path(options.activations).name
    target = "" if options.target_hook is None else f" → {options.target_hook}"
    return ", ".join(options.hooks) + target
