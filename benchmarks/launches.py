"""Calls that make every operator of the Triton backend launch its kernels: few tokens, real widths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from fastsae.backends.triton.encode_fused import encode_topk_fused
from fastsae.ops import OPERATORS, implementation, wide_dtype

__all__ = ["FUSED_WIDTH", "operator_calls"]

N, M, K, K_DEAD = 16, 4096, 64, 512
"""Tokens, latents, and active latents per token, all and dead ones."""
M_FUSED = (131_072, 1_048_576)
"""Latents of the fused encode, whose buffers depend on them."""
FUSED_WIDTH = 1024
"""The widest input that the fused encode is built for."""

Call = tuple[tuple[str, str, int], Callable[[], Any]]


def operator_calls(cases: Iterable[tuple[torch.dtype, int]]) -> Iterator[Call]:
    """(operator, dtype, width) and a call of the Triton backend, for every operator and variant of it."""
    for dtype, width in cases:
        name = str(dtype).removeprefix("torch."), width
        for op in OPERATORS:
            for operands in _operands(op, dtype, width):
                yield (op, *name), partial(implementation(op, "triton"), *operands)
        for m in M_FUSED if width <= FUSED_WIDTH else ():
            x, W, b = (torch.empty(*shape, dtype=dtype) for shape in ((N, width), (m, width), (m,)))
            yield ("encode_topk_fused", *name), partial(encode_topk_fused, x, W, b, K)


def _operands(op: str, dtype: torch.dtype, d: int) -> Iterator[tuple]:
    """The arguments of each variant of ``op`` that may launch something of its own."""
    x, W, b, b_dec = (torch.empty(*shape, dtype=dtype) for shape in ((N, d), (M, d), (M,), (d,)))
    wide = wide_dtype(x)
    values, weights = torch.zeros(N * K, dtype=dtype), torch.empty(M, d, dtype=wide)
    code = values, torch.arange(N * K, dtype=torch.int32), torch.arange(N + 1) * K
    state = [weights, weights, torch.zeros(M, dtype=torch.int32)]
    coast, clock = torch.zeros(256, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    adam = 0.9, 0.999, 1e-8
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
        rows = torch.arange(0, M, 8)
        for unit_norm in (True, False):
            yield W, *state, rows, weights[: len(rows)], coast, clock, *adam, unit_norm
        yield W, *state, None, weights, None, clock, *adam, True
        yield W, *state, None, None, coast, clock, *adam, True
    elif op == "row_step":
        bias = [torch.zeros(M, dtype=wide), torch.zeros(M, dtype=wide), state[2]]
        for table, every in ((coast, False), (None, True)):
            yield (
                W, b, W, state, bias, state, [table] * 3, [clock] * 3, [0.9, 0.999] * 3, [1e-8] * 3,
                [every] * 3, True, *code, x, x, torch.ones(N, dtype=wide), 0.0,
            )  # fmt: skip
    else:
        raise LookupError(f"fastsae.benchmarks.launches has no operands for the new operator {op!r}")
