"""The fused training step: the loss of SAE.training_forward minimised with no dense gradient and no [N, M]
tensor.

Forward and backward are written out over one sparse code. AuxK is a second batch of rows of that code: token
n's dead latents stand in row N + n, with an error of their own. So one transpose and one pass over the active
rows of each matrix serve both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae import functional as F
from fastsae import losses
from fastsae.backends import resolve
from fastsae.checks import check_number, check_type, reject
from fastsae.config import AuxK, DecoderNormL1, TopK
from fastsae.ops import upcast
from fastsae.optim import RowAdam
from fastsae.sae import SAE

__all__ = ["train_step"]

_ops = torch.ops.fastsae


@torch.no_grad()
def train_step(
    sae: SAE, opt: RowAdam, x: Tensor, target: Tensor | None = None, scale: dict[str, float] | None = None
) -> dict[str, Tensor]:
    """Take one optimizer step on the batch ``x`` [..., d_in].

    Equal to ``training_forward(x, target).loss.backward()``, ``constrain_gradients_()``, ``opt.step()`` and
    ``constrain_weights_()`` in ``train()`` mode, to rounding. A batch that holds, or leads to, NaN or Inf
    changes no weight, state or counter.

    Args:
        sae: the dictionary, whose counters and thresholds move with it.
        opt: a RowAdam over ``sae``.
        x: raw inputs, any leading shape.
        target: [..., d_out] for a transcoder; None reconstructs x.
        scale: multipliers of loss terms by name, for schedules, e.g. {"decoder_norm_l1": 0.3}.

    Returns:
        0-dim tensors: loss; each loss term by name, scaled; fvu; l0; n_dead; skipped (1 for a batch with NaN
        or Inf).
    """
    _check_optimizer(sae, opt)
    multipliers = _multipliers(sae, scale)
    sae.check_batch(x, target)
    if x.numel() == 0:
        reject("x", f"shape {tuple(x.shape)}", "at least one token")
    if not (x.isfinite().all() and (target is None or target.isfinite().all())):
        return _skipped(sae, x)
    was_training = sae.training
    sae.train()
    try:
        return _step(sae, opt, x, target, multipliers)
    finally:
        sae.train(was_training)


def _step(
    sae: SAE, opt: RowAdam, x: Tensor, target: Tensor | None, scale: dict[str, float]
) -> dict[str, Tensor]:
    counters = {name: t.clone() for name, t in sae.named_buffers()}
    sae.estimate_norm_scale_(x)
    forward = _forward(sae, x, target, scale)
    gradients = _Gradients(sae, forward)
    if not torch.stack([*forward.terms.values(), gradients.bound.square()]).isfinite().all():
        return _skipped(sae, x, counters)
    opt.begin_step_()
    for param, rows, grad in (
        (sae.W_enc, gradients.latents, gradients.W_enc),
        (sae.b_enc, gradients.latents, lambda lo, hi: gradients.b_enc[lo:hi, 0]),
        (sae.W_dec, gradients.latents, gradients.W_dec),
        (sae.b_dec, None, lambda lo, hi: gradients.b_dec[lo:hi]),
    ):
        if param.requires_grad:
            opt.update_rows_(param, rows, grad)
    opt.end_step_()
    return {
        "loss": torch.stack([*forward.terms.values()]).sum(),
        **forward.terms,
        "fvu": forward.fvu,
        "l0": forward.l0,
        "n_dead": torch.tensor(len(forward.dead)),
        "skipped": torch.tensor(0),
    }


@dataclass
class _Forward:
    """The code of a batch of N tokens, AuxK's rows below it, and the loss's derivatives at the decoder.

    values, indices, offsets: CSR over ``len(x)`` rows, which are N or, with AuxK, 2 N.
    x: [rows, d_in] what W_enc multiplies;  grad_y: [rows, d_out] dL / d(decoded row).
    l1: dL / d(f_i ||W_dec[i]||) at the first N rows;  n_tokens: N.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor
    x: Tensor
    grad_y: Tensor
    n_tokens: int
    terms: dict[str, Tensor]
    fvu: Tensor
    l0: Tensor
    dead: Tensor
    l1: float = 0.0


def _forward(sae: SAE, x: Tensor, target: Tensor | None, scale: dict[str, float]) -> _Forward:
    config, backend = sae.config, resolve(sae.backend)
    normalised = sae.normalise(x)
    code, x = sae.encode_normalised(*normalised)
    target = upcast(sae.normalise_target(target, *normalised)).reshape(-1, config.d_out)
    x = x.reshape(-1, config.d_in)
    stored = int(code.offsets[-1])  # AuxK's rows follow right after what is stored
    values, indices = code.values[:stored], code.indices[:stored]

    error = upcast(_ops.decode(values, indices, code.offsets, sae.W_dec, sae.b_dec, backend)) - target
    unit = losses.error_scale(target, config.reconstruction)
    weight = scale["reconstruction"] * unit
    squares = error.square().sum()
    sae.count_firing_(code)
    forward = _Forward(
        values, indices, code.offsets, x, 2 * weight * error, len(x),
        terms={"reconstruction": weight * squares},
        fvu=squares * (unit if config.reconstruction == "fvu" else losses.error_scale(target, "fvu")),
        l0=code.l0().float().mean(),
        dead=sae.dead_latents(),
    )  # fmt: skip
    for term in config.losses:
        if isinstance(term, DecoderNormL1):
            forward.l1 = scale[term.name] * term.coefficient / len(x)
            norms = losses.decoder_norm_l1(code, sae.W_dec, term.coefficient)
            forward.terms[term.name] = scale[term.name] * norms
        elif isinstance(term, AuxK):
            forward.terms[term.name] = _add_auxk(sae, forward, error, term, scale[term.name] * unit)
    return forward


