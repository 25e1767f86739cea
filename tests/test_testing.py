"""The helpers of fastsae.testing fail on wrong results, and only on them."""

import pytest
import torch

from fastsae import BatchTopK, JumpReLU, ReLU, SparseCode, TopK
from fastsae import functional as F
from fastsae.testing import (
    ADVERSARIAL,
    Allocations,
    NeverWaits,
    adversarial,
    assert_close,
    assert_encodes,
    assert_matches,
    assert_repeatable,
    assert_same,
    assert_same_code,
    assert_selected,
    code_at,
    decode_at,
    poisoned_empty,
    pre_acts,
    problem,
    random_code,
    tolerance,
)

pytestmark = pytest.mark.usefixtures("one_thread")

fails = pytest.raises


def code_of(values, indices, offsets, m=10):
    return SparseCode(torch.tensor(values), torch.tensor(indices).int(), torch.tensor(offsets), m)


def test_inputs_depend_on_the_seed_alone():
    first, again, other = problem(5, 7, 50), problem(5, 7, 50), problem(5, 7, 50, seed=1)
    for a, b, c in zip(first, again, other, strict=True):
        assert_same(a, b)
        assert not torch.equal(a, c)
    assert [tuple(t.shape) for t in problem(5, 7, 50, d_out=3)] == [(5, 7), (50, 7), (50,), (50, 3), (3,)]
    whole = problem(5, 7, 50, integers=True)
    assert all(t.eq(t.round()).all() and t.abs().max() == 2 for t in whole)
    assert whole.to(torch.bfloat16).W_dec.dtype == torch.bfloat16


def test_random_codes_have_every_kind_of_row():
    code = random_code(33, 50, spare=4)
    counts = code.offsets.diff()
    assert counts.min() == 0
    assert counts[1] == 50
    assert len(code.values) == code.offsets[-1] + 4
    assert code.values.isnan().sum() == 4
    assert (code.values == 0).any()
    assert all(len(set(row.tolist())) == len(row) for row in code.indices[:-4].split(counts.tolist()))


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_inputs_are_what_their_names_say(name):
    p = adversarial(name, 9, 7, 50, 6)
    scores = pre_acts(*p.encoder)
    descending = scores.sort(dim=1, descending=True).values
    said = {
        "equal": (scores == 1).all(),
        "zero": (scores == 0).all(),
        "all negative": (scores < 0).all(),
        "fewer than k positive": ((scores > 0).sum(1) == 3).all(),
        "one giant, a flat tail": (descending[:, 0] == 1024).all() and (descending[:, 1:] == 1).all(),
        "ascending": (scores.diff(dim=1) > 0).all(),
        "descending": (scores.diff(dim=1) < 0).all(),
        "near-ties": descending.diff(dim=1).abs().max() < 2**-8 and (descending.diff(dim=1) != 0).all(),
        "duplicated latents": (scores[:, :25] == scores[:, 25:]).all(),
        "NaN": scores[0].isnan().all() and (scores[1:].isnan().sum(1) == 1).all(),
        "Inf": (scores[1:] == torch.inf).any() and (scores == -torch.inf).any() and scores[0].isnan().any(),
        "mostly -Inf": ((scores == -torch.inf).sum(1) == 47).all(),
        "a latent that always fires": (scores.argmax(1) == 16).all() and (scores[:, 16] > 0).all(),
        "non-contiguous x": not p.x.is_contiguous(),
    }
    assert said[name]
    assert [len(t) for t in adversarial(name, 0, 1, 1, 1)] == [0, 1, 1, 1, 1]


def test_tolerance_is_derived():
    exact = torch.tensor([1.0, 4.0, torch.nan, torch.inf], dtype=torch.float64)
    eager = torch.tensor([1.25, 4.0, 0.0, 0.0], dtype=torch.bfloat16)
    assert tolerance(eager, exact) == 2 * (0.25 + 2**-7 * 4)
    assert tolerance(eager[2:], exact[2:]) == 0
    with pytest.raises(ValueError, match=r"got NaN or Inf in torch.float16 .*, expected smaller inputs"):
        tolerance(torch.tensor([torch.inf]).half(), torch.tensor([1e6]).double())


