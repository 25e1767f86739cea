"""The kernels on a GPU, in each dtype: against the fp64 oracle on a CPU, run by run, and in a CUDA graph.

The other files hold the same kernels, in Triton's interpreter, against more.
"""

import copy

import pytest
import torch

from fastsae import SAE, AuxK, BatchTopK, JumpReLU, ReLU, SAEConfig, SparseCode, TopK, ops
from fastsae import functional as F
from fastsae.formats import new_state, split, write_rows
from fastsae.optim import RowAdam
from fastsae.testing import (
    ADVERSARIAL,
    adversarial,
    assert_close,
    assert_encodes,
    assert_repeatable,
    assert_same,
    assert_same_code,
    problem,
    random_code,
)
from fastsae.training import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N, D, M, K = 300, 256, 20_000, 64
RULES = {
    "TopK": (TopK(K), None),
    "TopK of many": (TopK(300), None),
    "TopK of one": (TopK(1), None),
    "BatchTopK": (BatchTopK(K), None),
    "BatchTopK with a threshold": (BatchTopK(K), 1.5),
    "JumpReLU": (JumpReLU(), torch.linspace(1, 4, M)),
    "ReLU": (ReLU(), None),
}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def several_chunks(monkeypatch):
    from fastsae.backends.triton import encode

    monkeypatch.setattr(encode, "ROWS", 128)
    monkeypatch.setattr(encode, "CHUNK", 3000)


