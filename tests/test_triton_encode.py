"""Triton's chunked encode where chunks are many and lists are crowded; replays and cuts are counted."""

import pytest
import torch

from fastsae import BatchTopK, JumpReLU, ReLU, SparseCode, TopK
from fastsae.testing import (
    ADVERSARIAL,
    adversarial,
    assert_encodes,
    assert_repeatable,
    assert_same,
    assert_same_code,
    poisoned_empty,
    problem,
)

encode = pytest.importorskip("fastsae.backends.triton.encode")
support = pytest.importorskip("fastsae.backends.triton.support")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not support.interpreting(), reason="runs kernels on CPU tensors"),
]

RULES = {
    "topk": (TopK, None),
    "batchtopk": (BatchTopK, None),
    "threshold": (lambda k: ReLU(), torch.tensor(0.0)),
    "thresholds": (lambda k: JumpReLU(), torch.linspace(-1, 4, 100).round()),
}


@pytest.fixture
def small(monkeypatch):
    """Chunks of 32 latents and 3 tokens, the last ones narrower; blocks of 8 columns."""
    config = encode.kernels.EncodeConfig(block=8, list_block=16)
    monkeypatch.setattr(encode.kernels, "CONFIGS", {(80, 1): config})
    monkeypatch.setattr(encode, "ROWS", 3)
    monkeypatch.setattr(encode, "CHUNK", 32)
    original = encode._chunks

    def narrow(x, W, b, subset):  # chunks are a multiple of 128 columns otherwise
        m = len(W if subset is None else subset)
        for chunk in original(x, W, b, subset):
            for lo in range(0, chunk.scores.shape[1], 32):
                part = chunk.scores[:, lo : lo + 32].contiguous()
                bias = None if chunk.bias is None else chunk.bias[lo : lo + 32].contiguous()
                last = chunk.row + len(part) == len(x) and chunk.column + lo + 32 >= m
                yield chunk._replace(scores=part, bias=bias, column=chunk.column + lo, last=last)

    monkeypatch.setattr(encode, "_chunks", narrow)


def run(p, rule, k, subset=None):
    threshold = RULES[rule][1]
    rule = "threshold" if rule == "thresholds" else rule
    threshold = (
        threshold[subset] if subset is not None and threshold is not None and threshold.ndim else threshold
    )
    args = p.x.contiguous(), p.W_enc, p.b_enc, threshold, subset, rule, k
    return args, encode.encode(*args)


