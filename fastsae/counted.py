"""Which latents fire: what training notes of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsae.code import SparseCode
from fastsae.config import SAEConfig
from fastsae.policies import AuxK, PreActivation

__all__ = ["Counted"]

_THRESHOLD_DECAY = 0.999
_LONGEST = 2**31 - 1


class Counted(nn.Module):
    """A module that counts, in training, how long each latent has been silent; and BatchTopK's threshold."""

    config: SAEConfig
    threshold: Tensor
    silent_tokens: Tensor
    tokens_seen: Tensor

    @torch.no_grad()
    def count_firing_(self, code: SparseCode, proceed: Tensor | None = None) -> None:
        """Note a training batch: which latents fired, and BatchTopK's smallest positive value.

        Of the latter the threshold is a running mean, with a decay of 0.999, and of t / (t + 9) at batch t
        while that is less, so that random weights are soon forgotten.

        Nothing is noted where the 0-dim bool ``proceed`` is False, which the host needn't know.
        """
        fired = (code.rows() < code.n_tokens) & (code.values > 0)
        if proceed is not None:
            fired &= proceed
        self._count_tokens_(code.n_tokens, proceed)
        since = torch.where(fired, 0, _LONGEST).to(torch.int32)
        self.silent_tokens.scatter_reduce_(0, torch.where(fired, code.indices, 0).long(), since, "amin")
        if self.config.activation.rule == "batchtopk" and len(fired):
            smallest = torch.where(fired, code.values, torch.inf).min().float()
            batches = self.tokens_seen / code.n_tokens  # as if all were of this size; with this one
            decay = (batches / (batches + 9)).clamp_max(_THRESHOLD_DECAY)
            moved = decay * self.threshold + (1 - decay) * smallest
            moved = torch.where(self.threshold < 0, smallest, moved)
            self.threshold.copy_(torch.where(smallest < torch.inf, moved, self.threshold))

    @torch.no_grad()
    def count_fired_(self, fired: Tensor, n_tokens: int, proceed: Tensor) -> None:
        """:meth:`count_firing_` of a batch of which only is known which latents ``fired`` [M] bool."""
        self._count_tokens_(n_tokens, proceed)
        self.silent_tokens.masked_fill_(fired & proceed, 0)

    def _count_tokens_(self, n_tokens: int, proceed: Tensor | None) -> None:
        """As if nothing fired on them."""
        n = n_tokens if proceed is None else n_tokens * proceed
        self.tokens_seen += n
        self.silent_tokens.clamp_max_(_LONGEST - n_tokens).add_(n)

    def dead_mask(self, dead_after: int | None = None) -> Tensor:
        """Which latents haven't fired for ``dead_after`` tokens (AuxK's own where None), [M] bool."""
        if dead_after is None:
            dead_after = (self.config.loss(AuxK) or AuxK()).dead_after
        return self.silent_tokens >= dead_after

    def short_mask(self) -> Tensor | None:
        """The latents [M] bool that PreActivation is about; None for all of them, or without it."""
        term = self.config.loss(PreActivation)
        return None if term is None or term.dead_after is None else self.dead_mask(term.dead_after)

    def dead_latents(self, dead_after: int | None = None) -> Tensor:
        """The latents of :meth:`dead_mask`, ascending int64."""
        return self.dead_mask(dead_after).nonzero().flatten()