def test_assert_close_draws_the_line_at_the_tolerance():
    exact = torch.tensor([[1.0, -4.0]], dtype=torch.float64)
    eager = exact.float()
    allowed = 2 * 4 * 2.0**-23
    assert_close((exact + 0.9 * allowed).float(), eager, exact)
    with fails(AssertionError, match=r"grad_x: off by 1.9.*e-06 at \[0, 1\], allowed 9.5.*e-07; got -4"):
        assert_close(torch.tensor([[1, -4 + 2 * allowed]]), eager, exact, "grad_x")
    assert_close(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3).double())


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (torch.ones(3), r"shape \(3,\), not \(2,\)"),
        (torch.ones(2, 1), r"shape \(2, 1\), not \(2,\)"),
        (torch.ones(2).double(), r"torch.float64, not torch.float32"),
        (torch.tensor([1.0, torch.nan]), "off by inf"),
        (torch.tensor([torch.inf, 1.0]), "off by inf"),
    ],
)
def test_assert_close_refuses(actual, message):
    with fails(AssertionError, match=message):
        assert_close(actual, torch.ones(2), torch.ones(2).double())


def test_assert_close_wants_nan_and_inf_in_their_places():
    exact = torch.tensor([torch.nan, torch.inf, -torch.inf, 1], dtype=torch.float64)
    assert_close(exact.float(), exact.float(), exact)
    for place, wrong in ((0, 1.0), (1, -torch.inf), (1, 3e38), (2, torch.nan)):
        actual = exact.float()
        actual[place] = wrong
        with fails(AssertionError, match="got"):
            assert_close(actual, exact.float(), exact)


@pytest.mark.parametrize("wrong", ["result", "grad_a", "grad_b"])
def test_assert_matches_sees_a_wrong_value_and_each_wrong_gradient(wrong):
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a @ b * (1.001 if wrong == "result" else 1)

        @staticmethod
        def backward(ctx, grad):
            a, b = ctx.saved_tensors
            return (
                grad @ b.T * (1.001 if wrong == "grad_a" else 1),
                a.T @ grad * (1.001 if wrong == "grad_b" else 1),
            )

    inputs = {"a": torch.randn(3, 4), "b": torch.randn(4, 5)}
    assert_matches(lambda a, b: a @ b, lambda a, b: a @ b, inputs)
    with fails(AssertionError, match=f"^{wrong}: off by"):
        assert_matches(lambda a, b: Product.apply(a, b), lambda a, b: a @ b, inputs)


def test_assert_selected_on_clear_and_on_near_scores():
    scores = torch.tensor([[5.0, 1.0, 4.0, 3.0], [1.0, 2.0, 2.0 + 1e-9, 2.0]]).double()
    assert assert_selected(torch.tensor([[2, 0], [1, 3]]), scores, 1e-6) == 1
    assert assert_selected(torch.tensor([[3, 0, 1, 2], [0, 1, 2, 3]]), scores, 1e-6) == 2
    assert assert_selected(torch.zeros(2, 0, dtype=torch.int64), scores, 0) == 0
    for places, message in (
        ([[0, 0], [1, 2]], "selected twice"),
        ([[0, 4], [1, 2]], r"outside 0\.\.3"),
        ([[0, -1], [1, 2]], r"outside 0\.\.3"),
        ([[0, 3], [1, 2]], "a score 1 below the k-th largest"),
        ([[0, 2], [0, 2]], "a score 1 below the k-th largest"),
    ):
        with fails(AssertionError, match=message):
            assert_selected(torch.tensor(places), scores, 1e-6)


