"""Derivatives: one torch.autograd.Function per differentiable operator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae import nested
from fastsae.ops import wide_dtype  # importing it registers torch.ops.fastsae

__all__ = ["Decode", "Encode", "Jump", "NestedSquares", "Step", "in_band"]

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


def in_band(values: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """Whether |pre - theta| < bandwidth / 2, of entries that passed theta - bandwidth / 2.

    ``values`` are relu(pre), or 0 below theta.
    """
    return values < theta + bandwidth / 2


class Jump(torch.autograd.Function):
    """f = v * 1[v > theta], entry by entry; see :func:`fastsae.functional.jump`."""

    @staticmethod
    def forward(ctx, values, theta, bandwidth):
        ctx.save_for_backward(values, theta)
        ctx.bandwidth = bandwidth
        return torch.where(values > theta, values, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        values, theta = ctx.saved_tensors
        pulled = torch.where(in_band(values, theta, ctx.bandwidth), -(theta / ctx.bandwidth) * grad, 0)
        return torch.where(values > theta, grad, 0), pulled, None


class Step(torch.autograd.Function):
    """1[v > theta], entry by entry, with no gradient for v; see :func:`fastsae.functional.jump`."""

    @staticmethod
    def forward(ctx, values, theta, bandwidth):
        ctx.save_for_backward(values, theta)
        ctx.bandwidth = bandwidth
        return (values > theta).to(theta.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        values, theta = ctx.saved_tensors
        return None, torch.where(in_band(values, theta, ctx.bandwidth), -grad / ctx.bandwidth, 0), None


class NestedSquares(torch.autograd.Function):
    """sum_g weights[g] ||e_g||^2 by :mod:`fastsae.nested`, which makes nothing as large as all e_g."""

    @staticmethod
    def forward(ctx, values, W, error, indices, offsets, parts, backend, sparse_grad):
        ctx.save_for_backward(values, W, error, indices, offsets)
        ctx.parts, ctx.backend, ctx.sparse_grad = parts, backend, sparse_grad
        return nested.squares(values, indices, offsets, W, error, parts, backend)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        values, W, error, indices, offsets = ctx.saved_tensors
        found = nested.gradients(values, indices, offsets, W, error, ctx.parts, ctx.backend)
        grad_values = (grad * found.values).to(values.dtype)
        grad_W = _from_rows(found.latents, (grad * found.rows).to(W.dtype), len(W), ctx.sparse_grad)
        grad_error = (grad * found.error).to(error.dtype)
        return grad_values, grad_W, grad_error, None, None, None, None, None


def _weight_grad(coefs: Tensor, x: Tensor, feature_major, W: Tensor, ctx, dense: bool = False) -> Tensor:
    """The gradient of a weight [M, D] from its active rows: dense, or row-sparse COO."""
    latents, starts, tokens, order = feature_major
    rows = _ops.row_grads(coefs[order], x, starts, tokens, ctx.backend).to(W.dtype)
    return _from_rows(latents, rows, len(W), ctx.sparse_grad and not dense)


def _from_rows(latents: Tensor, rows: Tensor, m: int, sparse: bool) -> Tensor:
    """The gradient [M, D] whose rows ``latents``, ascending, are given; latents of M are unused places."""
    shape = m, rows.shape[1]
    if sparse:
        used = latents < m
        where = latents[used][None]
        return torch.sparse_coo_tensor(where, rows[used], shape, is_coalesced=True, check_invariants=False)
    # unused places hold zero rows; adding them to the last latent changes nothing
    return rows.new_zeros(shape).index_add_(0, latents.clamp_max(m - 1), rows)
