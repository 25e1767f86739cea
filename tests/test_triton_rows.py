"""Triton's launchers of decode to row_update, where the operators' own tests don't reach: tiles so small that
small tensors take many, long runs cut in pieces, rows passed over, and a host that never waits."""

import pytest
import torch

from fastsae.backends import reference
from fastsae.backends.triton import rows as launchers
from fastsae.backends.triton.decode import code_grad, decode, decode_error
from fastsae.backends.triton.rows import row_grads, row_update
from fastsae.backends.triton.support import interpreting
from fastsae.kernels import code_grad as code_grad_kernels
from fastsae.kernels import decode as decode_kernels
from fastsae.kernels import row_grads as row_grads_kernels
from fastsae.kernels import row_update as row_update_kernels
from fastsae.testing import (
    NeverWaits,
    assert_close,
    assert_repeatable,
    assert_same,
    poisoned_empty,
    problem,
    random_code,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not interpreting(), reason="Triton on CPU tensors needs TRITON_INTERPRET=1"),
]
HALVES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several slices of D, the last one padded; tiles of two entries; runs above four cut in pieces."""
    sliced = decode_kernels.DecodeConfig(BLOCK_K=2, most_columns=8)
    monkeypatch.setattr(decode_kernels, "CONFIGS", {(80, 9999): sliced})
    dots = code_grad_kernels.CodeGradConfig(BLOCK_K=2, BLOCK_D=8, num_warps=1)
    monkeypatch.setattr(code_grad_kernels, "CONFIGS", {(80, 9999): dots})
    sums = row_grads_kernels.RowGradsConfig(BLOCK_J=2, most_columns=8)
    monkeypatch.setattr(row_grads_kernels, "CONFIGS", {(80, 9999): sums})
    monkeypatch.setattr(row_grads_kernels, "SPLIT", 4)
    tile = row_update_kernels.RowUpdateConfig(elements=16, num_warps=1)
    monkeypatch.setattr(row_update_kernels, "CONFIGS", {(80, 9999): tile})


def to(args, dtype):
    return [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def assert_matches(op, oracle, args):
    """By :func:`assert_close`, with every place of torch.empty poisoned and a host that must not wait."""
    with poisoned_empty(), NeverWaits():
        actual = op(*args)
    outputs = (actual, oracle(*args), oracle(*to(args, torch.float64)))
    if isinstance(actual, torch.Tensor):
        outputs = tuple((out,) for out in outputs)
    for triple in zip(*outputs, strict=True):
        assert_close(*triple)
    return actual


def entries(n, d, m, dtype=torch.float32):
    p, code = problem(n, d, m).to(dtype), random_code(n, m, spare=5)
    return p, (code.values.to(dtype), code.indices, code.offsets)


def runs(n, d, m, dtype=torch.float32):
    p, code = entries(n, d, m, dtype)
    _, starts, tokens, order = reference.transpose(*code, m)
    return code[0].nan_to_num(7)[order] if len(order) else code[0], p.x, starts, tokens


def test_the_host_that_must_not_wait_is_told():
    t = torch.ones(3)
    for wait in (lambda: t.sum().item(), lambda: t[t > 0], lambda: t.nonzero(), lambda: t.unique()):
        with NeverWaits(), pytest.raises(AssertionError, match="wait"):
            wait()


@HALVES
@pytest.mark.parametrize("shape", [(0, 3, 50), (5, 1, 20), (4, 21, 9)], ids=str)
def test_decoding_in_slices(small_tiles, shape, dtype):
    p, code = entries(*shape, dtype)
    for bias in (p.b_dec, None):
        assert_matches(decode, reference.decode, (*code, p.W_dec, bias))
        assert_matches(decode_error, reference.decode_error, (*code, p.W_dec, bias, p.x))
    assert_matches(code_grad, reference.code_grad, (p.x, p.W_dec, *code[1:]))


def test_slices_waste_little():
    assert [decode_kernels.slice_width(d, 1024) for d in (4096, 2304, 768, 70, 1)] == [1024, 256, 256, 128, 1]


@HALVES
@pytest.mark.parametrize("shape", [(0, 3, 5), (12, 5, 9), (30, 11, 4)], ids=str)
def test_long_runs_are_summed_in_pieces(small_tiles, shape, dtype, monkeypatch):
    made, partial_sums = [], launchers._partial_sums
    monkeypatch.setattr(launchers, "_partial_sums", lambda *a: made.append(partial_sums(*a)) or made[-1])
    coefs, x, starts, tokens = runs(*shape, dtype)
    whole = assert_matches(row_grads, reference.row_grads, (coefs, x, starts, tokens))
    lengths = starts.diff()
    first, last = starts[:-1] // 4, (starts[1:] - 1) // 4
    pieces = int(torch.where(lengths > 4, last - first + 1, 0).sum())
    assert (~made[0].isnan().any(1)).sum() == pieces
    assert shape[0] == 0 or pieces > (lengths > 4).sum() > 0
    for lo, hi in ((0, 1), (2, 4), (4, 4)):
        assert_same(row_grads(coefs, x, starts[lo : hi + 1], tokens), whole[lo:hi])


def test_a_chunk_grows_where_there_would_be_too_many(small_tiles, monkeypatch):
    monkeypatch.setattr(row_grads_kernels, "CHUNKS", 2)
    args = runs(33, 3, 4)
    owner, split, slots = launchers._pieces(args[2], len(args[3]))
    assert slots <= 4
    assert split == -(-args[2][-1] // 2)  # of the places in use
    assert len(owner) == slots // 2 + 1
    assert_matches(row_grads, reference.row_grads, args)


def state(m, d, dtype):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(m, d, generator=generator).to(dtype)
    moments = (torch.randn(m, d, generator=generator), torch.rand(m, d, generator=generator) + 0.1)
    last = torch.arange(m).remainder(8).int()  # some never touched, one up to date
    return weight, *moments, last


def clock(step, proceed=1.0):
    correction = (1 - 0.999**step) ** 0.5
    return torch.tensor([step, 3e-3 * correction / (1 - 0.9**step), 1e-8 * correction, proceed]).double()


UPDATES = {
    "every row": {"rows": None},
    "rows, some beyond the last": {"rows": torch.tensor([0, 3, 4, 7, 8, 10, 11, 11, 2**40])},
    "no gradient": {"rows": None, "grad": False},
    "no coast": {"rows": torch.tensor([2, 5]), "coast": False},
    "no rows": {"rows": torch.empty(0, dtype=torch.int64)},
    "unit norm": {"rows": torch.arange(1, 11, 2), "unit_norm": True},
    "unit norm, no gradient": {"rows": None, "grad": False, "unit_norm": True},
    "skipped": {"rows": None, "unit_norm": True, "proceed": 0.0},
    "beta 0": {"rows": None, "betas": (0.0, 0.5)},
}


@HALVES
@pytest.mark.parametrize("d", [1, 5])
@pytest.mark.parametrize("name", UPDATES)
def test_row_update(name, d, dtype, small_tiles):
    options = {"rows": None, "grad": True, "coast": True, "unit_norm": False, "proceed": 1.0,
               "betas": (0.9, 0.999)} | UPDATES[name]  # fmt: skip
    m, rows = 11, options["rows"]
    before = state(m, d, dtype)
    generator = torch.Generator().manual_seed(4)
    grad = torch.randn(m if rows is None else len(rows), d, generator=generator) if options["grad"] else None
    coast = torch.rand(9, generator=generator).double() if options["coast"] else None

    now = clock(8, options["proceed"])

    def run(op, dtype=None):
        tensors = [t.clone() if dtype is None else t.clone().to(dtype) for t in before[:3]]
        tensors.append(before[3].clone())
        given = grad if grad is None or dtype is None else grad.to(dtype)
        weight, *its = tensors
        op(weight, None, its, rows, given, coast, now, *options["betas"], 1e-8, options["unit_norm"], 0, 0)
        return tensors

    with NeverWaits():
        actual = run(row_update)
    eager, exact = run(reference.row_update), run(reference.row_update, torch.float64)
    for triple in zip(actual[:3], eager[:3], exact[:3], strict=True):
        assert_close(*triple)
    assert_same(actual[3], eager[3])


def test_early_steps_and_small_variances_keep_their_digits():
    """1 - beta2^t for t = 1, 2, ...: in fp32 the plain difference would be off in the fourth digit."""
    m = 7
    weight, exp_avg, exp_avg_sq = torch.zeros(m, 2), torch.full((m, 2), 1e-8), torch.zeros(m, 2)
    last = torch.tensor([1, 2, 10, 100, 299, 301, 5000]).int()
    coast, now = torch.ones(5001, dtype=torch.float64), clock(5001)

    def run(op, dtype):
        w, *moments = (t.to(dtype, copy=True) for t in (weight, exp_avg, exp_avg_sq))
        op(w, None, [*moments, last.clone()], None, None, coast, now, 0.9, 0.999, 1e-8, False, 0, 0)
        return w

    expected = run(reference.row_update, torch.float64)
    torch.testing.assert_close(run(row_update, torch.float32).double(), expected, rtol=1e-6, atol=0)


def test_rows_of_a_view_are_updated_in_place():
    whole = [t.clone() for t in state(9, 4, torch.float32)]
    alone = [t[3:6].clone() for t in whole]
    grad = torch.ones(3, 4)
    for weight, *its in ([t[3:6] for t in whole], alone):
        row_update(weight, None, its, None, grad, None, clock(7), 0.9, 0.999, 1e-8, True, 0, 3)
    for t, expected, before in zip(whole, alone, state(9, 4, torch.float32), strict=True):
        assert_same(t[3:6], expected)
        assert_same(t[6:], before[6:])


def test_two_runs_agree_to_the_bit(small_tiles):
    p, code = entries(7, 13, 12)
    coefs, x, starts, tokens = runs(7, 13, 12)
    assert_repeatable(
        lambda: [
            decode(*code, p.W_dec, p.b_dec),
            *decode_error(*code, p.W_dec, p.b_dec, p.x),
            code_grad(p.x, p.W_dec, *code[1:]),
            row_grads(coefs, x, starts, tokens),
        ]
    )