RULES = [(TopK(3), None), (BatchTopK(3), None), (BatchTopK(3), 1.0), (JumpReLU(0.5), None), (ReLU(), None)]


@pytest.mark.parametrize(("activation", "threshold"), RULES, ids=str)
def test_assert_encodes_sees_damage(activation, threshold):
    x, W_enc, b_enc = problem(5, 7, 50).encoder
    code = F.encode(x, W_enc, b_enc, activation, threshold=threshold, backend="reference")
    assert assert_encodes(code, x, W_enc, b_enc, activation, threshold) > 0

    def damaged(values=None, indices=None, offsets=None):
        return SparseCode(
            code.values if values is None else values,
            code.indices if indices is None else indices,
            code.offsets if offsets is None else offsets,
            50,
            per_token=code.per_token,
        )

    last = int(code.offsets[-1])
    shifted = code.offsets.clone()
    shifted[2] -= 1
    unused = next(i for i in range(50) if i not in code.indices[: int(code.offsets[1])].tolist())
    swapped = code.indices.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    for wrong in (
        damaged(values=code.values * 1.001),
        damaged(values=code.values.double()),
        damaged(values=code.values.index_fill(0, torch.tensor([last - 1]), torch.nan)),
        damaged(indices=code.indices.index_fill(0, torch.tensor([0]), unused)),
        damaged(indices=code.indices.index_fill(0, torch.tensor([0]), 50)),
        damaged(indices=code.indices.index_fill(0, torch.tensor([0]), -1)),
        damaged(indices=swapped),
        damaged(offsets=shifted),
        damaged(code.values[:-1], code.indices[:-1], code.offsets.clamp(max=last - 1)),
    ):
        with fails(AssertionError):
            assert_encodes(wrong, x, W_enc, b_enc, activation, threshold)


@pytest.mark.parametrize(("activation", "threshold"), RULES[:4], ids=str)
def test_assert_encodes_sees_another_choice(activation, threshold):
    """Right values at the wrong latents: what only the second-best choice would give."""
    x, W_enc, b_enc = problem(5, 7, 50).encoder
    rivals = {TopK: TopK(3), BatchTopK: BatchTopK(3), JumpReLU: JumpReLU(0.4)}
    subset = torch.arange(1, 50)
    code = F.encode(
        x, W_enc, b_enc, rivals[type(activation)], threshold=threshold, subset=subset, backend="reference"
    )
    b_enc[0] = 10  # so that latent 0, left out, would have been chosen
    with fails(AssertionError, match="below the k-th largest|wrong side of the threshold"):
        assert_encodes(code, x, W_enc, b_enc, activation, threshold)


def test_plain_formulas_by_hand():
    x, W_enc, b_enc = (
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[3.0, 1.0], [-1.0, -1.0]]),
        torch.tensor([0.5, 1]),
    )
    assert pre_acts(x, W_enc, b_enc).tolist() == [[5.5, -2.0]]
    assert pre_acts(x, W_enc).tolist() == [[5.0, -3.0]]
    code = code_of([0.0, 0.0, 9.0], [1, 0, 7], [0, 2], m=2)
    assert code_at(code, x, W_enc, b_enc).tolist() == [0.0, 5.5]
    W_dec, b_dec = torch.tensor([[1.0], [10.0]]), torch.tensor([0.25])
    assert decode_at(code, torch.tensor([2.0, 3.0, 9.0]), W_dec, b_dec).tolist() == [[23.25]]


def test_assert_same_code():
    code = code_of([1.0, torch.nan, 3.0], [0, 4, 2], [0, 1, 3])
    assert_same_code(code, code_of([1.0, torch.nan, 3.0, 8.0], [0, 4, 2, 9], [0, 1, 3]))
    assert_same_code(code.to(torch.float64), code)
    for wrong in (
        code_of([1.0, torch.nan, 4.0], [0, 4, 2], [0, 1, 3]),
        code_of([1.0, 2.0, 3.0], [0, 4, 2], [0, 1, 3]),
        code_of([1.0, torch.nan, 3.0], [0, 4, 3], [0, 1, 3]),
        code_of([1.0, torch.nan, 3.0], [0, 4, 2], [0, 2, 3]),
        code_of([1.0, torch.nan], [0, 4], [0, 1, 2]),
    ):
        with fails(AssertionError, match="differ"):
            assert_same_code(wrong, code)


