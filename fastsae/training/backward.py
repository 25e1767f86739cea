"""The backward of a step whose loss has more to it than ``row_step`` knows: learning thresholds, gates,
partial reconstructions, other penalties, clipping.

It is the same arithmetic, of the same operators: dL / df at every entry, what follows of it for
pre-activations and for the vectors of the activation, then rows of gradients, a block at a time, straight
into the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae import losses, nested
from fastsae.autograd import in_band
from fastsae.backends import resolve
from fastsae.ops import upcast
from fastsae.optim import RowAdam
from fastsae.policies import Gated
from fastsae.sae import SAE
from fastsae.training.pieces import Forward, charges_of

__all__ = [
    "Slopes",
    "SparseBackward",
    "by_length",
    "clip_factor",
    "is_finite",
    "of_outputs",
    "update_whole_",
]

_ops = torch.ops.fastsae
_BLOCK_ELEMENTS = 2**20
"""Of gradient rows whose norm is taken at a time."""


@dataclass
class Slopes:
    """What the loss's terms multiply, at the step's weights.

    charges: by a term's name, dL / d charge of an activation.  l0: dL / d(active latents of all tokens).
    short: of PreActivation, dL / d(relu(theta - pre) ||W_dec||).
    """

    charges: dict[str, float]
    l0: Tensor | float = 0.0
    short: float = 0.0


class SparseBackward:
    """Gradients of a step by its code. ``finite``: whether all are, and their squares, 0-dim bool."""

    def __init__(self, sae: SAE, forward: Forward, slopes: Slopes) -> None:
        self.sae, self.forward, self.slopes = sae, forward, slopes
        self.backend = resolve(sae.backend, sae.W_enc)
        n = len(forward.x)
        self.sets = [int(end) for end in forward.offsets[::n]]
        self.values = upcast(forward.values[: self.sets[-1]])
        self.latents = forward.indices[: self.sets[-1]].long()
        self.g = upcast(forward.scale)[:, None] * upcast(forward.error)  # [rows, d_out]
        self.extra = self._nested(n)
        self.d_values = upcast(
            _ops.code_grad(self.g, sae.W_dec, forward.indices, forward.offsets, self.backend)
        )
        self.d_values = self.d_values[: self.sets[-1]]
        if self.extra is not None:
            self.d_values[: self.sets[1]] += self.extra.values[: self.sets[1]]
        self.stretch = self._charge()
        # by entry: dL / dpre, the part of it that moves b_enc, and what multiplies g in W_dec's gradient
        self.d_pre = torch.where(self.values > 0, self.d_values, 0)
        self.d_bias, self.coefs = self.d_pre, self.values
        self.vectors: dict[str, Tensor] = {}
        if (bandwidth := sae.band()) is not None:
            self._thresholds(bandwidth)
        elif isinstance(sae.config.activation, Gated):
            self._gates()
        self.finite = self._is_finite()

    def _nested(self, n: int) -> nested.Gradients | None:
        parts = self.sae.config.activation.nested(self.sae.config.n_latents)
        if parts is None:
            return None
        forward, code = self.forward, self.forward.code
        stored = code.values, code.indices, code.offsets
        found = nested.gradients(*stored, self.sae.W_dec, forward.error[:n], parts, self.backend)
        weight = upcast(forward.scale[0]) / 2
        self.g[:n] = weight * found.error
        return nested.Gradients(self.g, weight * found.values, found.latents, weight * found.rows)

    def _charge(self) -> Tensor | None:
        """Add to d_values what is charged for activations; return dL / d||W_dec[i]|| at these entries."""
        terms = charges_of(self.sae)
        if not terms:
            return None
        place = self._charged()
        f, lengths = self.values[place], losses.row_norms(self.sae.W_dec, self.sae.config.n_sites)
        stretch = torch.zeros_like(f)
        for term in terms:
            by_f, by_length_ = losses.charge_slopes(term, f, lengths[self.latents[place]])
            self.d_values[place] += self.slopes.charges[term.name] * by_f
            stretch += self.slopes.charges[term.name] * by_length_
        return stretch

    def _charged(self) -> slice:
        """The entries that terms charge: of Gated, its gates."""
        i = isinstance(self.sae.config.activation, Gated)
        return slice(self.sets[i], self.sets[i + 1])

    def _thresholds(self, bandwidth: float) -> None:
        main = slice(self.sets[1])
        theta = upcast(self.sae.log_threshold).exp()[self.latents[main]]
        band = in_band(self.values[main], theta, bandwidth)
        pulled = (theta / bandwidth) * (theta * self.d_values[main] + self.slopes.l0)
        by_entry = torch.where(band, -pulled, 0)
        self.vectors["log_threshold"] = self._by_latent(by_entry, self.latents[main])

    def _gates(self) -> None:
        sae, (_, first, second, *_) = self.sae, self.sets
        main, gates = slice(first), slice(first, second)
        latents = self.latents[main]
        stretch = upcast(sae.r_mag).exp()[latents]
        d_mag = self.d_pre[main].clone()
        wx = self.values[gates] - upcast(sae.b_enc)[latents]
        self.vectors["r_mag"] = self._by_latent(d_mag * stretch * wx, latents)
        self.vectors["b_mag"] = self._by_latent(d_mag, latents)
        self.d_pre, self.d_bias = self.d_pre.clone(), self.d_pre.clone()
        self.d_pre[main] = d_mag * stretch
        self.d_bias[main] = 0
        self.coefs = self.values.clone()
        self.coefs[gates] = 0  # its decoder is held fixed

    def _by_latent(self, by_entry: Tensor, latents: Tensor) -> Tensor:
        """The sums over each latent's entries, [M]; in a fixed order."""
        ends = torch.tensor([0, len(by_entry)], device=latents.device)
        found, starts, _, order = _ops.transpose(
            by_entry, latents.int(), ends, len(self.sae.W_enc), self.backend
        )
        ones = by_entry.new_ones(1, 1)
        sums = _ops.row_grads(by_entry[order], ones, starts, torch.zeros_like(order), self.backend)
        # unused places hold 0, which changes the last latent by nothing
        out = by_entry.new_zeros(len(self.sae.W_enc))
        return out.index_add_(0, found.clamp_max(len(out) - 1), sums.flatten())

    def _is_finite(self) -> Tensor:
        peak = self.g.abs().amax()
        bounds = [
            self.coefs.abs().sum() * peak,
            self.d_pre.abs().sum() * (upcast(self.forward.x).abs().amax() + 1),
            peak * len(self.g),
            *(t.abs().amax() for t in self.vectors.values()),
            *([] if self.stretch is None else [self.stretch.abs().sum()]),
            *([] if self.extra is None or not len(self.extra.rows) else [self.extra.rows.abs().amax()]),
        ]
        return is_finite(bounds)

    def update(self, opt: RowAdam, clip: float | None) -> None:
        """Take the optimizer's step on every parameter that learns, on gradients of a norm up to ``clip``."""
        small, matrices = self._small(), self._matrices()  # by the weights as they are
        factor = None
        if clip is not None:
            squares = [upcast(t).square().sum() for t in small.values()]
            squares += [upcast(grad).square().sum() for rows in matrices.values() for grad in rows.blocks()]
            factor = clip_factor(torch.stack(squares).sum(), clip)
        for name, rows in matrices.items():
            if getattr(self.sae, name).requires_grad:
                opt.update_rows_(getattr(self.sae, name), rows.latents, rows.scaled(factor))
        if factor is not None:
            small = {name: grad * factor for name, grad in small.items()}
        update_whole_(self.sae, opt, small)

    def _matrices(self) -> dict[str, _Rows]:
        sae, n = self.sae, len(self.forward.x)
        width = max(sae.config.d_in, sae.config.d_out)
        encoder = _Entries.of(self.values, self.forward, len(sae.W_enc), self.backend)
        decoder = (
            encoder
            if self.coefs is self.values
            else _Entries.of(self.coefs, self.forward, len(sae.W_enc), self.backend)
        )
        x, inputs = upcast(self.forward.x), encoder.rows % n
        d_pre, d_bias, coefs = (
            self.d_pre[encoder.order],
            self.d_bias[encoder.order],
            self.coefs[decoder.order],
        )
        ones = x.new_ones(n, 1)
        stretch = None
        if self.stretch is not None:
            stretch = torch.zeros_like(self.values)
            stretch[self._charged()] = self.stretch
            stretch = stretch[decoder.order]

        def dec_grad(lo: int, hi: int) -> Tensor:
            starts, latents = decoder.starts[lo : hi + 1], decoder.latents[lo:hi]
            grad = _ops.row_grads(coefs, self.g, starts, decoder.rows, self.backend)
            if stretch is not None:
                total = _ops.row_grads(stretch, ones, starts, decoder.rows % n, self.backend)
                grad += total * by_length(sae.W_dec[latents], sae.config.n_sites)
            if self.extra is not None:
                _add_rows_(grad, latents, self.extra)
            return grad

        return {
            "W_enc": _Rows(encoder.latents, width, lambda lo, hi: encoder.sums(d_pre, x, inputs, lo, hi)),
            "b_enc": _Rows(encoder.latents, 1, lambda lo, hi: encoder.sums(d_bias, ones, inputs, lo, hi)),
            "W_dec": _Rows(decoder.latents, width, dec_grad),
        }

    def _small(self) -> dict[str, Tensor]:
        """Gradients of everything that isn't by rows."""
        sae, pull = self.sae, torch.zeros_like(upcast(self.forward.x[0]))
        if sae.config.subtract_b_dec:
            by_latent = self._by_latent(self.d_pre, self.latents)
            for lo in range(0, len(by_latent), block := max(1, _BLOCK_ELEMENTS // sae.config.d_in)):
                pull += by_latent[lo : lo + block] @ upcast(sae.W_enc[lo : lo + block])
        return self.vectors | of_outputs(sae, self.forward, self.g[: len(self.forward.x)], pull)


@dataclass
class _Entries:
    """A code latent by latent, of the entries that some coefficient isn't 0 at."""

    latents: Tensor
    starts: Tensor
    rows: Tensor
    order: Tensor
    backend: str

    @classmethod
    def of(cls, coefs: Tensor, forward: Forward, n_latents: int, backend: str) -> _Entries:
        indices = forward.indices[: len(coefs)]
        latents, starts, rows, order = _ops.transpose(coefs, indices, forward.offsets, n_latents, backend)
        active = int((latents < n_latents).sum())
        return cls(latents[:active], starts[: active + 1], rows, order, backend)

    def sums(self, coefs: Tensor, x: Tensor, inputs: Tensor, lo: int, hi: int) -> Tensor:
        """Of the lo-th to the hi-th latent, the sums of coefs x[inputs]."""
        return _ops.row_grads(coefs, x, self.starts[lo : hi + 1], inputs, self.backend)


@dataclass
class _Rows:
    """Gradients of the rows ``latents``, ascending; ``grad(lo, hi)`` makes those of latents[lo:hi]."""

    latents: Tensor
    width: int
    grad: Callable[[int, int], Tensor]

    def blocks(self) -> Iterator[Tensor]:
        """Some gradients after the other."""
        size = max(1, _BLOCK_ELEMENTS // self.width)
        for lo in range(0, len(self.latents), size):
            yield self.grad(lo, min(lo + size, len(self.latents)))

    def scaled(self, factor: Tensor | None) -> Callable[[int, int], Tensor]:
        """What makes them times ``factor``; None: as they are."""
        return self.grad if factor is None else lambda lo, hi: self.grad(lo, hi) * factor


def _add_rows_(grad: Tensor, latents: Tensor, extra: nested.Gradients) -> None:
    """Add what ``extra`` holds of the rows ``latents``, which are among its own or have nothing to add."""
    if not len(extra.latents) or not len(latents):
        return
    place = torch.searchsorted(extra.latents, latents).clamp_max(len(extra.latents) - 1)
    grad += torch.where((extra.latents[place] == latents)[:, None], extra.rows[place], 0)


def of_outputs(sae: SAE, forward: Forward, g: Tensor, pull: Tensor) -> dict[str, Tensor]:
    """Gradients of b_dec and of a skip, by ``g`` [N, d_out] at the main reconstruction.

    b_dec is part of that one alone: AuxK has none, Gated's gates hold it fixed. ``pull`` [d_in] is what it
    loses where it is subtracted from x.
    """
    grad = g.sum(0)
    found = {"b_dec": grad - pull if sae.config.subtract_b_dec else grad}
    if forward.normalised is not None:
        found["W_skip"] = g.T @ upcast(forward.normalised)
    return found


def update_whole_(sae: SAE, opt: RowAdam, grads: dict[str, Tensor]) -> None:
    """Step every row of the parameters named, where they learn."""
    for name, grad in grads.items():
        if getattr(sae, name).requires_grad:
            opt.update_rows_(getattr(sae, name), None, grad)


def by_length(rows: Tensor, n_sites: int) -> Tensor:
    """The derivative of :func:`fastsae.losses.row_norms` by ``rows`` [R, D]: each site's part at length 1."""
    parts = upcast(rows).view(len(rows), n_sites, -1)
    return torch.nn.functional.normalize(parts, dim=2).view(rows.shape)


def clip_factor(square: Tensor, most: float) -> Tensor:
    """What gradients with this square of their norm are multiplied by, as by torch's clip_grad_norm_."""
    return (most / (square.sqrt() + 1e-6)).clamp_max(1)


def is_finite(bounds: list[Tensor]) -> Tensor:
    """Whether the squares of all are, 0-dim bool: Adam squares gradients."""
    return torch.stack([bound.float() for bound in bounds]).square().isfinite().all()
