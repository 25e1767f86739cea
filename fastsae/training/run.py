"""A whole run: activations, a dictionary trained on them, its metrics and its report, in one directory."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fastsae.checks import BadValue, check_choice, check_number, check_type, reject
from fastsae.config import AuxK, BatchTopK, DecoderNormL1, ReLU, SAEConfig, TopK
from fastsae.data import (
    ActivationStore,
    Batches,
    cached_activations,
    load_model,
    open_activations,
    split_rows,
)
from fastsae.evaluate import Evaluation, evaluate, top_examples, write_report
from fastsae.files import write_atomically, write_json
from fastsae.sae import SAE
from fastsae.training.logs import read_log
from fastsae.training.plan import check_fits
from fastsae.training.trainer import TrainConfig, Trainer, check_vacant

__all__ = ["RunOptions", "evaluate_run", "load_options", "run"]

log = logging.getLogger("fastsae")

OPTIONS_FILE = "run.yaml"
_CALIBRATION_TOKENS = 16_384
_EVALUATION_TOKENS = 1024  # at a time
_ACTIVATIONS = ("topk", "batchtopk", "relu")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RunOptions:
    """Everything a run depends on; what ``fastsae train``'s flags and a ``--config`` file set.

    Args:
        out: the run directory.
        model, hook, text: a transformers id or path (or "minilm"), a module path, and a text source
            (:func:`fastsae.data.read_texts`).
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
    hook: str | None = None
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
        check_choice("activation", self.activation, _ACTIVATIONS)
        check_choice("dtype", self.dtype, _DTYPES)
        _check_device(self.device)
        for name in ("batch_size", "held_out", "context"):
            check_number(name, getattr(self, name), integer=True, low=1)
        if self.tokens is not None:
            check_number("tokens", self.tokens, integer=True, low=self.batch_size)
        # every other check, before any work: the same objects at width 1, without memory
        sae = SAE(
            self.sae_config(1, 1),
            device="meta",
            dtype=_DTYPES[self.dtype],
            weight_format=self.weight_format,
            backend=self.backend,
        )
        Trainer(sae, [], dataclasses.replace(self.train_config(), n_steps=1))

    def sae_config(self, d_in: int, n_tokens: int) -> SAEConfig:
        """The dictionary for activations of width ``d_in``, trained on ``n_tokens`` tokens."""
        common: dict[str, Any] = {
            "d_in": d_in,
            "n_latents": self.latents,
            "normalization": self.normalization,
        }
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
        return TrainConfig(**{name: getattr(self, name) for name in shared} | {"lr": lr})


def run(options: RunOptions, *, resume: bool = False) -> dict[str, Any] | None:
    """Train a dictionary and write its run directory: what :class:`Trainer` writes, run.yaml, metrics.json,
    report.html.

    Returns:
        The contents of metrics.json; None where a signal stopped the training (``resume`` continues it).
    """
    out = Path(options.out)
    if not resume:
        check_vacant(out)
    store = _activations(options)
    log.info("activations: %s tokens of width %d, %s", f"{len(store):,}", store.d_in, store.path)
    train_rows, held_out = _split(store, options)
    batches = Batches(store, options.batch_size, rows=train_rows, seed=options.seed, n_tokens=options.tokens)
    torch.manual_seed(options.seed)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = options.sae_config(store.d_in, batches.n_tokens)
    check_fits(
        config,
        options.batch_size,
        accumulate=options.train_config().accumulate,
        weight_format=options.weight_format,
        state_dtype=options.state_dtype,
        mode=options.mode,
        dtype=options.dtype,
        device=device,
    )
    sae = SAE(
        config,
        device=device,
        dtype=_DTYPES[options.dtype],
        weight_format=options.weight_format,
        backend=options.backend,
    )
    sample = store[train_rows[:_CALIBRATION_TOKENS]]
    sample = sample[sample.isfinite().all(1)]
    sae.calibrate_(sample.to(device, sae.dtype))
    dead_after = options.resolve_dead_after(batches.n_tokens)
    trainer = Trainer(sae, batches, dataclasses.replace(options.train_config(), dead_after=dead_after))
    trainer.open(resume=resume)
    save_options(options)
    if options.dtype == "float16" and options.weight_format == "float32":
        log.warning("float16 weights round to nearest: small updates are lost, bfloat16 trains better")
    log.info("training %s on %s tokens of width %d", sae, f"{batches.n_tokens:,}", store.d_in)
    final = trainer.fit()
    if trainer.stopped:
        return None
    sae = SAE.load(out, device=device)
    log.info("evaluating on %s held-out tokens", f"{len(held_out):,}")
    evaluation = _evaluate(sae, store, held_out)
    metrics = {**evaluation.to_dict(), "held_out_tokens": len(held_out), "tokens": final["tokens"]}
    metrics |= {"seconds": final["seconds"], "skipped_batches": final["skipped"]}
    write_json(out / "metrics.json", metrics)
    _report(options, sae, store, evaluation, metrics)
    return metrics


def evaluate_run(directory: str | Path, activations: str | None = None) -> Evaluation:
    """Metrics of a run's dictionary on its held-out tokens, or on another ``activations`` file."""
    if activations is not None:
        return _evaluate(SAE.load(directory), open_activations(activations), None)
    if not (Path(directory) / OPTIONS_FILE).exists():
        reject(
            "directory",
            f"{directory}, which holds no {OPTIONS_FILE}",
            "a run of `fastsae train`, or --activations",
        )
    options = load_options(Path(directory))
    sae = SAE.load(directory, device=options.device)
    store = _activations(options)
    return _evaluate(sae, store, _split(store, options)[1])


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


def _activations(options: RunOptions) -> ActivationStore:
    if options.activations is not None:
        return open_activations(options.activations)
    assert options.model is not None
    assert options.hook is not None
    assert options.text is not None
    needed = None if options.tokens is None else options.tokens + options.held_out
    return cached_activations(
        options.model,
        options.hook,
        options.text,
        context=options.context,
        n_tokens=needed,
        cache_dir=options.cache_dir,
        device=options.device,
        progress=options.progress,
    )


def _split(store: ActivationStore, options: RunOptions):
    if len(store) < 10:
        reject("activations", f"{len(store)} tokens", "at least 10")
    return split_rows(len(store), min(options.held_out, len(store) // 10), options.seed)


def _evaluate(sae: SAE, store: ActivationStore, rows) -> Evaluation:
    batches = Batches(store, _EVALUATION_TOKENS, rows=rows, shuffle=False, drop_last=False)
    return evaluate(sae, batches)


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
    shown = ("model", "hook", "activations", "batch_size", "mode", "seed", "dtype")
    values = {name: getattr(options, name) for name in shown}
    facts = {name: value for name, value in values.items() if value is not None}
    facts |= {"lr": options.train_config().lr, "tokens": metrics["tokens"], "seconds": metrics["seconds"]}
    path = write_report(
        options.out,
        sae=sae,
        evaluation=evaluation,
        log=read_log(Path(options.out) / "log.jsonl"),
        examples=examples,
        title=f"{options.latents:,} latents of {options.hook or Path(str(options.activations)).name}",
        facts=facts,
    )
    log.info("report: %s", path)
