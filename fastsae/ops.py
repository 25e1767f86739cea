"""The contract: every operator's schema, its fake, and where its implementations live.

``torch.ops.fastsae.<op>(..., backend)`` runs the function of that name in ``fastsae.backends.<backend>``.
Arguments are two-dimensional, contiguous and already checked (:mod:`fastsae.functional` does that), W_enc and
W_dec in the dtype of the rest or, under fp32 tokens, in bf16;
differentiation is in :mod:`fastsae.autograd`. N tokens, D the width, M latents, P stored entries, R rows of a
feature-major code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["BACKENDS", "OPERATORS", "implementation", "upcast", "wide_dtype"]

BACKENDS = ("reference", "torch", "triton")
"""Backends with an implementation of every operator, as modules of :mod:`fastsae.backends`."""

OPERATORS = {
    "encode": "(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? threshold, Tensor? subset, str rule,"
    " int k, str backend) -> (Tensor values, Tensor indices, Tensor offsets)",
    "encode_dead": "(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? threshold, Tensor dead, str rule, int k,"
    " int k_dead, str backend) -> (Tensor values, Tensor indices, Tensor offsets, Tensor dead_values,"
    " Tensor dead_indices, Tensor dead_offsets)",
    "decode": "(Tensor values, Tensor indices, Tensor offsets, Tensor W_dec, Tensor? b_dec, str backend)"
    " -> Tensor",
    "decode_error": "(Tensor values, Tensor indices, Tensor offsets, Tensor W_dec, Tensor? b_dec,"
    " Tensor target, str backend) -> (Tensor error, Tensor squares)",
    "code_grad": "(Tensor grad_x_hat, Tensor W_dec, Tensor indices, Tensor offsets, str backend) -> Tensor",
    "transpose": "(Tensor values, Tensor indices, Tensor offsets, int n_latents, str backend)"
    " -> (Tensor latents, Tensor starts, Tensor tokens, Tensor order)",
    "row_grads": "(Tensor coefs, Tensor x, Tensor starts, Tensor tokens, str backend) -> Tensor",
    "row_update": "(Tensor(a!) weight, Tensor(b!)? remainder, Tensor(c!)[] state, Tensor? rows, Tensor? grad,"
    " Tensor? coast, Tensor clock, float beta1, float beta2, float eps, bool unit_norm, int seed, int first,"
    " str backend) -> ()",
    "row_step": "(Tensor(a!) W_enc, Tensor(b!) b_enc, Tensor(c!) W_dec, Tensor(d!)? enc_remainder,"
    " Tensor(e!)? dec_remainder, Tensor(f!)[] enc_state, Tensor(g!)[] bias_state, Tensor(h!)[] dec_state,"
    " Tensor?[] coasts, Tensor[] clocks, float[] betas, float[] eps, int[] seeds, bool[] every_row,"
    " bool unit_norm, Tensor values, Tensor indices, Tensor offsets, Tensor x, Tensor error, Tensor scale,"
    " float l1, str backend) -> Tensor",
}
"""Schemas. What each operator computes is in the docstrings of :mod:`fastsae.backends.reference`."""


def wide_dtype(t: Tensor) -> torch.dtype:
    """The dtype that sums over ``t`` run in: fp32, or fp64 of fp64."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def upcast(t: Tensor) -> Tensor:
    """``t`` in its :func:`wide_dtype`; itself where it is already."""
    return t.to(wide_dtype(t))


def implementation(op: str, backend: str) -> Callable:
    """The function that runs ``op`` on ``backend``; backends are imported when first used."""
    return getattr(importlib.import_module(f"fastsae.backends.{backend}"), op)


_LIBRARY = torch.library.Library("fastsae", "DEF")


def _register(op: str) -> None:
    def run(*args):
        if torch.is_autocast_enabled(kind := args[0].device.type):
            with torch.autocast(kind, enabled=False):  # inside, sums stay fp32
                return implementation(op, args[-1])(*args[:-1])
        return implementation(op, args[-1])(*args[:-1])

    _LIBRARY.define(op + OPERATORS[op])
    _LIBRARY.impl(op, run, "CompositeExplicitAutograd")


for _op in OPERATORS:
    _register(_op)


@torch.library.register_fake("fastsae::encode")
def _encode_fake(x, W_enc, b_enc, threshold, subset, rule, k, backend):
    n, m = x.shape[0], (W_enc if subset is None else subset).shape[0]
    if rule == "threshold":
        entries = torch.library.get_ctx().new_dynamic_size()
    else:
        entries = n * min(k, m)
    return (
        x.new_empty(entries),
        x.new_empty(entries, dtype=torch.int32),
        x.new_empty(n + 1, dtype=torch.int64),
    )


@torch.library.register_fake("fastsae::encode_dead")
def _encode_dead_fake(x, W_enc, b_enc, threshold, dead, rule, k, k_dead, backend):
    main = _encode_fake(x, W_enc, b_enc, threshold, None, rule, k, backend)
    return *main, *_encode_fake(x, W_enc, b_enc, None, None, "topk", k_dead, backend)


@torch.library.register_fake("fastsae::decode_error")
def _decode_error_fake(values, indices, offsets, W_dec, b_dec, target, backend):
    return torch.empty_like(target), target.new_empty(target.shape[0], dtype=wide_dtype(target))


@torch.library.register_fake("fastsae::decode")
def _decode_fake(values, indices, offsets, W_dec, b_dec, backend):
    return values.new_empty(offsets.shape[0] - 1, W_dec.shape[1])


@torch.library.register_fake("fastsae::code_grad")
def _code_grad_fake(grad_x_hat, W_dec, indices, offsets, backend):
    return grad_x_hat.new_empty(indices.shape[0])


@torch.library.register_fake("fastsae::transpose")
def _transpose_fake(values, indices, offsets, n_latents, backend):
    entries = indices.shape[0]
    rows = torch.sym_min(entries, n_latents)
    empty = lambda n: indices.new_empty(n, dtype=torch.int64)  # noqa: E731
    return empty(rows), empty(rows + 1), empty(entries), empty(entries)


@torch.library.register_fake("fastsae::row_grads")
def _row_grads_fake(coefs, x, starts, tokens, backend):
    return x.new_empty(starts.shape[0] - 1, x.shape[1], dtype=wide_dtype(x))


@torch.library.register_fake("fastsae::row_update")
def _row_update_fake(*args):
    return None


@torch.library.register_fake("fastsae::row_step")
def _row_step_fake(W_enc, *args):
    return W_enc.new_empty(W_enc.shape[1], dtype=wide_dtype(W_enc))
