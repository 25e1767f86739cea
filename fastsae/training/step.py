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
from fastsae.code import SparseCode
from fastsae.config import AuxK, DecoderNormL1
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
    ``constrain_weights_()`` in ``train()`` mode, to rounding; but under autocast only inputs are cast, to the
    weights' dtype. A batch that holds, or leads to, NaN or Inf changes no weight, state or counter.

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
    x, target = x.to(sae.W_enc.dtype), None if target is None else target.to(sae.W_dec.dtype)
    was_training = sae.training
    sae.train()
    try:
        if sae.config.normalization == "scalar" and not sae.norm_scale_is_set():
            return _first_step(sae, opt, x, target, multipliers)
        return _step(sae, opt, x, target, multipliers)
    finally:
        sae.train(was_training)


def _first_step(
    sae: SAE, opt: RowAdam, x: Tensor, target: Tensor | None, multipliers: dict[str, float]
) -> dict[str, Tensor]:
    """A step whose batch sets the scale of the input as well, unless it is skipped; here the host waits."""
    if x.isfinite().all():
        sae.estimate_norm_scale_(x)
    else:
        sae.norm_scale.fill_(1)
    metrics = _step(sae, opt, x, target, multipliers)
    if metrics["skipped"]:
        sae.unset_norm_scale_()
    return metrics


def _step(
    sae: SAE, opt: RowAdam, x: Tensor, target: Tensor | None, multipliers: dict[str, float]
) -> dict[str, Tensor]:
    """One step, queued on the device; with Triton, and TopK or BatchTopK, the host learns no result of it."""
    finite = x.isfinite().all()
    # NaN ranks first, so that with it every latent may count as active, which nothing has room for
    forward = _forward(sae, torch.where(finite, x, 0), target, multipliers)
    proceed = finite & forward.is_finite(sae)
    sae.count_firing_(forward.code, proceed)
    opt.begin_step_(proceed)
    weights = (sae.W_enc, sae.b_enc, sae.W_dec)
    pull = _ops.row_step(
        *weights, *opt.row_arguments(weights), sae.config.unit_norm_decoder, forward.values, forward.indices,
        forward.offsets, forward.x, forward.error, forward.scale, forward.l1,
        resolve(sae.backend, sae.W_enc),
    )  # fmt: skip
    if sae.b_dec.requires_grad:
        main = slice(forward.code.n_tokens)
        grad = (forward.scale[main, None] * forward.error[main]).sum(0)
        if sae.config.subtract_b_dec:
            grad -= pull
        opt.update_rows_(sae.b_dec, None, grad)
    opt.end_step_()
    numbers = {
        "loss": torch.stack([*forward.terms.values()]).sum(),
        **forward.terms,
        "fvu": forward.fvu,
        "l0": forward.code.l0().float().mean(),
    }
    return {name: torch.where(proceed, number, torch.nan) for name, number in numbers.items()} | {
        "n_dead": sae.dead_mask().sum(),
        "skipped": (~proceed).long(),
    }


@dataclass
class _Forward:
    """The code of a batch of N tokens, AuxK's rows below it, and the loss's derivatives at the decoder.

    code: of the N tokens.  values, indices, offsets: CSR over N rows or, with AuxK, 2 N: row N + n is token n
    again.  x: [N, d_in] what W_enc multiplies.
    error, scale: [rows, d_out], [rows]; dL / d(decoded row n) = scale[n] error[n], and squares[n] =
    ||error[n]||^2.
    l1: dL / d(f_i ||W_dec[i]||) at the first N rows.
    """

    code: SparseCode
    values: Tensor
    indices: Tensor
    offsets: Tensor
    x: Tensor
    error: Tensor
    scale: Tensor
    squares: Tensor
    terms: dict[str, Tensor]
    fvu: Tensor
    l1: float = 0.0

    def is_finite(self, sae: SAE) -> Tensor:
        """Whether the loss, and the square of every gradient by a bound on it, is: 0-dim bool.

        Adam squares gradients, and a moment that overflowed would never recover: no real batch comes near.
        """
        unit, width = sae.config.unit_norm_decoder, sae.config.d_out
        longest = 1.001 if unit else _largest(sae.W_dec) * width**0.5
        at_decoder = (self.scale * self.squares.sqrt()).amax() + self.l1
        at_entry = at_decoder * longest
        stored = torch.arange(len(self.values), device=self.x.device) < self.offsets[-1]
        bounds = [
            torch.where(stored, upcast(self.values).abs(), 0).sum() * at_decoder,
            at_entry * len(self.values) * (_largest(self.x) + 1),
            at_decoder * len(self.error),
        ]
        numbers = torch.stack([*self.terms.values(), *(bound.square() for bound in bounds)])
        kept = self.squares.amax().sqrt() <= torch.finfo(self.error.dtype).max  # the error, when rounded
        return numbers.isfinite().all() & kept


def _largest(t: Tensor) -> Tensor:
    """max |t| in at least fp32, without a copy of t."""
    low, high = t.aminmax()
    return torch.maximum(upcast(-low), upcast(high))


