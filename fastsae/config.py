"""What a dictionary is: sizes, activation rule, loss terms, space. Frozen, checked, plain JSON on disk."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from fastsae.checks import check_choice, check_number, check_type, reject
from fastsae.policies import (
    L0,
    L1,
    Activation,
    AuxK,
    Gated,
    JumpReLU,
    Loss,
    PreActivation,
    ReLU,
    TargetL0,
    check_keys,
    from_dict,
    to_dict,
)

__all__ = ["Normalization", "SAEConfig"]

Term = TypeVar("Term", bound=Loss)
Normalization = Literal["none", "scalar", "unit_scalar", "mean_norm", "layer_norm"]


@dataclass(frozen=True)
class SAEConfig:
    """The shape and the rules of a dictionary of ``n_latents`` features.

    Args:
        d_in: width of the input.
        n_latents: number of latents M.
        activation: TopK, BatchTopK, GroupMax, JumpReLU, ReLU, Gated, MultiTopK, HierarchicalTopK or
            Matryoshka (see :mod:`fastsae.policies`).
        d_out: width of the reconstruction; None is ``d_in``.
        losses: terms beside the reconstruction loss.
        normalization: "none"; x times one stored number, that makes E||x||^2 = d_in ("scalar"), E||x||^2 = 1
            ("unit_scalar") or E||x|| = sqrt(d_in) ("mean_norm"), of a crosscoder one number a site;
            or "layer_norm", each token centred and divided by its standard deviation, undone by decode.
        subtract_b_dec: encode x - b_dec. None: yes for autoencoders, except with JumpReLU and ReLU.
        unit_norm_decoder: keep decoder rows at length 1. None: as subtract_b_dec.
        reconstruction: "fvu", sum of squared errors over the batch's variance about its mean; or
            "squared_error", squared error summed over d_out, mean over tokens. None: "fvu" for those that fix
            the number of active latents, else "squared_error", the scale that published sparsity coefficients
            are meant for.
        transcoder: the target is another activation than the input, and W_dec starts at 0. None: where d_out
            differs from d_in, or with ``skip``.
        skip: add x W_skip^T to the reconstruction (a skip transcoder: Paulo et al. 2025, arXiv 2501.18823).
        n_sites: a crosscoder (Lindsey et al. 2024, "Sparse Crosscoders"): the input is so many activations of
            equal width side by side, of several layers or models, and so is the output.
            ``W_enc.view(M, n_sites, -1)`` holds their encoders.

    Raises:
        ValueError, TypeError: an argument outside the ranges above; an activation that doesn't fit
            n_latents; a loss that doesn't fit the activation; b_dec subtracted from what isn't reconstructed;
            two losses of one kind.
    """

    d_in: int
    n_latents: int
    activation: Activation
    d_out: int = None  # type: ignore[assignment]  # None stands for a default and never survives construction
    losses: tuple[Loss, ...] = ()
    normalization: Normalization = "none"
    subtract_b_dec: bool = None  # type: ignore[assignment]
    unit_norm_decoder: bool = None  # type: ignore[assignment]
    reconstruction: Literal["fvu", "squared_error"] = None  # type: ignore[assignment]
    transcoder: bool = None  # type: ignore[assignment]
    skip: bool = False
    n_sites: int = 1

    def __post_init__(self) -> None:
        check_number("d_in", self.d_in, integer=True, low=1)
        check_number("n_latents", self.n_latents, integer=True, low=1)
        kinds = get_args(Activation)
        names = [kind.__name__ for kind in kinds]
        check_type("activation", self.activation, kinds, f"{', '.join(names[:-1])} or {names[-1]}")
        self._resolve_defaults()
        check_number("d_out", self.d_out, integer=True, low=1)
        check_choice("normalization", self.normalization, get_args(Normalization))
        check_choice("reconstruction", self.reconstruction, ("fvu", "squared_error"))
        for flag in ("subtract_b_dec", "unit_norm_decoder", "transcoder", "skip"):
            check_type(flag, getattr(self, flag), bool, "True, False or None")
        self.activation.check_latents(self.n_latents)
        self._check_losses()
        self._check_structure()

    def _resolve_defaults(self) -> None:
        fixed = not isinstance(self.activation, JumpReLU | ReLU | Gated)
        d_out = self.d_in if self.d_out is None else self.d_out
        transcoder = bool(self.skip) or d_out != self.d_in if self.transcoder is None else self.transcoder
        centred = (fixed or isinstance(self.activation, Gated)) and not transcoder
        resolved = {
            "d_out": d_out,
            "losses": tuple(self.losses) if isinstance(self.losses, list | tuple) else (self.losses,),
            "subtract_b_dec": centred if self.subtract_b_dec is None else self.subtract_b_dec,
            "unit_norm_decoder": centred if self.unit_norm_decoder is None else self.unit_norm_decoder,
            "reconstruction": self.reconstruction or ("fvu" if fixed else "squared_error"),
            "transcoder": transcoder,
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)

    def _check_losses(self) -> None:
        for term in self.losses:
            check_type("losses", term, get_args(Loss), "loss terms such as AuxK() or DecoderNormL1()")
            wrong = isinstance(self.activation, Gated) and not isinstance(term, AuxK | L1)
            if wrong:
                reject("losses", term, "L1 or AuxK beside Gated, whose sparsity is that of relu(pi)")
            if isinstance(term, L0 | TargetL0 | PreActivation) and not isinstance(self.activation, JumpReLU):
                reject("losses", term, f"JumpReLU beside it, not {self.activation}")
        if len({type(term) for term in self.losses}) < len(self.losses):
            reject("losses", self.losses, "at most one term of each kind")
        if self.loss(AuxK) and self.loss(PreActivation):
            reject("losses", self.losses, "AuxK or PreActivation, not both")

    def _check_structure(self) -> None:
        check_number("n_sites", self.n_sites, integer=True, low=1)
        for name in ("d_in", "d_out"):
            if getattr(self, name) % self.n_sites:
                reject(name, getattr(self, name), f"a multiple of n_sites ({self.n_sites})")
        if not self.transcoder and self.d_out != self.d_in:
            reject("transcoder", False, f"True where d_out ({self.d_out}) differs from d_in ({self.d_in})")
        if self.skip and not self.transcoder:
            reject("skip", True, "a transcoder: an autoencoder's would be the identity")
        if self.subtract_b_dec and self.transcoder:
            reject("subtract_b_dec", True, "False for a transcoder, whose b_dec is in its target's space")

    def loss(self, kind: type[Term]) -> Term | None:
        """The loss term of that kind, None without one."""
        return next((term for term in self.losses if isinstance(term, kind)), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the inverse of :meth:`from_dict`."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["activation"] = to_dict(self.activation)
        data["losses"] = [to_dict(term) for term in self.losses]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SAEConfig:
        """Rebuild a config from :meth:`to_dict`. Raises ValueError at unknown or missing keys."""
        check_type("config", data, dict, "a JSON object")
        known = {f.name for f in dataclasses.fields(cls)}
        check_keys("config", data, known, required={"d_in", "n_latents", "activation"})
        losses = data.get("losses", [])
        check_type("losses", losses, list, "a list of loss terms")
        parsed = {"activation": from_dict("activation", data["activation"])}
        parsed["losses"] = tuple(from_dict("losses", term) for term in losses)
        return cls(**{**data, **parsed})
