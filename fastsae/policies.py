"""What a dictionary may be made of: activation rules and loss terms. Frozen, checked, plain JSON on disk.

An activation says which operator selects (``rule``, ``k``), in training and after it, and whether the loss is
taken at several partial reconstructions (``nested``). What parameters it learns beside the weights is in
:class:`fastsae.SAE`, the straight-through rules in :mod:`fastsae.functional`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from fastsae.checks import BadType, check_choice, check_number, check_type, reject

__all__ = [
    "L0",
    "L1",
    "Activation",
    "AuxK",
    "BatchTopK",
    "DecoderNormL1",
    "Gated",
    "GroupMax",
    "HierarchicalTopK",
    "JumpReLU",
    "Loss",
    "Matryoshka",
    "MultiTopK",
    "Nested",
    "PreActivation",
    "ReLU",
    "Tanh",
    "TargetL0",
    "TopK",
    "from_dict",
    "to_dict",
]


class Nested(NamedTuple):
    """A loss taken at partial reconstructions, of which each holds the one before.

        L = sum_g weights[g] ||target - x_hat_g||^2,   x_hat_g = b_dec + sum of f_i W_dec[i] over parts 0..g

    by: what an entry's part goes by: its "latent", or its "place" among its token's entries, largest first.
    ends: where each part ends, ascending: latents, or places, below ends[g] are in part g or an earlier one.
    main: the reconstruction that ``decode`` gives, whose error is reported.
    """

    by: Literal["latent", "place"]
    ends: tuple[int, ...]
    weights: tuple[float, ...]
    main: int


class _Activation:
    """The defaults: one operator in training and after it, a loss at the whole reconstruction alone."""

    rule: ClassVar[str]

    def selection(self, training: bool) -> Any:
        """The activation that an operator runs."""
        return self

    def nested(self, n_latents: int) -> Nested | None:
        """The partial reconstructions that a dictionary of ``n_latents`` is trained at."""
        return None

    def check_latents(self, n_latents: int) -> None:
        """Raise ValueError unless a dictionary of ``n_latents`` can have it."""


@dataclass(frozen=True)
class _Top(_Activation):
    """Of ``k`` entries a token."""

    k: int

    def __post_init__(self) -> None:
        check_number("k", self.k, integer=True, low=1)

    def check_latents(self, n_latents: int) -> None:
        """k is at most n_latents."""
        if self.k > n_latents:
            reject("k", self.k, f"an integer in 1..{n_latents} (n_latents)")


@dataclass(frozen=True)
class TopK(_Top):
    """Keep each token's ``k`` largest pre-activations, then ReLU. Ties: lowest index first.

    Source: Gao et al. 2024, arXiv 2406.04093.
    """

    rule: ClassVar[str] = "topk"


@dataclass(frozen=True)
class BatchTopK(_Top):
    """Keep the ``k * N`` largest pre-activations of the whole batch of N tokens, then ReLU.

    At inference a scalar threshold learned in training takes the batch's place; ``SAE.as_jump_relu`` makes it
    a JumpReLU dictionary. Source: Bussmann et al. 2024, arXiv 2412.06410.
    """

    rule: ClassVar[str] = "batchtopk"


@dataclass(frozen=True)
class GroupMax(_Top):
    """Cut the latents into ``k`` groups of neighbours, all of a size; keep the largest of each, then ReLU.

    Ties: lowest index. Source: the activation of that name in EleutherAI's sparsify.
    """

    rule: ClassVar[str] = "groupmax"

    def check_latents(self, n_latents: int) -> None:
        """n_latents is a multiple of k."""
        super().check_latents(n_latents)
        if n_latents % self.k:
            reject("k", self.k, f"a divisor of n_latents ({n_latents}), since groups are all of a size")


@dataclass(frozen=True)
class JumpReLU(_Activation):
    """Keep ``pre`` where it exceeds its latent's threshold: ``f = pre * 1[pre > theta_i]``, theta_i >= 0.

    The thresholds learn, as t_i = log theta_i, through a rectangle that stands for the jump's derivative:

        df / dt_i = -(theta_i^2 / bandwidth) * 1[|pre - theta_i| < bandwidth / 2]

    Args:
        threshold: what every latent starts with; of 0 it can't learn.
        bandwidth: width of the rectangle, in the units of pre.

    Source: Rajamanoharan et al. 2024, arXiv 2407.14435.
    """

    threshold: float = 0.001
    bandwidth: float = 0.001
    rule: ClassVar[str] = "threshold"

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, low=0.0)
        check_number("bandwidth", self.bandwidth, low=0.0, open_low=True)


@dataclass(frozen=True)
class ReLU(_Activation):
    """Keep every positive pre-activation."""

    rule: ClassVar[str] = "threshold"


@dataclass(frozen=True)
class Gated(_Activation):
    """Decide by one bias, measure by another, both on the same W_enc x:

        pi = W_enc x + b_enc;   f = 1[pi > 0] * relu(exp(r_mag) * W_enc x + b_mag)

    Through 1[pi > 0] comes no gradient; instead relu(pi) has to reconstruct too, through a decoder (and a
    skip) that this term doesn't move, and :class:`L1` charges relu(pi) in place of f:

        L += aux_coefficient * ||target - b_dec - sum_i relu(pi_i) W_dec[i]||^2,  W_dec and b_dec held fixed

    Source: Rajamanoharan et al. 2024, arXiv 2404.16014, eq. 6-8.
    """

    aux_coefficient: float = 1.0
    rule: ClassVar[str] = "threshold"

    def __post_init__(self) -> None:
        check_number("aux_coefficient", self.aux_coefficient, low=0.0)

    def selection(self, training: bool) -> ReLU:
        """The gate: every positive pi."""
        return ReLU()


@dataclass(frozen=True)
class MultiTopK(_Top):
    """TopK that is trained at ``multiple * k`` entries as well: ``L = L(k) + weight * L(multiple * k)``.

    Source: Gao et al. 2024, arXiv 2406.04093, section 5.3 (L(k) + L(4k) / 8).
    """

    multiple: int = 4
    weight: float = 1 / 8
    rule: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("multiple", self.multiple, integer=True, low=2)
        check_number("weight", self.weight, low=0.0)

    def selection(self, training: bool) -> TopK:
        """``multiple * k`` entries in training."""
        return TopK(self.k * self.multiple if training else self.k)

    def nested(self, n_latents: int) -> Nested:
        """Two budgets."""
        return Nested("place", (self.k, self.k * self.multiple), (1.0, self.weight), main=0)

    def check_latents(self, n_latents: int) -> None:
        """k * multiple is at most n_latents."""
        if self.k * self.multiple > n_latents:
            got = f"{self.k} x {self.multiple}"
            reject("k * multiple", got, f"at most {n_latents} (n_latents)")


@dataclass(frozen=True)
class HierarchicalTopK(_Top):
    """TopK whose loss is the mean over several budgets, so that one dictionary serves every k up to its own.

    ``budgets``: ascending, the last one ``k``; None is 1..k. Memory doesn't grow with their number.
    Source: Balagansky et al. 2025, arXiv 2505.24473.
    """

    budgets: tuple[int, ...] | None = None
    rule: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budgets is not None:
            object.__setattr__(self, "budgets", _ascending("budgets", self.budgets))
            if self.budgets[-1] != self.k:
                reject("budgets", self.budgets, f"budgets that end with {self.k}, which is k")

    def selection(self, training: bool) -> TopK:
        """The largest budget."""
        return TopK(self.k)

    def nested(self, n_latents: int) -> Nested:
        """A part for each budget."""
        ends = self.budgets or tuple(range(1, self.k + 1))
        return Nested("place", ends, (1 / len(ends),) * len(ends), main=len(ends) - 1)


@dataclass(frozen=True)
class Matryoshka(_Activation):
    """The mean of the losses of nested prefixes of the dictionary, each of which reconstructs by itself.

    ``inner`` selects among all latents. ``widths``: ascending, the last one n_latents; None is 1, 3, 7, 15
    and 32 parts in 32 of n_latents.
    Source: Bussmann et al. 2025, arXiv 2503.17547 (2048, 6144, 14,336, 30,720 and 65,536 latents).
    """

    inner: TopK | BatchTopK
    widths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_type("inner", self.inner, (TopK, BatchTopK), "TopK or BatchTopK")
        if self.widths is not None:
            object.__setattr__(self, "widths", _ascending("widths", self.widths))

    @property
    def rule(self) -> str:  # type: ignore[override]
        """Of ``inner``."""
        return self.inner.rule

    @property
    def k(self) -> int:
        """Of ``inner``."""
        return self.inner.k

    def selection(self, training: bool) -> TopK | BatchTopK:
        """``inner``."""
        return self.inner

    def nested(self, n_latents: int) -> Nested:
        """A part for each width."""
        ends = self.widths or tuple(sorted({max(1, n_latents * part // 32) for part in (1, 3, 7, 15, 32)}))
        return Nested("latent", ends, (1 / len(ends),) * len(ends), main=len(ends) - 1)

    def check_latents(self, n_latents: int) -> None:
        """The last width is n_latents."""
        self.inner.check_latents(n_latents)
        if self.widths is not None and self.widths[-1] != n_latents:
            reject("widths", self.widths, f"widths that end with {n_latents}, which is n_latents")


def _ascending(name: str, numbers: Any) -> tuple[int, ...]:
    check_type(name, numbers, (tuple, list), "ascending integers")
    for number in numbers:
        check_number(name, number, integer=True, low=1)
    if not numbers or sorted(set(numbers)) != list(numbers):
        reject(name, tuple(numbers), "ascending integers, at least one")
    return tuple(numbers)


@dataclass(frozen=True)
class AuxK:
    """Let dead latents reconstruct what the live ones missed.

        L = coefficient * min(n_dead / k_aux, 1) * ||e - e_hat||^2 / normaliser of the reconstruction loss

    with e = target - x_hat (detached) and e_hat the decode of each token's ``k_aux`` largest dead latents,
    without ``b_dec``. A latent is dead when it hasn't fired for ``dead_after`` tokens. Its gradient reaches
    encoder and decoder.

    Args:
        coefficient: weight of the term.
        k_aux: dead latents per token; None takes the power of two nearest d_in / 2.
        dead_after: tokens without firing after which a latent counts as dead.

    Source: Gao et al. 2024, arXiv 2406.04093, appendix A.2.
    """

    coefficient: float = 1 / 32
    k_aux: int | None = None
    dead_after: int = 10_000_000
    name: ClassVar[str] = "auxk"

    def __post_init__(self) -> None:
        check_number("coefficient", self.coefficient, low=0.0)
        check_number("dead_after", self.dead_after, integer=True, low=1)
        if self.k_aux is not None:
            check_number("k_aux", self.k_aux, integer=True, low=1)

    def resolve_k(self, d_in: int) -> int:
        """The number of dead latents per token for inputs of width ``d_in``."""
        return self.k_aux or 2 ** max(0, round(math.log2(max(d_in, 2) / 2)))


@dataclass(frozen=True)
class _Penalty:
    """A term that keeps codes sparse. ``name`` is what losses, metrics and schedules call it."""

    coefficient: float
    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_number("coefficient", self.coefficient, low=0.0)


@dataclass(frozen=True)
class L1(_Penalty):
    """Charge each activation its size: ``L = coefficient * mean_n sum_i f_i``; of Gated, relu(pi_i).

    Meant for decoders of unit norm: with free ones the rows grow and activations shrink.
    """

    name: ClassVar[str] = "l1"


@dataclass(frozen=True)
class DecoderNormL1(_Penalty):
    """Charge each activation the length of its decoder row: ``L = coefficient * mean_n sum_i f_i
    ||W_dec[i]||``. Of a crosscoder the lengths at all sites are summed.

    Source: Templeton et al. 2024, "Scaling Monosemanticity" (coefficient 5 with E||x||^2 = d_in).
    """

    coefficient: float = 5.0
    name: ClassVar[str] = "decoder_norm_l1"


@dataclass(frozen=True)
class Tanh(_Penalty):
    """Charge activations up to a limit: ``L = coefficient * mean_n sum_i tanh(scale * f_i ||W_dec[i]||)``.

    Source: Anthropic, "Circuits Updates - January 2025" (scale 4).
    """

    scale: float = 4.0
    name: ClassVar[str] = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("scale", self.scale, low=0.0, open_low=True)


@dataclass(frozen=True)
class L0(_Penalty):
    """Charge each active latent the same: ``L = coefficient * mean_n ||f||_0``. JumpReLU only.

    Its gradient reaches the thresholds alone, through the rectangle that :class:`JumpReLU` has:

        dL / dt_i = -coefficient * (theta_i / bandwidth) * mean_n 1[|pre - theta_i| < bandwidth / 2]

    Source: Rajamanoharan et al. 2024, arXiv 2407.14435, eq. 9-12.
    """

    name: ClassVar[str] = "l0_penalty"


@dataclass(frozen=True)
class TargetL0(_Penalty):
    """Hold the mean number of active latents: ``L = coefficient * (mean_n ||f||_0 / target - 1)^2``.

    JumpReLU only, whose thresholds it moves as :class:`L0` does.
    Source: Rajamanoharan et al. 2024, arXiv 2407.14435, appendix on training at a target L0.
    """

    target: float
    name: ClassVar[str] = "target_l0"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("target", self.target, low=0.0, open_low=True)


@dataclass(frozen=True)
class PreActivation(_Penalty):
    """Pull latents that don't fire up to their thresholds, JumpReLU only:

        L = coefficient * mean_n sum_i relu(theta_i - pre_i) ||W_dec[i]||

    over all latents, or with ``dead_after`` over those that haven't fired for so many tokens. It touches all
    of them at every token, so a step with it takes the chunked dense path.

    Source: Anthropic, "Circuits Updates - January 2025" (coefficient 3e-6).
    """

    coefficient: float = 3e-6
    dead_after: int | None = None
    name: ClassVar[str] = "pre_activation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dead_after is not None:
            check_number("dead_after", self.dead_after, integer=True, low=1)


Activation = TopK | BatchTopK | GroupMax | JumpReLU | ReLU | Gated | MultiTopK | HierarchicalTopK | Matryoshka
Loss = AuxK | L1 | DecoderNormL1 | Tanh | L0 | TargetL0 | PreActivation
_BY_NAME: dict[str, type] = {cls.__name__: cls for cls in (*Activation.__args__, *Loss.__args__)}


def to_dict(policy: Any) -> dict[str, Any]:
    """Plain JSON types; the inverse of :func:`from_dict`."""
    fields = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}
    plain = {name: to_dict(v) if dataclasses.is_dataclass(v) else v for name, v in fields.items()}
    return {"type": type(policy).__name__, **plain}


def from_dict(name: str, data: Any) -> Any:
    """The activation or loss term that :func:`to_dict` described; ValueError at anything else."""
    check_type(name, data, dict, 'an object such as {"type": "TopK", "k": 32}')
    fields = dict(data)
    kind = fields.pop("type", None)
    check_choice(f"{name}.type", kind, _BY_NAME)
    check_keys(name, fields, {f.name for f in dataclasses.fields(_BY_NAME[kind])}, required=set())
    inner = {key: from_dict(f"{name}.{key}", v) for key, v in fields.items() if isinstance(v, dict)}
    try:
        return _BY_NAME[kind](**fields | inner)
    except TypeError as error:
        raise BadType(f"{name}: got {data}, expected the fields of {kind}") from error


def check_keys(name: str, data: dict[str, Any], known: set[str], required: set[str]) -> None:
    """Raise ValueError unless the keys of ``data`` are known, and all that are required there."""
    if unknown := sorted(set(data) - known):
        reject(name, f"unknown keys {unknown}", f"keys among {sorted(known)}")
    if missing := sorted(required - set(data)):
        reject(name, f"no {missing}", f"the keys {sorted(required)}")
