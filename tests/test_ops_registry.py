"""The contract: each operator has a schema, a fake, documented implementations and tests; opcheck."""

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

from fastsae import TopK, autograd, backends, ops
from fastsae import functional as F
from fastsae.formats import STATE_DTYPES, new_state
from fastsae.testing import assert_same, problem, random_code

pytestmark = pytest.mark.usefixtures("one_thread")

DIFFERENTIABLE = {"encode", "decode"}
# on a GPU kernels take only its tensors: tests/test_gpu.py
usable = pytest.mark.parametrize(
    "backend", [name for name in ops.BACKENDS if name != "triton" or not torch.cuda.is_available()]
)


@pytest.mark.parametrize("op", ops.OPERATORS)
def test_operator_is_complete(op):
    overload = getattr(torch.ops.fastsae, op).default
    schema = torch._C.parse_schema(f"fastsae::{op}{ops.OPERATORS[op]}")
    assert overload._schema == schema
    assert [a.name for a in schema.arguments][-1] == "backend"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CompositeExplicitAutograd")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "Meta"), "no fake"
    assert {"reference", "torch"} <= set(ops.BACKENDS)
    for backend in ops.BACKENDS:
        implementation = ops.implementation(op, backend)
        assert implementation.__doc__, backend
        takes = list(inspect.signature(implementation).parameters)
        assert takes == [a.name for a in schema.arguments][:-1], backend
    assert Path(__file__).with_name(f"test_ops_{op}.py").exists()
    if op in DIFFERENTIABLE:
        assert issubclass(getattr(autograd, op.capitalize()), torch.autograd.Function)
        assert getattr(F, op).__doc__


def test_every_backend_offers_the_operators_and_nothing_else():
    for backend in ops.BACKENDS:
        module = importlib.import_module(f"fastsae.backends.{backend}")
        assert sorted(module.__all__) == sorted(ops.OPERATORS)


CHANGED = {
    "row_update": ["weight", "remainder", "state"],
    "row_step": [
        "W_enc",
        "b_enc",
        "W_dec",
        "enc_remainder",
        "dec_remainder",
        "enc_state",
        "bias_state",
        "dec_state",
    ],
}


def test_only_the_optimizer_changes_its_arguments():
    for op in ops.OPERATORS:
        schema = getattr(torch.ops.fastsae, op).default._schema
        changed = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        assert changed == CHANGED.get(op, [])


def operands(dtype, n, m):
    """Arguments of every operator, less the backend."""
    x, W_enc, b_enc, W_dec, b_dec = problem(n, 5, m).to(dtype)
    code = random_code(n, m, spare=3)
    values, indices, offsets = code.values.to(dtype), code.indices, code.offsets
    _, starts, tokens, order = torch.ops.fastsae.transpose(values, indices, offsets, m, "reference")
    threshold, subset = torch.linspace(-1, 2, m), torch.arange(0, m, 3)
    wide = torch.promote_types(dtype, torch.float32)
    state, remainder = new_state(W_enc, "float32"), torch.zeros(m, 5, dtype=torch.int16)
    coast = torch.ones(8, dtype=torch.float64)
    clock = torch.tensor([3, 1e-3, 1e-8, 1], dtype=torch.float64)
    adam = (clock, 0.9, 0.999, 1e-8, True, 0, 0)
    dead = torch.arange(m) % 4 == 0
    weights = (W_enc, b_enc, W_dec)
    yield "encode", (x, W_enc, b_enc, None, None, "topk", 3)
    yield "encode", (x, W_enc, None, None, None, "topk", m)
    yield "encode", (x, W_enc, b_enc, None, subset, "topk", 1)
    yield "encode", (x, W_enc, b_enc, None, None, "batchtopk", 3)
    yield "encode", (x, W_enc, b_enc, threshold, None, "threshold", 0)
    yield "encode", (x, W_enc, b_enc, threshold[subset], subset, "threshold", 0)
    yield "encode", (x, W_enc, b_enc, torch.tensor(0.5), None, "threshold", 0)
    yield "decode", (values, indices, offsets, W_dec, b_dec)
    yield "decode", (values, indices, offsets, W_dec, None)
    yield "code_grad", (x, W_dec, indices, offsets)
    yield "transpose", (values, indices, offsets, m)
    yield "row_grads", (values[order], x, starts, tokens)
    yield "row_grads", (values[order], x, starts[1:3], tokens)
    yield "row_update", (W_enc, None, state, None, torch.ones(m, 5), None, *adam)
    yield "row_update", (W_enc, None, state, subset, torch.ones(len(subset), 5), coast, *adam)
    yield "row_update", (W_enc, None, state, None, None, coast, *adam)
    if dtype == torch.bfloat16:
        for kind in STATE_DTYPES:
            narrow = new_state(W_enc, kind)
            yield "row_update", (W_enc, remainder, narrow, None, torch.ones(m, 5), None, *adam)
    yield "encode_dead", (x, W_enc, b_enc, None, dead, "topk", 3, 2)
    yield "encode_dead", (x, W_enc, b_enc, None, dead, "batchtopk", 3, m)
    yield "encode_dead", (x, W_enc, None, threshold, dead, "threshold", 0, 2)
    yield "decode_error", (values, indices, offsets, W_dec, b_dec, x)
    yield "decode_error", (values, indices, offsets, W_dec, None, x)
    error, scale = torch.cat([x, x])[:n], torch.rand(n, dtype=wide)
    three = [None, coast, None], [clock] * 3, [0.9, 0.999] * 3, [1e-8] * 3, [0, 1, 2], [False, False, True]
    states = [new_state(t, "float32") for t in (W_enc, b_enc[:, None], W_dec)]
    rest = values, indices, offsets, x, error, scale
    yield "row_step", (*weights, None, None, *states, *three, True, *rest, 0.1)
    yield "row_step", (*weights, None, None, [], [], states[2], *three, False, *rest, 0.0)
    if dtype == torch.bfloat16:
        narrow = [new_state(W_enc, "int8"), states[1], new_state(W_dec, "int8_row")]
        yield "row_step", (*weights, remainder, None, *narrow, *three, True, *rest, 0.1)


