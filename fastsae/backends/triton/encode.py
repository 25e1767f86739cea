"""encode: a GEMM into a bounded buffer of scores, chunk by chunk, and kernels that keep what may count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastsae.backends import torch as portable
from fastsae.backends.triton.encode_fused import encode_topk_fused
from fastsae.backends.triton.support import architecture, factors, launch, score
from fastsae.checks import reject
from fastsae.kernels import encode as kernels
from fastsae.kernels.common import choose

__all__ = ["encode", "encode_dead"]

CHUNK = 8448
"""Latents scored at a time: with 8192 tokens, 33 x 64 tiles of 256 x 128 are 16 full waves of 132 SMs."""
ROWS = 8192
"""Tokens scored at a time; of fewer, chunks are wider."""
MAX_K = 1024
"""Entries per token that can be put in order."""
MAX_K_DEAD = 4096
"""Entries per token of AuxK's list, which stays in the order of latents."""
FUSED: dict[int, tuple[int, int]] = {}
"""Where TopK takes :func:`encode_topk_fused`: by architecture, the widest D and the fewest latents at which
benchmarks/results show it faster. Not yet measured anywhere."""
MAX_LANES = 4096
"""Column maxima that a row's first threshold is made of, at most."""


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor | None,
    subset: Tensor | None,
    rule: str,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastsae.backends.reference.encode`. Holds ROWS * CHUNK fp32 scores and a few candidates.

    Beside bf16 weights an fp32 x is rounded for a GPU's GEMM, in a copy of it. k <= 1024. The host waits for
    the device under the rule "threshold" only, to learn how many scores pass.
    """
    if rule == "groupmax":  # no kernel of its own: blocks of scores and torch.max
        return portable.encode(x, W_enc, b_enc, threshold, subset, rule, k)
    if rule == "topk" and subset is None and _fused_is_faster(x, W_enc):
        return encode_topk_fused(x, W_enc, b_enc, k)
    chosen = _list(x, W_enc, subset, threshold, rule, k)
    for chunk in _chunks(x, W_enc, b_enc, subset):
        chosen.add(chunk)
    return chosen.finish()


def _fused_is_faster(x: Tensor, W: Tensor) -> bool:
    width, latents = FUSED.get(architecture(x.device), (0, 0))
    return x.shape[1] <= width and len(W) >= latents


def encode_dead(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor | None,
    dead: Tensor,
    rule: str,
    k: int,
    k_dead: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastsae.backends.reference.encode_dead`. Scores once; while nothing is dead, as encode."""
    if rule == "groupmax":
        second = _TopList(x, W_enc, None, min(k_dead, len(W_enc)), dead)
        for chunk in _chunks(x, W_enc, b_enc, None):
            second.add(chunk)
        return *encode(x, W_enc, b_enc, threshold, None, rule, k), *second.finish()
    chosen = _list(x, W_enc, None, threshold, rule, k)
    second = _TopList(x, W_enc, None, min(k_dead, len(W_enc)), dead)
    for chunk in _chunks(x, W_enc, b_enc, None):
        chosen.add(chunk)
        second.add(chunk)
    return *chosen.finish(), *second.finish()


class _Chunk(NamedTuple):
    """fp32 scores [n, width] without their bias, of tokens row.. and columns column.. (last if they end)."""

    scores: Tensor
    bias: Tensor | None
    row: int
    column: int
    last: bool

    def allowed(self, mask: Tensor | None) -> Tensor | None:
        """The chunk's part of a mask over all columns."""
        return None if mask is None else mask[self.column : self.column + self.scores.shape[1]]


