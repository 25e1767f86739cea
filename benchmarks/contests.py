"""What is measured: each operator and the whole step, beside the ways that torch itself has.

A case makes the operands of one shape once and yields its entries: calls that take turns on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import cycle
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as nnf

from fastsae import SAE, SAEConfig, TopK
from fastsae.backends import available, resolve
from fastsae.backends import torch as portable
from fastsae.backends.triton.encode_fused import encode_topk_fused
from fastsae.benchmarks.cases import Shape, encode_work, step_work
from fastsae.benchmarks.checks import check_code, check_operator, check_step, check_trainer
from fastsae.benchmarks.launches import FUSED_WIDTH
from fastsae.benchmarks.processes import repeated_step
from fastsae.benchmarks.trainers import LONG, TRAINERS, Run, Trainer, build, dense, phases
from fastsae.formats import new_state
from fastsae.ops import implementation
from fastsae.optim import RowAdam
from fastsae.training import train_step
from fastsae.training.plan import plan_run

chunked = import_module("fastsae.backends.triton.encode")  # the package's `encode` is the function

__all__ = [
    "Entry",
    "backward",
    "ceilings",
    "chunks",
    "compiled_step",
    "decode",
    "encode",
    "narrow_backward",
    "narrow_step",
    "parts",
    "peers",
    "step",
    "vast_step",
]

NARROW = (("split32", "int8"), ("bfloat16", "int8"))
"""Formats of weights and states that are measured beside the case's dtype and fp32."""
COPY_BYTES = {"cuda": 2**32, "cpu": 2**28}
BATCHES = 3
"""Batches that the calls of an entry take turns on."""


@dataclass
class Entry:
    """One contestant: what to call, and the arithmetic and the bytes that it can't do without.

    ``check`` takes what a call returned and raises AssertionError where that is wrong. ``needs``: bytes of
    device memory beyond the operands, where that is much. ``dtype`` overrides the case's. ``format``: of
    weights and states, where they aren't the case's dtype and fp32. ``alone`` makes the call anew in a
    process of its own, whose memory is then measured on a CPU. ``phases``: times of the parts of a step.
    """

    op: str
    backend: str
    call: Callable[[], Any]
    flops: float = 0
    bytes: float = 0
    check: Callable[[Any], None] | None = None
    needs: float = 0
    note: str = ""
    dtype: torch.dtype | None = None
    format: str = ""
    alone: Callable[[], Callable[[], Any]] | None = None
    phases: Callable[[], dict[str, float]] | None = None


def _backends(device: str) -> list[str]:
    """Those of ours that run there: Triton's kernels first, where they do."""
    return ["triton", "torch"] if device == "cuda" or available()["triton"] is None else ["torch"]


def ceilings(s: Shape, dtype: torch.dtype, device: str) -> Iterator[Entry]:
    """What the machine can do: a large copy, a square GEMM, and torch.topk over [N, M] scores."""
    size = COPY_BYTES[device]
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    sink = torch.empty_like(source)
    yield Entry("copy", "torch", partial(sink.copy_, source), bytes=2 * size, note="read + written")
    side = max(s.N, min(s.M, 2048))
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    work = {"flops": 2 * side**3, "note": f"{side} cubed"}
    yield Entry("square gemm", "cublas" if device == "cuda" else "torch", partial(torch.mm, a, b), **work)
    if device == "cpu":
        blocks = partial(portable.score_all, a, b, None)
        yield Entry("square gemm", "torch, in blocks", blocks, **work)  # by oneDNN where that is the faster
    for kind in dict.fromkeys((dtype, torch.float32)):
        scores = torch.randn(s.N, s.M, device=device).to(kind)
        held = scores.numel() * scores.element_size()
        yield Entry("topk", "torch", partial(scores.topk, s.k), bytes=held, dtype=kind)


