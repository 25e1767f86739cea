"""Where latents start, beyond the usual; and dead ones again, where the dictionary does worst."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastsae import functional as F
from fastsae.checks import check_type, reject
from fastsae.evaluate.metrics import eval_mode
from fastsae.initial import INITIAL_ROWS
from fastsae.ops import upcast
from fastsae.optim import RowAdam
from fastsae.policies import BatchTopK, Gated, JumpReLU
from fastsae.sae import SAE

__all__ = ["resample_", "start_thresholds_", "start_uniformly_"]

_ENCODER_SHARE = 0.2


@torch.no_grad()
def start_thresholds_(sae: SAE, x: Tensor, k: int, bandwidth: float | None = None) -> float:
    """Give a new JumpReLU dictionary the threshold by which ``k`` latents of a token fire on average.

    In log theta a short run doesn't get far: it moves by at most the sum of its learning rates.

    Args:
        sae: calibrated already.
        x: a raw sample [n, d_in].
        bandwidth: of the activation; None: a quarter of the threshold. At the start most latents lie just
            below, and each of them in the band is an entry of the code.

    Returns:
        The threshold, which is also the activation's from now on.
    """
    check_type("activation", sae.config.activation, JumpReLU, "JumpReLU")
    code = F.encode(_inputs(sae, x), sae.W_enc, sae.b_enc, BatchTopK(k), backend=sae.backend)
    threshold = float(code.values[code.values > 0].min())
    sae.config = replace(
        sae.config, activation=JumpReLU(threshold, threshold / 4 if bandwidth is None else bandwidth)
    )
    sae.log_threshold.fill_(threshold).log_()
    return threshold


@torch.no_grad()
def start_uniformly_(sae: SAE, x: Tensor, seed: int = 0) -> None:
    """Begin as Anthropic's JumpReLU dictionaries do, from a raw sample ``x`` [n, d_in], calibrated already.

        W_dec ~ U(-1 / sqrt(D), 1 / sqrt(D));   W_enc = (D / M) W_dec
        b_enc[i] such that latent i passes its threshold on 10,000 / M of the sample (all of it, if M is less)

    Raises:
        ValueError: d_out differs from d_in; x is empty or doesn't fit.

    Source: Conerly et al. 2025, "Circuits Updates - January 2025".
    """
    d, m = sae.config.d_in, sae.config.n_latents
    if sae.config.d_out != d:
        reject("initial", "'uniform'", f"'tied' where d_out ({sae.config.d_out}) differs from d_in ({d})")
    if not x.numel():
        reject("x", f"shape {tuple(x.shape)}", "at least one token")
    x = upcast(_inputs(sae, x))
    passing = max(1, min(len(x), round(len(x) * 10_000 / m)))
    theta = sae.threshold if isinstance(sae.config.activation, JumpReLU) else torch.zeros_like(sae.b_enc)
    generator = torch.Generator(x.device).manual_seed(seed)
    for lo in range(0, m, INITIAL_ROWS):
        hi = min(lo + INITIAL_ROWS, m)
        rows = (2 * torch.rand(hi - lo, d, generator=generator, device=x.device) - 1) / d**0.5
        sae.put_rows_("W_dec", lo, rows)
        sae.put_rows_("W_enc", lo, rows * (d / m))
        scores = x @ (rows * (d / m)).T.to(x.dtype)
        # the first that is not to pass lies at the threshold
        last = scores.amin(0) - 1 if passing == len(x) else scores.kthvalue(len(x) - passing, dim=0).values
        sae.b_enc[lo:hi] = theta[lo:hi] - last


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
    x, target = x.to(sae.dtype), None if target is None else target.to(sae.dtype)
    y, losses = _targets_and_losses(sae, x, target)
    x = _inputs(sae, x)
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


def _inputs(sae: SAE, x: Tensor) -> Tensor:
    """What W_enc multiplies of raw inputs, [n, d_in]."""
    return sae.encoder_input(sae.normalise(x.to(sae.dtype))[0].reshape(-1, sae.config.d_in))


def _targets_and_losses(sae: SAE, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """The normalised target less b_dec [n, d_out]; each token's squared error [n], in raw space."""
    with eval_mode(sae):
        x_hat, _ = sae.reconstruct(x)
    goal = sae.normalise_target(target, *sae.normalise(x)).reshape(-1, sae.config.d_out)
    errors = (upcast(x_hat) - upcast(x if target is None else target)).reshape(goal.shape)
    return upcast(goal) - upcast(sae.b_dec), errors.square().sum(1)


def _mean_length(sae: SAE, name: str, living: Tensor) -> float:
    """The mean length of the rows of a weight where ``living`` [M] bool; 1 where none is."""
    lengths = torch.linalg.vector_norm(getattr(sae, name), dim=1, dtype=torch.float32)[living]
    mean = float(lengths.mean()) if len(lengths) else 0.0
    return mean or 1.0
