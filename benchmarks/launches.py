"""Calls that make every operator of the Triton backend launch its kernels: few tokens, real widths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from fastsae.backends.triton.encode_fused import encode_topk_fused
from fastsae.formats import new_state
from fastsae.ops import OPERATORS, implementation, wide_dtype

__all__ = ["FUSED_WIDTH", "operator_calls"]

N, M, K, K_DEAD = 16, 4096, 64, 512
"""Tokens, latents, and active latents per token, all and dead ones."""
M_FUSED = (131_072, 1_048_576)
"""Latents of the fused encode, whose buffers depend on them."""
FUSED_WIDTH = 1024
"""The widest input that the fused encode is built for."""

FORMAT_OPERATORS = ("decode", "decode_error", "code_grad", "row_update", "row_step")
"""Those whose kernels depend on how weights or states are held."""

Call = tuple[tuple[str, str, int], Callable[[], Any]]


def operator_calls(
    cases: Iterable[tuple[torch.dtype, int]], formats: Iterable[tuple[str, str, torch.dtype, int]] = ()
) -> Iterator[Call]:
    """(operator, dtype, width) and a call of the Triton backend, for every operator and variant of it.

    ``formats``: of weights and of states, the dtype of tokens beside them, and the width.
    """
    for weights, states, dtype, width in formats:
        for op in FORMAT_OPERATORS:
            for operands in _operands(op, dtype, width, weights, states):
                yield (op, f"{weights}/{states}", width), partial(implementation(op, "triton"), *operands)
    for dtype, width in cases:
        name = str(dtype).removeprefix("torch."), width
        for op in OPERATORS:
            for operands in _operands(op, dtype, width):
                yield (op, *name), partial(implementation(op, "triton"), *operands)
        for m in M_FUSED if width <= FUSED_WIDTH else ():
            x, W, b = (torch.empty(*shape, dtype=dtype) for shape in ((N, width), (m, width), (m,)))
            yield ("encode_topk_fused", *name), partial(encode_topk_fused, x, W, b, K)


def _operands(
    op: str, dtype: torch.dtype, d: int, weights: str = "float32", states: str = "float32"
) -> Iterator[tuple]:
    """The arguments of each variant of ``op`` that may launch something of its own."""
    x, W = torch.empty(N, d, dtype=dtype), torch.empty(M, d, dtype=dtype)
    remainder, bias_dtype, wide = None, dtype, wide_dtype(x)
    if weights != "float32":
        W, bias_dtype = W.bfloat16(), torch.float32
        remainder = torch.empty(M, d, dtype=torch.int16) if weights == "split32" else None
    b, b_dec = torch.empty(M, dtype=bias_dtype), torch.empty(d, dtype=bias_dtype)
    values, grad = torch.zeros(N * K, dtype=dtype), torch.empty(M, d, dtype=wide)
    code = values, torch.arange(N * K, dtype=torch.int32), torch.arange(N + 1) * K
    state = new_state(W, states)
    coast, clock = torch.zeros(256, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    adam = clock, 0.9, 0.999, 1e-8
    if op == "encode":
        for rule in ("topk", "batchtopk"):
            yield x, W, b, None, None, rule, K
            yield x, W, b, None, torch.arange(0, M, 8), rule, K
        yield x, W, b, torch.zeros(M, dtype=wide), None, "threshold", 0
        yield x, W, b, torch.zeros((), dtype=wide), None, "threshold", 0
    elif op == "encode_dead":
        for rule in ("topk", "batchtopk"):
            yield x, W, b, None, torch.arange(M) % 8 == 0, rule, K, K_DEAD
    elif op == "decode":
        yield *code, W, b_dec
        yield *code, W, None
    elif op == "decode_error":
        yield *code, W, b_dec, x
    elif op == "code_grad":
        yield x, W, *code[1:]
    elif op == "transpose":
        yield *code, M
    elif op == "row_grads":
        for coefs in (values, values.to(wide)):
            yield coefs, x, torch.arange(N * K + 1), torch.zeros(N * K, dtype=torch.int64)
    elif op == "row_update":
        rows, held = torch.arange(0, M, 8), (W, remainder, state)
        for unit_norm in (True, False):
            yield *held, rows, grad[: len(rows)], coast, *adam, unit_norm, 0, 0
        yield *held, None, grad, None, *adam, True, 0, 0
        yield *held, None, None, coast, *adam, True, 0, 0
    elif op == "row_step":
        bias = new_state(b[:, None], "float32")
        for table, every in ((coast, False), (None, True)):
            yield (
                W, b, W, remainder, remainder, state, bias, state, [table] * 3, [clock] * 3, [0.9, 0.999] * 3,
                [1e-8] * 3, [0] * 3, [every] * 3, True, *code, x, x, torch.ones(N, dtype=wide), 0.0,
            )  # fmt: skip
    else:
        raise LookupError(f"fastsae.benchmarks.launches has no operands for the new operator {op!r}")