def encode(s: Shape, dtype: torch.dtype, device: str) -> Iterator[Entry]:
    """Encode with TopK; first the GEMM that every ratio refers to, on a GPU in half precision."""
    W, b = _weights(s, dtype, device), 0.1 * torch.randn(s.M, device=device).to(dtype)
    batches = _batches(s, dtype, device)
    work = encode_work(s, W.element_size())._asdict()
    yield _gemm(W, batches, s)
    if device == "cpu":
        blocks = Turns(batches, lambda x: portable.score_all(x, W, b))
        yield Entry("gemm", "torch", blocks, **work, note="in the blocks that encode uses, none kept")
    for name in _backends(device):
        yield _encode(name, implementation("encode", name), batches, W, b, s)
        if name == "triton" and s.D <= FUSED_WIDTH:
            yield _encode("triton fused", _fused, batches, W, b, s)
    entry = _encode("cublas + topk" if device == "cuda" else "mm + topk", _gemm_and_topk, batches, W, b, s)
    entry.needs = s.N * s.M * W.element_size()
    yield entry


def _gemm(W: Tensor, batches: list[Tensor], s: Shape) -> Entry:
    """The encoder's scores by torch.mm into memory that is there; of fp32 weights on a GPU, in bf16."""
    on_gpu = W.is_cuda
    half = torch.bfloat16 if on_gpu and W.dtype == torch.float32 else W.dtype
    W, out = W.to(half), torch.empty(s.N, s.M, dtype=half, device=W.device)
    turns = Turns([x.to(half) for x in batches], lambda x: torch.mm(x, W.T, out=out))
    work = encode_work(s, W.element_size())._asdict()
    return Entry("gemm", "cublas" if on_gpu else "mm", turns, **work, dtype=half)


def _encode(name: str, run: Callable, batches: list[Tensor], W: Tensor, b: Tensor, s: Shape) -> Entry:
    call = Turns(batches, lambda x: run(x, W, b, None, None, "topk", s.k))
    work = encode_work(s, W.element_size())._asdict()
    return Entry("encode", name, call, **work, check=check_code(call, W, b, s.k))


def _fused(x, W, b, threshold, subset, rule, k):
    return encode_topk_fused(x, W, b, k)


def _gemm_and_topk(x, W, b, threshold, subset, rule, k):
    values, indices = torch.addmm(b, x, W.T).topk(k)
    return values.relu_().flatten(), indices.flatten(), None


