"""Launchers of row_grads, row_update and row_step. Nothing here waits for the GPU: counts stay there."""

from __future__ import annotations

import math
from functools import partial

import torch
import triton
from torch import Tensor

from fastsae.backends.torch import transpose
from fastsae.backends.triton.support import architecture, launch, tuned
from fastsae.kernels import row_grads as _row_grads
from fastsae.kernels import row_step as _row_step
from fastsae.kernels import row_update as _row_update
from fastsae.kernels.common import choose
from fastsae.kernels.decode import slice_width
from fastsae.kernels.formats import BLOCK

__all__ = ["row_grads", "row_step", "row_update"]


def row_grads(coefs: Tensor, x: Tensor, starts: Tensor, tokens: Tensor) -> Tensor:
    """See :func:`fastsae.backends.reference.row_grads`. Runs longer than SPLIT are summed in pieces."""
    owner, split, slots = _pieces(starts, tokens.shape[0])
    parts = _partial_sums(coefs, x, starts, tokens, owner, split, slots)
    out = x.new_empty(starts.shape[0] - 1, x.shape[1], dtype=torch.float32)
    _launch_row_grads(out.shape[0], False, coefs, x, starts, tokens, owner, parts, out, split)
    return out


def _partial_sums(coefs, x, starts, tokens, owner, split, slots) -> Tensor:
    """The sums of the pieces of long runs, [slots, D] of which the kernel writes those it has."""
    parts = x.new_empty(slots, x.shape[1], dtype=torch.float32)
    _launch_row_grads(slots, True, coefs, x, starts, tokens, owner, parts, None, split)
    return parts


