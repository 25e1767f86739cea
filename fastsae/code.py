"""SparseCode: the one container of sparse activations, in compressed sparse rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastsae.checks import check_type, reject

__all__ = ["SparseCode"]


class SparseCode:
    """Activations of N tokens over ``n_latents`` latents, stored as compressed sparse rows (CSR).

    Entries ``offsets[n] : offsets[n + 1]`` belong to token n:  f[n, indices[j]] = values[j], all others 0.

    Attributes:
        values: [capacity] floating; differentiable.
        indices: [capacity] int32 in [0, n_latents), distinct within a token.
        offsets: [N + 1] int64, ascending from 0. ``offsets[-1]`` may be below capacity: what lies beyond is
        ignored.
        leading: the shape of the tokens, with product N.
        per_token: entries per token where that is one number for all (TopK), else None.
        mean, scale: [N, 1] each, or None: what a layer-normed input needs to be restored by decode.
    """

    def __init__(
        self,
        values: Tensor,
        indices: Tensor,
        offsets: Tensor,
        n_latents: int,
        leading: tuple[int, ...] | None = None,
        *,
        per_token: int | None = None,
        mean: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        for name, tensor in (("values", values), ("indices", indices), ("offsets", offsets)):
            check_type(name, tensor, Tensor, "a tensor")
            if tensor.ndim != 1:
                reject(name, f"shape {tuple(tensor.shape)}", "one dimension")
        if indices.shape != values.shape:
            reject("indices", f"{indices.shape[0]} entries", f"{values.shape[0]}, as many as values")
        if not values.is_floating_point():
            reject("values", values.dtype, "a floating dtype")
        if indices.dtype != torch.int32 or offsets.dtype != torch.int64:
            reject("indices, offsets", f"{indices.dtype}, {offsets.dtype}", "torch.int32, torch.int64")
        if not len(offsets):
            reject("offsets", "no entry", "N + 1 of them")
        if n_latents < 1:
            reject("n_latents", n_latents, "an integer >= 1")
        n_tokens = offsets.shape[0] - 1
        leading = (n_tokens,) if leading is None else tuple(leading)
        if math.prod(leading) != n_tokens:
            reject("leading", leading, f"a shape with product {n_tokens}, the rows of offsets")
        self.values, self.indices, self.offsets = values, indices, offsets
        self.n_latents, self.leading, self.per_token = n_latents, leading, per_token
        self.mean, self.scale = mean, scale

    @property
    def n_tokens(self) -> int:
        """Tokens, leading dimensions flattened."""
        return self.offsets.shape[0] - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense code: [*leading, n_latents]."""
        return (*self.leading, self.n_latents)

    def __repr__(self) -> str:
        kind = (
            f"{self.per_token} per token"
            if self.per_token is not None
            else f"capacity {self.values.shape[0]}"
        )
        return (
            f"SparseCode(shape={self.shape}, {kind}, dtype={self.values.dtype}, device={self.values.device})"
        )

    def rows(self) -> Tensor:
        """The token of every entry, [capacity] int64; N for what lies beyond ``offsets[-1]``."""
        position = torch.arange(self.values.shape[0], device=self.offsets.device)
        return torch.searchsorted(self.offsets[1:].contiguous(), position, right=True)

    def l0(self) -> Tensor:
        """Nonzero activations per token, [*leading] int64."""
        counts = self.offsets.new_zeros(self.n_tokens + 1)
        counts.index_add_(0, self.rows(), self.values.detach().ne(0).long())
        return counts[:-1].view(self.leading)

    def topk(self) -> tuple[Tensor, Tensor]:
        """Values and indices, [*leading, k] each; ragged codes are padded with 0 to the longest row."""
        k = self.per_token
        if k is not None:
            return self.values.view(*self.leading, k), self.indices.view(*self.leading, k)
        rows, n = self.rows(), self.n_tokens
        k = int(self.offsets.diff().max()) if n else 0
        keep = rows < n
        rows = rows[keep]
        slot = torch.arange(keep.shape[0], device=rows.device)[keep] - self.offsets[rows]
        values = self.values.new_zeros(n, k).index_put((rows, slot), self.values[keep])
        indices = self.indices.new_zeros(n, k).index_put((rows, slot), self.indices[keep])
        return values.view(*self.leading, k), indices.view(*self.leading, k)

    def to_dense(self) -> Tensor:
        """The dense code [*leading, n_latents]; differentiable in ``values``."""
        rows = self.rows()
        keep = rows < self.n_tokens
        dense = self.values.new_zeros(self.n_tokens, self.n_latents)
        return dense.index_put((rows[keep], self.indices[keep].long()), self.values[keep]).view(self.shape)

    @classmethod
    def from_dense(cls, z: Tensor) -> SparseCode:
        """The nonzero entries of a dense code [..., n_latents]; differentiable in ``z``."""
        check_type("z", z, Tensor, "a tensor")
        if z.ndim == 0 or not z.is_floating_point():
            reject("z", f"shape {tuple(z.shape)}, {z.dtype}", "a floating tensor [..., n_latents]")
        flat = z.reshape(-1, z.shape[-1])
        rows, columns = flat.detach().ne(0).nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=flat.shape[0])
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(flat[rows, columns], columns.int(), offsets, z.shape[-1], tuple(z.shape[:-1]))

    def with_values(self, values: Tensor) -> SparseCode:
        """The same entries with other values."""
        return self._map(lambda t: values if t is self.values else t)

    def detach(self) -> SparseCode:
        """The same code without history."""
        return self._map(lambda t: t.detach())

    def to(self, *args, **kwargs) -> SparseCode:
        """Move or cast as :meth:`torch.Tensor.to`; a dtype applies to the floating parts only."""
        floats = lambda t: t.to(*args, **kwargs)  # noqa: E731
        device = floats(self.values.detach()[:0]).device
        return self._map(lambda t: floats(t) if t.is_floating_point() else t.to(device))

    def _map(self, f: Callable[[Tensor], Tensor]) -> SparseCode:
        optional = {name: f(t) for name in ("mean", "scale") if (t := getattr(self, name)) is not None}
        return SparseCode(
            f(self.values),
            f(self.indices),
            f(self.offsets),
            self.n_latents,
            self.leading,
            per_token=self.per_token,
            **optional,
        )