@usable
@pytest.mark.parametrize(
    ("dtype", "n", "m"), [(torch.float32, 6, 11), (torch.bfloat16, 3, 11), (torch.float32, 0, 4)], ids=str
)
def test_opcheck(backend, dtype, n, m):
    """Schema, fake and aliasing, with symbolic shapes too."""
    tested = set()
    for op, args in operands(dtype, n, m):
        opcheck(getattr(torch.ops.fastsae, op).default, (*args, backend))
        tested.add(op)
    assert tested == set(ops.OPERATORS)


@usable
def test_fakes_have_the_shapes_dtypes_and_strides_of_the_results(backend):
    wide = () if backend == "triton" else (torch.float64,)
    for dtype in (torch.float32, torch.float16, *wide):
        for op, args in operands(dtype, 6, 11):
            if "threshold" in args:
                continue  # how many entries is known after the fact
            run = getattr(torch.ops.fastsae, op)
            faked = run(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args), backend)
            real = run(*args, backend)
            pairs = zip(
                *((r,) if isinstance(r, torch.Tensor) else r or () for r in (faked, real)), strict=True
            )
            assert all((f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride()) for f, r in pairs), op


# torch._dynamo itself makes the instance it warns of
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile_without_a_graph_break():
    torch._dynamo.reset()
    p = problem(5, 7, 50)

    def reconstruct(x, W_enc, b_enc, W_dec, b_dec):
        return F.decode(F.encode(x, W_enc, b_enc, TopK(3)), W_dec, b_dec)

    results = []
    for run in (reconstruct, torch.compile(reconstruct, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in p]
        x_hat = run(*leaves)
        x_hat.square().sum().backward()
        results.append([x_hat, *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert_same(compiled, eager)


def test_available_and_resolve():
    names = backends.available()
    assert list(names) == ["reference", "torch", "triton", "cuda"]
    assert names["reference"] is None
    assert names["torch"] is None
    assert all(reason is None or len(reason) > 10 for reason in names.values())
    assert backends.resolve("auto") in ops.BACKENDS
    for name, reason in names.items():
        if reason is None:
            assert backends.resolve(name) == name
        else:
            with pytest.raises(
                ValueError, match=f"backend: got '{name}', expected a usable one .*: {re.escape(reason)}"
            ):
                backends.resolve(name)
    with pytest.raises(ValueError, match="backend: got 'tritn', expected one of 'auto', 'reference'"):
        backends.resolve("tritn")


class Like:
    """What resolve looks at of a tensor on a GPU that isn't here."""

    def __init__(self, kind="cuda", dtype=torch.bfloat16, width=64):
        self.device, self.dtype, self.shape, self.ndim = torch.device(kind), dtype, (3, width), 2


def test_auto_takes_triton_where_it_was_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.resolve("auto", Like()) == "torch"
    monkeypatch.setattr(backends, "MEASURED", {90: "results/h200.json"})
    assert "triton for CUDA tensors on sm_90 (results/h200.json)" in backends.diagnose()["backend auto"]
    assert backends.resolve("auto", Like()) == "triton"
    for other in (Like("cpu"), Like(dtype=torch.float64), Like(width=16385)):
        assert backends.resolve("auto", other) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert backends.resolve("auto", Like()) == "torch"


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.resolve("auto", Like()) == "torch"
    with pytest.raises(ValueError, match="triton is not installed"):
        backends.resolve("triton", Like())


@pytest.mark.skipif(backends.available()["triton"] is not None, reason="Triton can't run here")
def test_what_triton_does_not_take_is_refused(monkeypatch):
    for like, reason in (
        (torch.ones(2, 3).double(), "float64"),
        (torch.ones(1, 16385), "rows of 16385: its kernels hold at most 16384"),
    ):
        with pytest.raises(ValueError, match=f"backend: got 'triton' for {reason}"):
            backends.resolve("triton", like)
    monkeypatch.setattr(sys.modules["triton"].knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="backend: got 'triton' for a tensor on cpu"):
        backends.resolve("triton", torch.ones(2, 3))


def test_diagnose_survives_the_import_of_a_backend():
    """The module fastsae.backends.torch must not shadow PyTorch in its package."""
    ops.implementation("encode", "torch")
    report = backends.diagnose()
    assert report["torch"] == torch.__version__
    assert report["backend reference"] == "ok"
