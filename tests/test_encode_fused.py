"""The fused encode by TopK: exact to the bit, whatever a row holds, and without waiting for the device."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("triton")

from fastsae import SparseCode, TopK
from fastsae.backends import reference
from fastsae.backends.triton import encode_fused as fused
from fastsae.backends.triton.support import interpreting
from fastsae.kernels import encode_fused as kernels
from fastsae.testing import (
    ADVERSARIAL,
    NeverWaits,
    adversarial,
    assert_encodes,
    assert_repeatable,
    assert_same,
    assert_same_code,
    poisoned_empty,
    pre_acts,
    problem,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # numpy's, of Inf - Inf
    pytest.mark.skipif(
        not (torch.cuda.is_available() or interpreting()), reason="needs a GPU or the interpreter"
    ),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@pytest.fixture(params=["configured tiles", "small tiles"])
def tiles(request, monkeypatch):
    if request.param == "small tiles":
        _small(monkeypatch)


@pytest.fixture
def small(monkeypatch):
    _small(monkeypatch)


def _small(monkeypatch):
    """So small that the tests' shapes take several programs, in several bands, and full buffers."""
    for name in ("FILTER", "FILTER_FP32"):
        for key in getattr(kernels, name):
            monkeypatch.setitem(getattr(kernels, name), key, kernels.FilterConfig(16, 64, 16, 1, 2))
    monkeypatch.setitem(kernels.RESCUE, (80, 1024), dataclasses.replace(kernels.RESCUE[80, 1024], block_d=16))
    monkeypatch.setattr(fused, "BAND_N", 2)
    monkeypatch.setattr(fused, "SAMPLED", 100)


def run(x, W_enc, b_enc, k):
    """The code, and how many rows were rescued."""
    operands = [t if t is None else t.to(DEVICE) for t in (x, W_enc, b_enc)]
    values, indices, rescued = fused._encode(*operands, k)
    offsets = torch.arange(len(x) + 1) * min(k, len(W_enc))
    return SparseCode(values.cpu(), indices.cpu(), offsets, len(W_enc)), int(rescued)


def by_hand(x, W_enc, b_enc, k):
    """The contract, one score at a time, on the fp64 scores."""
    scores = pre_acts(x.double(), W_enc.double(), None if b_enc is None else b_enc.double()).tolist()
    rank = [[math.inf if math.isnan(s) else s for s in row] for row in scores]
    chosen = [sorted(range(len(W_enc)), key=lambda j, row=row: (-row[j], j))[:k] for row in rank]
    values = [s if math.isnan(s := scores[n][j]) else max(s, 0.0) for n, js in enumerate(chosen) for j in js]
    indices = torch.tensor([j for js in chosen for j in js]).int()
    offsets = torch.arange(len(x) + 1) * min(k, len(W_enc))
    return SparseCode(torch.tensor(values).double(), indices, offsets, len(W_enc))


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_inputs(tiles, name):
    for i, (n, d, m, k) in enumerate([(5, 7, 257, 6), (2, 5, 300, 7), (1, 2, 50, 50), (1, 3, 1, 1)]):
        dtype = DTYPES[i % len(DTYPES)]
        p = adversarial(name, n, d, m, k).to(dtype)
        code, _ = run(*p.encoder, k)
        assert code.values.dtype == dtype
        assert code.indices.dtype == torch.int32
        assert_same_code(code, by_hand(*p.encoder, k))


@pytest.mark.parametrize("k", [1, 2, 13, 256, 257])
def test_ties_go_to_the_lowest_index(small, k):
    p = problem(4, 7, 257, integers=True)
    assert_same_code(run(*p.encoder, k)[0], by_hand(*p.encoder, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 24, 257, 1), (2, 1, 257, 9), (9, 24, 1000, 8), (1, 130, 4096, 16), (17, 9, 200, 3)], ids=str
)  # fmt: skip
def test_random_inputs(tiles, shape, dtype):
    n, d, m, k = shape
    p = problem(n, d, m).to(dtype)
    assert assert_encodes(run(*p.encoder, k)[0], *p.encoder, TopK(k)) > 0


