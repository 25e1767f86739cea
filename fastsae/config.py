"""What a dictionary is: sizes, activation rule, loss terms. Frozen, checked, plain JSON on disk."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastsae.checks import BadType, check_choice, check_number, check_type, reject

__all__ = [
    "Activation",
    "AuxK",
    "BatchTopK",
    "DecoderNormL1",
    "JumpReLU",
    "Loss",
    "ReLU",
    "SAEConfig",
    "TopK",
]


@dataclass(frozen=True)
class TopK:
    """Keep each token's ``k`` largest pre-activations, then ReLU. Ties: lowest index first.

    Source: Gao et al. 2024, arXiv 2406.04093.
    """

    k: int
    rule: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        check_number("k", self.k, integer=True, low=1)


@dataclass(frozen=True)
class BatchTopK:
    """Keep the ``k * N`` largest pre-activations of the whole batch of N tokens, then ReLU.

    At inference a scalar threshold learned in training takes the batch's place.
    Source: Bussmann et al. 2024, arXiv 2412.06410.
    """

    k: int
    rule: ClassVar[str] = "batchtopk"

    def __post_init__(self) -> None:
        check_number("k", self.k, integer=True, low=1)


@dataclass(frozen=True)
class JumpReLU:
    """Keep ``pre`` where it exceeds its latent's threshold: ``f = pre * 1[pre > threshold]``, threshold >= 0.

    ``threshold`` is the value every latent starts with. Source: Rajamanoharan et al. 2024, arXiv 2407.14435.
    """

    threshold: float = 0.001
    rule: ClassVar[str] = "threshold"

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, low=0.0)


@dataclass(frozen=True)
class ReLU:
    """Keep every positive pre-activation."""

    rule: ClassVar[str] = "threshold"


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
class DecoderNormL1:
    """Charge each activation the length of its decoder row: ``L = coefficient * mean_n sum_i f_i
    ||W_dec[i]||``.

    Source: Templeton et al. 2024, "Scaling Monosemanticity" (coefficient 5 with E||x||^2 = d_in).
    """

    coefficient: float = 5.0
    name: ClassVar[str] = "decoder_norm_l1"

    def __post_init__(self) -> None:
        check_number("coefficient", self.coefficient, low=0.0)


Activation = TopK | BatchTopK | JumpReLU | ReLU
Loss = AuxK | DecoderNormL1
_BY_NAME: dict[str, type] = {
    cls.__name__: cls for cls in (TopK, BatchTopK, JumpReLU, ReLU, AuxK, DecoderNormL1)
}


@dataclass(frozen=True)
class SAEConfig:
    """The shape and the rules of a dictionary of ``n_latents`` features.

    Args:
        d_in: width of the input.
        n_latents: number of latents M.
        activation: TopK, BatchTopK, JumpReLU or ReLU.
        d_out: width of the reconstruction; None is ``d_in``.
        losses: terms beside the reconstruction loss.
        normalization: "none"; "scalar", x times one stored number that makes E||x||^2 = d_in; or
            "layer_norm", each token centred and divided by its standard deviation, undone by decode.
        subtract_b_dec: encode x - b_dec. None: yes for TopK and BatchTopK autoencoders, no otherwise.
        unit_norm_decoder: keep decoder rows at length 1. None: yes for TopK and BatchTopK autoencoders.
        reconstruction: "fvu", sum of squared errors over the batch's variance about its mean; or
            "squared_error", squared error summed over d_out, mean over tokens. None: "fvu" for TopK and
            BatchTopK, else "squared_error", the scale that published sparsity coefficients are meant for.

    Raises:
        ValueError, TypeError: an argument outside the ranges above; k > n_latents; b_dec subtracted though
            d_out differs from d_in; two losses of one kind.
    """

    d_in: int
    n_latents: int
    activation: Activation
    d_out: int = None  # type: ignore[assignment]  # None stands for a default and never survives construction
    losses: tuple[Loss, ...] = ()
    normalization: Literal["none", "scalar", "layer_norm"] = "none"
    subtract_b_dec: bool = None  # type: ignore[assignment]
    unit_norm_decoder: bool = None  # type: ignore[assignment]
    reconstruction: Literal["fvu", "squared_error"] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_number("d_in", self.d_in, integer=True, low=1)
        check_number("n_latents", self.n_latents, integer=True, low=1)
        check_type(
            "activation",
            self.activation,
            (TopK, BatchTopK, JumpReLU, ReLU),
            "TopK, BatchTopK, JumpReLU or ReLU",
        )
        self._resolve_defaults()
        check_number("d_out", self.d_out, integer=True, low=1)
        check_choice("normalization", self.normalization, ("none", "scalar", "layer_norm"))
        check_choice("reconstruction", self.reconstruction, ("fvu", "squared_error"))
        for flag in ("subtract_b_dec", "unit_norm_decoder"):
            check_type(flag, getattr(self, flag), bool, "True, False or None")
        for term in self.losses:
            check_type("losses", term, (AuxK, DecoderNormL1), "loss terms such as AuxK() or DecoderNormL1()")
        if len({type(term) for term in self.losses}) < len(self.losses):
            reject("losses", self.losses, "at most one term of each kind")
        if isinstance(self.activation, TopK | BatchTopK) and self.activation.k > self.n_latents:
            reject("k", self.activation.k, f"an integer in 1..{self.n_latents} (n_latents)")
        if self.subtract_b_dec and self.d_out != self.d_in:
            reject(
                "subtract_b_dec", True, f"False where d_out ({self.d_out}) differs from d_in ({self.d_in})"
            )

    def _resolve_defaults(self) -> None:
        top = isinstance(self.activation, TopK | BatchTopK)
        d_out = self.d_in if self.d_out is None else self.d_out
        resolved = {
            "d_out": d_out,
            "losses": tuple(self.losses) if isinstance(self.losses, list | tuple) else (self.losses,),
            "subtract_b_dec": top and d_out == self.d_in
            if self.subtract_b_dec is None
            else self.subtract_b_dec,
            "unit_norm_decoder": top and d_out == self.d_in
            if self.unit_norm_decoder is None
            else self.unit_norm_decoder,
            "reconstruction": self.reconstruction or ("fvu" if top else "squared_error"),
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the inverse of :meth:`from_dict`."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["activation"] = _to_dict(self.activation)
        data["losses"] = [_to_dict(term) for term in self.losses]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SAEConfig:
        """Rebuild a config from :meth:`to_dict`. Raises ValueError at unknown or missing keys."""
        check_type("config", data, dict, "a JSON object")
        known = {f.name for f in dataclasses.fields(cls)}
        _check_keys("config", data, known, required={"d_in", "n_latents", "activation"})
        losses = data.get("losses", [])
        check_type("losses", losses, list, "a list of loss terms")
        parsed = {"activation": _from_dict("activation", data["activation"])}
        parsed["losses"] = tuple(_from_dict("losses", term) for term in losses)
        return cls(**{**data, **parsed})


def _to_dict(policy: Any) -> dict[str, Any]:
    return {"type": type(policy).__name__, **dataclasses.asdict(policy)}


def _from_dict(name: str, data: Any) -> Any:
    check_type(name, data, dict, 'an object such as {"type": "TopK", "k": 32}')
    fields = dict(data)
    kind = fields.pop("type", None)
    check_choice(f"{name}.type", kind, _BY_NAME)
    _check_keys(name, fields, {f.name for f in dataclasses.fields(_BY_NAME[kind])}, required=set())
    try:
        return _BY_NAME[kind](**fields)
    except TypeError as error:
        raise BadType(f"{name}: got {data}, expected the fields of {kind}") from error


def _check_keys(name: str, data: dict[str, Any], known: set[str], required: set[str]) -> None:
    if unknown := sorted(set(data) - known):
        reject(name, f"unknown keys {unknown}", f"keys among {sorted(known)}")
    if missing := sorted(required - set(data)):
        reject(name, f"no {missing}", f"the keys {sorted(required)}")
