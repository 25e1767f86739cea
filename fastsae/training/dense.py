"""A step whose code would be larger than the scores: a block of latents at a time, densely.

Where a rule lets thousands of latents fire for each token, as at the start of L1 and JumpReLU training, a
sparse code has more numbers than [N, M], and gathering rows for them costs more than multiplying matrices.
Here a block [N, B] of scores is made, used and let go, once forward and once more for its gradients, which go
straight into the optimizer. Memory is a few such blocks, whatever fires.

    forward:   x_hat += f W_dec[block]
    backward:  d_f = g W_dec[block]^T + penalties;  rows of W_enc: d_pre^T x,  of W_dec: f^T g + penalties
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as nnf

from fastsae import functional as F
from fastsae import losses
from fastsae.backends import resolve
from fastsae.ops import upcast
from fastsae.optim import RowAdam
from fastsae.policies import AuxK, Gated, JumpReLU, PreActivation
from fastsae.sae import SAE
from fastsae.training.backward import (
    Slopes,
    by_length,
    clip_factor,
    is_finite,
    of_outputs,
    update_whole_,
)
from fastsae.training.pieces import Forward, Piece, charges_of

__all__ = ["DenseBackward", "fill_densely", "pays"]

DENSE_SHARE = 1 / 16
"""Share of the latents firing for a token from which this path takes less time: at 1 / 32 the sparse one took
0.4 to 0.75 of it, at 1 / 16 0.6 to 1.45, at 1 / 8 0.8 to 2.8 (ReLU, JumpReLU, Gated; M = 4096 and 16,384, N =
1024, D = 384; AMD EPYC, 1 and 2 threads, 2026-11)."""
MOST_ENTRIES = 2**24
"""Entries of a batch from which it is taken whatever share they are: of each a sparse step keeps some 60
bytes."""
FEW_SCORES = 2**16
"""Up to so many scores in all, the sparse path is taken whatever fires."""
BLOCK_SCORES = 2**20
"""Of a block [N, B], of which some five are held at a time: 4 MiB each."""
_BY_ROWS = ("W_enc", "b_enc", "W_dec")
SAMPLE = 64
"""Tokens that are encoded to learn how many latents fire."""


def pays(sae: SAE, x: Tensor) -> bool:
    """Whether a step on the batch ``x``, as W_enc is to multiply it, is to take this path.

    A function of weights and batch alone, so that a resumed run goes the same way.
    """
    if sae.config.loss(PreActivation):
        return True
    ruled_out = sae.config.activation.rule != "threshold" or sae.config.loss(AuxK)
    if ruled_out or len(x) * sae.config.n_latents <= FEW_SCORES:
        return False
    some = x[:: max(1, len(x) // SAMPLE)][:SAMPLE].contiguous()
    rule, threshold = F.selection(*sae.selection(whole=True), sae.W_enc)
    backend = resolve(sae.backend, sae.W_enc)
    offsets = torch.ops.fastsae.encode(some, sae.W_enc, sae.b_enc, threshold, None, rule, 0, backend)[2]
    fired = int(offsets[-1]) / len(some)
    return fired > DENSE_SHARE * sae.config.n_latents or fired * len(x) > MOST_ENTRIES


class _Block:
    """The activations of all tokens over some latents: f [N, B]; of Gated also relu(pi)."""

    def __init__(self, sae: SAE, x: Tensor, lo: int, hi: int) -> None:
        self.sae, self.lo, self.hi = sae, lo, hi
        self.pre = nnf.linear(upcast(x), upcast(sae.W_enc[lo:hi]), upcast(sae.b_enc[lo:hi]))
        self.theta, self.gates = None, None
        if isinstance(sae.config.activation, JumpReLU):
            self.theta, self.bandwidth = (
                upcast(sae.log_threshold[lo:hi]).exp(),
                sae.config.activation.bandwidth,
            )
            self.f = torch.where(self.pre > self.theta, self.pre, 0)
        elif isinstance(sae.config.activation, Gated):
            self.gates = self.pre.relu()
            self.stretch = upcast(sae.r_mag[lo:hi]).exp()
            self.wx = self.pre - upcast(sae.b_enc[lo:hi])
            magnitude = self.stretch * self.wx + upcast(sae.b_mag[lo:hi])
            self.f = torch.where(self.pre > 0, magnitude.relu(), 0)
        else:
            self.f = self.pre.relu()
        self.W_dec = upcast(sae.W_dec[lo:hi])
        self.lengths = losses.row_norms(self.W_dec, sae.config.n_sites)

    def charged(self) -> Tensor:
        """What penalties are on."""
        return self.f if self.gates is None else self.gates

    def short(self, among: Tensor | None) -> Tensor:
        """How far each is below its threshold; 0 of latents where ``among`` [M] isn't set."""
        assert self.theta is not None
        short = (self.theta - self.pre).relu()
        return short if among is None else short * among[self.lo : self.hi]


