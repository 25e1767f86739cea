"""A step's batches: what is kept of each, and how they are joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae import functional as F
from fastsae import losses
from fastsae.backends import resolve
from fastsae.code import SparseCode
from fastsae.config import AuxK, DecoderNormL1
from fastsae.ops import upcast
from fastsae.sae import SAE

__all__ = ["Forward", "Piece", "auxk_term", "forward_piece", "join", "largest"]

_ops = torch.ops.fastsae

# A code as CSR: values, indices, offsets
Code = tuple[Tensor, Tensor, Tensor]


@dataclass
class Piece:
    """What a step needs of one batch of N tokens.

    code: of the tokens.  second: AuxK's, None where nothing is dead.  x: [N, d_in] what W_enc multiplies.
    error, missed: [N, d_out] what the code's decode, and then the second's, is off the target.
    finite: whether the input is.
    squares, peaks: [1], with AuxK [2]: sum and maximum over tokens of ||error||^2, and of ||missed||^2.
    magnitude, largest: the sum of |values| of both codes; max |x|.
    spread: of the target.  norms: DecoderNormL1's term, unscaled.  l0: its mean.
    """

    code: SparseCode
    second: Code | None
    x: Tensor
    error: Tensor
    missed: Tensor | None
    finite: Tensor
    squares: Tensor
    peaks: Tensor
    magnitude: Tensor
    largest: Tensor
    spread: losses.Spread
    norms: Tensor | None
    l0: Tensor

    @property
    def entries(self) -> int:
        """Places of both codes."""
        return len(self.code.values) + (0 if self.second is None else len(self.second[0]))


def forward_piece(
    sae: SAE, x: Tensor, target: Tensor | None, dead: Tensor | None, *, alone: bool = True
) -> Piece:
    """Encode and decode one batch, and with ``dead`` [M] bool the dead latents' code of its error.

    ``alone``: no other batch is to be joined with it, which spares a little work.
    """
    config, backend = sae.config, resolve(sae.backend, sae.W_enc)
    finite = x.isfinite().all()
    # NaN ranks first, so that with it every latent may count as active, which nothing has room for
    normalised = sae.normalise(torch.where(finite, x, 0))
    target = sae.normalise_target(target, *normalised).reshape(-1, config.d_out).contiguous()
    x = (normalised[0] - sae.b_dec).to(sae.dtype) if config.subtract_b_dec else normalised[0]
    x = x.reshape(-1, config.d_in).contiguous()
    code, second = _encode(sae, x, dead, backend, alone)

    stored = code.values, code.indices, code.offsets
    error, squares = _ops.decode_error(*stored, sae.W_dec, sae.b_dec, target, backend)
    sums, peaks, magnitude = [squares.sum()], [squares.amax()], _magnitude(stored)
    missed = None
    if second is not None:
        missed, squares = _ops.decode_error(*second, sae.W_dec, None, -error, backend)
        sums, peaks = [*sums, squares.sum()], [*peaks, squares.amax()]
        magnitude = magnitude + _magnitude(second)
    elif dead is not None:
        sums, peaks = [*sums, torch.zeros_like(sums[0])], [*peaks, torch.zeros_like(sums[0])]
    term = next((term for term in config.losses if isinstance(term, DecoderNormL1)), None)
    return Piece(
        code, second, x, error, missed, finite, torch.stack(sums), torch.stack(peaks), magnitude, largest(x),
        losses.spread(target, with_mean=not alone),
        None if term is None else losses.decoder_norm_l1(code, sae.W_dec, term.coefficient),
        code.l0().float().mean(),
    )  # fmt: skip


def _encode(
    sae: SAE, x: Tensor, dead: Tensor | None, backend: str, alone: bool
) -> tuple[SparseCode, Code | None]:
    """The code of x, and with ``dead`` its code over these, None if that is empty.

    Of neither is there more than is stored, so that another can follow it; but for a first one that none
    follows, and for the second one where the host mustn't wait to learn its length (Triton).
    """
    rule, threshold = F.selection(sae.config.activation, sae.threshold_in_use(), sae.W_enc)
    k, auxk = getattr(sae.config.activation, "k", 0), auxk_term(sae)
    second: Code | None = None
    if dead is None or auxk is None:
        first = _ops.encode(x, sae.W_enc, sae.b_enc, threshold, None, rule, k, backend)
    else:
        k_aux = auxk.resolve_k(sae.config.d_in)
        both = _ops.encode_dead(x, sae.W_enc, sae.b_enc, threshold, dead, rule, k, k_aux, backend)
        first, second = both[:3], both[3:] if backend == "triton" else _trimmed(*both[3:])
    if rule == "threshold" and not (alone and second is None):
        first = _trimmed(*first)
    if second is not None and not len(second[0]):
        second = None
    return SparseCode(first[0], first[1], first[2], sae.config.n_latents), second


def _trimmed(values: Tensor, indices: Tensor, offsets: Tensor) -> Code:
    stored = int(offsets[-1])
    return values[:stored], indices[:stored], offsets


@dataclass
class Forward:
    """The code of a step's N tokens, AuxK's rows below it, and the loss's derivatives at the decoder.

    code: of the N tokens.  values, indices, offsets: CSR over N rows or, with AuxK, 2 N: row N + n is token n
    again.  x: [N, d_in] what W_enc multiplies.
    error, scale: [rows, d_out], [rows]; dL / d(decoded row n) = scale[n] error[n].
    l1: dL / d(f_i ||W_dec[i]||) at the first N rows.
    """

    code: SparseCode
    values: Tensor
    indices: Tensor
    offsets: Tensor
    x: Tensor
    error: Tensor
    scale: Tensor
    l1: float


def join(sae: SAE, pieces: list[Piece], weights: Tensor, l1: float) -> Forward:
    """Join the batches of a step, token below token.

    Empties ``pieces``, so that all but one tensor at a time are in memory once.

    Args:
        weights: [1], with AuxK [2]: what the loss multiplies the squares of error, and of missed, by.
        l1: see :class:`Forward`.
    """
    codes = [(piece.code.values, piece.code.indices, piece.code.offsets) for piece in pieces]
    seconds = [piece.second for piece in pieces if piece.second is not None]
    inputs = [piece.x for piece in pieces]
    errors = [piece.error for piece in pieces]
    errors += [piece.missed for piece in pieces if piece.missed is not None]
    pieces.clear()

    main = _below(codes)
    roomy = len(seconds) > 1 and resolve(sae.backend, sae.W_enc) == "triton"
    both = _below([main, *seconds], roomy) if seconds else main
    x, error = _cat(inputs), _cat(errors)
    scale = (2 * weights[: len(error) // len(x), None]).repeat(1, len(x)).flatten()
    return Forward(SparseCode(*main, sae.config.n_latents), *both, x, error, scale, l1)


def _below(codes: Sequence[Code], roomy: bool = False) -> Code:
    """The codes one below the other. All but the last must be full, unless ``roomy``.

    Where one has spare places, the host doesn't know where the next begins.
    """
    if len(codes) == 1:
        return codes[0]
    offsets = [codes[0][2]]
    for code in codes[1:]:
        offsets.append(offsets[-1][-1] + code[2][1:])
    values, indices = [code[0] for code in codes], [code[1] for code in codes]
    if not roomy:
        return torch.cat(values), torch.cat(indices), torch.cat(offsets)
    room = sum(map(len, values))
    all_values, all_indices = values[0].new_zeros(room), indices[0].new_zeros(room)
    for i, part in enumerate(values):
        # in this order: each is written over the spare places of the one before
        places = torch.arange(len(part), device=part.device)
        if i:
            places += offsets[i - 1][-1]
        all_values.index_copy_(0, places, part)
        all_indices.index_copy_(0, places, indices[i])
    return all_values, all_indices, torch.cat(offsets)


def _cat(parts: list[Tensor]) -> Tensor:
    """The parts one below the other, let go of; the only one as it is."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    parts.clear()
    return whole


def _magnitude(code: Code) -> Tensor:
    """The sum of |values|, 0-dim, in at least fp32."""
    values, _, offsets = code
    stored = torch.arange(len(values), device=values.device) < offsets[-1]
    return torch.where(stored, upcast(values).abs(), 0).sum()


def largest(t: Tensor) -> Tensor:
    """max |t| in at least fp32, without a copy of t."""
    low, high = t.aminmax()
    return torch.maximum(upcast(-low), upcast(high))


def auxk_term(sae: SAE) -> AuxK | None:
    """AuxK among the losses of ``sae``."""
    return next((term for term in sae.config.losses if isinstance(term, AuxK)), None)