def test_no_bias_and_more_than_there_are(small):
    p = problem(5, 7, 60)
    assert assert_encodes(run(p.x, p.W_enc, None, 4)[0], p.x, p.W_enc, None, TopK(4)) > 0
    assert_same_code(run(*p.encoder, 100)[0], run(*p.encoder, 60)[0])


def test_the_contract_of_the_operator():
    p = problem(5, 7, 257, integers=True).to(DEVICE)
    expected = reference.encode(*p.encoder, None, None, "topk", 6)
    for actual, wanted in zip(fused.encode_topk_fused(*p.encoder, 6), expected, strict=True):
        assert_same(actual, wanted)
    values, indices, offsets = fused.encode_topk_fused(p.x[:0], p.W_enc, p.b_enc, 6)
    assert (values.shape, indices.shape, offsets.tolist()) == ((0,), (0,), [0])


def test_tokens_go_in_parts(small, monkeypatch):
    monkeypatch.setattr(fused, "LISTED", 0)
    p = problem(130, 7, 64, integers=True)
    assert_same_code(run(*p.encoder, 1)[0], by_hand(*p.encoder, 1))


def test_nan_ranks_as_infinity_and_stays_nan():
    b_enc = torch.tensor([1.0, torch.nan, torch.inf, 3.0, torch.nan, -torch.inf])
    x, W_enc = torch.zeros(1, 1), torch.zeros(6, 1)
    code, _ = run(x, W_enc, b_enc, 4)
    assert code.indices.tolist() == [1, 2, 4, 3]
    assert str(code.values.tolist()) == "[nan, inf, nan, 3.0]"
    assert run(x, W_enc, b_enc, 6)[0].values.tolist()[-2:] == [1.0, 0.0]


# The rescue: which rows take it, and that it is right about them.


def _rows(m, *patterns):
    """x, W_enc: token n gives latent j the score patterns[n][j], exactly."""
    return torch.eye(len(patterns)), torch.stack([p.float() for p in patterns], 1)


def test_only_rows_without_a_certificate_are_rescued(small):
    m, k = 2000, 8
    plan = fused._plan(m, k)
    assert plan.stride > 1
    shuffled = torch.arange(m) * 7919 % 2003 + 1.0
    equal, under, over = torch.ones(m), shuffled.clone(), shuffled.clone()
    under[:: plan.stride] += 10_000  # the sample holds the best ones and more: fewer than k exceed its cut
    over[:: plan.stride] = 0  # it holds none of them: too many do
    infinite = torch.where(torch.arange(m) % 11 == 0, torch.inf, shuffled)
    x, W_enc = _rows(m, shuffled, equal, shuffled, under, over)
    code, rescued = run(x, W_enc, None, k)
    assert_same_code(code, by_hand(x, W_enc, None, k))
    assert rescued == 3
    for tokens, expected in (([0, 2], 0), ([1], 1), ([3], 1), ([4], 1)):
        assert run(x[tokens], W_enc, None, k)[1] == expected
    bias = infinite - shuffled  # Inf - finite; 0 elsewhere
    assert_same_code(run(x[:1], W_enc, bias, k)[0], by_hand(x[:1], W_enc, bias, k))


def test_lists_overflow_into_nothing(small):
    """More groups than there is room for, one score above tau in each; the next row is none the worse."""
    m, k = 4096, 2
    j = torch.arange(m)
    one_a_group = torch.where((j % 64 >= 8) & (j % 64 < 16), 1.0 + j, -(j % 16.0))
    assert m // 8 > fused._plan(m, k).capacity
    x, W_enc = _rows(m, one_a_group, j * 7919 % 4099)
    code, rescued = run(x, W_enc, None, k)
    assert_same_code(code, by_hand(x, W_enc, None, k))
    assert rescued == 1


