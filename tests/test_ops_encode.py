"""encode: every rule against the fp64 oracle, forward and gradients; ties and odd inputs to the bit."""

import math

import pytest
import torch

import fastsae.backends.torch as portable
from fastsae import BatchTopK, GroupMax, JumpReLU, ReLU, SparseCode, TopK
from fastsae import functional as F
from fastsae.testing import (
    ADVERSARIAL,
    Allocations,
    adversarial,
    assert_encodes,
    assert_matches,
    assert_repeatable,
    assert_same,
    assert_same_code,
    code_at,
    poisoned_empty,
    pre_acts,
    problem,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # N, D, M, k
    (0, 7, 50, 3),
    (1, 1, 1, 1),
    (1, 24, 257, 1),
    (5, 7, 50, 50),
    (5, 1, 257, 9),
    (33, 24, 1000, 8),
    (256, 5, 1024, 4),  # round enough for oneDNN
]
RULES = {
    "TopK": lambda k, m: (TopK(k), None),
    "BatchTopK": lambda k, m: (BatchTopK(k), None),
    "GroupMax": lambda k, m: (GroupMax(max(g for g in range(1, k + 1) if m % g == 0)), None),
    "BatchTopK with a threshold": lambda k, m: (BatchTopK(k), 1.5),
    "JumpReLU": lambda k, m: (JumpReLU(), torch.linspace(-1, 4, m)),
    "ReLU": lambda k, m: (ReLU(), None),
}


def by_hand(x, W_enc, b_enc, activation, threshold=None, subset=None):
    """The contract, one score at a time, on the fp64 scores."""
    scores = pre_acts(x.double(), W_enc.double(), None if b_enc is None else b_enc.double()).tolist()
    m = len(W_enc)
    latents = list(range(m)) if subset is None else subset.tolist()
    k = min(getattr(activation, "k", 0), len(latents))
    rank = [[math.inf if math.isnan(s) else s for s in row] for row in scores]
    if isinstance(activation, TopK):
        chosen = [sorted(latents, key=lambda j, row=row: (-row[j], j))[:k] for row in rank]
    elif isinstance(activation, GroupMax):
        size = m // k
        groups = [range(lo, lo + size) for lo in range(0, m, size)]
        chosen = [[max(group, key=lambda j, row=row: (row[j], -j)) for group in groups] for row in rank]
    elif isinstance(activation, BatchTopK) and threshold is None:
        places = [(n, j) for n in range(len(x)) for j in latents]
        kept = sorted(places, key=lambda place: (-rank[place[0]][place[1]], place))[: k * len(x)]
        chosen = [sorted(j for row, j in kept if row == n) for n in range(len(x))]
    else:
        cut = torch.as_tensor(getattr(activation, "threshold", 0.0) if threshold is None else threshold)
        cut = cut.expand(m).tolist()
        chosen = [[j for j in latents if row[j] > cut[j]] for row in rank]
    entries = [(scores[n][j], j) for n, js in enumerate(chosen) for j in js]
    values = torch.tensor([s if math.isnan(s) else max(s, 0.0) for s, _ in entries]).double()
    ends = torch.tensor([0, *map(len, chosen)]).cumsum(0)
    return SparseCode(values, torch.tensor([j for _, j in entries]).int(), ends, m)


def run(backend, x, W_enc, b_enc, activation, threshold=None, **options):
    return F.encode(x, W_enc, b_enc, activation, threshold=threshold, backend=backend, **options)


