"""A step's batches: what is kept of each, and how they are joined.

A loss may look at several reconstructions of a token: that of its code; of Gated's gates; of the dead
latents, of what the code missed (AuxK). Each has a code and an error of its own, and stands in a row of its
own: that of token n in the s-th set is row s N + n. So one pass over the rows of the weights serves all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastsae import functional as F
from fastsae import losses, nested
from fastsae.backends import resolve
from fastsae.code import SparseCode
from fastsae.ops import upcast
from fastsae.policies import AuxK, Gated
from fastsae.sae import SAE

__all__ = [
    "Code",
    "Forward",
    "Piece",
    "charges_of",
    "fill",
    "join",
    "largest",
    "prepare",
]

_ops = torch.ops.fastsae

# A code as CSR: values, indices, offsets
Code = tuple[Tensor, Tensor, Tensor]


@dataclass
class Piece:
    """What a step needs of one batch of N tokens.

    x: [N, d_in] what W_enc multiplies.  normalised: what W_skip does, None without it.
    finite: whether the input is.  spread: of the target.  largest: max |x|.
    codes, errors: by set; the error [N, d_out] is how far the code's decode is off its target. A batch that
    was made densely keeps no codes.
    squares, peaks: [sets] the sum and the maximum over tokens of ||error||^2.
    main_squares: the sum for what decode gives.
    magnitude: the sum of |values| of all codes.  l0: mean.  charges: by term, unscaled means.
    fired: [M] bool, only of a batch that was made densely.
    """

    x: Tensor
    normalised: Tensor | None
    finite: Tensor
    spread: losses.Spread
    largest: Tensor
    codes: list[Code] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    squares: Tensor = None  # type: ignore[assignment]  # set once it is known
    peaks: Tensor = None  # type: ignore[assignment]
    main_squares: Tensor = None  # type: ignore[assignment]
    magnitude: Tensor = None  # type: ignore[assignment]
    l0: Tensor = None  # type: ignore[assignment]
    charges: dict[str, Tensor] = field(default_factory=dict)
    fired: Tensor | None = None

    @property
    def entries(self) -> int:
        """Places of all codes."""
        return sum(len(code[0]) for code in self.codes)


def prepare(sae: SAE, x: Tensor, target: Tensor | None, *, alone: bool) -> tuple[Piece, Tensor]:
    """A batch in the space of the loss, nothing encoded yet; and the target that is left to the codes.

    ``alone``: no other batch is to be joined with it, which spares a little work.
    """
    config = sae.config
    finite = x.isfinite().all()
    # NaN ranks first, so that with it every latent may count as active, which nothing has room for
    normalised = sae.normalise(torch.where(finite, x, 0))
    target = sae.normalise_target(target, *normalised).reshape(-1, config.d_out).contiguous()
    plain = normalised[0].reshape(-1, config.d_in)
    encoded = sae.encoder_input(plain).contiguous()
    spread = losses.spread(target, with_mean=not alone)
    if config.skip:
        target = (target - sae.skip(plain)).to(target.dtype)
    return Piece(encoded, plain if config.skip else None, finite, spread, largest(encoded)), target


def fill(sae: SAE, piece: Piece, target: Tensor, dead: Tensor | None, *, alone: bool = True) -> None:
    """Encode and decode a batch, and with ``dead`` [M] bool the dead latents' code of its error.

    ``alone``: no other batch is to be joined with it.
    """
    backend = resolve(sae.backend, sae.W_enc)
    code, second = _encode(sae, piece.x, dead, backend, alone)
    code, _, _, gates = sae.activate(code, piece.x)
    sums, peaks = _decode(sae, piece, [code, gates], target, backend)
    main = sae.main_part(code)
    parts = sae.config.activation.nested(sae.config.n_latents)
    missed = piece.errors[0]
    piece.main_squares = sums[0]
    if parts is not None:
        stored = _csr(code)
        sums[0], piece.main_squares, worst = nested.squares(*stored, sae.W_dec, missed, parts, backend)
        peaks[0] = worst * sum(parts.weights) ** 2
        if second is not None and main is not code:
            missed = _ops.decode_error(*_csr(main), sae.W_dec, sae.b_dec, target, backend)[0]
    if second is not None:
        error, squares = _ops.decode_error(*second, sae.W_dec, None, -missed, backend)
        piece.codes.append(second)
        piece.errors.append(error)
        sums, peaks = [*sums, squares.sum()], [*peaks, squares.amax()]
    elif dead is not None:
        sums, peaks = [*sums, torch.zeros_like(sums[0])], [*peaks, torch.zeros_like(sums[0])]
    piece.squares, piece.peaks = torch.stack(sums), torch.stack(peaks)
    piece.magnitude = torch.stack([_magnitude(stored) for stored in piece.codes]).sum()
    charged = code if gates is None else gates
    for term in charges_of(sae):
        piece.charges[term.name] = losses.sparsity(term, charged, sae.W_dec, sae.config.n_sites)
    piece.l0 = main.l0().float().mean()


def _decode(
    sae: SAE, piece: Piece, codes: list[SparseCode | None], target: Tensor, backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Keep the codes and what they miss; return the sums and maxima of its squares."""
    sums, peaks = [], []
    for code in codes:
        if code is not None:
            error, squares = _ops.decode_error(*_csr(code), sae.W_dec, sae.b_dec, target, backend)
            piece.codes.append(_csr(code))
            piece.errors.append(error)
            sums.append(squares.sum())
            peaks.append(squares.amax())
    return sums, peaks