def exact(args):
    from fastsae.backends import reference

    return reference.encode(
        *(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args)
    )


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("rule", RULES)
def test_adversarial_rows_over_chunks(small, rule, name):
    p = adversarial(name, 4, 5, 100, 6)
    args, code = run(p, rule, 6)
    assert_same_code(SparseCode(*code, 100), SparseCode(*exact(args), 100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_random_rows_over_chunks(small, rule, dtype):
    p = problem(4, 24, 100).to(dtype)
    _, code = run(p, rule, 6)
    activation, threshold = RULES[rule]
    assert assert_encodes(SparseCode(*code, 100), *p.encoder, activation(6), threshold) > 0


@pytest.mark.parametrize("rule", RULES)
def test_a_subset_over_chunks(small, rule):
    p = problem(4, 5, 100, integers=True)
    args, code = run(p, rule, 6, torch.arange(0, 100, 2))
    assert_same_code(SparseCode(*code, 100), SparseCode(*exact(args), 100))


@pytest.mark.parametrize("rule", RULES)
def test_repeatable_and_every_place_written(small, rule):
    p = problem(4, 5, 100)
    assert_repeatable(lambda: run(p, rule, 6)[1])
    with poisoned_empty():
        poisoned = run(p, rule, 6)[1]
    for a, b in zip(poisoned, run(p, rule, 6)[1], strict=True):
        assert_same(a, b)


@pytest.fixture
def lists(monkeypatch):
    """Every list that an encode keeps."""
    made = []
    original = encode._list
    monkeypatch.setattr(encode, "_list", lambda *args: made.append(original(*args)) or made[-1])
    return made


@pytest.mark.parametrize(
    ("name", "replayed"),
    [("random", False), ("ascending", True), ("equal", False), ("descending", False), ("near-ties", False)],
)
def test_a_chunk_that_does_not_fit_is_replayed(small, lists, name, replayed):
    """Scores that rise all the way pass every threshold: their candidates overflow."""
    n, m, k = 2, 100, 5
    p = problem(n, 5, m) if name == "random" else adversarial(name, n, 5, m, k)
    run(p, "topk", k)
    assert lists[0].capacity == 32
    assert lists[0].replays.gt(0).tolist() == [replayed] * n


def test_a_replay_loses_nothing_between_scores(small, lists):
    p = adversarial("ascending", 2, 5, 100, 5)
    p.W_enc[:, 0] = 1 + torch.arange(100) / 1024
    args, code = run(p, "topk", 5)
    assert lists[0].replays.gt(0).all()
    assert_same_code(SparseCode(*code, 100), SparseCode(*exact(args), 100))


def test_the_threshold_rises_and_few_candidates_pass(small, monkeypatch, lists):
    passed = []
    original = encode.launch

    def watch(kernel, grid, *args, **options):
        original(kernel, grid, *args, **options)
        if kernel is encode.kernels.append:
            passed.append(lists[0].count.clone())

    monkeypatch.setattr(encode, "launch", watch)
    run(problem(3, 8, 100), "topk", 5)
    assert len(passed) == 4
    assert all(5 <= count.float().mean() < 16 for count in passed)  # of 32 columns
    assert lists[0].tau.isfinite().all()


def test_a_crowded_batch_list_raises_its_cut(small, lists, monkeypatch):
    cuts = []
    original = encode._BatchList.add

    def add(self, chunk):
        original(self, chunk)
        cuts.append(self.cut.item())

    monkeypatch.setattr(encode._BatchList, "add", add)
    run(problem(6, 8, 100), "batchtopk", 2)
    raised = sum(a != b for a, b in zip([-torch.inf, *cuts], cuts, strict=False))
    assert len(cuts) == 8
    assert 2 <= raised < 8
    assert cuts == sorted(cuts)


def test_what_is_too_wide_is_refused(monkeypatch):
    p = problem(2, 3, 2000)
    with pytest.raises(ValueError, match="k: got 1025, expected at most 1024 on backend 'triton'"):
        run(p, "topk", 1025)
    monkeypatch.setattr(encode, "MAX_K_DEAD", 1000)
    dead = torch.ones(2000, dtype=torch.bool)
    with pytest.raises(ValueError, match="k_aux: got 1500, expected at most 1000 on backend 'triton'"):
        encode.encode_dead(*p.encoder, None, dead, "topk", 4, 1500)


def test_fp32_products_are_true_whatever_the_user_allows():
    """What holds on a GPU holds here for the switch: it is off inside, and as it was outside."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        with support.true_fp32():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_the_fused_encode_is_taken_where_it_was_measured_faster(monkeypatch):
    taken = []
    monkeypatch.setattr(encode, "encode_topk_fused", lambda x, W, b, k: taken.append(W.shape))
    p = problem(2, 8, 100)
    for fused, rule, expected in (
        ({}, "topk", False),
        ({90: (8, 100)}, "topk", True),
        ({90: (8, 100)}, "batchtopk", False),
        ({90: (7, 100)}, "topk", False),
        ({90: (8, 101)}, "topk", False),
        ({80: (8, 100)}, "topk", False),
    ):
        monkeypatch.setattr(encode, "FUSED", fused)
        taken.clear()
        encode.encode(*p.encoder, None, None, rule, 3)
        assert bool(taken) == expected, (fused, rule)
