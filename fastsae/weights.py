"""A dictionary's matrices in their formats: read with all bits, written by rows, held at unit length."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsae.checks import check_choice
from fastsae.config import SAEConfig
from fastsae.formats import join, split
from fastsae.initial import INITIAL_ROWS
from fastsae.ops import upcast

__all__ = ["Weights"]


class Weights(nn.Module):
    """A module with W_enc and W_dec in a ``weight_format``: see :mod:`fastsae.formats`."""

    config: SAEConfig
    weight_format: str
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def full_precision(self, name: str, lo: int = 0, hi: int | None = None) -> Tensor:
        """The weight ``name``, or its rows lo..hi, with all its bits, whatever the format: at least fp32."""
        check_choice("name", name, ("W_enc", "b_enc", "W_dec", "b_dec"))
        rows, rest = getattr(self, name).detach()[lo:hi], self._buffers.get(f"{name}_remainder")
        return upcast(rows) if rest is None else join(rows, rest[lo:hi])

    def _stored(self, name: str, lo: int, hi: int) -> Tensor:
        """Rows lo..hi of a parameter as files hold them: all bits of split32, else what is in memory."""
        return (
            self.full_precision(name, lo, hi)
            if self.weight_format == "split32"
            else getattr(self, name)[lo:hi]
        )

    def remainder(self, param: Tensor) -> Tensor | None:
        """The buffer of the bits that ``param``, a plane of split32, lacks; None of other parameters."""
        names = [name for name in ("W_enc", "W_dec") if self._parameters[name] is param]
        return self._buffers.get(f"{names[0]}_remainder") if names else None

    @torch.no_grad()
    def put_rows_(self, name: str, lo: int, rows: Tensor) -> None:
        """Set rows lo.. of the weight ``name`` to ``rows``, in the weight's format; rounds to nearest."""
        weight, rest = getattr(self, name)[lo : lo + len(rows)], self._buffers.get(f"{name}_remainder")
        if rest is None:
            weight.copy_(rows)
        else:
            for part, new in zip((weight, rest[lo : lo + len(rows)]), split(rows.float()), strict=True):
                part.copy_(new)

    @torch.no_grad()
    def constrain_gradients_(self) -> None:
        """If the decoder is unit-norm, remove gradients' parts along their rows; before the optimizer."""
        grad = self.W_dec.grad
        if not self.config.unit_norm_decoder or grad is None:
            return
        if grad.is_sparse:
            grad = grad.coalesce()
            rows, values = self.W_dec[grad.indices()[0]], grad.values()
        else:
            rows, values = self.W_dec, grad
        unit = nn.functional.normalize(rows, dim=1)
        values.sub_(unit * (values * unit).sum(1, keepdim=True))
        self.W_dec.grad = grad

    @torch.no_grad()
    def constrain_weights_(self) -> None:
        """Where the decoder is unit-norm, divide each row by its length; call after the optimizer."""
        if not self.config.unit_norm_decoder:
            return
        if self.weight_format == "float32":
            self.W_dec.copy_(nn.functional.normalize(self.W_dec, dim=1))
            return
        for lo in range(0, self.config.n_latents, INITIAL_ROWS):
            rows = self.full_precision("W_dec", lo, lo + INITIAL_ROWS)
            self.put_rows_("W_dec", lo, nn.functional.normalize(rows, dim=1))
