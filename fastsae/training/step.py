"""The fused training step: the loss of SAE.training_forward minimised with no dense gradient and no [N, M]
tensor.

Forward and backward are written out over one sparse code. Most dictionaries take the operator ``row_step``;
what has more to its loss, :mod:`fastsae.training.backward`; where so much fires that sparse is the longer
way, :mod:`fastsae.training.dense`.

A step may take its tokens in several batches. Of each is kept what the backward needs, its code, encoder
input and error: less than gradients, which would soon have a row for nearly every latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastsae import losses
from fastsae.backends import resolve
from fastsae.checks import check_number, check_type, reject
from fastsae.optim import RowAdam
from fastsae.policies import L0, AuxK, DecoderNormL1, Gated, PreActivation, TargetL0
from fastsae.sae import SAE
from fastsae.training.backward import Slopes, SparseBackward, of_outputs, update_whole_
from fastsae.training.dense import DenseBackward, fill_densely, pays
from fastsae.training.pieces import Forward, Piece, charges_of, fill, join, largest, prepare

__all__ = ["drop_batches", "train_step"]

_ops = torch.ops.fastsae


@torch.no_grad()
def train_step(
    sae: SAE,
    opt: RowAdam,
    x: Tensor,
    target: Tensor | None = None,
    scale: dict[str, float] | None = None,
    *,
    accumulate: bool = False,
    clip: float | None = None,
) -> dict[str, Tensor]:
    """Take one optimizer step on the batch ``x`` [..., d_in] and on those that ``accumulate`` kept.

    Equal to ``training_forward(x, target).loss.backward()``, ``constrain_gradients_()``, ``opt.step()`` and
    ``constrain_weights_()`` in ``train()`` mode, to rounding; but under autocast only inputs are cast, to the
    weights' dtype. A batch that holds, or leads to, NaN or Inf changes no weight, state or counter.

    With ``accumulate`` the batch is only encoded, decoded and kept, until a call without it takes one step on
    all tokens since the last one, equal to rounding to a step on one batch of them all: ``fvu`` is about
    their common mean, AuxK works on the latents dead before the first, and any NaN skips the whole step. Two
    rules see one batch at a time: BatchTopK selects within each, and "scalar" normalisation that is still
    unset is estimated from the first. Kept are, a token, 2 numbers (with AuxK 3) for each of d_in and its
    code's entries, in this process alone: neither ``opt.state_dict()`` nor a copy of ``opt`` holds them;
    :func:`drop_batches` lets them go. A CUDA graph must capture all calls of a step.

        for i, x in enumerate(batches):
            metrics = train_step(sae, opt, x, accumulate=(i + 1) % 4 != 0)

    Args:
        sae: the dictionary, whose counters and thresholds move with it.
        opt: a RowAdam over ``sae``.
        x: raw inputs, any leading shape.
        target: [..., d_out] for a transcoder; None reconstructs x.
        scale: multipliers of loss terms by name, for schedules, e.g. {"decoder_norm_l1": 0.3}; the same for
            all batches of a step.
        accumulate: keep the batch for a later call's step.
        clip: scale the gradients so that their common norm, before a unit-norm decoder takes its part out, is
            at most this. Costs a second pass over their rows.

    Returns:
        0-dim tensors, of all tokens of the step so far: loss; each loss term by name, scaled; fvu and l0 of
        what ``decode`` gives; n_dead; skipped (1 for a step with NaN or Inf).

    Raises:
        ValueError, TypeError: an argument that doesn't fit ``sae``, or the batches kept; these stay.
    """
    _check_optimizer(sae, opt)
    check_type("accumulate", accumulate, bool, "True or False")
    if clip is not None:
        check_number("clip", clip, low=0.0, open_low=True)
    multipliers = _multipliers(sae, scale)
    step = _begun.get(opt)
    if step is not None:
        step.check(sae, multipliers)
    sae.check_batch(x, target)
    if x.numel() == 0:
        reject("x", f"shape {tuple(x.shape)}", "at least one token")
    x, target = x.to(sae.dtype), None if target is None else target.to(sae.dtype)
    was_training = sae.training
    sae.train()
    try:
        if step is None:
            step = _Step(sae, multipliers, sae.dead_mask() if sae.config.loss(AuxK) else None)
        step.add(x, target, alone=not (accumulate or step.pieces))
        if accumulate:
            _begun[opt] = step
            return _metrics(sae, *_loss(step))
        drop_batches(opt)
        return _take(step, opt, clip)
    finally:
        sae.train(was_training)


def drop_batches(opt: RowAdam) -> None:
    """Forget the batches that ``train_step(..., accumulate=True)`` kept for the next step of ``opt``."""
    _begun.pop(opt, None)


@dataclass
class _Step:
    """A step under way: its batches, and what is the same for all of them.

    dead: [M] bool, the latents that AuxK works on, None without it.
    sets_scale: whether the scale of the input comes from one of the batches.
    dense: whether the batches are made densely; the first one says.
    """

    sae: SAE
    multipliers: dict[str, float]
    dead: Tensor | None
    sets_scale: bool = False
    dense: bool | None = None
    pieces: list[Piece] = field(default_factory=list)

    def check(self, sae: SAE, multipliers: dict[str, float]) -> None:
        """Raise unless another batch may join those kept."""
        kept = f"the {len(self.pieces)} batches kept for this step"
        if sae is not self.sae:
            reject("sae", "another one", f"that of {kept}")
        if multipliers != self.multipliers:
            reject("scale", multipliers, f"{self.multipliers}, as for {kept}")

    def add(self, x: Tensor, target: Tensor | None, alone: bool) -> None:
        """Encode and decode a batch, and keep what is needed of it; ``alone``: no other joins it."""
        usable = True
        if self.sae.scales_inputs and not self.sae.norm_scale_is_set():
            # the batch sets the scale of the input as well, unless it is to be skipped; here the host waits
            usable = bool(x.isfinite().all())
            if usable:
                self.sae.estimate_norm_scale_(x)
                self.sets_scale = True
            else:
                self.sae.norm_scale.fill_(1)
        piece, target = prepare(self.sae, x, target, alone=alone)
        if self.dense is None:
            self.dense = pays(self.sae, piece.x)
        if self.dense:
            fill_densely(self.sae, piece, target)
        else:
            fill(self.sae, piece, target, self.dead, alone=alone)
        self.pieces.append(piece)
        if not usable:
            self.sae.unset_norm_scale_()


_begun: WeakKeyDictionary[RowAdam, _Step] = WeakKeyDictionary()
"""The steps that wait for more batches. Kept beside optimizers, so that no state or copy of one holds any."""


def _take(step: _Step, opt: RowAdam, clip: float | None) -> dict[str, Tensor]:
    """The step itself, queued on the device; with Triton, and TopK or BatchTopK, the host learns no result of
    it."""
    sae = step.sae
    loss, proceed = _loss(step)
    fired = [piece.fired for piece in step.pieces if piece.fired is not None]
    magnitude = _sum([piece.magnitude for piece in step.pieces])
    forward = join(sae, step.pieces, loss.weights)
    backward: DenseBackward | SparseBackward | None = None
    if step.dense:
        backward = DenseBackward(sae, forward, loss.slopes, magnitude)
    elif clip is not None or not _fits_row_step(sae):
        backward = SparseBackward(sae, forward, loss.slopes)
    if backward is not None:
        proceed = proceed & backward.finite
    if fired:
        sae.count_fired_(torch.stack(fired).any(0), len(forward.x), proceed)
    else:
        sae.count_firing_(sae.main_part(forward.code), proceed)
    opt.begin_step_(proceed)
    if backward is not None:
        backward.update(opt, clip)
    else:
        _row_step(sae, opt, forward, loss.slopes.charges.get(DecoderNormL1.name, 0.0))
    opt.end_step_()
    metrics = _metrics(sae, loss, proceed)
    if step.sets_scale and metrics["skipped"]:
        sae.unset_norm_scale_()
    return metrics


def _fits_row_step(sae: SAE) -> bool:
    """Whether the one operator knows all that the loss has."""
    activation, charges = sae.config.activation, charges_of(sae)
    by_itself = sae.band() is None and not isinstance(activation, Gated)
    at_the_whole = activation.nested(sae.config.n_latents) is None
    charged = charges and (sae.config.n_sites > 1 or not all(isinstance(t, DecoderNormL1) for t in charges))
    return by_itself and at_the_whole and not charged


def _row_step(sae: SAE, opt: RowAdam, forward: Forward, l1: float) -> None:
    weights = (sae.W_enc, sae.b_enc, sae.W_dec)
    pull = _ops.row_step(
        *weights, *map(sae.remainder, weights[::2]), *opt.row_arguments(weights),
        sae.config.unit_norm_decoder, forward.values, forward.indices, forward.offsets, forward.x,
        forward.error, forward.scale, l1, resolve(sae.backend, sae.W_enc),
    )  # fmt: skip
    n = len(forward.x)
    g = forward.scale[:n, None] * forward.error[:n]
    update_whole_(sae, opt, of_outputs(sae, forward, g, pull))


def _metrics(sae: SAE, loss: _Loss, proceed: Tensor) -> dict[str, Tensor]:
    numbers = {
        "loss": torch.stack([*loss.terms.values()]).sum(),
        **loss.terms,
        "fvu": loss.fvu,
        "l0": loss.l0,
    }
    return {name: torch.where(proceed, number, torch.nan) for name, number in numbers.items()} | {
        "n_dead": sae.dead_mask().sum(),
        "skipped": (~proceed).long(),
    }


@dataclass
class _Loss:
    """The loss over all batches of a step, and its derivatives.

    weights: [sets] what the sums of squares are multiplied by in it.
    """

    terms: dict[str, Tensor]
    fvu: Tensor
    l0: Tensor
    weights: Tensor
    slopes: Slopes


def _loss(step: _Step) -> tuple[_Loss, Tensor]:
    """The loss; and whether all is finite, as a 0-dim bool."""
    config, pieces, multipliers = step.sae.config, step.pieces, step.multipliers
    counts = [len(piece.x) for piece in pieces]
    n, squares = sum(counts), _sum([piece.squares for piece in pieces])
    spread = losses.joined_spread([piece.spread for piece in pieces])
    unit, l0 = spread.scale(config.reconstruction), _mean([piece.l0 for piece in pieces], counts)
    slopes, weights, terms = Slopes({}), [], {}

    def add(name: str, factor: Tensor | float) -> None:
        weights.append(multipliers[name] * unit * factor)
        terms[name] = weights[-1] * squares[len(weights) - 1]

    add("reconstruction", 1.0)
    if isinstance(config.activation, Gated):
        add("gated_aux", config.activation.aux_coefficient)
    for term in config.losses:
        factor = multipliers[term.name] * term.coefficient
        if isinstance(term, L0):
            terms[term.name], slopes.l0 = factor * l0, slopes.l0 + factor / n
        elif isinstance(term, TargetL0):
            off = l0 / term.target - 1
            terms[term.name] = factor * off.square()
            slopes.l0 = slopes.l0 + 2 * factor * off / (term.target * n)
        elif isinstance(term, AuxK):
            if step.dead is not None:
                share = (step.dead.sum() / term.resolve_k(config.d_in)).clamp_max(1)
                add(term.name, term.coefficient * share)
        else:
            terms[term.name] = multipliers[term.name] * _mean(
                [piece.charges[term.name] for piece in pieces], counts
            )
            if isinstance(term, PreActivation):
                slopes.short = factor / n
            else:
                slopes.charges[term.name] = factor / n
    fvu = _sum([piece.main_squares for piece in pieces]) * spread.scale("fvu")
    loss = _Loss(terms, fvu, l0, torch.stack(weights), slopes)
    finite = torch.stack([piece.finite for piece in pieces]).all()
    return loss, finite & _is_finite(step, loss)


def _is_finite(step: _Step, loss: _Loss) -> Tensor:
    """Whether the loss, and the square of every gradient by a bound on it, is: 0-dim bool.

    Adam squares gradients, and a moment that overflowed would never recover: no real batch comes near.
    """
    sae, pieces = step.sae, step.pieces
    longest = 1.001 if sae.config.unit_norm_decoder else largest(sae.W_dec) * sae.config.d_out**0.5
    peaks = torch.stack([piece.peaks for piece in pieces]).amax(0).sqrt()
    at_decoder = 2 * (loss.weights * peaks).amax() + loss.slopes.charges.get(DecoderNormL1.name, 0.0)
    at_entry = at_decoder * longest
    x = torch.stack([piece.largest for piece in pieces]).amax()
    rows = sum(len(piece.x) * len(piece.squares) for piece in pieces)
    bounds = [
        _sum([piece.magnitude for piece in pieces]) * at_decoder,
        at_entry * sum(piece.entries for piece in pieces) * (x + 1),
        at_decoder * rows,
    ]
    numbers = torch.stack([*loss.terms.values(), *(bound.square() for bound in bounds)])
    kept = peaks.amax() <= torch.finfo(pieces[0].errors[0].dtype).max  # the error, when rounded
    return numbers.isfinite().all() & kept


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack([*parts]).sum(0)


def _mean(parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The mean over all tokens of what ``parts`` are means of over ``counts`` tokens each."""
    return _sum([part * (count / sum(counts)) for part, count in zip(parts, counts, strict=True)])


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
    names = ["reconstruction", *(["gated_aux"] if isinstance(sae.config.activation, Gated) else [])]
    multipliers = dict.fromkeys(names, 1.0) | {term.name: 1.0 for term in sae.config.losses}
    for name, value in (scale or {}).items():
        if name not in multipliers:
            reject("scale", f"a multiplier of {name!r}", f"names among {sorted(multipliers)}")
        check_number(f"scale[{name!r}]", value, low=0.0)
        multipliers[name] = float(value)
    return multipliers