def _chunks(x: Tensor, W: Tensor, b: Tensor | None, subset: Tensor | None) -> Iterator[_Chunk]:
    """The scores of all tokens and latents, a chunk at a time in one buffer, columns innermost."""
    m = len(W if subset is None else subset)
    n, (x, W) = min(len(x), ROWS), factors(x, W)
    if n == 0 or m == 0:
        return
    width = min(m, ROWS * CHUNK // n // 128 * 128 or CHUNK)
    buffer = torch.empty(n * width, dtype=torch.float32, device=x.device)
    for row in range(0, len(x), n):
        part = x[row : row + n]
        for column in range(0, m, width):
            end = min(column + width, m)
            latents = slice(column, end) if subset is None else subset[column:end]
            scores = buffer[: len(part) * (end - column)].view(len(part), end - column)
            score(part, W[latents], scores)
            bias = None if b is None else b[latents]
            yield _Chunk(scores, bias, row, column, last=end == m and row + n >= len(x))


def _list(x, W, subset, threshold, rule, k) -> _TopList | _BatchList | _ThresholdList:
    m = len(W if subset is None else subset)
    if rule == "topk":
        if min(k, m) > MAX_K:
            reject("k", k, f"at most {MAX_K} on backend 'triton' (reference and torch take any)")
        return _TopList(x, W, subset, min(k, m))
    if rule == "batchtopk":
        return _BatchList(x, W, subset, len(x) * min(k, m))
    return _ThresholdList(x, W, subset, threshold.float())


class _TopList:
    """Each token's k best columns, of those ``allowed`` [M] where given: see kernels/triton/encode.py."""

    def __init__(self, x: Tensor, W: Tensor, subset: Tensor | None, k: int, allowed: Tensor | None = None):
        if k > MAX_K_DEAD:
            reject("k_aux", k, f"at most {MAX_K_DEAD} on backend 'triton'")
        n, device = len(x), x.device
        self.k, self.dtype, self.subset, self.allowed = k, x.dtype, subset, allowed
        self.config = choose(kernels.CONFIGS, architecture(device), CHUNK)
        room = 4 * k if k <= 256 else 2 * k  # after each chunk k remain, and few are added to them
        self.capacity = triton.next_power_of_2(max(room, k + self.config.block))
        self.values = torch.empty(n, self.capacity, dtype=torch.float32, device=device)
        self.columns = torch.empty(n, self.capacity, dtype=torch.int32, device=device)
        self.count = torch.zeros(n, dtype=torch.int32, device=device)
        self.tau = torch.empty(n, dtype=torch.float32, device=device)  # from the first chunk
        self.replays = torch.zeros(n, dtype=torch.int32, device=device)
        self.n_allowed = None if allowed is None else allowed.sum()

    def add(self, chunk: _Chunk) -> None:
        """Keep the best of the chunk and of what is kept."""
        n, width = chunk.scores.shape
        mine = slice(chunk.row, chunk.row + n)
        tau, count = self.tau[mine], self.count[mine]
        source = chunk.scores, chunk.bias, chunk.allowed(self.allowed), self.n_allowed, tau
        flags = {"HAS_BIAS": chunk.bias is not None, "HAS_ALLOWED": self.allowed is not None}
        if self.k == 0:
            return
        if chunk.column == 0:
            lanes = min(MAX_LANES, triton.next_power_of_2(max(512, 4 * self.k)))
            launch(kernels.seed, (n,), *source, width, self.k, **flags, LANES=lanes, num_warps=4)
        flags |= {"CAPACITY": self.capacity, "BLOCK": self.config.block}
        kept = self.values[mine], self.columns[mine], count
        launch(
            kernels.append, (n,), *source, *kept, chunk.column, width, **flags,
            num_warps=self.config.num_warps,
        )  # fmt: skip
        warps = max(1, min(16, self.capacity // 512))
        launch(
            kernels.replay, (n,), *source, *kept, self.replays[mine], chunk.column, width, self.k, **flags,
            num_warps=warps,
        )  # fmt: skip
        launch(kernels.tighten, (n,), tau, *kept, self.k, CAPACITY=self.capacity, num_warps=warps)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """values, indices, offsets; best first, or in the order of latents where only some are allowed."""
        n, device = len(self.count), self.count.device
        make = torch.empty if self.allowed is None else torch.zeros  # not all places may be used
        values = make(n * self.k, dtype=self.dtype, device=device)
        indices = make(n * self.k, dtype=torch.int32, device=device)
        per_row = torch.full((), self.k, dtype=torch.int64, device=device)
        if self.n_allowed is not None:
            per_row = per_row.minimum(self.n_allowed)
        if self.k:
            kept = triton.next_power_of_2(self.k)
            launch(
                kernels.finish, (n,), self.values, self.columns, self.count, self.subset, per_row, values,
                indices, HAS_SUBSET=self.subset is not None, ORDERED=self.allowed is None,
                CAPACITY=self.capacity, KEPT=kept, BLOCK=min(16, kept), num_warps=max(1, min(16, kept // 64)),
            )  # fmt: skip
        return values, indices, torch.arange(n + 1, device=device) * per_row


class _Entries(NamedTuple):
    """A CSR list of scores: values, columns, starts [N + 1] int64."""

    values: Tensor
    columns: Tensor
    starts: Tensor

    @classmethod
    def empty(cls, room: int, like: Tensor, starts: Tensor) -> _Entries:
        values = torch.empty(room, dtype=torch.float32, device=like.device)
        return cls(values, torch.empty(room, dtype=torch.int32, device=like.device), starts)

    def code(self, dtype: torch.dtype, subset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The code of these scores: ReLU, and the latents that columns stand for."""
        columns = self.columns if subset is None else subset[self.columns.long()].int()
        return self.values.relu().to(dtype), columns, self.starts


def _list_options(like: Tensor, bias: Tensor | None) -> dict[str, int]:
    config = choose(kernels.CONFIGS, architecture(like.device), CHUNK)
    return {"HAS_BIAS": bias is not None, "BLOCK": config.list_block, "num_warps": config.list_warps}


class _BatchList:
    """The ``keep`` best scores of all tokens, ties by (token, column), in a list that each chunk rewrites."""

    def __init__(self, x: Tensor, W: Tensor, subset: Tensor | None, keep: int) -> None:
        self.keep, self.dtype, self.subset = keep, x.dtype, subset
        starts = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
        # 4 * keep: the cut needs finding only in about every fourth chunk
        self.list, self.spare = (_Entries.empty(4 * keep, x, starts) for _ in range(2))
        self.cut = torch.full((1,), -torch.inf, device=x.device)
        self.above = torch.empty(len(x), dtype=torch.int32, device=x.device)
        self.equal = torch.empty_like(self.above)
        self.digits = torch.zeros(256, dtype=torch.int32, device=x.device)
        self.always = torch.ones(1, dtype=torch.int32, device=x.device)

    def add(self, chunk: _Chunk) -> None:
        """Keep every score not below the cut; where these are too many, or the last, raise the cut first."""
        scores, width = chunk.scores, chunk.scores.shape[1]
        n, rows = len(self.above), (chunk.row, len(scores))
        if not self.keep:
            return
        shared = _list_options(scores, chunk.bias)

        def tally(proceed: Tensor) -> None:
            launch(
                kernels.tally, (n,), scores, chunk.bias, self.cut, proceed, self.list.values,
                self.list.starts, self.above, self.equal, *rows, width, 0, **shared,
            )  # fmt: skip

        tally(self.always)
        total = self.above.sum() + self.equal.sum()
        crowded = torch.full_like(total, 1) if chunk.last else (total > len(self.list.values)).long()
        prefix, wanted = torch.zeros_like(total), torch.full_like(total, self.keep)
        for shift in (24, 16, 8, 0):
            launch(
                kernels.histogram, (n,), scores, chunk.bias, crowded, self.list.values, self.list.starts,
                prefix, self.digits, *rows, width, shift, **shared,
            )  # fmt: skip
            launch(kernels.pick, (1,), self.digits, crowded, prefix, wanted, self.cut, shift, num_warps=4)
        tally(crowded)
        spare = self.keep - self.above.sum() - (self.equal.cumsum(0) - self.equal)
        allowance = torch.where(crowded > 0, spare.clamp_min(0).minimum(self.equal), self.equal)
        starts = torch.nn.functional.pad((self.above + allowance).cumsum(0), (1, 0))
        launch(
            kernels.merge, (n,), scores, chunk.bias, self.cut, *self.list, allowance, starts, *self.spare[:2],
            *rows, chunk.column, width, 0, **shared,
        )  # fmt: skip
        self.list, self.spare = self.spare._replace(starts=starts), self.list

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """values, indices, offsets."""
        kept = _Entries(self.list.values[: self.keep], self.list.columns[: self.keep], self.list.starts)
        return kept.code(self.dtype, self.subset)


class _ThresholdList:
    """All scores above ``cut``, 0-dim or one for each column; asks the device how many each chunk holds."""

    def __init__(self, x: Tensor, W: Tensor, subset: Tensor | None, cut: Tensor) -> None:
        self.cut, self.dtype, self.subset = cut, x.dtype, subset
        self.parts: list[_Entries] = []
        self.none = _Entries.empty(0, x, torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device))

    def add(self, chunk: _Chunk) -> None:
        """Store what passes as a list of its own."""
        scores, width = chunk.scores, chunk.scores.shape[1]
        n, rows = len(self.none.starts) - 1, (chunk.row, len(scores))
        cut = self.cut[chunk.column : chunk.column + width] if self.cut.ndim else self.cut
        shared = _list_options(scores, chunk.bias)
        above, equal = torch.zeros(2, n, dtype=torch.int32, device=cut.device)
        launch(
            kernels.tally, (n,), scores, chunk.bias, cut, torch.ones_like(above[:1]), self.none.values,
            self.none.starts, above, equal, *rows, width, cut.ndim, **shared,
        )  # fmt: skip
        starts = torch.nn.functional.pad(above.cumsum(0), (1, 0))
        part = _Entries.empty(int(starts[-1]), scores, starts)
        launch(
            kernels.merge, (n,), scores, chunk.bias, cut, *self.none, torch.zeros_like(above), starts,
            *part[:2], *rows, chunk.column, width, cut.ndim, **shared,
        )  # fmt: skip
        self.parts.append(part)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """values, indices, offsets: the parts' rows, one part behind the other."""
        base = sum((part.starts for part in self.parts), torch.zeros_like(self.none.starts))
        whole = _Entries.empty(sum(len(part.values) for part in self.parts), base, base.clone())
        cut, allowance = torch.full_like(self.cut, -torch.inf), torch.zeros_like(base, dtype=torch.int32)
        for part in self.parts:
            launch(
                kernels.merge, (len(base) - 1,), part.values, None, cut, *part, allowance, base, *whole[:2],
                0, 0, 0, 0, 0, **_list_options(base, None),
            )  # fmt: skip
            base[:-1] += part.starts.diff()
        return whole.code(self.dtype, self.subset)
