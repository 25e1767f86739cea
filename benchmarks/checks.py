"""No figure on a wrong result: small samples against fp64, before a contestant is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsae import SAE, SAEConfig, TopK
from fastsae.benchmarks.cases import Shape
from fastsae.benchmarks.trainers import build, check
from fastsae.formats import new_state
from fastsae.ops import implementation
from fastsae.optim import RowAdam
from fastsae.training import train_step

__all__ = ["check_code", "check_operator", "check_step", "check_trainer"]

TOKENS, LATENTS = 8, 256
"""Tokens whose codes are checked; the size of the problem that the other operators are checked on, at full
width."""
BLOCK = 2**26
"""Weights upcast at a time."""


def check_code(call: Any, W: Tensor, b: Tensor, k: int) -> Callable[[Any], None]:
    """A check of the codes of a few tokens that ``call`` was made on last: values and selection, by fp64.

    Scores of half precision may be rounded before the selection (the baselines do that), so a selected one
    may fall below the k-th best by that much.
    """

    def check(result: tuple[Tensor, Tensor, Any]) -> None:
        values, indices = (t.view(-1, k)[:TOKENS] for t in result[:2])
        x, step = call.latest[:TOKENS].double(), max(1, BLOCK // W.shape[1])
        exact = torch.cat([x @ rows.double().T for rows in W.split(step)], 1) + b.double()
        allowed = 4 * _eps(W.dtype) * exact.abs().max()
        chosen = exact.gather(1, indices.long())
        _require(values.double(), chosen.relu(), allowed)
        _require(chosen.sort(1).values, exact.topk(k).values.flip(1), allowed)

    return check


def check_operator(
    s: Shape, dtype: torch.dtype, device: str, op: str, backend: str, weights: str = "float32",
    states: str = "float32",
) -> Callable[[Any], None]:  # fmt: skip
    """A check of ``op`` at width D, on a problem of LATENTS latents, against the oracle in fp64; of narrower
    formats, which round at random, against the oracle in the same."""

    def check(_: Any) -> None:
        torch.manual_seed(0)
        arguments = _arguments(op, s.D, min(s.k, LATENTS), dtype, device, weights, states)
        narrow = weights != "float32"
        widen = lambda t: t.double() if t.is_floating_point() and not narrow else t.clone()  # noqa: E731
        exact = _map(widen, arguments)
        got, want = implementation(op, backend)(*arguments), implementation(op, "reference")(*exact)
        if op in ("row_update", "row_step"):  # they change their arguments
            got, want = (got, arguments), (want, exact)
        for a, e in zip(_tensors(got), _tensors(want), strict=True):
            if narrow and a.dtype in (torch.bfloat16, torch.uint8, torch.int16):
                _require_equal_mostly(a, e)
                continue
            floating = a.dtype.is_floating_point and e.numel()
            _require(a.double(), e.double(), 8 * _eps(a.dtype) * e.abs().max() if floating else 0)

    return check


def check_step(
    s: Shape, dtype: torch.dtype, device: str, backend: str, weights: str = "float32", states: str = "float32"
) -> Callable[[Any], None]:
    """A check of a few whole steps, at width D on few latents, against the portable backend in fp64."""
    eps = _eps(dtype if weights == "float32" else torch.bfloat16)

    def check(_: Any) -> None:
        losses = []
        for kind, name, *formats in (
            (dtype, backend, weights, states), (torch.float64, "torch", "float32", "float32")
        ):  # fmt: skip
            torch.manual_seed(0)
            config = SAEConfig(s.D, LATENTS, TopK(min(s.k, 16)))
            sae = SAE(config, dtype=torch.float32, weight_format=formats[0]).to(device)
            x = torch.randn(4 * TOKENS, s.D).to(device)
            sae, x = sae.to(dtype).to(kind), x.to(dtype).to(kind)
            sae.backend = name
            opt = RowAdam(sae, lr=1e-3, backend=name, state_dtype=formats[1])
            losses.append(torch.stack([train_step(sae, opt, x)["loss"] for _ in range(3)]).double())
        _require(*losses, 32 * eps * losses[1].abs().max())

    return check


def check_trainer(name: str, s: Shape, device: str) -> None:
    """A check of a contestant of :mod:`fastsae.benchmarks.trainers`, at width D on few latents."""
    few = Shape(8 * TOKENS, s.D, LATENTS, min(s.k, 16))
    torch.manual_seed(0)
    x = torch.randn(few.N, 16) @ torch.randn(16, s.D)
    with torch.enable_grad():
        check(build(name, few, device, steps=100), few, x.to(device))


def _arguments(op: str, d: int, k: int, dtype: torch.dtype, device: str, weights: str, states: str) -> tuple:
    n, m = TOKENS, LATENTS
    draw = lambda *shape, kind=dtype: torch.randn(shape).to(device, kind)  # noqa: E731
    x, W, b, entries = draw(n, d), draw(m, d), draw(d), n * k
    indices = torch.stack([torch.randperm(m)[:k] for _ in range(n)]).flatten().int().to(device)
    values, offsets = draw(entries).abs(), torch.arange(n + 1, device=device) * k
    code, zeros = (values, indices, offsets), lambda *shape: torch.zeros(shape, device=device)
    coast, clock = torch.zeros(8, dtype=torch.float64, device=device), torch.tensor([1, 0.1, 0.1, 1])
    clock, adam = clock.double().to(device), (0.9, 0.999, 1e-8)
    if op == "row_step":
        planes, bias = (W, draw(m, d)), draw(m)
        if weights != "float32":
            planes, bias = (W.bfloat16(), planes[1].bfloat16()), bias.float()
        rest = [zeros(m, d).short() if weights == "split32" else None for _ in planes]
        held = *rest, new_state(W, states), new_state(bias[:, None], "float32"), new_state(W, states)
        return (
            planes[0], bias, planes[1], *held, [coast] * 3, [clock] * 3, [0.9, 0.999] * 3, [1e-8] * 3,
            [0] * 3, [False] * 3, True, *code, x, draw(n, d), zeros(n) + 1, 0.0,
        )  # fmt: skip
    if op == "row_update":
        rows = torch.arange(0, m, 3, device=device)
        grad = draw(len(rows), d, kind=torch.float32)
        return W, None, new_state(W, "float32"), rows, grad, coast, clock, *adam, True, 0, 0
    if op == "row_grads":
        _, starts, tokens, order = implementation("transpose", "reference")(*code, m)
        return values.float()[order], x, starts, tokens
    return {
        "decode": (*code, W, b),
        "decode_error": (*code, W, b, x),
        "code_grad": (x, W, indices, offsets),
        "transpose": (*code, m),
    }[op]


def _eps(dtype: torch.dtype) -> float:
    """Relative rounding of a result; of fp32, that of its sums of thousands of terms."""
    return max(torch.finfo(dtype).eps, 2e-6)


def _map(f: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return f(value)
    return type(value)(_map(f, v) for v in value) if isinstance(value, list | tuple) else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


def _require_equal_mostly(got: Tensor, want: Tensor) -> None:
    """Planes and codes differ where sums in another order fall on another side of a random bit: seldom.

    The low bits of split32 are left: they hold the last bits of those sums.
    """
    share = 1.0 if got.dtype == torch.int16 else (got == want).double().mean().item()
    if share < 0.98:
        raise AssertionError(f"{1 - share:.1%} of the {got.dtype} differ, allowed 2%")


def _require(got: Tensor, want: Tensor, allowed: Any) -> None:
    error = (got - want).abs().max().item() if want.numel() else 0.0
    if not error <= float(allowed):  # NaN fails too
        raise AssertionError(f"off by {error:.3g}, allowed {float(allowed):.3g}")