def gradients(backend, p, activation, threshold=None, **options):
    """The code's tensors and the gradient of sum((1 + j) * values[j])."""
    leaves = [t.detach().requires_grad_() for t in p.encoder]
    code = run(backend, *leaves, activation, threshold, **options)
    weights = torch.arange(len(code.values), dtype=code.values.dtype) + 1
    return [
        code.values,
        code.indices,
        code.offsets,
        *torch.autograd.grad((code.values * weights).sum(), leaves),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_forward_and_gradients(few, backend, rule, shape, dtype):
    n, d, m, k = shape
    n = few(n, backend)
    p = problem(n, d, m)
    if rule == "ReLU" and n > 1:
        p.b_enc.sub_(1.5)  # a sparse code: of very long rows a running sum errs more than a blocked product
    p = p.to(dtype)
    activation, threshold = RULES[rule](k, m)
    code = run(backend, *p.encoder, activation, threshold)
    decided = assert_encodes(code, *p.encoder, activation, threshold)
    assert n == 0 or decided > 0
    assert_matches(
        lambda x, W_enc, b_enc: run(backend, x, W_enc, b_enc, activation, threshold).values,
        lambda x, W_enc, b_enc: code_at(code, x, W_enc, b_enc),
        {"x": p.x, "W_enc": p.W_enc, "b_enc": p.b_enc},
    )


@pytest.mark.parametrize("rule", RULES)
def test_without_a_bias(backend, rule):
    p = problem(5, 7, 257)
    activation, threshold = RULES[rule](4, 257)
    code = run(backend, p.x, p.W_enc, None, activation, threshold)
    assert assert_encodes(code, p.x, p.W_enc, None, activation, threshold) > 0
    assert_matches(
        lambda x, W_enc: run(backend, x, W_enc, None, activation, threshold).values,
        lambda x, W_enc: code_at(code, x, W_enc),
        {"x": p.x, "W_enc": p.W_enc},
    )


@pytest.mark.parametrize("k", [1, 2, 13, 256, 257])
@pytest.mark.parametrize("rule", RULES)
def test_ties_go_to_the_lowest_index(few, any_backend, rule, k):
    p = problem(few(19, any_backend), 7, 257, integers=True)
    activation, threshold = RULES[rule](k, 257)
    threshold = threshold.round() if isinstance(threshold, torch.Tensor) else threshold
    expected = by_hand(*p.encoder, activation, threshold)
    for dtype in DTYPES:
        assert_same_code(run(any_backend, *p.to(dtype).encoder, activation, threshold), expected)


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("rule", RULES)
def test_adversarial_inputs(few, any_backend, rule, name):
    for n, d, m, k in ((9, 7, 257, 6), (3, 2, 50, 50), (2, 3, 1, 1)):
        n = few(n, any_backend)
        activation, threshold = RULES[rule](k, m)
        for dtype in (torch.float32, torch.bfloat16):
            p = adversarial(name, n, d, m, k).to(dtype)
            expected = by_hand(*p.encoder, activation, threshold)
            assert_same_code(run(any_backend, *p.encoder, activation, threshold), expected)


def test_nan_ranks_as_infinity_and_stays_nan(any_backend):
    b_enc = torch.tensor([1.0, torch.nan, torch.inf, 3.0, torch.nan, -torch.inf])
    x, W_enc = torch.zeros(1, 1), torch.zeros(6, 1)
    code = run(any_backend, x, W_enc, b_enc, TopK(4))
    assert code.indices.tolist() == [1, 2, 4, 3]
    assert str(code.values.tolist()) == "[nan, inf, nan, 3.0]"
    assert run(any_backend, x, W_enc, b_enc, TopK(6)).values.tolist()[-2:] == [1.0, 0.0]
    assert run(any_backend, x, W_enc, b_enc, ReLU()).indices.tolist() == [0, 1, 2, 3, 4]
    # nothing exceeds an infinite threshold
    assert run(any_backend, x, W_enc, b_enc, JumpReLU(), torch.full((6,), torch.inf)).indices.tolist() == []


def test_thresholds_are_strict_and_below_zero_let_zeros_pass(any_backend):
    b_enc = torch.tensor([-0.5, 0.0, 0.5, 1.0])
    x, W_enc = torch.zeros(1, 1), torch.zeros(4, 1)
    for activation, threshold, indices in (
        (JumpReLU(), torch.tensor([-1.0, -1.0, 0.5, 0.5]), [0, 1, 3]),
        (JumpReLU(), torch.tensor([-0.5, -1.0, 0.5, 0.5]), [1, 3]),
        (JumpReLU(threshold=0.25), None, [2, 3]),
        (BatchTopK(1), 0.5, [3]),
        (BatchTopK(1), torch.tensor(-1.0), [0, 1, 2, 3]),
        (ReLU(), None, [2, 3]),
    ):
        code = run(any_backend, x, W_enc, b_enc, activation, threshold)
        assert code.indices.tolist() == indices
        assert_same(code.values, b_enc.relu()[indices])


def test_entries_below_zero_hold_zero_and_have_no_gradient(backend):
    p = problem(3, 7, 257)
    values, indices, offsets, *grads = gradients(backend, p, JumpReLU(), torch.full((257,), -100.0))
    assert offsets.tolist() == [0, 257, 514, 771]
    assert indices.tolist() == [*range(257)] * 3
    scores = pre_acts(*p.to(torch.float64).encoder).flatten()
    assert_same(values == 0, scores <= 0)
    weights = torch.where(scores > 0, torch.arange(771).double() + 1, 0).view(3, 257)
    for grad, exact in zip(
        grads, (weights @ p.W_enc.double(), weights.T @ p.x.double(), weights.sum(0)), strict=True
    ):
        torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("k", [1, 2, 5, 24, 120, 240])
def test_groupmax_keeps_the_first_largest_of_each_group(few, any_backend, k):
    """Groups of 240, which blocks of columns cut, down to groups of one; small integers tie in most."""
    n = few(19, any_backend)
    p = problem(n, 3, 240, integers=True)
    code = run(any_backend, *p.encoder, GroupMax(k))
    assert_same_code(code, by_hand(*p.encoder, GroupMax(k)))
    assert code.offsets.tolist() == [k * row for row in range(n + 1)]
    assert code.topk()[0].shape == (n, k)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_inputs_of_groupmax(few, any_backend, name):
    for n, d, m, k in ((9, 7, 240, 6), (9, 7, 240, 2), (3, 2, 50, 50), (2, 3, 1, 1)):
        p = adversarial(name, few(n, any_backend), d, m, k)
        assert_same_code(run(any_backend, *p.encoder, GroupMax(k)), by_hand(*p.encoder, GroupMax(k)))


def test_groupmax_of_nan_and_infinities(any_backend):
    b_enc = torch.tensor([1.0, torch.nan, torch.inf, torch.inf, torch.nan, 0.0, -torch.inf, -torch.inf, -1.0])
    code = run(any_backend, torch.zeros(2, 1), torch.zeros(9, 1), b_enc, GroupMax(3))
    assert code.indices.tolist() == [1, 3, 8] * 2
    assert str(code.values.tolist()) == str([math.nan, math.inf, 0.0] * 2)
    b_enc = torch.full((9,), -torch.inf)
    code = run(any_backend, torch.zeros(2, 1), torch.zeros(9, 1), b_enc, GroupMax(3))
    assert code.indices.tolist() == [0, 3, 6] * 2
    assert code.values.tolist() == [0.0] * 6


@pytest.mark.parametrize("k", [1, 3, 12])
def test_groupmax_of_no_tokens(any_backend, k):
    p = problem(0, 7, 12)
    code = run(any_backend, *p.encoder, GroupMax(k))
    assert code.offsets.tolist() == [0]
    assert code.values.shape == code.indices.shape == (0,)


def test_groups_are_cut_by_blocks(small_blocks, monkeypatch):
    """What the tests above rely on: at 5 groups of 48 none is cut, at 2 of 120 all are."""
    widths, original = [], portable._scores
    monkeypatch.setattr(portable, "_scores", lambda x, W, b: widths.append(len(W)) or original(x, W, b))
    for k in (2, 24):
        run("torch", *problem(8, 3, 240).encoder, GroupMax(k))
    assert widths == [32] * 7 + [16] + [30] * 8


@pytest.mark.parametrize("rule", ["TopK", "BatchTopK"])
def test_padding_is_distinct_in_range_and_without_gradient(backend, rule):
    activation, _ = RULES[rule](13, 257)
    p = adversarial("all negative", 9, 7, 257, 13)
    values, indices, _, *grads = gradients(backend, p, activation)
    assert values.eq(0).all()
    assert not any(grad.any() for grad in grads)
    if rule == "TopK":
        assert all(
            len(set(row)) == 13 and min(row) >= 0 and max(row) < 257 for row in indices.view(9, 13).tolist()
        )


def test_a_zero_score_has_no_gradient(backend):
    """relu is flat at 0: entries whose value is 0 are padding, though their score needn't be negative."""
    p = adversarial("zero", 5, 7, 50, 3)
    assert not any(grad.any() for grad in gradients(backend, p, TopK(3))[3:])


@pytest.mark.parametrize("subset", [[], [7], [0, 3, 4, 200, 256], list(range(0, 257, 2))], ids=len)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "GroupMax"])
def test_subset_confines_the_choice(any_backend, rule, subset):
    subset = torch.tensor(subset, dtype=torch.int64)
    p = problem(9, 7, 257, integers=True)
    activation, threshold = RULES[rule](6, 257)
    code = run(any_backend, *p.encoder, activation, threshold, subset=subset)
    assert_same_code(code, by_hand(*p.encoder, activation, threshold, subset))
    assert_matches(
        lambda x, W_enc, b_enc: (
            run(any_backend, x, W_enc, b_enc, activation, threshold, subset=subset).values
        ),
        lambda x, W_enc, b_enc: code_at(code, x, W_enc, b_enc),
        {"x": p.x, "W_enc": p.W_enc, "b_enc": p.b_enc},
    )