@pytest.mark.parametrize("name", ["equal", "zero", "mostly -Inf", "ascending", "descending", "near-ties"])
def test_which_inputs_need_the_rescue(small, name):
    """Rows of ties and rows short of scores; not a sorted dictionary, as the sample is strided."""
    n, d, m, k = 2, 2, 1500, 20
    p = adversarial(name, n, d, m, k)
    code, rescued = run(*p.encoder, k)
    assert_same_code(code, by_hand(*p.encoder, k))
    assert rescued == (n if name in ("equal", "zero", "mostly -Inf") else 0)


@pytest.mark.parametrize(
    "name", ["random", "equal", "ascending", "descending", "near-ties", "NaN", "Inf", "mostly -Inf"]
)
def test_the_rescue_alone(small, monkeypatch, name):
    """Everything through the rescue, in several rounds of it and with a buffer that fills up."""
    n, d, m, k = 17 if name == "random" else 2, 3, 500, 20
    p = problem(n, d, m, integers=True) if name == "random" else adversarial(name, n, d, m, k)
    plan = fused._plan(m, k)
    monkeypatch.setattr(fused, "_plan", lambda *_: plan._replace(place=1, capacity=128))
    monkeypatch.setattr(
        fused, "_thresholds", lambda x, *_: torch.full((len(x),), torch.finfo().max, device=DEVICE)
    )
    code, rescued = run(*p.encoder, k)
    assert_same_code(code, by_hand(*p.encoder, k))
    assert rescued == n or "Inf" in name or name == "NaN"


@pytest.mark.parametrize("shift", [0, -10])
def test_random_rows_need_no_rescue(shift):
    p = problem(18, 16, 4000)
    p.b_enc.add_(shift)
    code, rescued = run(*p.encoder, 8)
    assert rescued == 0
    assert assert_encodes(code, *p.encoder, TopK(8)) > 9


def test_two_runs_agree_to_the_bit(small):
    p = problem(9, 24, 1000)
    p.b_enc[:300] += 1  # some rows are rescued
    operands = [t.to(DEVICE) for t in p.encoder]
    assert_repeatable(lambda: fused._encode(*operands, 8))


def test_no_place_is_left_unwritten(tiles):
    for name in ("near-ties", "equal", "NaN"):  # certified, rescued, odd
        p = adversarial(name, 2, 7, 257, 6)
        expected = run(*p.encoder, 6)[0]
        with poisoned_empty():
            actual = run(*p.encoder, 6)[0]
        assert_same(actual.values, expected.values)
        assert_same(actual.indices, expected.indices)


@pytest.mark.parametrize("name", ["near-ties", "equal", "NaN"])
def test_the_device_is_never_asked(name):
    operands = [t.to(DEVICE) for t in adversarial(name, 3, 7, 257, 6).encoder]
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NeverWaits():
        float(operands[0][0, 0])
    with NeverWaits():
        code = fused.encode_topk_fused(*operands, 6)
    assert len(code[0]) == 3 * 6


@pytest.mark.parametrize(
    ("m", "k"),
    [(2**17, 64), (2**17, 1), (2**20, 64), (2**20, 1024), (2**14, 32), (2**22, 32), (300, 2), (50, 50)],
)
def test_the_odds_of_a_plan(m, k):
    stride, place, capacity = fused._plan(m, k)

    def fewer_sampled(than, of):
        odds = (math.comb(of, i) * (stride - 1) ** (of - i) for i in range(than))
        return sum(odds) / stride**of

    assert capacity >= k + 64
    assert 1 <= place <= k + 1
    if stride == 1:
        assert place == k + 1
        return
    assert place == k + 1 or 0 <= 1 - fewer_sampled(place, k) <= fused.UNDERFULL * 1.001
    assert fewer_sampled(place, capacity) <= fused.OVERFULL * 1.001
    assert m // stride >= 4 * k
    assert capacity <= 8192