def _add_auxk(sae: SAE, forward: _Forward, error: Tensor, term: AuxK, weight: Tensor) -> Tensor:
    """Append AuxK's rows to ``forward``; return the term. See :func:`fastsae.losses.auxk`."""
    dead, k = forward.dead, term.resolve_k(sae.config.d_in)
    if not len(dead):
        return torch.zeros_like(weight)
    x, backend = forward.x, resolve(sae.backend)
    aux = F.encode(x, sae.W_enc, sae.b_enc, TopK(min(k, len(dead))), subset=dead, backend=backend)
    missed = upcast(F.decode(aux, sae.W_dec, backend=backend)) + error
    factor = term.coefficient * min(len(dead) / k, 1.0) * weight
    forward.values = torch.cat([forward.values, aux.values])
    forward.indices = torch.cat([forward.indices, aux.indices])
    forward.offsets = torch.cat([forward.offsets, forward.offsets[-1] + aux.offsets[1:]])
    forward.x, forward.grad_y = torch.cat([x, x]), torch.cat([forward.grad_y, 2 * factor * missed])
    return factor * missed.square().sum()


class _Gradients:
    """Gradients of the active rows, computed when asked for: row r is that of ``latents[r]``."""

    def __init__(self, sae: SAE, forward: _Forward) -> None:
        self.sae, self.forward, self.backend = sae, forward, resolve(sae.backend)
        f, m = forward, sae.config.n_latents
        self.x = upcast(f.x)
        grad_values = _ops.code_grad(f.grad_y, sae.W_dec, f.indices, f.offsets, self.backend)
        if f.l1:
            main = slice(int(f.offsets[f.n_tokens]))
            grad_values[main] += f.l1 * losses.row_norms(sae.W_dec)[f.indices[main].long()]
        grad_pre = torch.where(f.values > 0, grad_values, 0)
        latents, starts, self.tokens, order = _ops.transpose(f.values, f.indices, f.offsets, m, self.backend)
        active = int((latents < m).sum())
        self.latents, self.starts = latents[:active], starts[: active + 1]
        self.coefs, self.grad_pre = upcast(f.values)[order], grad_pre[order]
        self.b_enc = self._sum(self.grad_pre, self.x.new_ones(len(f.x), 1), 0, active)
        self.b_dec = f.grad_y[: f.n_tokens].sum(0)
        if sae.config.subtract_b_dec:
            one_row, rows = torch.tensor([0, active], device=f.x.device), self.latents.int()
            self.b_dec -= _ops.decode(self.b_enc.flatten(), rows, one_row, sae.W_enc, None, self.backend)[0]
        # Adam squares gradients, and a moment that overflowed would never recover: no real batch comes near
        self.bound = torch.stack([
            self.coefs.abs().sum() * (f.grad_y.abs().max() + f.l1),
            self.grad_pre.abs().sum() * (f.x.abs().max() + 1),
            self.b_dec.abs().max(),
        ]).sum()  # fmt: skip

    def W_enc(self, lo: int, hi: int) -> Tensor:
        return self._sum(self.grad_pre, self.x, lo, hi)

    def W_dec(self, lo: int, hi: int) -> Tensor:
        f = self.forward
        grad = self._sum(self.coefs, f.grad_y, lo, hi)
        if f.l1:
            main = torch.arange(len(f.x), device=f.x.device) < f.n_tokens
            total = self._sum(self.coefs, main[:, None].to(grad.dtype), lo, hi)
            rows = upcast(self.sae.W_dec[self.latents[lo:hi]])
            grad += f.l1 * total * torch.nn.functional.normalize(rows, dim=1)
        return grad

    def _sum(self, coefs: Tensor, x: Tensor, lo: int, hi: int) -> Tensor:
        return _ops.row_grads(coefs, x, self.starts[lo : hi + 1], self.tokens, self.backend)


def _check_optimizer(sae: SAE, opt: RowAdam) -> None:
    check_type("opt", opt, RowAdam, "a RowAdam (other optimizers take the ordinary loop)")
    groups = {id(p): group for group in opt.param_groups for p in group["params"]}
    learning = {id(p) for p in sae.parameters() if p.requires_grad}
    if not learning <= groups.keys():
        reject("opt", "one that lacks parameters of sae", "RowAdam(sae)")
    if id(sae.W_dec) in learning and groups[id(sae.W_dec)]["unit_norm"] != sae.config.unit_norm_decoder:
        reject("opt", "one that doesn't know of the unit-norm decoder", "RowAdam(sae)")


def _multipliers(sae: SAE, scale: dict[str, float] | None) -> dict[str, float]:
    multipliers = {"reconstruction": 1.0} | {term.name: 1.0 for term in sae.config.losses}
    for name, value in (scale or {}).items():
        if name not in multipliers:
            reject("scale", f"a multiplier of {name!r}", f"names among {sorted(multipliers)}")
        check_number(f"scale[{name!r}]", value, low=0.0)
        multipliers[name] = float(value)
    return multipliers


def _skipped(sae: SAE, x: Tensor, counters: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    for name, before in (counters or {}).items():
        sae.get_buffer(name).copy_(before)
    nan = torch.tensor(torch.nan, device=x.device)
    names = ["loss", "reconstruction", *(term.name for term in sae.config.losses), "fvu", "l0"]
    return dict.fromkeys(names, nan) | {
        "n_dead": torch.tensor(len(sae.dead_latents())),
        "skipped": torch.tensor(1),
    }