@pytest.mark.parametrize("rule", RULES)
def test_two_runs_agree_to_the_bit(few, backend, two_threads, rule):
    p = problem(few(33, backend), 24, 1000)
    assert_repeatable(lambda: gradients(backend, p, *RULES[rule](8, 1000)))


@pytest.mark.parametrize("rule", RULES)
def test_no_place_is_left_unwritten(backend, rule):
    p = problem(9, 7, 257)
    activation, threshold = RULES[rule](6, 257)
    expected = gradients(backend, p, activation, threshold)
    with poisoned_empty():
        actual = gradients(backend, p, activation, threshold)
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("rule", RULES)
def test_only_asked_for_gradients_are_computed(backend, rule):
    p = problem(5, 7, 50)
    activation, threshold = RULES[rule](3, 50)
    full = gradients(backend, p, activation, threshold)[3:]
    for asked in range(3):
        leaves = [t.detach().requires_grad_(i == asked) for i, t in enumerate(p.encoder)]
        values = run(backend, *leaves, activation, threshold).values
        (values * (torch.arange(len(values)) + 1)).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == asked for i in range(3)]
        assert_same(leaves[asked].grad, full[asked])


def test_a_sparse_gradient_equals_the_dense_one(backend):
    p = problem(5, 7, 257)
    dense, sparse = (gradients(backend, p, TopK(3), sparse_grad=flag)[4] for flag in (False, True))
    assert sparse.is_sparse
    assert sparse.is_coalesced()
    assert 0 < sparse._nnz() <= 15
    torch.sparse_coo_tensor(sparse.indices(), sparse.values(), sparse.shape, check_invariants=True)
    assert sparse.indices()[0].diff().gt(0).all()
    assert_same(sparse.to_dense(), dense)