def chunks(s: Shape, dtype: torch.dtype, device: str) -> Iterator[Entry]:
    """The chunked encode at other widths of its chunks."""
    W, batches = _weights(s, dtype, device), _batches(s, dtype, device)
    run = implementation("encode", "triton")
    for width in (chunked.CHUNK // 4, chunked.CHUNK // 2, *(chunked.CHUNK * i for i in (1, 2, 4))):
        call = _patched(width, Turns(batches, lambda x: run(x, W, None, None, None, "topk", s.k)))
        yield Entry("encode", f"triton, chunks of {width:,}", call, 2 * s.N * s.M * s.D)


def _patched(width: int, call: Callable[[], Any]) -> Callable[[], Any]:
    def run():
        with mock.patch.object(chunked, "CHUNK", width):
            return call()

    return run


def decode(s: Shape, dtype: torch.dtype, device: str) -> Iterator[Entry]:
    """decode, with and without the error, and the gradient of the code."""
    W, b = _weights(s, dtype, device), 0.1 * torch.randn(s.D, device=device).to(dtype)
    code, batches, size = _code(s, dtype, device), _batches(s, dtype, device), W.element_size()
    gathered, row = s.N * s.k * s.D * size, s.N * s.D * size
    work = {"flops": 2 * s.N * s.k * s.D, "bytes": gathered + row}
    checked = partial(check_operator, s, dtype, device)
    for backend in _backends(device):
        run = partial(implementation("decode", backend), *code, W, b)
        yield Entry("decode", backend, run, **work, check=checked("decode", backend))
    values, indices, offsets = code
    bag = partial(nnf.embedding_bag, indices, W, offsets[:-1].int(), mode="sum", per_sample_weights=values)
    yield Entry("decode", "embedding_bag", bag, **work, note="without b_dec")
    by_gemm = partial(_dense_decode, values.view(s.N, s.k), indices.view(s.N, s.k).long(), W, b)
    yield Entry("decode", "dense", by_gemm, **work, needs=s.N * s.M * size)
    for backend in _backends(device):
        run = implementation("decode_error", backend)
        call = Turns(batches, lambda x, run=run: run(*code, W, b, x))
        error = {"flops": 2 * s.N * s.k * s.D, "bytes": gathered + 2 * row}
        yield Entry("decode_error", backend, call, **error, check=checked("decode_error", backend))
    for backend in _backends(device):
        run = implementation("code_grad", backend)
        call = Turns(batches, lambda x, run=run: run(x, W, indices, offsets))
        yield Entry("code_grad", backend, call, **work, check=checked("code_grad", backend))


def _dense_decode(values: Tensor, indices: Tensor, W: Tensor, b: Tensor) -> Tensor:
    dense = values.new_zeros(len(values), len(W)).scatter_(1, indices, values)
    return torch.addmm(b, dense, W)


def parts(s: Shape, dtype: torch.dtype, device: str) -> Iterator[Entry]:
    """The operators that the ordinary loop's backward is made of."""
    code, batches = _code(s, dtype, device), _batches(s, dtype, device)
    W, checked = _weights(s, dtype, device), partial(check_operator, s, dtype, device)
    latents, starts, tokens, order = implementation("transpose", "torch")(*code, s.M)
    rows = latents[latents < s.M]
    coefs, grad = code[0].float()[order], torch.randn(len(rows), s.D, device=device)
    update = W, None, new_state(W, "float32"), rows, grad, *_adam(device), 0.9, 0.999, 1e-8, True, 0, 0
    p, size = s.N * s.k, W.element_size()
    for backend in _backends(device):
        run = partial(implementation("transpose", backend), *code, s.M)
        check = checked("transpose", backend)
        yield Entry("transpose", backend, run, bytes=p * (size + 4 + 16) + 16 * len(latents), check=check)
    for backend in _backends(device):
        run = implementation("row_grads", backend)
        call = Turns(batches, lambda x, run=run: run(coefs, x, starts[: len(rows) + 1], tokens))
        moved = p * s.D * size + 4 * len(rows) * s.D
        yield Entry("row_grads", backend, call, 2 * p * s.D, moved, checked("row_grads", backend))
    for backend in _backends(device):
        run = partial(implementation("row_update", backend), *update)
        moved = len(rows) * s.D * (2 * size + 16 + 4)
        yield Entry("row_update", backend, run, bytes=moved, check=checked("row_update", backend))


def backward(s: Shape, dtype: torch.dtype, device: str) -> Iterator[Entry]:
    """Backward and optimizer of both matrices: row_step; dense GEMMs and dense Adam."""
    weights = _weights(s, dtype, device), _weights(s, dtype, device)
    code, batches, size = _code(s, dtype, device), _batches(s, dtype, device), dtype.itemsize
    ours = list(_row_steps(s, weights, code, batches, ("float32", "float32"), _backends(device)))
    yield from ours
    taken = _Later(lambda: _dense_backward(*weights, code, s), batches)
    needs = 6 * s.M * s.D * size + 2 * s.N * s.M * size
    note = "GEMMs and torch.optim.Adam(fused=True)"
    yield Entry("row_step", "dense", taken, ours[0].flops, ours[0].bytes, needs=needs, note=note)


def narrow_backward(s: Shape, dtype: torch.dtype, device: str) -> Iterator[Entry]:
    """row_step in formats of fewer bytes than fp32, on tokens of ``dtype``."""
    code, batches = _code(s, dtype, device), _batches(s, dtype, device)
    for formats in NARROW:
        planes = _weights(s, torch.bfloat16, device), _weights(s, torch.bfloat16, device)
        yield from _row_steps(s, planes, code, batches, formats, _backends(device)[:1])


def _row_steps(
    s: Shape, weights: tuple[Tensor, Tensor], code: tuple[Tensor, Tensor, Tensor], batches: list[Tensor],
    formats: tuple[str, str], backends: list[str],
) -> Iterator[Entry]:  # fmt: skip
    """An entry for each backend. Bytes: tokens, and what is held of each active row, there and back."""
    x, device, narrow = batches[0], str(batches[0].device), formats[0] != "float32"
    rest = [torch.zeros_like(W, dtype=torch.int16) if formats[0] == "split32" else None for W in weights]
    states = [new_state(W, formats[1]) for W in weights]
    b = torch.zeros(s.M, dtype=torch.float32 if narrow else x.dtype, device=device)
    coast, clock = _adam(device)
    arguments = (
        weights[0], b, weights[1], *rest, states[0], new_state(b[:, None], "float32"), states[1],
        [coast] * 3, [clock] * 3, [0.9, 0.999] * 3, [1e-8] * 3, [0] * 3, [False] * 3, True, *code,
    )  # fmt: skip
    held = sum(t.nbytes for t in (*weights, *rest, *states[0], *states[1]) if t is not None)
    active, scale = len(code[1].unique()), torch.full((s.N,), 1e-3, device=device)
    moved = 2 * s.N * s.k * s.D * x.element_size() + 2 * active * held / s.M
    for backend in backends:
        run = implementation("row_step", backend)
        call = Turns(batches, lambda x, run=run: run(*arguments, x, x, scale, 0.0))
        yield Entry(
            "row_step", backend, call, 6 * s.N * s.k * s.D, moved,
            check_operator(s, x.dtype, device, "row_step", backend, *formats),
            format="/".join(formats) if narrow else "",
        )  # fmt: skip


def _dense_backward(W_enc: Tensor, W_dec: Tensor, code, s: Shape) -> Callable[[Tensor], None]:
    values, indices = code[0].view(s.N, s.k), code[1].view(s.N, s.k).long()
    adam = torch.optim.Adam([W.requires_grad_() for W in (W_enc, W_dec)], lr=1e-6, fused=True)
    sparse = values.new_zeros(s.N, s.M).scatter_(1, indices, values)

    @torch.no_grad()
    def run(x: Tensor) -> None:
        grad_pre = torch.where(sparse > 0, torch.mm(x, W_dec.T), 0)
        W_dec.grad, W_enc.grad = torch.mm(sparse.T, x), torch.mm(grad_pre.T, x)
        adam.step()

    return run


def step(s: Shape, dtype: torch.dtype, device: str) -> Iterator[Entry]:
    """The whole training step; the dense one is autograd over [N, M] with torch.topk and a dense Adam."""
    sae = SAE(SAEConfig(s.D, s.M, TopK(s.k)), device=device, dtype=dtype)
    batches = _batches(s, dtype, device)
    yield from _steps(s, sae, batches, ("float32", "float32"), _backends(device))
    yield _dense_step(s, sae, batches)


def compiled_step(s: Shape, dtype: torch.dtype, device: str) -> Iterator[Entry]:
    """The dense step under torch.compile, which takes about a minute first."""
    sae = SAE(SAEConfig(s.D, s.M, TopK(s.k)), device=device, dtype=dtype)
    yield _dense_step(s, sae, _batches(s, dtype, device), compiled=True)


def narrow_step(s: Shape, dtype: torch.dtype, device: str) -> Iterator[Entry]:
    """The whole training step in formats of fewer bytes than fp32, on tokens of ``dtype``."""
    batches = _batches(s, dtype, device)
    for formats in NARROW:
        config = SAEConfig(s.D, s.M, TopK(s.k))
        sae = SAE(config, device=device, dtype=dtype, weight_format=formats[0])
        yield from _steps(s, sae, batches, formats, _backends(device)[:1])


def vast_step(s: Shape, dtype: torch.dtype, device: str) -> Iterator[Entry]:
    """The step of a dictionary that one card holds in the fewest bytes alone."""
    formats = ("bfloat16", "int8" if s.M <= 2**24 else "int8_row")
    sae = SAE(SAEConfig(s.D, s.M, TopK(s.k)), device=device, dtype=dtype, weight_format=formats[0])
    held = plan_run(s.D, s.M, s.k, s.N, weight_format=formats[0], state_dtype=formats[1])
    gib = (held["weights_bytes"] + held["states_bytes"] + held["counters_bytes"]) / 2**30
    for entry in _steps(s, sae, _batches(s, dtype, device), formats, _backends(device)[:1]):
        entry.note = f"beside {gib:.1f} GiB of weights and states"
        yield entry


def _steps(
    s: Shape, sae: SAE, batches: list[Tensor], formats: tuple[str, str], backends: list[str]
) -> Iterator[Entry]:
    optimizer, device = RowAdam(sae, lr=1e-6, state_dtype=formats[1]), str(batches[0].device)
    for backend in backends:

        def run(x: Tensor, backend: str = backend) -> Any:
            sae.backend = optimizer.backend = backend
            return train_step(sae, optimizer, x)

        yield Entry(
            "step", backend, Turns(batches, run), **step_work(s, sae.W_enc.element_size())._asdict(),
            check=check_step(s, sae.dtype, device, backend, *formats),
            format="" if formats[0] == "float32" else "/".join(formats),
            alone=partial(repeated_step, "fastsae", s) if formats[0] == "float32" else None,
            phases=partial(phases, Trainer(run, sae.encode, sae), batches[0], device),
        )  # fmt: skip


def _dense_step(s: Shape, sae: SAE, batches: list[Tensor], compiled: bool = False) -> Entry:
    weights, device, size = list(sae.parameters()), str(batches[0].device), sae.W_enc.element_size()
    taken = _Later(lambda: dense(s, device, Run(LONG, 1e-6), compiled, weights).step, batches)
    return Entry(
        "step", "dense compiled" if compiled else "dense", taken, **step_work(s, size)._asdict(),
        needs=6 * s.M * s.D * size + 4 * s.N * s.M * size,
    )  # fmt: skip


def peers(s: Shape, dtype: torch.dtype, device: str) -> Iterator[Entry]:
    """A whole training step of ours, of dense torch and of every library; the GEMM first."""
    batches = _batches(s, dtype, device)
    yield _gemm(_weights(s, dtype, device), batches, s)
    for name in TRAINERS:
        made: list[Trainer] = []

        def prepare(name: str = name, made: list = made) -> Callable[[Tensor], Any]:
            made.append(build(name, s, device, steps=LONG, lr=1e-6))
            return made[0].step

        ours = name.startswith("fastsae")
        yield Entry(
            "step", resolve("auto", batches[0]) if ours else name, _Later(prepare, batches),
            **step_work(s, batches[0].element_size())._asdict(), alone=partial(repeated_step, name, s),
            check=lambda _, name=name: check_trainer(name, s, device),
            format=name.removeprefix("fastsae ") if "/" in name else "",
            phases=lambda made=made: phases(made[0], batches[0], device) | {"note": made[0].note},
        )  # fmt: skip


class Turns:
    """Calls ``run`` on each of the batches in turn, so that none is found in a cache."""

    def __init__(self, batches: list[Tensor], run: Callable[[Tensor], Any]) -> None:
        self.batches, self.run, self.turn, self.latest = batches, run, cycle(batches), batches[0]

    def __call__(self) -> Any:
        self.latest = next(self.turn)
        return self.run(self.latest)


class _Later(Turns):
    """Turns whose ``run`` is prepared when it is first called: what it allocates is allocated only then."""

    def __init__(self, prepare: Callable[[], Callable[[Tensor], Any]], batches: list[Tensor]) -> None:
        def first(x: Tensor) -> Any:
            self.run = prepare()
            return self.run(x)

        super().__init__(batches, first)


def _weights(s: Shape, dtype: torch.dtype, device: str) -> Tensor:
    return torch.empty(s.M, s.D, dtype=dtype, device=device).normal_(std=s.D**-0.5)


def _batches(s: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.empty(s.N, s.D, dtype=dtype, device=device).normal_() for _ in range(BATCHES)]


def _code(s: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """values, indices, offsets of k random latents a token: an odd stride repeats none of 2^i latents."""
    first, stride = (torch.randint(s.M, (s.N, 1), device=device) for _ in range(2))
    indices = (first + torch.arange(s.k, device=device) * (2 * stride + 1)) % s.M
    values = torch.rand(s.N * s.k, device=device).add_(0.5).to(dtype)
    return values, indices.flatten().int(), torch.arange(s.N + 1, device=device) * s.k


def _adam(device: str) -> tuple[Tensor, Tensor]:
    """row_update's coast and clock, at some step of a run whose learning rate is next to nothing."""
    clock = torch.tensor([2, 1e-6, 1e-8, 1], dtype=torch.float64, device=device)
    return torch.zeros(2**20, dtype=torch.float64, device=device), clock