def _blocks(sae: SAE, x: Tensor) -> Iterator[_Block]:
    size = max(1, BLOCK_SCORES // max(1, len(x)))
    for lo in range(0, sae.config.n_latents, size):
        yield _Block(sae, x, lo, min(lo + size, sae.config.n_latents))


def fill_densely(sae: SAE, piece: Piece, target: Tensor) -> None:
    """What :func:`fastsae.training.pieces.fill` does, without a code."""
    short, among = sae.config.loss(PreActivation), sae.short_mask()
    n, wide = len(piece.x), upcast(piece.x).new_zeros
    error = upcast(sae.b_dec) - upcast(target)
    others = [error.clone()] if isinstance(sae.config.activation, Gated) else []
    active, magnitude, fired = wide(()), wide(()), []
    totals = {term.name: wide(()) for term in charges_of(sae)} | (
        {} if short is None else {short.name: wide(())}
    )
    for block in _blocks(sae, piece.x):
        error.addmm_(block.f, block.W_dec)
        for other in others:
            other.addmm_(block.charged(), block.W_dec)
        active += (on := block.f > 0).sum()
        fired.append(on.any(0))
        magnitude += block.charged().sum() + block.f.sum()
        for term in charges_of(sae):
            totals[term.name] += losses.charge(term, block.charged(), block.lengths).sum()
        if short is not None:
            totals[short.name] += (block.short(among) * block.lengths).sum()
    errors = [error, *others]
    squares = torch.stack([torch.linalg.vector_norm(one, dim=1).square() for one in errors])
    piece.errors = [one.to(target.dtype) for one in errors]
    piece.squares, piece.peaks, piece.main_squares = squares.sum(1), squares.amax(1), squares[0].sum()
    piece.magnitude, piece.l0, piece.fired = magnitude, active / n, torch.cat(fired)
    coefficients = {term.name: term.coefficient for term in sae.config.losses}
    piece.charges = {name: coefficients[name] * total / n for name, total in totals.items()}


class DenseBackward:
    """Gradients of a step by blocks of latents. ``finite``: whether their bounds are, 0-dim bool."""

    def __init__(self, sae: SAE, forward: Forward, slopes: Slopes, magnitude: Tensor) -> None:
        self.sae, self.forward, self.slopes = sae, forward, slopes
        self.g = (upcast(forward.scale)[:, None] * upcast(forward.error)).view(
            -1, *forward.error[: len(forward.x)].shape
        )
        self.x = upcast(forward.x)
        self.among = sae.short_mask()
        longest = losses.row_norms(sae.W_dec, sae.config.n_sites).amax()
        steepest = sum(map(abs, slopes.charges.values())) + slopes.short
        at_entry = (self.g.norm(dim=2).amax() + steepest) * longest + steepest
        rows = len(self.x) * len(self.g)
        bounds = [magnitude * (self.g.abs().amax() + steepest), at_entry * rows * (self.x.abs().amax() + 1)]
        self.finite = is_finite([*bounds, at_entry * magnitude, self.g.abs().amax() * rows])

    def update(self, opt: RowAdam, clip: float | None) -> None:
        """Take the optimizer's step on every parameter that learns, on gradients of a norm up to ``clip``."""
        factor: Tensor | float = 1.0 if clip is None else clip_factor(self._square(), clip)
        sae, pull = self.sae, torch.zeros_like(self.x[0])
        vectors: dict[str, list[Tensor]] = {}
        for block in _blocks(sae, self.forward.x):
            grads = self._gradients(block)
            pull += grads.pop("pull")
            for name, grad in grads.items():
                if name not in _BY_ROWS:
                    vectors.setdefault(name, []).append(grad)
                elif getattr(sae, name).requires_grad:
                    touched = (grad.view(len(grad), -1) != 0).any(1).nonzero().flatten()
                    span = block.lo, block.hi
                    opt.update_rows_(getattr(sae, name), touched + block.lo, grad[touched] * factor, span)
        whole = of_outputs(sae, self.forward, self.g[0], pull)
        whole |= {name: torch.cat(parts) for name, parts in vectors.items()}
        update_whole_(sae, opt, {name: grad * factor for name, grad in whole.items()})

    def _square(self) -> Tensor:
        """Of the norm of all gradients."""
        squares, pull = self.g.new_zeros(()), torch.zeros_like(self.x[0])
        for block in _blocks(self.sae, self.forward.x):
            grads = self._gradients(block)
            pull += grads.pop("pull")
            squares += torch.stack([grad.square().sum() for grad in grads.values()]).sum()
        whole = of_outputs(self.sae, self.forward, self.g[0], pull)
        return squares + torch.stack([grad.square().sum() for grad in whole.values()]).sum()

    def _gradients(self, block: _Block) -> dict[str, Tensor]:
        """Of the block's rows, before clipping; "pull": what moving x would do through them, [d_in]."""
        sae, slopes = self.sae, self.slopes
        d_f = self.g[0] @ block.W_dec.T
        d_charged = d_f if block.gates is None else self.g[1] @ block.W_dec.T
        along = torch.zeros_like(block.lengths)
        for term in charges_of(sae):
            by_f, by_row = losses.charge_slopes(term, block.charged(), block.lengths)
            d_charged += slopes.charges[term.name] * by_f
            along += slopes.charges[term.name] * by_row.sum(0)
        d_pre = torch.where(block.f > 0, d_f, 0)
        grads: dict[str, Tensor] = {}
        d_bias = d_pre
        if block.gates is not None:
            d_bias = torch.where(block.pre > 0, d_charged, 0)
            grads["r_mag"], grads["b_mag"] = (d_pre * block.stretch * block.wx).sum(0), d_pre.sum(0)
            d_pre = d_pre * block.stretch + d_bias
        if block.theta is not None:
            theta, width = block.theta, block.bandwidth
            by_entry = torch.where((block.pre - theta).abs() < width / 2, theta * d_f + slopes.l0, 0)
            by_threshold = -(theta / width) * by_entry.sum(0)
            if slopes.short:
                short = block.short(self.among)
                below = slopes.short * (short > 0) * block.lengths
                d_pre = d_pre - below
                d_bias = d_pre
                by_threshold = by_threshold + theta * below.sum(0)
                along += slopes.short * short.sum(0)
            if sae.log_threshold.requires_grad:
                grads["log_threshold"] = by_threshold
        grads["W_dec"] = block.f.T @ self.g[0] + along[:, None] * by_length(block.W_dec, sae.config.n_sites)
        grads["W_enc"], grads["b_enc"] = d_pre.T @ self.x, d_bias.sum(0)
        grads["pull"] = d_pre.sum(0) @ upcast(sae.W_enc[block.lo : block.hi])
        return grads