def _launch_row_grads(programs, pieces, coefs, x, starts, tokens, owner, parts, out, split) -> None:
    d = x.shape[1]

    def run(config: _row_grads.RowGradsConfig) -> None:
        width = slice_width(d, config.most_columns)
        launch(
            _row_grads.row_grads_kernel, (programs, -(-d // width)),
            coefs, x, starts, tokens, owner, split, parts, out, starts.shape[0] - 1, d, PIECES=pieces,
            BLOCK_J=config.BLOCK_J, BLOCK_D=width, num_warps=max(1, width // config.warp_columns),
        )  # fmt: skip

    tuned(_row_grads.CONFIGS, _row_grads.TRIALS, x, d, run)


def _pieces(starts: Tensor, n_entries: int) -> tuple[Tensor, Tensor, int]:
    """The run of each chunk's first place (see the kernel file), places a chunk (0-dim), and slots in all.

    A code may have room for many more entries than it has: chunks divide those in use.
    """
    chunks = min(_row_grads.CHUNKS, -(-n_entries // _row_grads.SPLIT))
    split = (-(-starts[-1] // max(chunks, 1))).clamp_min(_row_grads.SPLIT)
    firsts = torch.arange(chunks + 1, device=starts.device) * split
    return torch.searchsorted(starts, firsts, right=True) - 1, split, 2 * chunks


def row_update(
    weight: Tensor,
    remainder: Tensor | None,
    state: list[Tensor],
    rows: Tensor | None,
    grad: Tensor | None,
    coast: Tensor | None,
    clock: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    unit_norm: bool,
    seed: int,
    first: int,
) -> None:
    """See :func:`fastsae.backends.reference.row_update`. Reads the clock on the GPU; rows up to WIDEST."""
    m, d = weight.shape
    n_rows = m if rows is None else rows.shape[0]
    config = choose(_row_update.CONFIGS, architecture(weight.device), d)
    block_d = triton.next_power_of_2(max(d, 1))
    block_r = max(1, config.elements // block_d)
    launch(
        _row_update.row_update_kernel, (-(-n_rows // block_r),),
        weight, rows, grad, _state(remainder, state, None, coast, clock), _hyper(beta1, beta2, eps),
        _int32(seed), _int32(first), n_rows, m, d, UNIT_NORM=unit_norm, PER_ROW=_per_row(state),
        BLOCK_R=block_r, BLOCK_D=block_d, num_warps=config.num_warps,
    )  # fmt: skip


def row_step(
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    enc_remainder: Tensor | None,
    dec_remainder: Tensor | None,
    enc_state: list[Tensor],
    bias_state: list[Tensor],
    dec_state: list[Tensor],
    coasts: list[Tensor | None],
    clocks: list[Tensor],
    betas: list[float],
    eps: list[float],
    seeds: list[int],
    every_row: list[bool],
    unit_norm: bool,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor,
    x: Tensor,
    error: Tensor,
    scale: Tensor,
    l1: float,
) -> Tensor:
    """See :func:`fastsae.backends.reference.row_step`. Gradients stay in registers; long runs' in pieces."""
    (m, d_in), d_out, n = W_enc.shape, W_dec.shape[1], x.shape[0]
    latents, starts, tokens, order = transpose(values, indices, offsets, m)
    owner, split, slots = _pieces(starts, tokens.shape[0])
    enc = dec = None
    if enc_state:  # a row's slices each read last_step, and each write it
        enc = _state(enc_remainder, enc_state, enc_state[2].clone(), coasts[0], clocks[0])
    if dec_state:
        dec = _state(dec_remainder, dec_state, None, coasts[2], clocks[2])
    # rows, and their first places; by whether every row is meant
    runs: dict[bool, tuple[Tensor | None, Tensor]] = {False: (latents, starts)}
    if any(every_row):
        first = torch.searchsorted(latents, torch.arange(m + 1, device=latents.device))
        runs[True] = None, starts[first]
    empty = partial(torch.empty, dtype=torch.float32, device=x.device)
    d_pre, db = empty(tokens.shape[0]), torch.zeros(m, dtype=torch.float32, device=x.device)

    config = choose(_row_step.DECODER, architecture(x.device), d_out)
    blocks = {
        "BLOCK_J": _tokens(config, error),
        "BLOCK_D": triton.next_power_of_2(max(d_out, 1)),
        "num_warps": config.num_warps,
    }
    entries = tokens, values[order], scale, error, d_pre
    parts, sums = empty(slots, d_out) if dec else None, empty(slots, 2)
    for pieces in (True, False):
        rows, firsts = runs[bool(dec) and every_row[2] and not pieces]
        n_rows = firsts.shape[0] - 1
        launch(
            _row_step.decoder_step_kernel, (slots if pieces else n_rows,),
            W_dec, rows, firsts, owner, split, entries, parts, sums, db,
            dec, _hyper(betas[4], betas[5], eps[2]), _int32(seeds[2]),
            n_rows, m, d_out, n, l1, DEC=dec is not None, PIECES=pieces, UNIT_NORM=unit_norm,
            PER_ROW=_per_row(dec_state), **blocks,
        )  # fmt: skip

    if error.shape[0] > n:
        tokens = tokens % max(n, 1)
    parts = _partial_sums(d_pre, x, starts, tokens, owner, split, slots) if enc else None
    rows, firsts = runs[bool(enc) and every_row[0]]
    n_rows = firsts.shape[0] - 1
    config = choose(_row_step.ENCODER, architecture(x.device), d_in)
    block_j, width, warps = _encoder_blocks(config, enc_state, x)
    programs = min(n_rows, config.programs)
    pull = empty(programs, d_in)
    launch(
        _row_step.encoder_step_kernel, (programs, -(-d_in // width)),
        W_enc, rows, firsts, split, tokens, d_pre, x, parts, db, pull,
        enc, _hyper(betas[0], betas[1], eps[0]), _int32(seeds[0]), n_rows, m, d_in,
        ENC=enc is not None, PER_ROW=_per_row(enc_state), BLOCK_J=block_j, BLOCK_D=width, num_warps=warps,
    )  # fmt: skip
    if bias_state:
        rows, grad = (None, db) if every_row[1] else (latents, db[latents.clamp(max=m - 1)])
        row_update(
            b_enc[:, None], None, bias_state, rows, grad[:, None], coasts[1], clocks[1],
            betas[2], betas[3], eps[1], False, seeds[1], 0,
        )  # fmt: skip
    return pull.sum(0)


def _state(
    remainder: Tensor | None, state: list[Tensor], before: Tensor | None, coast: Tensor | None, clock: Tensor
) -> tuple[Tensor | None, ...]:
    """What adam_rows takes of a weight beside itself, whatever the format of its state."""
    exp_avg, exp_avg_sq, last_step, *scales = state
    scale, scale_sq = (*scales, None, None)[:2]
    return remainder, exp_avg, exp_avg_sq, last_step, scale, scale_sq, before, coast, clock


def _per_row(state: list[Tensor]) -> bool:
    """Whether a row has one second moment (a row of one column may be taken either way)."""
    return bool(state) and state[1].shape[1] < state[0].shape[1]


def _encoder_blocks(
    config: _row_step.EncoderStepConfig, state: list[Tensor], x: Tensor
) -> tuple[int, int, int]:
    """Tokens at a time, columns that a program of the encoder's kernel owns, and its warps.

    Whole blocks where they share a scale; whole rows, as the decoder's, where these have one second moment.
    """
    d = x.shape[1]
    if _per_row(state):
        whole = choose(_row_step.DECODER, architecture(x.device), d)
        return _tokens(whole, x), triton.next_power_of_2(d), whole.num_warps
    width = slice_width(d, config.most_columns, BLOCK.value if len(state) > 3 else 1)
    return config.BLOCK_J, width, max(1, width // config.warp_columns)


def _tokens(config: _row_step.DecoderStepConfig, like: Tensor) -> int:
    """Tokens at a time: as many bytes whatever the dtype."""
    return max(1, 2 * config.BLOCK_J // like.element_size())


def _int32(n: int) -> int:
    """``n`` modulo 2^32, as the signed number of those bits."""
    return (n + 2**31) % 2**32 - 2**31


def _hyper(beta1: float, beta2: float, eps: float) -> tuple[float, ...]:
    """What the kernels take of Adam's constants: 1 - beta and log2 beta are lost if fp32 computes them."""
    logs = [math.log2(beta) if beta else -1e30 for beta in (beta1, beta2)]  # 0 * -1e30 is 0, and 0^0 is 1
    return beta1, 1 - beta1, logs[0], beta2, 1 - beta2, logs[1], eps
