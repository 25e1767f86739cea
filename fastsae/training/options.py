"""The options of a run: what the command line's flags and its YAML files set, checked before any work."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fastsae import policies
from fastsae.checks import BadValue, check_choice, check_number, check_type, reject
from fastsae.config import SAEConfig
from fastsae.files import write_atomically
from fastsae.policies import AuxK, PreActivation
from fastsae.sae import SAE
from fastsae.training.trainer import TrainConfig, Trainer

__all__ = ["DTYPES", "OPTIONS_FILE", "RunOptions", "load_options", "read_yaml", "save_options"]

OPTIONS_FILE = "run.yaml"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ACTIVATIONS = (
    "topk",
    "batchtopk",
    "groupmax",
    "multitopk",
    "hierarchicaltopk",
    "matryoshka",
    "matryoshka_topk",
    "jumprelu",
    "relu",
    "gated",
)
_PENALTIES = {"relu": "decoder_norm_l1", "gated": "l1", "jumprelu": "target_l0"}
_COEFFICIENTS = {"decoder_norm_l1": 5.0, "l1": 5.0, "tanh": 10.0, "l0": 1.0, "target_l0": 1.0}
_STRUCTURES = ("autoencoder", "transcoder", "skip_transcoder", "crosscoder")
_TRANSCODERS = _STRUCTURES[1:3]


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
        recipe: the name of the recipe (:mod:`fastsae.training.recipes`) that the others came from; a note.
        latents, k: dictionary size, active latents (of "jumprelu" with its default penalty, those aimed at).
        activation: one of ACTIVATIONS; "matryoshka" is over BatchTopK.
        widths: of "matryoshka" the nested widths, of "hierarchicaltopk" the budgets; None: their defaults.
        threshold, bandwidth: of "jumprelu"; None: such that at the start k latents of a token pass, and a
            quarter of the threshold.
        penalty: "l1", "decoder_norm_l1", "tanh", "l0", "target_l0" or "none"; None is decoder_norm_l1 for
            "relu", l1 for "gated", target_l0 for "jumprelu", none for others.
        sparsity: its coefficient; None is 5 (l1, decoder_norm_l1), 10 (tanh), 1 (l0, target_l0).
        pre_activation: coefficient of :class:`fastsae.PreActivation`, "jumprelu" only; 0 leaves it out.
        auxk, k_aux: coefficient of AuxK and its latents per token; coefficient 0 leaves it out. None is 1/32
            where the number of active latents is fixed, else 0.
        dead_after: tokens without firing that make a latent dead; None is 1/28 of the run, at most 10
            million.
        normalization: see :class:`fastsae.SAEConfig`, also for subtract_b_dec and unit_norm_decoder.
        initial: "tied", see :class:`fastsae.SAE`, or "uniform", see
            :func:`fastsae.training.starts.start_uniformly_`.
        batch_size, accumulate: tokens per batch, batches per step.
        lr: None is 2e-4 / sqrt(latents / 2^14) (Gao et al. 2024), meant for long runs.
        held_out: tokens kept from training for the final metrics, at most a tenth of the data.
        context: tokens per window of text.
        beta1, beta2, eps, mode, state_dtype: of :class:`fastsae.optim.RowAdam`.
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
    recipe: str | None = None
    latents: int = 16_384
    k: int = 32
    activation: str = "topk"
    widths: list[int] | None = None
    threshold: float | None = None
    bandwidth: float | None = None
    penalty: str | None = None
    sparsity: float | None = None
    pre_activation: float = 0.0
    auxk: float | None = None
    k_aux: int | None = None
    dead_after: int | None = None
    normalization: str = "scalar"
    subtract_b_dec: bool | None = None
    unit_norm_decoder: bool | None = None
    initial: str = "tied"
    batch_size: int = 4096
    accumulate: int = 1
    lr: float | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    warmup: float = 0.05
    decay: float = 0.2
    sparsity_warmup: float = 0.05
    threshold_rate: float = 1.0
    clip: float | None = None
    resample_every: int | None = None
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
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("penalty", self.penalty or "none", ("none", *_COEFFICIENTS))
        check_choice("initial", self.initial, ("tied", "uniform"))
        check_choice("dtype", self.dtype, DTYPES)
        _check_device(self.device)
        for name in ("batch_size", "held_out", "context"):
            check_number(name, getattr(self, name), integer=True, low=1)
        if self.tokens is not None:
            check_number("tokens", self.tokens, integer=True, low=self.batch_size)
        # every other check, before any work: the same objects at width 1, without memory
        sae = SAE(
            self.sae_config(self.n_sites, 1),
            device="meta",
            dtype=DTYPES[self.dtype],
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
        structure: dict[str, Any] = {}
        if self.kind in _TRANSCODERS:
            structure = {"d_out": d_out, "transcoder": True, "skip": self.kind == "skip_transcoder"}
        return SAEConfig(
            d_in=d_in,
            n_latents=self.latents,
            activation=self._activation(),
            losses=self._losses(n_tokens),
            normalization=self.normalization,  # type: ignore[arg-type]  # SAEConfig checks it
            subtract_b_dec=self.subtract_b_dec,  # type: ignore[arg-type]
            unit_norm_decoder=self.unit_norm_decoder,  # type: ignore[arg-type]
            n_sites=self.n_sites,
            **structure,
        )

    def _activation(self) -> policies.Activation:
        if self.widths is not None and not self.activation.startswith(("matryoshka", "hierarchical")):
            reject("widths", self.widths, f"None with activation {self.activation!r}")
        widths = None if self.widths is None else tuple(self.widths)
        match self.activation:
            case "jumprelu":
                given = {"threshold": self.threshold, "bandwidth": self.bandwidth}
                return policies.JumpReLU(**{name: v for name, v in given.items() if v is not None})
            case "relu":
                return policies.ReLU()
            case "gated":
                return policies.Gated()
            case "matryoshka":
                return policies.Matryoshka(policies.BatchTopK(self.k), widths)
            case "matryoshka_topk":
                return policies.Matryoshka(policies.TopK(self.k), widths)
            case "hierarchicaltopk":
                return policies.HierarchicalTopK(self.k, widths)
            case name:
                kinds = policies.TopK, policies.BatchTopK, policies.GroupMax, policies.MultiTopK
                return next(kind for kind in kinds if kind.__name__.lower() == name)(self.k)

    def _losses(self, n_tokens: int) -> tuple[policies.Loss, ...]:
        fixed = self.activation not in _PENALTIES
        auxk = (1 / 32 if fixed else 0.0) if self.auxk is None else self.auxk
        terms: list[policies.Loss] = []
        if auxk:
            terms.append(AuxK(auxk, self.k_aux, self.resolve_dead_after(n_tokens)))
        penalty = self.penalty or _PENALTIES.get(self.activation, "none")
        size = _COEFFICIENTS.get(penalty, 0.0) if self.sparsity is None else self.sparsity
        match penalty:
            case "l1":
                terms.append(policies.L1(size))
            case "decoder_norm_l1":
                terms.append(policies.DecoderNormL1(size))
            case "tanh":
                terms.append(policies.Tanh(size))
            case "l0":
                terms.append(policies.L0(size))
            case "target_l0":
                terms.append(policies.TargetL0(size, self.k))
        if self.pre_activation:
            terms.append(PreActivation(self.pre_activation))
        return tuple(terms)

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
        made = {"lr": lr, "hook": hook, "betas": (self.beta1, self.beta2)}
        return TrainConfig(**{name: getattr(self, name) for name in shared} | made)


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
        "list[int]": list,
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
