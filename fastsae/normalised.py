"""The space that a dictionary works in: raw activations in, raw reconstructions out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsae import functional as F
from fastsae.checks import BadValue, reject
from fastsae.code import SparseCode
from fastsae.config import SAEConfig
from fastsae.ops import upcast

__all__ = ["Normalised"]


class Normalised(nn.Module):
    """A module with ``config.normalization``: the way into its space, and back.

    Where inputs are multiplied by a number it lies in the buffer ``norm_scale``, -1 while unset.
    """

    config: SAEConfig
    norm_scale: Tensor
    W_enc: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self._norm_scale_set = False

    @property
    def scales_inputs(self) -> bool:
        """Whether inputs are multiplied by a stored number."""
        return self.config.normalization not in ("none", "layer_norm")

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Normalised x, and for layer norm the per-token mean and scale [N, 1] that restore it."""
        F.check_input("x", x, self.W_enc)
        if self.config.normalization == "none":
            return x, None, None
        if self.scales_inputs:
            return (x * self._scale(self.config.d_in)).to(x.dtype), None, None
        wide = upcast(x)
        mean = wide.mean(-1, keepdim=True)
        # torch's std warns of no tokens
        std = wide.std(-1, keepdim=True, correction=min(1, x.shape[-1] - 1)) if x.numel() else mean
        scale = std + 1e-5
        return ((wide - mean) / scale).to(x.dtype), mean.reshape(-1, 1), scale.reshape(-1, 1)

    def norm_scale_is_set(self) -> bool:
        """Whether inputs' scale has been set; asks the device only until it has."""
        self._norm_scale_set = self._norm_scale_set or bool((self.norm_scale >= 0).all())
        return self._norm_scale_set

    def unset_norm_scale_(self) -> None:
        """Let the inputs' scale be estimated anew from the next training batch."""
        self.norm_scale.fill_(-1)
        self._norm_scale_set = False

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._norm_scale_set = False

    def _scale(self, width: int) -> Tensor:
        """norm_scale: 0-dim, or of a crosscoder for each of ``width`` columns."""
        if not self.norm_scale_is_set():
            raise BadValue(
                "norm_scale: got no value yet, expected sae.calibrate_(sample) or a training step first"
            )
        scale = self.norm_scale
        return scale.repeat_interleave(width // len(scale)) if scale.ndim else scale

    def _restore(self, x_hat: Tensor, code: SparseCode | None) -> Tensor:
        if self.scales_inputs:
            return (x_hat / self._scale(self.config.d_out)).to(x_hat.dtype)
        if self.config.normalization == "none":
            return x_hat
        if code is None or code.mean is None or code.scale is None:
            reject("code", "a code without mean and scale", "one that this dictionary's encode_sparse made")
        flat = upcast(x_hat).reshape(-1, x_hat.shape[-1])
        return (flat * code.scale + code.mean).to(x_hat.dtype).view(x_hat.shape)

    def normalise_target(
        self, target: Tensor | None, x: Tensor, mean: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        """The target in the space of the loss, under x's own normalisation: x itself where it is None."""
        if target is None:
            return x
        if self.scales_inputs:
            return (target * self._scale(self.config.d_out)).to(target.dtype)
        if mean is None or scale is None:
            return target
        flat = upcast(target).reshape(-1, target.shape[-1])
        return ((flat - mean) / scale).to(target.dtype).view(target.shape)

    @torch.no_grad()
    def estimate_norm_scale_(self, x: Tensor, again: bool = False) -> None:
        """Set norm_scale from ``x`` where inputs are scaled and it is still unset (or ``again``)."""
        if not self.scales_inputs or (self.norm_scale_is_set() and not again):
            return
        F.check_input("x", x, self.W_enc)
        sites = upcast(x).reshape(-1, self.config.n_sites, self.config.d_in // self.config.n_sites)
        lengths = torch.linalg.vector_norm(sites, dim=2)  # [n, n_sites]
        kind = self.config.normalization
        size = lengths.mean(0) if kind == "mean_norm" else lengths.square().mean(0).sqrt()
        if not (size > 0).all() or not size.isfinite().all():
            got = f"a sample whose mean ||x|| is {size.tolist()}" if kind == "mean_norm" else None
            got = got or f"a sample with mean ||x||^2 = {', '.join(f'{s * s:g}' for s in size.tolist())}"
            reject("x", got, "one that isn't zero, NaN or Inf")
        wanted = 1.0 if kind == "unit_scalar" else sites.shape[2] ** 0.5
        self.norm_scale.copy_((wanted / size).view(self.norm_scale.shape))