def _forward(sae: SAE, x: Tensor, target: Tensor | None, multipliers: dict[str, float]) -> _Forward:
    config, backend = sae.config, resolve(sae.backend, sae.W_enc)
    normalised = sae.normalise(x)
    target = sae.normalise_target(target, *normalised).reshape(-1, config.d_out).contiguous()
    x = normalised[0] - sae.b_dec if config.subtract_b_dec else normalised[0]
    x = x.reshape(-1, config.d_in).contiguous()
    auxk = next((term for term in config.losses if isinstance(term, AuxK)), None)
    dead = None if auxk is None else sae.dead_mask()
    code, second = _encode(sae, x, dead, 0 if auxk is None else auxk.resolve_k(config.d_in), backend)
    stored = code.values, code.indices, code.offsets

    error, squares = _ops.decode_error(*stored, sae.W_dec, sae.b_dec, target, backend)
    unit = losses.error_scale(target, config.reconstruction)
    weight = multipliers["reconstruction"] * unit
    total = squares.sum()
    fvu = total * (unit if config.reconstruction == "fvu" else losses.error_scale(target, "fvu"))
    forward = _Forward(
        code, code.values, code.indices, code.offsets, x, error, (2 * weight).repeat(len(x)), squares,
        {"reconstruction": weight * total}, fvu,
    )  # fmt: skip
    for term in config.losses:
        if isinstance(term, DecoderNormL1):
            forward.l1 = multipliers[term.name] * term.coefficient / len(x)
            norms = losses.decoder_norm_l1(code, sae.W_dec, term.coefficient)
            forward.terms[term.name] = multipliers[term.name] * norms
        elif dead is not None:
            share = (dead.sum() / term.resolve_k(config.d_in)).clamp_max(1)
            factor = multipliers[term.name] * unit * term.coefficient * share
            forward.terms[term.name] = _append_auxk(forward, second, sae, factor, backend)
    return forward


def _encode(
    sae: SAE, x: Tensor, dead: Tensor | None, k_aux: int, backend: str
) -> tuple[SparseCode, tuple[Tensor, ...]]:
    """The code of x, and with ``dead`` its code over these; of neither is there more than is stored, but for
    the second one's where the host mustn't wait to learn its length (Triton)."""
    rule, threshold = F.selection(sae.config.activation, sae.threshold_in_use(), sae.W_enc)
    k = getattr(sae.config.activation, "k", 0)
    if dead is None:
        stored = _ops.encode(x, sae.W_enc, sae.b_enc, threshold, None, rule, k, backend)
        return SparseCode(stored[0], stored[1], stored[2], sae.config.n_latents), ()
    both = _ops.encode_dead(x, sae.W_enc, sae.b_enc, threshold, dead, rule, k, k_aux, backend)
    first, second = both[:3], both[3:]
    if rule == "threshold":
        first = _trimmed(*first)
    if backend != "triton":
        second = _trimmed(*second)
    return SparseCode(first[0], first[1], first[2], sae.config.n_latents), second


def _trimmed(values: Tensor, indices: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    stored = int(offsets[-1])
    return values[:stored], indices[:stored], offsets


def _append_auxk(
    forward: _Forward, second: tuple[Tensor, ...], sae: SAE, factor: Tensor, backend: str
) -> Tensor:
    """Append AuxK's rows to ``forward``; return the term. See :func:`fastsae.losses.auxk`."""
    values, indices, offsets = second
    if not len(values):
        return torch.zeros_like(factor)
    missed, squares = _ops.decode_error(*second, sae.W_dec, None, -forward.error, backend)
    forward.values = torch.cat([forward.values, values])
    forward.indices = torch.cat([forward.indices, indices])
    forward.offsets = torch.cat([forward.offsets, forward.offsets[-1] + offsets[1:]])
    forward.error = torch.cat([forward.error, missed])
    forward.scale = torch.cat([forward.scale, (2 * factor).repeat(len(missed))])
    forward.squares = torch.cat([forward.squares, squares])
    return factor * squares.sum()


def _check_optimizer(sae: SAE, opt: RowAdam) -> None:
    check_type("opt", opt, RowAdam, "a RowAdam (other optimizers take the ordinary loop)")
    backends = {resolve(sae.backend, sae.W_enc), resolve(sae.backend, sae.W_dec)}
    if backends != {resolve(opt.backend, sae.W_enc)}:
        reject("opt", f"one on backend {opt.backend!r}", f"{sae.backend!r}, the backend of sae")
    groups = {id(p): group for group in opt.param_groups for p in group["params"]}
    learning = {id(p) for p in sae.parameters() if p.requires_grad}
    if not learning <= groups.keys():
        reject("opt", "one that lacks parameters of sae", "RowAdam(sae)")
    if any(groups[id(p)]["unit_norm"] for p in (sae.W_enc, sae.b_enc) if id(p) in learning):
        reject("opt", "one that keeps the encoder's rows at unit length", "RowAdam(sae)")
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
