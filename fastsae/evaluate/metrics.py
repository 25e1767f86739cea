"""Metrics of a trained dictionary, in one streaming pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastsae.checks import BadType, check_type, reject
from fastsae.sae import SAE

__all__ = ["Evaluation", "eval_mode", "evaluate"]

Batch = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Metrics over T tokens in raw space, x being the target where the dictionary has one.

        fvu           = sum_n ||x[n] - x_hat[n]||^2 / sum_n ||x[n] - mean||^2,   mean = sum_n x[n] / T
        l0            = sum_n #{i: f[n, i] > 0} / T
        n_silent      = #{i: f[n, i] = 0 for all n}
        cosine        = mean_n <x[n], x_hat[n]> / (||x[n]|| ||x_hat[n]||)    0 where x_hat[n] = 0
        relative_norm = mean_n ||x_hat[n]|| / ||x[n]||                       below 1: shrinkage

    Tokens with x = 0 have no direction or length to compare, and are left out of the last two.

    Attributes:
        tokens: T, the tokens measured.
        skipped_tokens: tokens left out because they held NaN or Inf.
        n_latents: size of the dictionary.
        firing_counts: [n_latents] int32 on the CPU, on how many of the T tokens each latent fired.
    """

    fvu: float
    l0: float
    n_silent: int
    n_latents: int
    cosine: float
    relative_norm: float
    tokens: int
    skipped_tokens: int
    firing_counts: Tensor = field(repr=False, compare=False)

    @property
    def explained_variance(self) -> float:
        """1 - fvu."""
        return 1 - self.fvu

    @property
    def dead_share(self) -> float:
        """n_silent / n_latents. Silence on few tokens doesn't mean death: state it with ``tokens``."""
        return self.n_silent / self.n_latents

    def to_dict(self) -> dict[str, float | int | None]:
        """The numbers for a JSON file; None where one isn't finite (no variance, or x = 0 throughout)."""
        numbers = {
            "fvu": self.fvu,
            "explained_variance": self.explained_variance,
            "l0": self.l0,
            "dead_share": self.dead_share,
            "n_silent": self.n_silent,
            "n_latents": self.n_latents,
            "cosine": self.cosine,
            "relative_norm": self.relative_norm,
            "tokens": self.tokens,
            "skipped_tokens": self.skipped_tokens,
        }
        return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


def evaluate(sae: SAE, batches: Iterable[Batch], *, progress: bool = False) -> Evaluation:
    """Measure ``sae`` on ``batches``, in one pass and in ``eval()`` mode, which is undone afterwards.

    Sums are fp64; the variance merges each batch's own mean and squares (Chan et al. 1983), so data far from
    the origin lose nothing. Memory: one batch, its sparse code and [n_latents] counts. Tokens with NaN or Inf
    in x or target are left out and counted.

    Args:
        sae: the dictionary; batches are moved to its device and dtype, and compared as they came.
        batches: [..., d_in] tensors, or (x, target) pairs; a tensor by itself is its own target.
        progress: show a progress bar.

    Raises:
        ValueError, TypeError: batches of another kind or width; no tokens.

    Source: fvu as in Gao et al. 2024, arXiv 2406.04093, its "normalized MSE" about the mean.
    """
    from tqdm.auto import tqdm

    check_type("sae", sae, SAE, "an SAE")
    sums = _Sums(sae)
    with eval_mode(sae), torch.inference_mode():
        for batch in tqdm(batches, desc="evaluate", unit="batch", disable=None if progress else True):
            sums.add(*_finite_rows(sae, batch))
    if sums.tokens == 0:
        reject("batches", f"no finite tokens ({sums.skipped} with NaN or Inf)", "at least one")
    return sums.result()


@contextmanager
def eval_mode(*roots: nn.Module) -> Iterator[None]:
    """Put the modules in ``eval()`` mode; afterwards each of their parts in its own again."""
    modes = {module: module.training for root in roots for module in root.modules()}
    try:
        for root in roots:
            root.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _finite_rows(sae: SAE, batch: Batch) -> tuple[Tensor, Tensor, int]:
    """x [n, d_in] and target [n, d_out] without rows of NaN or Inf; how many those were."""
    pair = tuple(batch) if isinstance(batch, tuple | list) else (batch, batch)
    if len(pair) != 2 or not all(isinstance(t, Tensor) and t.is_floating_point() for t in pair):
        kinds = ", ".join(str(t.dtype) if isinstance(t, Tensor) else type(t).__name__ for t in pair)
        raise BadType(f"batches: got ({kinds}), expected floating [n, d_in] tensors or (x, target) pairs")
    shapes, widths = [list(t.shape) for t in pair], [W.shape[1] for W in (sae.W_enc, sae.W_dec)]
    if [shape[-1:] for shape in shapes] != [[d] for d in widths] or shapes[0][:-1] != shapes[1][:-1]:
        got, expected = (f"x {x}, target {y}" for x, y in (shapes, [["n", d] for d in widths]))
        reject("batches", got, expected.replace("'", ""))
    x, target = (t.reshape(-1, t.shape[-1]).to(sae.W_enc.device) for t in pair)
    finite = x.isfinite().all(1) & target.isfinite().all(1)
    skipped = int((~finite).sum())
    return (x[finite], target[finite], skipped) if skipped else (x, target, 0)


class _Sums:
    """Running sums over batches; everything that result() needs."""

    def __init__(self, sae: SAE) -> None:
        self.sae, device = sae, sae.W_enc.device
        self.tokens = self.skipped = 0
        self.counts = torch.zeros(sae.config.n_latents, dtype=torch.int32, device=device)
        self.mean = torch.zeros(sae.W_dec.shape[1], dtype=torch.float64, device=device)
        # error, variance, cosine, relative norm, tokens with x != 0
        self.totals = torch.zeros(5, dtype=torch.float64, device=device)

    def add(self, x: Tensor, target: Tensor, skipped: int) -> None:
        """Count in a batch of x [n, d_in], target [n, d_out]."""
        self.skipped += skipped
        if not (n := len(x)):
            return
        x_hat, code = self.sae.reconstruct(x.to(self.sae.dtype))
        x_hat, target = x_hat.double(), target.double()
        entry = torch.arange(len(code.values), device=code.values.device)
        active = (code.values > 0) & (entry < code.offsets[-1])
        fired = code.indices[active].long()
        self.counts.index_add_(0, fired, self.counts.new_ones(()).expand(len(fired)))

        mean = target.mean(0)
        shift = mean - self.mean
        spread = (target - mean).square().sum() + shift.square().sum() * (n * self.tokens / (n + self.tokens))
        self.tokens += n
        self.mean += shift * (n / self.tokens)

        norm, norm_hat = target.norm(dim=1), x_hat.norm(dim=1)
        some = norm > 0
        norm = norm.where(some, 1)
        cosine = (target * x_hat).sum(1) / norm / norm_hat.where(norm_hat != 0, 1)
        self.totals += torch.stack([
            (target - x_hat).square().sum(), spread, cosine.sum(), (norm_hat / norm)[some].sum(), some.sum(),
        ])  # fmt: skip

    def result(self) -> Evaluation:
        error, variance, cosine, relative_norm, some = self.totals.tolist()
        counts = self.counts.cpu()
        return Evaluation(
            fvu=error / variance if variance else math.nan,
            l0=int(counts.sum()) / self.tokens,
            n_silent=int((counts == 0).sum()),
            n_latents=len(counts),
            cosine=cosine / some if some else math.nan,
            relative_norm=relative_norm / some if some else math.nan,
            tokens=self.tokens,
            skipped_tokens=self.skipped,
            firing_counts=counts,
        )
