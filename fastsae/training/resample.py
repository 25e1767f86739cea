"""Dead latents begun anew, where the dictionary does worst."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastsae import functional as F
from fastsae.checks import check_type, reject
from fastsae.ops import upcast
from fastsae.optim import RowAdam
from fastsae.policies import Gated, JumpReLU
from fastsae.sae import SAE

__all__ = ["resample_"]

_ENCODER_SHARE = 0.2


@torch.no_grad()
def resample_(
    sae: SAE,
    opt: RowAdam,
    x: Tensor,
    target: Tensor | None = None,
    *,
    dead: Tensor | None = None,
    seed: int = 0,
) -> int:
    """Point each dead latent at a token drawn with a probability in proportion to its squared loss.

        W_dec[i] = (y[n] - b_dec) / ||.||, at the mean length of living rows
        W_enc[i] = x[n] / ||.||, at 0.2 times the mean length of living rows;   b_enc[i] = 0

    with x[n] as W_enc is to multiply it and y[n] the target, both normalised. Their moments in ``opt`` are
    forgotten, thresholds and magnitudes put back, and they count as having just fired.

    Args:
        sae: the dictionary.
        opt: the RowAdam over it.
        x: a sample of raw inputs [n, d_in], finite; some ten thousand tokens are many.
        target: [n, d_out], of a transcoder.
        dead: [M] bool; None: those of ``sae.dead_mask()``.
        seed: of the draw.

    Returns:
        How many latents were dead.

    Raises:
        ValueError, TypeError: a sample that doesn't fit, is empty, or holds NaN or Inf.

    Source: Bricken et al. 2023, "Towards Monosemanticity", appendix on neuron resampling.
    """
    check_type("opt", opt, RowAdam, "a RowAdam over the dictionary")
    sae.check_batch(x, target)
    if not x.numel() or not x.isfinite().all() or not (target is None or target.isfinite().all()):
        reject("x", "a sample that is empty or holds NaN or Inf", "finite activations [n, d_in]")
    dead = sae.dead_mask() if dead is None else dead
    latents = dead.nonzero().flatten()
    if not len(latents):
        return 0
    opt.flush_()
    x, y, losses = _inputs_and_losses(sae, x.to(sae.dtype), None if target is None else target.to(sae.dtype))
    generator = torch.Generator(x.device).manual_seed(seed)
    odds = losses.square() if losses.any() else torch.ones_like(losses)
    drawn = torch.multinomial(odds, len(latents), replacement=True, generator=generator)
    for name, source, share in (("W_enc", x, _ENCODER_SHARE), ("W_dec", y, 1.0)):
        length = share * _mean_length(sae, name, ~dead)
        if name == "W_dec" and sae.config.unit_norm_decoder:
            length = 1.0
        rows = normalize(upcast(source)[drawn], dim=1) * length
        for latent, row in zip(latents.tolist(), rows, strict=True):
            sae.put_rows_(name, latent, row[None])
    sae.b_enc[latents] = 0
    if isinstance(sae.config.activation, JumpReLU):
        sae.log_threshold[latents] = torch.tensor(sae.config.activation.threshold).log().to(sae.log_threshold)
    if isinstance(sae.config.activation, Gated):
        sae.r_mag[latents] = 0
        sae.b_mag[latents] = 0
    for param in (sae.W_enc, sae.b_enc, sae.W_dec):
        if param.requires_grad:
            opt.reset_rows_(param, latents)
    sae.silent_tokens[latents] = 0
    return len(latents)


def _inputs_and_losses(sae: SAE, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What W_enc multiplies [n, d_in]; the target less b_dec [n, d_out]; each token's squared error [n]."""
    was_training = sae.training
    sae.eval()
    try:
        normalised = sae.normalise(x)
        found = sae.encode_normalised(*normalised)
        goal = sae.normalise_target(target, *normalised).reshape(-1, sae.config.d_out)
        x_hat = F.decode(found.code, sae.W_dec, sae.b_dec, backend=sae.backend).reshape(goal.shape)
    finally:
        sae.train(was_training)
    errors = (upcast(x_hat) - upcast(goal)).square().sum(1)
    return found.x.reshape(-1, sae.config.d_in), upcast(goal) - upcast(sae.b_dec), errors


def _mean_length(sae: SAE, name: str, living: Tensor) -> float:
    """The mean length of the rows of a weight where ``living`` [M] bool; 1 where none is."""
    lengths = torch.linalg.vector_norm(getattr(sae, name), dim=1, dtype=torch.float32)[living]
    mean = float(lengths.mean()) if len(lengths) else 0.0
    return mean or 1.0
