"""The Triton kernels over every format of weights and states: what they store, to the bit where arithmetic is
exact, and within a step of the exact result where it isn't."""

from functools import partial

import pytest
import torch

from fastsae import SAE, SAEConfig, TopK
from fastsae.backends import reference
from fastsae.backends import torch as portable
from fastsae.backends.triton import rows as launchers
from fastsae.backends.triton.decode import code_grad, decode, decode_error
from fastsae.backends.triton.encode import encode, encode_dead
from fastsae.backends.triton.encode_fused import encode_topk_fused
from fastsae.backends.triton.support import interpreting
from fastsae.formats import BLOCK, STATE_DTYPES, new_state, read_rows, split, write_rows
from fastsae.kernels import row_grads, row_step
from fastsae.optim import RowAdam, row_adam
from fastsae.testing import (
    NeverWaits,
    assert_close,
    assert_repeatable,
    assert_same,
    poisoned_empty,
    problem,
    random_code,
)
from fastsae.training import train_step

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not interpreting(), reason="Triton on CPU tensors needs TRITON_INTERPRET=1"),
]
PAIRS = [("float16", "float32"), *((w, s) for w in ("float32", "split32", "bfloat16") for s in STATE_DTYPES)]
pairs = pytest.mark.parametrize(("weights", "states"), PAIRS, ids=map("/".join, PAIRS))
M, STEP, SEED, FIRST = 5, 8, 2**31 - 3, 7


def hold(w, m, v, weights, states):
    """weight, remainder and state that hold the fp32 numbers [M, D], or what they are rounded to."""
    if weights == "split32":
        weight, remainder = split(w)
    else:
        weight, remainder = w.to(getattr(torch, weights)), None
    state = new_state(w, states)
    v = v if state[1].shape == v.shape else v[:, :1]
    # written to others, so that a bf16 weight isn't rounded at random here
    write_rows(w.clone(), None, state, None, (w, m, v), 1, 0)
    return weight.clone(), None if remainder is None else remainder.clone(), state