def on_gpu(value):
    """Tensors moved, in nested lists and tuples too; everything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    return type(value)(map(on_gpu, value)) if isinstance(value, list | tuple) else value


def encode(operands, activation, threshold=None, **options):
    return F.encode(*on_gpu(operands), activation, threshold=on_gpu(threshold), backend="triton", **options)


@dtypes
@pytest.mark.parametrize("rule", RULES)
def test_encode(several_chunks, rule, dtype):
    p = problem(N, D, M).to(dtype)
    activation, threshold = RULES[rule]
    code = encode(p.encoder, activation, threshold).to("cpu")
    assert assert_encodes(code, *p.encoder, activation, threshold) > 0


@dtypes
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_rows(several_chunks, name, dtype):
    n, d, m, k = 200, 8, 7000, 50
    p = adversarial(name, n, d, m, k).to(dtype)
    for rule, threshold in (("topk", None), ("batchtopk", None), ("threshold", torch.tensor(1.5))):
        args = p.x.contiguous(), p.W_enc, p.b_enc, threshold, None, rule, k
        exact = (t.double() if isinstance(t, torch.Tensor) else t for t in args)
        expected = SparseCode(*ops.implementation("encode", "reference")(*exact), m)
        actual = SparseCode(*ops.implementation("encode", "triton")(*on_gpu(args)), m).to("cpu")
        assert_same_code(actual, expected)


@dtypes
@pytest.mark.parametrize("name", ["random", *ADVERSARIAL])
def test_fused_encode(name, dtype):
    from fastsae.backends.triton.encode_fused import encode_topk_fused

    n, d, m, k = 200, 72, 7000, 50
    if name == "random":
        p = problem(n, d, m).to(dtype)
        code = SparseCode(*encode_topk_fused(*on_gpu(p.encoder), k), m).to("cpu")
        assert assert_encodes(code, *p.encoder, TopK(k)) > 0
        return
    p = adversarial(name, n, d, m, k).to(dtype)
    x, W_enc, b_enc = (t.contiguous() for t in p.encoder)
    exact = (t.double() for t in (x, W_enc, b_enc))
    expected = SparseCode(*ops.implementation("encode", "reference")(*exact, None, None, "topk", k), m)
    assert_same_code(SparseCode(*encode_topk_fused(*on_gpu((x, W_enc, b_enc)), k), m).to("cpu"), expected)


def arguments(dtype, d=D, d_out=200, m=500, n=600):
    """For each operator but encode, operands that reach every branch: hot latents, spare places, padding."""
    p = problem(n, d, m, d_out=d_out).to(dtype)
    code = random_code(n, m, spare=9)
    for first, end in zip(code.offsets[:-1], code.offsets[1:], strict=True):
        if first < end and 7 not in code.indices[first:end]:
            code.indices[first] = 7  # fires on nearly every token
    values, indices, offsets = code.values.to(dtype), code.indices, code.offsets
    latents, starts, tokens, order = ops.implementation("transpose", "reference")(values, indices, offsets, m)
    wide = [torch.rand(m, d) * 0.1, torch.rand(m, d) + 0.1, torch.arange(m).remainder(9).int()]
    clock = torch.tensor([9, 1e-2, 1e-3, 1], dtype=torch.float64)
    coast = torch.rand(10, dtype=torch.float64) * 0.01
    adam = clock, 0.9, 0.999, 1e-2
    error = problem(n, d_out, 1, seed=1).x.to(dtype)
    yield "decode", (values, indices, offsets, p.W_dec, p.b_dec)
    yield "decode_error", (values, indices, offsets, p.W_dec, p.b_dec, error)
    yield "code_grad", (error, p.W_dec, indices, offsets)
    yield "transpose", (values, indices, offsets, m)
    yield "row_grads", (values.nan_to_num()[order], error, starts, tokens)
    yield "row_update", (p.W_enc, None, wide, latents, torch.rand(len(latents), d), coast, *adam, True, 0, 0)
    bias = [torch.rand(m, 1), torch.rand(m, 1) + 0.1, wide[2].clone()]
    dec = [torch.rand(m, d_out) * 0.1, torch.rand(m, d_out) + 0.1, wide[2].clone()]
    shared = [coast, None, coast], [clock] * 3, [0.9, 0.999] * 3, [1e-2] * 3, [0] * 3, [False, True, False]
    second = SparseCode(values, indices, offsets, m)
    both = torch.cat([second.offsets, second.offsets[-1:].expand(n)])
    rows = torch.cat([error, torch.zeros_like(error)]), torch.rand(2 * n)
    for unit_norm, l1 in ((True, 0.0), (False, 0.01)):
        yield "row_step", (
            p.W_enc, p.b_enc, p.W_dec, None, None, [t.clone() for t in wide], bias, dec, *shared, unit_norm,
            values, indices, both, p.x, *rows, l1,
        )  # fmt: skip


def run(op, backend, args, device="cpu", dtype=None):
    """All tensors of the result, and those that the operator changes in place, on the CPU."""

    def prepare(value):
        if isinstance(value, torch.Tensor):
            value = value.to(dtype) if dtype and value.is_floating_point() else value
            return value.to(device, copy=True)
        return [prepare(v) for v in value] if isinstance(value, list | tuple) else value

    args = [prepare(a) for a in args]
    out = ops.implementation(op, backend)(*args)
    flat = torch.utils._pytree.tree_leaves([out, args if op.startswith("row_") else []])
    return [t.cpu() for t in flat if isinstance(t, torch.Tensor)]


WIDTHS = [(D, 200), (4096, 1024)]  # rows of one warp, and of several


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@dtypes
def test_the_other_operators(dtype, widths):
    for op, args in arguments(dtype, *widths):
        results = run(op, "triton", args, DEVICE), run(op, "reference", args)
        exact = run(op, "reference", args, dtype=torch.float64)
        for i, (actual, eager, oracle) in enumerate(zip(*results, exact, strict=True)):
            if actual.is_floating_point():
                assert_close(actual, eager, oracle, f"{op}, tensor {i}")
            else:
                assert_same(actual, eager, f"{op}, tensor {i}")


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@dtypes
def test_two_runs_of_an_operator_agree_to_the_bit(dtype, widths):
    for op, args in arguments(dtype, *widths):
        for _ in range(5):  # a race shows now and then
            assert_repeatable(lambda op=op, args=args: run(op, "triton", args, DEVICE))


FORMATS = [("split32", "int8"), ("bfloat16", "int8_row"), ("split32", "bfloat16"), ("bfloat16", "int8")]
formats = pytest.mark.parametrize(("weights", "states"), FORMATS, ids=map("/".join, FORMATS))


def in_formats(weights, states, d, d_out, dtype=torch.bfloat16):
    """row_update's and row_step's operands beside tokens of ``dtype``, with moments that aren't 0."""
    generator = torch.Generator().manual_seed(2)

    def hold(w):
        """weight, remainder, state."""
        weight, remainder = split(w) if weights == "split32" else (w.bfloat16(), None)
        state, shape = new_state(w, states), w.shape
        v = torch.rand(shape[0], state[1].shape[1], generator=generator) + 0.1
        write_rows(w.clone(), None, state, None, (w, torch.randn(shape, generator=generator), v), 1, 0)
        state[2].copy_(torch.arange(len(w)).remainder(9))
        return weight.clone(), None if remainder is None else remainder.clone(), state

    *_, (_, update), (_, step), _ = arguments(dtype, d, d_out)
    (W_enc, enc_rest, enc), (W_dec, dec_rest, dec) = hold(update[0].float()), hold(step[2].float())
    yield "row_update", (W_enc, enc_rest, enc, *update[3:])
    bias = step[1].float()
    yield "row_step", (W_enc, bias, W_dec, enc_rest, dec_rest, enc, step[6], dec, *step[8:])


