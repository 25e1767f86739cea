"""Launchers of decode, decode_error and code_grad."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.backends.triton.support import launch, tuned
from fastsae.kernels import code_grad as _code_grad
from fastsae.kernels import decode as _decode

__all__ = ["code_grad", "decode", "decode_error"]


def decode(values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """See :func:`fastsae.backends.reference.decode`. Any width: a program owns a slice of it."""
    return _decode_rows(values, indices, offsets, W_dec, b_dec, None)[0]


def decode_error(
    values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`fastsae.backends.reference.decode_error`. decode's kernel: x_hat is never in memory."""
    error, squares = _decode_rows(values, indices, offsets, W_dec, b_dec, target)
    return error, squares.sum(1)


def _decode_rows(values, indices, offsets, W_dec, b_dec, target) -> tuple[Tensor, Tensor]:
    n, d = offsets.shape[0] - 1, W_dec.shape[1]

    def run(config: _decode.DecodeConfig) -> tuple[Tensor, Tensor]:
        width = _decode.slice_width(d, config.most_columns)
        out = (values if target is None else target).new_empty(n, d)
        squares = W_dec.new_empty(0 if target is None else n, -(-d // width), dtype=torch.float32)
        launch(
            _decode.decode_kernel, (n, -(-d // width)),
            values, indices, offsets, W_dec, b_dec, target, out, squares, d,
            BLOCK_K=config.BLOCK_K, BLOCK_D=width, num_warps=max(1, width // config.warp_columns),
        )  # fmt: skip
        return out, squares

    return tuned(_decode.CONFIGS, _decode.TRIALS, W_dec, d, run)


def code_grad(grad_x_hat: Tensor, W_dec: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    """See :func:`fastsae.backends.reference.code_grad`. Any width: a program walks along it."""
    n, d = grad_x_hat.shape
    grad = grad_x_hat.new_zeros(indices.shape[0])  # places beyond offsets[-1] keep the 0

    def run(config: _code_grad.CodeGradConfig) -> Tensor:
        launch(
            _code_grad.code_grad_kernel, (n,), grad_x_hat, W_dec, indices, offsets, grad, d,
            BLOCK_K=config.BLOCK_K, BLOCK_D=config.BLOCK_D, num_warps=config.num_warps,
        )  # fmt: skip
        return grad

    return tuned(_code_grad.CONFIGS, _code_grad.TRIALS, W_dec, d, run)
