"""A whole run: activations, a dictionary trained on them, its metrics and its report, in one directory."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from fastsae.checks import BadValue, check_choice, check_number, check_type, reject
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
from fastsae.files import write_atomically, write_json
from fastsae.policies import AuxK, BatchTopK, DecoderNormL1, ReLU, TopK
from fastsae.sae import SAE
from fastsae.training.logs import read_log
from fastsae.training.plan import check_fits
from fastsae.training.together import check_vacant, fit_together, open_together
from fastsae.training.trainer import TrainConfig, Trainer, pick

__all__ = ["RunOptions", "evaluate_run", "load_options", "run", "tokens_wanted"]

log = logging.getLogger("fastsae")

OPTIONS_FILE = "run.yaml"
_CALIBRATION_TOKENS = 16_384
_EVALUATION_TOKENS = 1024  # at a time
_TRANSCODERS = ("transcoder", "skip_transcoder")
_STRUCTURES = ("autoencoder", *_TRANSCODERS, "crosscoder")
_ACTIVATIONS = ("topk", "batchtopk", "relu")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RunOptions:
    """Everything a run depends on; what ``fastsae train``'s flags and a ``--config`` file set.

    Args:
        out: the run directory.
        model, hook, text: a transformers id or path (or "minilm"), a module path or several, and a text
            source (:func:`fastsae.data.read_texts`).
        target_hook: a transcoder's target: the module path of what it reconstructs.
        structure: "autoencoder" (of several hooks one dictionary each, in ``out``/hook), "transcoder",
            "skip_transcoder" or "crosscoder" (one dictionary of all hooks, which must be of one width). None:
            "transcoder" with a target_hook, else "autoencoder".
        activations: a file or folder of activations in place of the three above.
        tokens: tokens to train on; None is one pass. Beyond the data, it is reshuffled and repeated.
        latents, k, activation: dictionary size, active latents, and "topk", "batchtopk" or "relu".
        l1: coefficient of the decoder-norm L1, "relu" only.
        auxk: coefficient of AuxK, "topk" and "batchtopk" only; 0 leaves it out.
        dead_after: tokens without firing that make a latent dead; None is 1/28 of the run, at most 10
        million.
        normalization: "none", "scalar" or "layer_norm".
        batch_size, accumulate: tokens per batch, batches per step.
        lr: None is 2e-4 / sqrt(latents / 2^14) (Gao et al. 2024), meant for long runs.
        held_out: tokens kept from training for the final metrics, at most a tenth of the data.
        context: tokens per window of text.
        mode, state_dtype: of :class:`fastsae.optim.RowAdam`.
        seed: of initial weights, split, order and stochastic rounding.
        the rest: see :class:`fastsae.SAE` and :class:`TrainConfig`.
    """

    out: str
    model: str | None = None
    hook: str | list[str] | None = None
    target_hook: str | None = None
    structure: str | None = None
    text: str | list[str] | None = None
    activations: str | None = None
    tokens: int | None = None
    latents: int = 16_384
    k: int = 32
    activation: str = "topk"
    l1: float = 5.0
    auxk: float = 1 / 32
    dead_after: int | None = None
    normalization: str = "scalar"
    batch_size: int = 4096
    accumulate: int = 1
    lr: float | None = None
    warmup: float = 0.05
    decay: float = 0.2
    mode: str = "deferred"
    held_out: int = 16_384
    context: int = 128
    seed: int = 0
    checkpoint_every: int | None = 1000
    log_every: int = 10
    on_nan: str = "skip"
    backend: str = "auto"
    device: str | None = None
    dtype: str = "float32"
    weight_format: str = "float32"
    state_dtype: str = "float32"
    cache_dir: str | None = None
    tensorboard: bool = False
    wandb: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_field(field, getattr(self, field.name))
        sources = [name for name in ("model", "hook", "text") if getattr(self, name) is not None]
        if self.activations is not None and sources:
            reject(
                "activations",
                f"{self.activations!r} beside {sources}",
                "one source: activations, or model, hook and text",
            )
        if self.activations is None and len(sources) < 3:
            missing = [name for name in ("model", "hook", "text") if name not in sources]
            reject("model, hook, text", f"no {' and no '.join(missing)}", "all three, or activations")
        self._check_structure()
        check_choice("activation", self.activation, _ACTIVATIONS)
        check_choice("dtype", self.dtype, _DTYPES)
        _check_device(self.device)
        for name in ("batch_size", "held_out", "context"):
            check_number(name, getattr(self, name), integer=True, low=1)
        if self.tokens is not None:
            check_number("tokens", self.tokens, integer=True, low=self.batch_size)
        # every other check, before any work: the same objects at width 1, without memory
        sae = SAE(
            self.sae_config(self.n_sites, 1),
            device="meta",
            dtype=_DTYPES[self.dtype],
            weight_format=self.weight_format,
            backend=self.backend,
        )
        Trainer(sae, [], dataclasses.replace(self.train_config(), n_steps=1))

    def _check_structure(self) -> None:
        check_choice("structure", self.kind, _STRUCTURES)
        if self.activations is not None and self.kind != "autoencoder":
            reject("structure", repr(self.kind), "'autoencoder' beside activations: one file is one hook's")
        hooks = self.hooks
        if not hooks or len(set(hooks)) < len(hooks):
            reject("hook", hooks, "different module paths, at least one")
        if self.kind in _TRANSCODERS:
            if self.target_hook is None:
                reject("target_hook", None, f"the module path of a {self.kind}'s target")
            if len(hooks) > 1:
                reject("hook", hooks, f"one module path for a {self.kind}")
        elif self.target_hook is not None:
            reject("target_hook", repr(self.target_hook), f"None beside structure {self.kind!r}")
        if self.kind == "crosscoder" and len(hooks) < 2:
            reject("hook", hooks, "at least two module paths for a crosscoder")

    @property
    def kind(self) -> str:
        """The structure, its default resolved."""
        default = "autoencoder" if self.target_hook is None else "transcoder"
        return default if self.structure is None else self.structure

    @property
    def hooks(self) -> list[str]:
        """The inputs by name: module paths, or the file of activations."""
        hook = self.hook if self.activations is None else self.activations
        return list(hook) if isinstance(hook, list) else [str(hook)]

    @property
    def n_sites(self) -> int:
        """How many inputs a dictionary has."""
        return len(self.hooks) if self.kind == "crosscoder" else 1

    def dictionaries(self) -> list[RunOptions]:
        """The options of each dictionary's own run: these, or of several autoencoders one in ``out``/hook."""
        if self.n_sites == len(self.hooks):
            return [self]
        return [dataclasses.replace(self, out=str(Path(self.out) / hook), hook=hook) for hook in self.hooks]

    def sae_config(self, d_in: int, n_tokens: int, d_out: int | None = None) -> SAEConfig:
        """The dictionary for activations of width ``d_in``, trained on ``n_tokens`` tokens.

        Args:
            d_in: of a crosscoder the sum of all hooks' widths.
            d_out: of a transcoder's target; None is ``d_in``.
        """
        common: dict[str, Any] = {
            "d_in": d_in,
            "n_latents": self.latents,
            "normalization": self.normalization,
            "n_sites": self.n_sites,
        }
        if self.kind in _TRANSCODERS:
            common |= {"d_out": d_out, "transcoder": True, "skip": self.kind == "skip_transcoder"}
        if self.activation == "relu":
            return SAEConfig(activation=ReLU(), losses=(DecoderNormL1(self.l1),), **common)
        losses = (AuxK(self.auxk, dead_after=self.resolve_dead_after(n_tokens)),) if self.auxk else ()
        rule = TopK(self.k) if self.activation == "topk" else BatchTopK(self.k)
        return SAEConfig(activation=rule, losses=losses, **common)

    def resolve_dead_after(self, n_tokens: int) -> int:
        """Tokens without firing that make a latent dead in a run of ``n_tokens``."""
        return self.dead_after or max(1, min(n_tokens // 28, 10_000_000))

    def train_config(self) -> TrainConfig:
        """The trainer's share of the options."""
        lr = 2e-4 / (self.latents / 2**14) ** 0.5 if self.lr is None else self.lr
        shared = {f.name for f in dataclasses.fields(TrainConfig)} & {
            f.name for f in dataclasses.fields(self)
        }
        hook = tuple(self.hooks) if self.kind == "crosscoder" else self.hooks[0]
        return TrainConfig(**{name: getattr(self, name) for name in shared} | {"lr": lr, "hook": hook})


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
    trainers = {one.hooks[0]: _trainer(one, stores, batches, train_rows) for one in runs}
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


def _trainer(
    options: RunOptions, stores: dict[str, ActivationStore], batches: Batches, train_rows: np.ndarray
) -> Trainer:
    """The trainer of one new, calibrated dictionary."""
    torch.manual_seed(options.seed)  # so that it is the same whatever is trained beside it
    sae = SAE(
        _sae_config(options, stores, batches.n_tokens),
        device=_device(options),
        dtype=_DTYPES[options.dtype],
        weight_format=options.weight_format,
        backend=options.backend,
    )
    sample = _inputs(options, stores)[train_rows[:_CALIBRATION_TOKENS]]
    sample = sample[sample.isfinite().all(1)]
    sae.calibrate_(sample.to(sae.W_enc.device, sae.dtype))
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


def save_options(options: RunOptions) -> None:
    """Write run.yaml, which ``--config`` and ``--resume`` read."""
    text = yaml.safe_dump(dataclasses.asdict(options), sort_keys=False)
    write_atomically(Path(options.out) / OPTIONS_FILE, text)


def load_options(directory: Path) -> RunOptions:
    """The options of the run in ``directory``."""
    return RunOptions(**{**read_yaml(directory / OPTIONS_FILE), "out": str(directory)})


def read_yaml(path: Path) -> dict[str, Any]:
    """The options in a YAML file. Raises ValueError at an unreadable file or an unknown option."""
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise BadValue(
            f"{path}: got no readable YAML file ({reason}), expected options such as 'k: 32'"
        ) from error
    check_type(str(path), data, dict, "a YAML mapping of options such as 'k: 32'")
    data = {str(key).replace("-", "_"): value for key, value in data.items()}
    known = {f.name: str(f.type) for f in dataclasses.fields(RunOptions)}
    if unknown := sorted(data.keys() - known.keys()):
        reject(str(path), f"unknown options {unknown}", f"options among {sorted(known)}")
    return {name: _number(value) if "float" in known[name] else value for name, value in data.items()}


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3, without a point, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _check_field(field: dataclasses.Field, value: Any) -> None:
    """Types as annotated, so that a YAML file's 'k: many' is refused by name."""
    kinds = {
        "int": int,
        "float": (int, float),
        "str": str,
        "bool": bool,
        "list[str]": list,
        "None": type(None),
    }
    names = str(field.type).split(" | ")
    allowed: list[type] = []
    for name in names:
        kind = kinds[name]
        allowed += kind if isinstance(kind, tuple) else (kind,)
    check_type(field.name, value, tuple(allowed), " or ".join(names))


def _check_device(device: str | None) -> None:
    try:
        kind = torch.device(device or "cpu").type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        found = "cpu or cuda" if torch.cuda.is_available() else "cpu, since torch finds no CUDA device"
        reject("device", repr(device), found)


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