@pytest.mark.parametrize("widths", [(D, 200), (4096, 1100)], ids=str)
@formats
def test_formats(weights, states, widths):
    """What was rounded to few bits is the oracle's but where its sums fell on another side of a bit."""
    for op, args in in_formats(weights, states, *widths):
        for _ in range(3):
            assert_repeatable(lambda op=op, args=args: run(op, "triton", args, DEVICE))
        for actual, expected in zip(run(op, "triton", args, DEVICE), run(op, "reference", args), strict=True):
            assert actual.dtype == expected.dtype
            if actual.dtype in (torch.uint8, torch.bfloat16):
                assert (actual.nan_to_num() == expected.nan_to_num()).double().mean() > 0.98
            elif actual.dtype == torch.float32:
                torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
            elif actual.dtype != torch.int16:
                assert_same(actual, expected)


@formats
def test_the_same_bytes_where_moments_are_exact(weights, states):
    generator = torch.Generator().manual_seed(3)
    draw = lambda most: torch.randint(-most, most + 1, (64, 1024), generator=generator).float()  # noqa: E731
    W = draw(1000).bfloat16()
    state, clock = new_state(W, states), torch.tensor([9, 0, 0.5, 1], dtype=torch.float64)
    v = draw(90).square()[:, : state[1].shape[1]]
    write_rows(W.float(), None, state, None, (W.float(), draw(64), v), 1, 0)
    remainder = draw(1000).short() if weights == "split32" else None
    args = W, remainder, state, None, draw(32), None, clock, 0.5, 0.5, 1e-8, False, 2**31 - 1, 7
    for actual, expected in zip(
        run("row_update", "triton", args, DEVICE), run("row_update", "torch", args), strict=True
    ):
        assert_same(actual, expected)


@dtypes
def test_two_runs_of_encode_agree_to_the_bit(several_chunks, dtype):
    p = problem(N, D, M).to(dtype)
    for activation, threshold in RULES.values():
        assert_repeatable(lambda a=activation, t=threshold: encoded(p, a, t))


def encoded(p, activation, threshold):
    code = encode(p.encoder, activation, threshold)
    return code.values, code.indices, code.offsets


def test_dead_latents_by_the_thousand():
    """A list that several warps keep, beside the code."""
    p, dead = problem(40, 64, 9000, integers=True), torch.arange(9000) % 2 == 0
    args = p.x, p.W_enc, p.b_enc, None, dead, "topk", K, 2048
    actual = [t.cpu() for t in ops.implementation("encode_dead", "triton")(*on_gpu(args))]
    expected = ops.implementation("encode_dead", "reference")(*args)
    for a, b in zip(actual[:3], expected[:3], strict=True):
        assert_same(a, b)
    for i in (3, 4):  # in any order
        assert_same(actual[i].view(40, -1).sort(1).values, expected[i].view(40, -1).sort(1).values)


def test_more_tokens_than_a_chunk_has_rows():
    n, m, k = 8200, 300, 3
    p = problem(n, 8, m, integers=True)
    for rule in ("topk", "batchtopk"):
        args = p.x, p.W_enc, p.b_enc, None, None, rule, k
        actual = SparseCode(*ops.implementation("encode", "triton")(*on_gpu(args)), m).to("cpu")
        assert_same_code(actual, SparseCode(*ops.implementation("encode", "reference")(*args), m))


