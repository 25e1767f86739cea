"""The fused training step: the loss of SAE.training_forward minimised with no dense gradient and no [N, M]
tensor.

Forward and backward are written out over one sparse code. AuxK is a second batch of rows of that code: token
n's dead latents stand in row N + n, with an error of their own. So one transpose and one pass over the active
rows of each matrix serve both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae import functional as F
from fastsae import losses
from fastsae.backends import resolve
from fastsae.checks import check_number, check_type, reject
from fastsae.config import AuxK, DecoderNormL1, TopK
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
    config, backend = sae.config, resolve(sae.backend)
    counters = {name: t.clone() for name, t in sae.named_buffers()}
    sae.estimate_norm_scale_(x)
    code = sae.encode_sparse(x)
    target = losses.upcast(sae.normalise_target(x, target, code)).reshape(-1, config.d_out)
    x = sae.encoder_input(x)[0].reshape(-1, config.d_in)
    n = x.shape[0]
    stored, offsets = int(code.offsets[-1]), code.offsets  # AuxK's rows follow right after what is stored
    values, indices = code.values[:stored], code.indices[:stored]

    error = losses.upcast(_ops.decode(values, indices, offsets, sae.W_dec, sae.b_dec, backend)) - target
    weight = losses.error_scale(target, config.reconstruction)
    squares = error.square().sum()
    terms = {"reconstruction": scale["reconstruction"] * weight * squares}
    if not terms["reconstruction"].isfinite():
        return _skipped(sae, x, counters)
    sae.count_firing_(code)
    dead, l1 = sae.dead_latents(), None
    grad_y = 2 * scale["reconstruction"] * weight * error
    grad_b_dec = grad_y.sum(0)

    for term in config.losses:
        if isinstance(term, DecoderNormL1):
            l1 = scale[term.name] * term.coefficient / n
            terms[term.name] = scale[term.name] * losses.decoder_norm_l1(code, sae.W_dec, term.coefficient)
        elif isinstance(term, AuxK):
            terms[term.name] = torch.zeros_like(weight)
            if not len(dead):
                continue
            k = term.resolve_k(config.d_in)
            aux = F.encode(x, sae.W_enc, sae.b_enc, TopK(min(k, len(dead))), subset=dead, backend=backend)
            missed = losses.upcast(F.decode(aux, sae.W_dec, backend=backend)) + error
            factor = scale[term.name] * term.coefficient * min(len(dead) / k, 1.0) * weight
            terms[term.name] = factor * missed.square().sum()
            values, indices = torch.cat([values, aux.values]), torch.cat([indices, aux.indices])
            offsets = torch.cat([offsets, offsets[-1] + aux.offsets[1:]])
            grad_y, x = torch.cat([grad_y, 2 * factor * missed]), torch.cat([x, x])

    grad_values = _ops.code_grad(grad_y, sae.W_dec, indices, offsets, backend)
    if l1 is not None:
        grad_values[:stored] += l1 * losses.row_norms(sae.W_dec)[indices[:stored].long()]
    grad_pre = torch.where(values > 0, grad_values, 0)

    latents, starts, tokens, order = _ops.transpose(values, indices, offsets, config.n_latents, backend)
    active = int((latents < config.n_latents).sum())
    latents, starts = latents[:active], starts[: active + 1]
    coefs, grad_pre = losses.upcast(values)[order], grad_pre[order]
    grad_b_enc = _ops.row_grads(grad_pre, x.new_ones(len(x), 1), starts, tokens, backend)
    if config.subtract_b_dec:
        whole = torch.tensor([0, active], device=x.device)
        grad_b_dec -= _ops.decode(grad_b_enc.flatten(), latents.int(), whole, sae.W_enc, None, backend)[0]

    # Adam squares gradients, and a moment that overflowed would never recover: no real batch comes near
    decoder = coefs.abs().sum() * (grad_y.abs().max() + (l1 or 0))
    encoder = grad_pre.abs().sum() * (x.abs().max() + 1)
    bounds = torch.stack([decoder, encoder, grad_b_dec.abs().max()])
    if not torch.stack([*bounds.square(), *terms.values()]).isfinite().all():
        return _skipped(sae, x, counters)

    def grad_W_enc(lo: int, hi: int) -> Tensor:
        return _ops.row_grads(grad_pre, x, starts[lo : hi + 1], tokens, backend)

    def grad_W_dec(lo: int, hi: int) -> Tensor:
        grad = _ops.row_grads(coefs, grad_y, starts[lo : hi + 1], tokens, backend)
        if l1 is not None:
            in_main = (torch.arange(len(x), device=x.device) < n).to(grad.dtype)[:, None]
            total = _ops.row_grads(coefs, in_main, starts[lo : hi + 1], tokens, backend)
            grad += (
                l1 * total * torch.nn.functional.normalize(losses.upcast(sae.W_dec[latents[lo:hi]]), dim=1)
            )
        return grad

    opt.begin_step_()
    for param, rows, grad in (
        (sae.W_enc, latents, grad_W_enc),
        (sae.b_enc, latents, lambda lo, hi: grad_b_enc[lo:hi, 0]),
        (sae.W_dec, latents, grad_W_dec),
        (sae.b_dec, None, lambda lo, hi: grad_b_dec[lo:hi]),
    ):
        if param.requires_grad:
            opt.update_rows_(param, rows, grad)
    opt.end_step_()

    variance = (target - target.mean(0)).square().sum()
    return {
        "loss": torch.stack([*terms.values()]).sum(),
        **terms,
        "fvu": squares / variance,
        "l0": code.l0().float().mean(),
        "n_dead": torch.tensor(len(dead)),
        "skipped": torch.tensor(0),
    }


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
    for name, buffer in sae.named_buffers():
        if counters:
            buffer.copy_(counters[name])
    nan = torch.tensor(torch.nan, device=x.device)
    names = ["loss", "reconstruction", *(term.name for term in sae.config.losses), "fvu", "l0"]
    return dict.fromkeys(names, nan) | {
        "n_dead": torch.tensor(len(sae.dead_latents())),
        "skipped": torch.tensor(1),
    }