def _encode(
    sae: SAE, x: Tensor, dead: Tensor | None, backend: str, alone: bool
) -> tuple[SparseCode, Code | None]:
    """The code of x, and with ``dead`` its code over these, None if that is empty.

    Of neither is there more than is stored, so that another can follow it; but for a first one that none
    follows, and for the second one where the host mustn't wait to learn its length (Triton).
    """
    activation, threshold = sae.selection(whole=True)
    rule, threshold = F.selection(activation, threshold, sae.W_enc)
    k, auxk = getattr(activation, "k", 0), sae.config.loss(AuxK)
    second: Code | None = None
    if dead is None or auxk is None:
        first = _ops.encode(x, sae.W_enc, sae.b_enc, threshold, None, rule, k, backend)
    else:
        k_aux = auxk.resolve_k(sae.config.d_in)
        both = _ops.encode_dead(x, sae.W_enc, sae.b_enc, threshold, dead, rule, k, k_aux, backend)
        first, second = both[:3], both[3:] if backend == "triton" else _trimmed(*both[3:])
    follows = second is not None or isinstance(sae.config.activation, Gated)
    if rule == "threshold" and not (alone and not follows):
        first = _trimmed(*first)
    if second is not None and not len(second[0]):
        second = None
    return SparseCode(first[0], first[1], first[2], sae.config.n_latents), second


def _csr(code: SparseCode) -> Code:
    return code.values, code.indices, code.offsets


def _trimmed(values: Tensor, indices: Tensor, offsets: Tensor) -> Code:
    stored = int(offsets[-1])
    return values[:stored], indices[:stored], offsets


@dataclass
class Forward:
    """The codes of a step's N tokens, set below set, and the loss's derivatives at the decoder.

    code: of the N tokens, the first set.  values, indices, offsets: CSR over the rows of all sets.
    x: [N, d_in] what W_enc multiplies.  normalised: what W_skip does.
    error, scale: [rows, d_out], [rows]; dL / d(decoded row r) = scale[r] error[r].
    """

    code: SparseCode
    values: Tensor
    indices: Tensor
    offsets: Tensor
    x: Tensor
    normalised: Tensor | None
    error: Tensor
    scale: Tensor


def join(sae: SAE, pieces: list[Piece], weights: Tensor) -> Forward:
    """Join the batches of a step, token below token, set below set.

    Empties ``pieces``, so that all but one tensor at a time are in memory once.

    Args:
        weights: [sets] what the loss multiplies the squares of their errors by.
    """
    n_sets = max(len(piece.errors) for piece in pieces)
    sets = [[piece.codes[i] for piece in pieces if len(piece.codes) > i] for i in range(n_sets)]
    errors = [piece.errors[i] for i in range(n_sets) for piece in pieces if len(piece.errors) > i]
    inputs = [piece.x for piece in pieces]
    plain = [piece.normalised for piece in pieces if piece.normalised is not None]
    made_densely = not sets[0] if sets else True
    pieces.clear()

    x, error = _cat(inputs), _cat(errors)
    scale = (2 * weights[: len(error) // len(x), None]).repeat(1, len(x)).flatten()
    normalised = _cat(plain) if plain else None
    if made_densely:
        nothing = x.new_empty(0), torch.empty(0, dtype=torch.int32, device=x.device)
        empty = *nothing, torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
        return Forward(SparseCode(*empty, sae.config.n_latents), *empty, x, normalised, error, scale)
    triton = resolve(sae.backend, sae.W_enc) == "triton"
    main = _below(sets[0])
    # where a batch's second code has spare places, the host doesn't know where the next begins
    roomy = triton and any(len(codes) > 1 for codes in sets[1:])
    whole = _below([main, *(code for codes in sets[1:] for code in codes)], roomy) if n_sets > 1 else main
    return Forward(SparseCode(*main, sae.config.n_latents), *whole, x, normalised, error, scale)


def _below(codes: Sequence[Code], roomy: bool = False) -> Code:
    """The codes one below the other. All but the last must be full, unless ``roomy``."""
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


def charges_of(sae: SAE) -> list[losses.Charge]:
    """The losses of ``sae`` that charge activations by their size."""
    return [term for term in sae.config.losses if isinstance(term, losses.Charge)]