def test_weights_beyond_two_to_the_31_elements():
    m, d = 2**19 + 100, 4096
    W = torch.empty(m, d, dtype=torch.bfloat16, device=DEVICE).normal_()
    indices = torch.tensor([m - 1, 0, m - 50], dtype=torch.int32, device=DEVICE)
    values, offsets = (
        torch.ones(3, dtype=torch.bfloat16, device=DEVICE),
        torch.tensor([0, 2, 3], device=DEVICE),
    )
    x_hat = F.decode(SparseCode(values, indices, offsets, m), W, backend="triton")
    expected = torch.stack([W[m - 1].float() + W[0].float(), W[m - 50].float()]).bfloat16()
    torch.testing.assert_close(x_hat, expected)
    x = W[m - 50 : m - 49].clone()  # most like itself
    assert F.encode(x, W, None, TopK(4), backend="triton").indices[0] == m - 50


def test_a_run_begun_on_a_cpu_goes_on():
    sae = make(TopK(8))[0].to("cpu")
    twin = copy.deepcopy(sae)
    sae.backend = twin.backend = "torch"
    on_cpu = RowAdam(sae, 1e-3)
    for x in batches(count=20):
        train_step(sae, on_cpu, x.cpu())
    twin.load_state_dict(sae.state_dict())
    twin.to(DEVICE).backend = "triton"
    optimizer = RowAdam(twin, 1e-3)
    optimizer.load_state_dict(on_cpu.state_dict())
    for x in batches(count=260):
        train_step(twin, optimizer, x)
    optimizer.flush_()
    assert all(p.isfinite().all() for p in twin.parameters())
    assert int(optimizer.param_groups[0]["steps"]) == 280


def make(activation, dtype=torch.float32, mode="deferred", weights="float32", states="float32"):
    torch.manual_seed(0)
    config = SAEConfig(D, 3000, activation, losses=(AuxK(0.5, k_aux=32, dead_after=500),))
    sae = SAE(config, backend="triton", weight_format=weights).to(DEVICE, dtype)
    with torch.no_grad():
        sae.b_enc[::6] = -30
    return sae, RowAdam(sae, 1e-3, eps=1e-3, mode=mode, state_dtype=states, backend="triton")


def batches(dtype=torch.float32, count=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(N, D, generator=generator).to(DEVICE, dtype) for _ in range(count)]


def everything(sae, optimizer):
    states = [t for state in optimizer.state.values() for t in state.values()]
    return [*(t.clone() for t in sae.state_dict().values()), *(t.clone() for t in states)]


@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred"])
@pytest.mark.parametrize("activation", [TopK(8), BatchTopK(8), ReLU()], ids=str)
def test_training_matches_the_oracle(activation, mode):
    runs = []
    for backend, dtype in (
        ("triton", torch.float32),
        ("reference", torch.float32),
        ("reference", torch.float64),
    ):
        sae, _ = make(activation, dtype)
        sae.backend = backend
        optimizer = RowAdam(sae, 1e-3, eps=1e-3, mode=mode, backend=backend)
        for x in batches(dtype, 3):
            train_step(sae, optimizer, x)
        runs.append(sae.state_dict())
    for name, exact in runs[2].items():
        if exact.dtype == torch.float64:
            assert_close(runs[0][name], runs[1][name], exact, name)


@dtypes
@pytest.mark.parametrize("activation", [TopK(8), BatchTopK(8)], ids=str)
@pytest.mark.parametrize("held", [("float32", "float32"), *FORMATS[:2]], ids="/".join)
def test_a_step_can_be_captured_in_a_graph(held, activation, dtype):
    """Replays equal steps launched one by one; and no step makes the host wait."""
    sae, optimizer = make(activation, dtype, weights=held[0], states=held[1])
    *first, last = batches(dtype)
    for x in first[:2]:
        train_step(sae, optimizer, x)
    x, stream = first[2].clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        train_step(sae, optimizer, x)
    torch.cuda.current_stream().wait_stream(stream)
    twin, its_optimizer = copy.deepcopy((sae, optimizer))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metrics = train_step(sae, optimizer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in (*first[3:], last * torch.nan, last):
            x.copy_(batch)
            graph.replay()
            expected = train_step(twin, its_optimizer, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(metrics["loss"], expected["loss"])
    for a, b in zip(everything(sae, optimizer), everything(twin, its_optimizer), strict=True):
        assert_same(a, b)
    assert optimizer.param_groups[0]["steps"] == 7 - 1