# Rows of which many scores, or all, pass a threshold raised from left to right.
FLAT = ["equal", "ascending", "near-ties", "mostly -Inf"]


@pytest.mark.parametrize("name", ["random", *FLAT])
@pytest.mark.parametrize("rule", RULES)
def test_memory_is_bounded(small_blocks, rule, name):
    """The largest tensor is a block of scores and a few candidates a token, or what is returned."""
    n, d, m, k = 64, 2, 1000, 3
    p = problem(n, d, m) if name == "random" else adversarial(name, n, d, m, k)
    if "TopK" != rule != "BatchTopK":
        p.b_enc.sub_(10_000)  # so that what is returned is small
        p.b_enc[::50] = 1
    activation, threshold = RULES[rule](k, m)
    with Allocations() as made:
        code = run("torch", *p.encoder, activation, threshold)
    block = portable.BLOCK_SCORES
    bound = {
        "TopK": block + portable.MAX_TOKENS * (5 * k + 64),
        "BatchTopK": block + 2 * n * k,
    }.get(rule, block + m + len(code.values))
    assert made.largest <= bound, made.made_by
    assert bound < n * m / 10


@pytest.mark.parametrize("name", ["random", "ascending"])
def test_memory_is_bounded_with_blocks_as_set(name):
    n, d, m, k = 64, 1, 2**18, 4
    p = problem(n, d, m) if name == "random" else adversarial(name, n, d, m, k)
    with Allocations() as made:
        run("torch", *p.encoder, TopK(k))
    assert made.largest <= portable.BLOCK_SCORES + n * (5 * k + 64) < n * m / 3, made.made_by


def test_small_blocks_are_several_and_padded(small_blocks, monkeypatch):
    """What the other tests rely on: token blocks, column blocks, a last one that groups don't divide."""
    shapes, original = [], portable._scores
    monkeypatch.setattr(
        portable, "_scores", lambda x, W, b: shapes.append((len(x), len(W))) or original(x, W, b)
    )
    run("torch", *problem(19, 7, 257).encoder, TopK(2))
    assert {n for n, _ in shapes} == {8, 3}
    assert [m for n, m in shapes if n == 3] == [80, 80, 80, 17]
    shapes.clear()
    run("torch", *problem(19, 7, 257).encoder, BatchTopK(2))
    assert len(shapes) > 20
