"""Derivatives: one torch.autograd.Function per differentiable operator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae.ops import wide_dtype  # importing it registers torch.ops.fastsae

__all__ = ["Decode", "Encode"]

_ops = torch.ops.fastsae


class Encode(torch.autograd.Function):
    """values[j] = relu(<x[n], W[m]> + b[m]) at the selected entries; the selection has no gradient.

    grad_pre[j] = grad_values[j] where values[j] > 0, else 0
    grad_W[m] = sum grad_pre x[n];   grad_b[m] = sum grad_pre;   grad_x[n] = sum grad_pre W[m]
    """

    @staticmethod
    def forward(ctx, x, W, b, threshold, subset, rule, k, backend, sparse_grad):
        values, indices, offsets = _ops.encode(x, W, b, threshold, subset, rule, k, backend)
        ctx.mark_non_differentiable(indices, offsets)
        ctx.save_for_backward(x, W, values, indices, offsets)
        ctx.backend, ctx.sparse_grad = backend, sparse_grad
        ctx.bias_dtype = None if b is None else b.dtype
        return values, indices, offsets

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values, *_):
        x, W, values, indices, offsets = ctx.saved_tensors
        needs_x, needs_W, needs_b = ctx.needs_input_grad[:3]
        grad_pre = torch.where(values > 0, grad_values, 0)
        grad_x = _ops.decode(grad_pre, indices, offsets, W, None, ctx.backend) if needs_x else None
        grad_W = grad_b = None
        if needs_W or needs_b:
            feature_major = _ops.transpose(values, indices, offsets, W.shape[0], ctx.backend)
            if needs_W:
                grad_W = _weight_grad(grad_pre, x, feature_major, W, ctx)
            if needs_b:
                ones = x.new_ones(x.shape[0], 1)
                like = W.new_empty(len(W), 1, dtype=ctx.bias_dtype)
                grad_b = _weight_grad(grad_pre, ones, feature_major, like, ctx, dense=True).flatten()
        return grad_x, grad_W, grad_b, None, None, None, None, None, None


class Decode(torch.autograd.Function):
    """x_hat[n] = sum_j values[j] W[indices[j]] + b.

    grad_values[j] = <grad_x_hat[n], W[m]>;  grad_W[m] = sum values[j] grad_x_hat[n];  grad_b = sum_n
    grad_x_hat[n].
    """

    @staticmethod
    def forward(ctx, values, indices, offsets, W, b, backend, sparse_grad):
        ctx.save_for_backward(values, indices, offsets, W)
        ctx.backend, ctx.sparse_grad = backend, sparse_grad
        ctx.bias_dtype = None if b is None else b.dtype
        return _ops.decode(values, indices, offsets, W, b, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        values, indices, offsets, W = ctx.saved_tensors
        needs_values, _, _, needs_W, needs_b = ctx.needs_input_grad[:5]
        grad = grad.contiguous()
        grad_values = grad_W = grad_b = None
        if needs_values:
            grad_values = _ops.code_grad(grad, W, indices, offsets, ctx.backend).to(values.dtype)
        if needs_W:
            feature_major = _ops.transpose(values, indices, offsets, W.shape[0], ctx.backend)
            grad_W = _weight_grad(values, grad, feature_major, W, ctx)
        if needs_b:
            grad_b = grad.sum(0, dtype=wide_dtype(grad)).to(ctx.bias_dtype)
        return grad_values, None, None, grad_W, grad_b, None, None


def _weight_grad(coefs: Tensor, x: Tensor, feature_major, W: Tensor, ctx, dense: bool = False) -> Tensor:
    """The gradient of a weight [M, D] from its active rows: dense, or row-sparse COO."""
    latents, starts, tokens, order = feature_major
    rows = _ops.row_grads(coefs[order], x, starts, tokens, ctx.backend).to(W.dtype)
    if ctx.sparse_grad and not dense:
        used = latents < W.shape[0]
        where = latents[used][None]
        return torch.sparse_coo_tensor(where, rows[used], W.shape, is_coalesced=True, check_invariants=False)
    # unused places hold zero rows; adding them to the last latent changes nothing
    return rows.new_zeros(W.shape[0], rows.shape[1]).index_add_(0, latents.clamp_max(W.shape[0] - 1), rows)