def random_case(d, weights, states, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(M, d, generator=generator)  # noqa: E731
    # the columns of a block differ by more than its codes reach
    spread = torch.exp(2 * draw())
    weight, remainder, state = hold(draw(), draw() * spread, (draw() * spread) ** 2, weights, states)
    state[2].copy_(torch.arange(M) % 4 + STEP - 4)
    return weight, remainder, state, draw()


def copy(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    return [copy(v) for v in value] if isinstance(value, list | tuple) else value


def tensors(value):
    return [value] if isinstance(value, torch.Tensor) else [t for v in value or () for t in tensors(v)]


def clock(step=STEP, proceed=1.0):
    correction = (1 - 0.999**step) ** 0.5
    return torch.tensor([step, 3e-2 * correction / (1 - 0.9**step), 1e-8 * correction, proceed]).double()


def allowed(x, weights_or_states, signed=True):
    """How far a stored number may be from ``x``, which it was rounded from: a step, and an fp32 error."""
    fp32 = 1e-5 * x.abs() + 1e-6 * x.abs().amax(1, keepdim=True)
    if weights_or_states.startswith("int8"):
        blocks = torch.nn.functional.pad(x.abs(), (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        largest = blocks.amax(2).repeat_interleave(BLOCK, 1)[:, : x.shape[1]]
        return fp32 + x.abs() / 8 + largest * 2.0 ** (-13 if signed else -29)
    relative = {"bfloat16": 2.0**-7, "float16": 2.0**-10}.get(weights_or_states, 0.0)
    return fp32 + relative * x.abs() + (2.0**-24 if weights_or_states == "float16" else 0)


def assert_within_a_step(got, exact, weights, states):
    """``got``: weight, remainder, state. ``exact``: what they would be before rounding, fp64 [M, D]."""
    kinds = (weights, True), (states, True), ("float32" if states == "int8_row" else states, False)
    for name, x, e, (kind, signed) in zip("wmv", read_rows(*got, None), exact, kinds, strict=True):
        excess = (x.double() - e).abs() - allowed(e, kind, signed)
        assert excess.max() <= 0, f"{name}: {excess.max()}"


def share_of_equal(got, want):
    """Of the bytes of tensors whose numbers were rounded to fewer than 32 bits; 1 if there are none."""
    narrow = (
        [t for t in tensors(value) if t.dtype in (torch.bfloat16, torch.uint8)] for value in (got, want)
    )
    same = [(a.view(torch.uint8) == b.view(torch.uint8)).flatten() for a, b in zip(*narrow, strict=True)]
    return torch.cat([torch.ones(1), *same]).mean()


VARIANTS = {  # unit norm, rows, coast
    "plain": (False, False, False),
    "rows, coast": (False, True, True),
    "unit norm, coast": (True, False, True),
    "unit norm, rows": (True, True, False),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("d", [7, 256, 300, 520, 1024])
@pairs
def test_row_update(weights, states, d, variant):
    unit_norm, some, owing = VARIANTS[variant]
    weight, remainder, state, grad = random_case(d, weights, states)
    rows = torch.tensor([1, 2, 4, M, 2**40]) if some else None
    coast = torch.linspace(1, 0.1, STEP + 1, dtype=torch.float64) * 0.01 if owing else None
    rest = rows, grad, coast, clock(), 0.9, 0.999, 1e-8, unit_norm, SEED, FIRST

    def run(op, *held):
        held = copy(held)
        op(*held, *rest)
        return held

    with NeverWaits():
        got = run(launchers.row_update, weight, remainder, state)
    want = run(portable.row_update, weight, remainder, state)
    w, m, v = (t.double() for t in read_rows(weight, remainder, state, None))
    exact = run(reference.row_update, w, None, [m, v, state[2]])
    assert_within_a_step(got, [exact[0], *exact[2][:2]], weights, states)
    assert share_of_equal(got, want) > 0.99
    assert_same(got[2][2], want[2][2])
    if all(VARIANTS[variant][::2]):
        assert_repeatable(lambda: tensors(run(launchers.row_update, weight, remainder, state)))
    others = [0, 3] if some else []
    for new, old in zip(tensors(got), tensors([weight, remainder, state]), strict=True):
        assert_same(new[others], old[others])


@pytest.mark.parametrize(("d", "given"), [
    (8, "a gradient"), (256, "a gradient"), (1024, "a gradient"), (512, "nothing"), (8, "nothing to be done"),
])  # fmt: skip
@pairs
def test_the_same_bytes_where_arithmetic_is_exact(weights, states, d, given, monkeypatch):
    """Integers, and halves of them: whatever differs was rounded or coded otherwise than formats says."""
    root = torch.Tensor.sqrt  # MKL's, on some processors, is off by the last bit
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda t: root(t.double()).to(t.dtype))
    generator = torch.Generator().manual_seed(1)
    draw = lambda most: torch.randint(-most, most + 1, (M, d), generator=generator).float()  # noqa: E731
    w, m, v = draw(1000), draw(64) * torch.rand(M, d, generator=generator).lt(0.9), draw(90) ** 2
    m[3], v[3] = 0, 0  # a row never touched
    v[0, :5] = 0
    few = slice(1, None, 7)  # too small for a code
    m[:, few] *= 2.0**-20
    v[:, few] *= 2.0**-40
    weight, remainder, state = hold(w, m, v, weights, states)
    state[2].copy_(torch.arange(M))
    now = torch.tensor([STEP, 2.0**-9, 2.0**-10, given != "nothing to be done"], dtype=torch.float64)
    grad = draw(32)
    grad[:, few] = 0
    rest = None, None if given == "nothing" else grad, None, now, 0.5, 0.5, 1e-8, False, SEED, FIRST
    got, want = copy((weight, remainder, state)), copy((weight, remainder, state))
    launchers.row_update(*got, *rest)
    portable.row_update(*want, *rest)
    for a, b in zip(tensors(got), tensors(want), strict=True):
        assert_same(a, b)
    if given == "nothing to be done":
        for a, b in zip(tensors(got), tensors([weight, remainder, state]), strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("states", STATE_DTYPES)
def test_rows_of_a_view(states):
    """Other rows stay, and random numbers go by the row's number in the whole."""
    weight, remainder, state, grad = random_case(300, "split32", states)
    rest = None, clock(), 0.9, 0.999, 1e-8, True, 5
    whole, part = copy((weight, remainder, state)), copy((weight, remainder, state))
    launchers.row_update(*whole, None, grad, *rest, 0)
    some = slice(2, 4)
    views = part[0][some], part[1][some], [t[some] for t in part[2]]
    launchers.row_update(*views, None, grad[some], *rest, 2)
    for a, b, old in zip(tensors(part), tensors(whole), tensors([weight, remainder, state]), strict=True):
        assert_same(a[some], b[some])
        assert_same(a[:2], old[:2])


@pytest.fixture
def small_step(monkeypatch):
    """Tokens in pairs, runs above four in pieces, two programs; slices of one block."""
    monkeypatch.setattr(row_grads, "SPLIT", 4)
    decoder = row_step.DecoderStepConfig(BLOCK_J=4, num_warps=1)
    encoder = row_step.EncoderStepConfig(BLOCK_J=2, most_columns=256, programs=2)
    monkeypatch.setattr(row_step, "DECODER", {(80, 9999): decoder})
    monkeypatch.setattr(row_step, "ENCODER", {(80, 9999): encoder})


@pytest.mark.parametrize(("d", "every"), [(13, True), (530, False)])
@pytest.mark.parametrize(("weights", "states"), [
    ("split32", "int8"), ("bfloat16", "int8_row"), ("split32", "bfloat16"), ("bfloat16", "int8"),
    ("split32", "int8_row"), ("bfloat16", "float32"),
])  # fmt: skip
def test_row_step(small_step, weights, states, d, every):
    n, m = 4, 7
    p, code, generator = problem(n, d, m), random_code(2 * n, m, spare=3), torch.Generator().manual_seed(1)
    code = code.values, code.indices, code.offsets
    moments = lambda w: (torch.randn(w.shape, generator=generator), torch.rand(w.shape, generator=generator))  # noqa: E731
    enc, bias, dec = (
        hold(w, *moments(w), *formats)
        for w, formats in ((p.W_enc, (weights, states)), (p.b_enc[:, None], ("float32", "float32")),
                           (p.W_dec, (weights, states)))
    )  # fmt: skip
    for held in (enc, bias, dec):
        held[2][2].copy_(torch.arange(m) % STEP)
    coast = torch.linspace(1, 0.1, STEP + 1, dtype=torch.float64) * 0.01
    error, scale = torch.randn(2 * n, d, generator=generator), torch.rand(2 * n, generator=generator)
    now = clock()

    def run(op):
        (W_enc, enc_rest, enc_state), (b, _, bias_state), (W_dec, dec_rest, dec_state) = copy(
            (enc, bias, dec)
        )
        pull = op(
            W_enc, b[:, 0].contiguous(), W_dec, enc_rest, dec_rest, enc_state, bias_state, dec_state,
            [coast] * 3, [now] * 3, [0.9, 0.999] * 3, [1e-8] * 3, [3, 4, 5], [every] * 3, True, *code,
            p.x, error, scale, 0.3,
        )  # fmt: skip
        return (W_enc, enc_rest, enc_state), (W_dec, dec_rest, dec_state), bias_state, pull

    def on_triton():
        with poisoned_empty(), NeverWaits():
            return run(launchers.row_step)

    got, want = on_triton(), run(reference.row_step)
    for a, b in zip(tensors(on_triton()), tensors(got), strict=True):
        assert_same(a, b)
    for i in range(2):
        kinds = (weights, True), (states, True), ("float32" if states == "int8_row" else states, False)
        pairs = zip(read_rows(*got[i], None), read_rows(*want[i], None), kinds, strict=True)
        for a, b, (kind, signed) in pairs:
            assert ((a - b).abs() <= allowed(b, kind, signed) * 2).all()
        assert_same(got[i][2][2], want[i][2][2])
    assert share_of_equal(got, want) > 0.99
    for a, b in zip(tensors(got[2:]), tensors(want[2:]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bf16_weights_beside_other_tensors(dtype):
    """Every operator's result is in the dtype of what isn't a weight; on a CPU no factor is rounded."""
    n, d, m = 4, 11, 30
    p, code = problem(n, d, m), random_code(n, m, spare=3)
    x, b, b_dec = p.x.to(dtype), p.b_enc, p.b_dec
    W_enc, W_dec = p.W_enc.bfloat16(), p.W_dec.bfloat16()
    code, dead = (code.values.to(dtype), code.indices, code.offsets), torch.arange(m) % 3 == 0

    def fused(x, W_enc, b_enc, threshold, subset, rule, k):
        return encode_topk_fused(x, W_enc, b_enc, k)

    def sorted_dead(op, *args):
        *first, values, indices, offsets = op(*args)
        by_latent = indices.view(n, 2).argsort(1)  # they are in any order
        return *first, *(t.view(n, 2).gather(1, by_latent) for t in (values, indices)), offsets

    for op, oracle, args in (
        (decode, reference.decode, (*code, W_dec, b_dec)),
        (decode_error, reference.decode_error, (*code, W_dec, b_dec, x)),
        (code_grad, reference.code_grad, (x, W_dec, *code[1:])),
        (encode, reference.encode, (x, W_enc, b, None, None, "topk", 3)),
        (encode, reference.encode, (x, W_enc, b, None, torch.arange(0, m, 2), "batchtopk", 3)),
        (encode, reference.encode, (x, W_enc, b, torch.tensor(0.5), None, "threshold", 0)),
        (fused, reference.encode, (x, W_enc, b, None, None, "topk", 3)),
        (
            partial(sorted_dead, encode_dead),
            partial(sorted_dead, reference.encode_dead),
            (x, W_enc, b, None, dead, "topk", 3, 2),
        ),
    ):
        wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        results = op(*args), oracle(*args), oracle(*wide)
        for actual, eager, exact in zip(*map(tensors, results), strict=True):
            if actual.is_floating_point():
                assert_close(actual, eager, exact)
            else:
                assert_same(actual, eager)


@pytest.mark.parametrize(("weights", "states"), [("split32", "int8"), ("bfloat16", "int8_row")])
def test_the_host_never_waits_in_a_step(monkeypatch, weights, states):
    monkeypatch.setattr(row_adam, "_on_host", lambda t: False)
    monkeypatch.setattr(row_adam, "GRAPH_STEPS", 64)
    torch.manual_seed(0)
    sae = SAE(SAEConfig(12, 40, TopK(3)), weight_format=weights, backend="triton")
    optimizer = RowAdam(sae, lr=1e-2, state_dtype=states, backend="triton")
    batches = [torch.randn(6, 12) for _ in range(4)]
    for x in batches[:2]:
        train_step(sae, optimizer, x)
    before = sae.full_precision("W_dec").clone()
    with NeverWaits(), poisoned_empty():
        metrics = [train_step(sae, optimizer, x) for x in (batches[2], batches[2] * torch.nan, batches[3])]
    assert [int(m["skipped"]) for m in metrics] == [0, 1, 0]
    assert (sae.full_precision("W_dec") != before).any(1).sum() > 3
    optimizer.flush_()
    assert all(sae.full_precision(name).isfinite().all() for name in ("W_enc", "W_dec"))