def test_assert_same_compares_bits():
    t = torch.tensor([0.0, torch.nan, 1.0])
    assert_same(t, t.clone())
    for other in (
        torch.tensor([-0.0, torch.nan, 1.0]),
        t.nextafter(torch.tensor(2.0)),
        t.double(),
        t[None],
        t[:2],
    ):
        with fails(AssertionError):
            assert_same(t, other)
    assert_same(torch.tensor(3), torch.tensor(3))


def test_assert_repeatable_sees_a_result_that_moves():
    assert_repeatable(lambda: [torch.ones(3), torch.arange(4)])
    calls = iter(range(10))
    with fails(AssertionError, match="result 1 of the second run: 1 bytes differ"):
        assert_repeatable(lambda: [torch.ones(3), torch.tensor(next(calls))])
    shapes = iter([[torch.ones(1)], []])
    with fails(ValueError):
        assert_repeatable(lambda: next(shapes))


def test_poison_reaches_every_kind_of_empty_and_goes_away():
    like = torch.ones(2, 3)
    makers = (
        lambda dtype: torch.empty(2, 3, dtype=dtype),
        lambda dtype: torch.empty_like(like, dtype=dtype),
        lambda dtype: torch.empty_strided((2, 3), (3, 1), dtype=dtype),
        lambda dtype: like.new_empty(2, 3, dtype=dtype),
        lambda dtype: like.new_empty_strided((2, 3), (3, 1), dtype=dtype),
    )
    names = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]
    before = [getattr(home, name) for home, name in names]
    with poisoned_empty():
        for make in makers:
            assert make(torch.float32).isnan().all()
            assert make(torch.bfloat16).isnan().all()
            assert (make(torch.int32) == -(2**31)).all()
            assert make(torch.bool).all()
            assert make(torch.float32).shape == (2, 3)
        assert torch.empty(3, requires_grad=True).requires_grad
    assert [getattr(home, name) for home, name in names] == before


def test_allocations_see_inside_operators_and_ignore_views():
    x = torch.ones(64, 4)
    with Allocations() as made:
        x.view(-1).expand(1000, -1)[:10]
        x.mul_(2)
    assert made.largest == 0
    with Allocations() as made:
        x[:3] + 1
    assert (made.largest, made.made_by) == (12, "aten::add.Tensor")
    p = problem(64, 2, 1000)
    with Allocations() as made:
        F.encode(*p.encoder, TopK(3), backend="reference")
    assert made.largest == 64 * 1000


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t[0].item(),
        lambda t: t.tolist(),
        lambda t: bool(t[0] > 0),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t.index_put_((t > 0,), t[:1]),
        lambda t: t.unique(),
        lambda t: t.long().repeat_interleave(t.long()),
        lambda t: t + torch.tensor(1.0),
        lambda t: torch.ops.fastsae.transpose(t, t.int(), torch.arange(4), 9, "reference"),
    ],
)
def test_what_makes_the_host_wait_is_refused(wait):
    t = torch.ones(3)
    with pytest.raises(AssertionError, match="makes the host wait"), NeverWaits():
        wait(t)


def test_what_does_not_make_the_host_wait_passes():
    t = torch.ones(3)
    with NeverWaits():
        t[t.long().clamp_max(2)].cumsum(0).where(t > 0, 0).sort(stable=True)
        t.long().repeat_interleave(t.long(), output_size=3)
        torch.ops.fastsae.transpose(t, t.int(), torch.arange(4), 9, "torch")
