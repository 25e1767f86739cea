"""Losses at partial reconstructions: against dense formulas, a few tokens at a time, in bounded memory."""

import pytest
import torch

import fastsae.backends.torch as portable
from fastsae import (
    SAE,
    BatchTopK,
    HierarchicalTopK,
    Matryoshka,
    MultiTopK,
    SAEConfig,
    SparseCode,
    TopK,
    backends,
    nested,
)
from fastsae.optim import RowAdam
from fastsae.policies import Nested
from fastsae.testing import Allocations, assert_close, assert_same, poisoned_empty, random_code
from fastsae.training import train_step

pytestmark = pytest.mark.usefixtures("one_thread")
triton = pytest.mark.skipif(backends.available()["triton"] is not None, reason="Triton can't run here")

N, D, M = 11, 5, 45
PARTS = {
    "latents": Nested("latent", (1, 7, 8, 30, M), (0.5, 0.25, 2.0, 0.0, 1.0), 4),
    "one part": Nested("latent", (M,), (0.75,), 0),
    "places": Nested("place", (1, 2, 5, 20, M), (0.1, 0.2, 0.3, 0.4, 0.5), 4),
    "main first": Nested("place", (3, M), (1.0, 0.125), 0),
    "more places than entries": Nested("place", (10, 100), (1.0, 1.0), 1),
}


def operands(dtype=torch.float64, *, spare=6, n=N):
    """A ragged code with empty rows and rubbish behind it, decoder rows, errors."""
    code = random_code(n, M, spare=spare)
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(M, D, generator=generator).to(dtype)
    error = torch.randn(n, D, generator=generator).to(dtype)
    return code.values.to(dtype), code.indices, code.offsets, W, error


def part_of(indices, offsets, parts):
    """The part of each stored entry, one at a time."""
    found = []
    for lo, hi in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        for place in range(lo, hi):
            at = int(indices[place]) if parts.by == "latent" else place - lo
            found.append(next((g for g, end in enumerate(parts.ends) if at < end), len(parts.ends)))
    return torch.tensor(found, dtype=torch.int64)


def errors_by_formula(values, indices, offsets, W, error, parts):
    """e_g [G, N, D]: e less the decode of what comes after part g."""
    stored, n = int(offsets[-1]), len(error)
    rows = torch.arange(n).repeat_interleave(offsets.diff())
    of, columns = part_of(indices, offsets, parts), indices[:stored].long()
    errors = []
    for g in range(len(parts.ends)):
        later = torch.where(of > g, values[:stored], torch.zeros_like(values[:stored]))
        dense = torch.zeros(n, M, dtype=values.dtype).index_put((rows, columns), later)
        errors.append(error - dense @ W)
    return torch.stack(errors)


def loss_by_formula(values, indices, offsets, W, error, parts):
    errors = errors_by_formula(values, indices, offsets, W, error, parts)
    return (errors.new_tensor(parts.weights) * errors.square().sum((1, 2))).sum()


@pytest.fixture(params=["whole", "a token at a time"])
def chunks(request, monkeypatch):
    if request.param != "whole":
        monkeypatch.setattr(nested, "MOST_ELEMENTS", 1)


@pytest.mark.parametrize("name", [name for name in PARTS if "more" not in name])
def test_squares_and_gradients_are_the_formulas(exact_backend, chunks, name):
    parts = PARTS[name]
    values, indices, offsets, W, error = operands()
    errors = errors_by_formula(values, indices, offsets, W, error, parts)
    total, main, peak = nested.squares(values, indices, offsets, W, error, parts, exact_backend)
    squares = errors.square().sum(2)
    torch.testing.assert_close(total, (errors.new_tensor(parts.weights)[:, None] * squares).sum())
    torch.testing.assert_close(main, squares[parts.main].sum())
    torch.testing.assert_close(peak, squares.max())

    leaves = [t.clone().requires_grad_() for t in (values, W, error)]
    loss = loss_by_formula(leaves[0], indices, offsets, *leaves[1:], parts)
    by_values, by_W, by_error = torch.autograd.grad(loss, leaves)
    found = nested.gradients(values, indices, offsets, W, error, parts, exact_backend)
    torch.testing.assert_close(found.error, by_error)
    assert found.latents.diff().gt(0).all()
    dense = torch.zeros_like(W).index_copy(0, found.latents, found.rows)
    torch.testing.assert_close(dense, by_W)
    # through e as well, as a plain decoder's values are: the split that the module's text describes
    stored = int(offsets[-1])
    torch.testing.assert_close(found.values[:stored], by_values[:stored])
    assert not found.values[stored:].any()


@pytest.mark.parametrize("name", ["latents", "places"])
def test_one_chunk_and_many_agree(monkeypatch, name):
    values, indices, offsets, W, error = operands()
    results = []
    for most in (2**20, 2 * 5 * D, 1):
        monkeypatch.setattr(nested, "MOST_ELEMENTS", most)
        found = nested.gradients(values, indices, offsets, W, error, PARTS[name], "torch")
        results.append([*nested.squares(values, indices, offsets, W, error, PARTS[name], "torch"), *found])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@triton
@pytest.mark.parametrize("name", ["latents", "places"])
def test_triton_is_as_close_to_the_formulas_as_eager(name):
    parts = PARTS[name]
    values, indices, offsets, W, error = operands(torch.float32, n=4)
    answers = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (values, W, error)]
        loss = loss_by_formula(leaves[0], indices, offsets, *leaves[1:], parts)
        answers.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    total = nested.squares(values, indices, offsets, W, error, parts, "triton")[0]
    found = nested.gradients(values, indices, offsets, W, error, parts, "triton")
    rows = torch.zeros_like(W).index_copy(0, found.latents, found.rows)
    stored = int(offsets[-1])
    for what, t, eager, exact in zip(
        ("loss", "values", "rows", "error"), (total, found.values, rows, found.error), *answers, strict=True
    ):
        upto = stored if what == "values" else None
        assert_close(*((x[:upto] if upto else x) for x in (t, eager, exact)), what)


def test_entries_beyond_the_last_budget_are_in_no_reconstruction_but_the_whole():
    """A code of fewer entries than the budget is in the first parts alone."""
    parts = PARTS["more places than entries"]
    values = torch.tensor([2.0, 1.0]).double()
    indices, offsets = torch.tensor([3, 1], dtype=torch.int32), torch.tensor([0, 2])
    W, error = torch.eye(M, D).double(), torch.zeros(1, D).double()
    error[0, 0] = 3
    total, main, peak = nested.squares(values, indices, offsets, W, error, parts, "torch")
    assert (total, main, peak) == (18, 9, 9)


@pytest.mark.parametrize("name", PARTS)
def test_no_entries_at_all(exact_backend, name):
    _, _, _, W, error = operands()
    values, indices = error.new_empty(0), torch.empty(0, dtype=torch.int32)
    offsets = torch.zeros(N + 1, dtype=torch.int64)
    total, main, _ = nested.squares(values, indices, offsets, W, error, PARTS[name], exact_backend)
    torch.testing.assert_close(total, sum(PARTS[name].weights) * error.square().sum())
    torch.testing.assert_close(main, error.square().sum())
    found = nested.gradients(values, indices, offsets, W, error, PARTS[name], exact_backend)
    torch.testing.assert_close(found.error, 2 * sum(PARTS[name].weights) * error)
    assert found.rows.shape == (0, D)
    assert len(found.values) == len(found.latents) == 0


@pytest.mark.parametrize("name", ["latents", "places"])
def test_two_runs_agree_and_no_place_is_left_unwritten(backend, chunks, name):
    values, indices, offsets, W, error = operands(torch.float32, n=4)

    def run():
        found = nested.gradients(values, indices, offsets, W, error, PARTS[name], backend)
        return [*nested.squares(values, indices, offsets, W, error, PARTS[name], backend), *found]

    expected = run()
    with poisoned_empty():
        poisoned = run()
    for other in (run(), poisoned):
        for a, b in zip(other, expected, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("name", ["latents", "places", "main first"])
def test_first_parts(name):
    _, indices, offsets, _, _ = operands()
    stored = int(offsets[-1])
    kept = nested.first_parts(indices, offsets, PARTS[name])
    assert_same(kept[:stored], part_of(indices, offsets, PARTS[name]) <= PARTS[name].main)


def test_the_main_part_of_multi_topk_is_topk():
    torch.manual_seed(0)
    sae = SAE(SAEConfig(6, 40, MultiTopK(3, 4)))
    x = torch.randn(7, 6)
    out = sae.train().training_forward(x)
    plain = SAE(SAEConfig(6, 40, TopK(3)))
    plain.load_state_dict(sae.state_dict())
    expected = plain.encode_sparse(x)
    assert out.code.topk()[0].shape == (7, 3)
    for name in ("values", "indices", "offsets"):
        assert_same(getattr(out.code, name), getattr(expected, name))
    assert isinstance(out.code, SparseCode)


def test_weights_and_ends_of_each_policy():
    assert MultiTopK(4).nested(99) == Nested("place", (4, 16), (1.0, 1 / 8), 0)
    assert HierarchicalTopK(3).nested(99) == Nested("place", (1, 2, 3), (1 / 3,) * 3, 2)
    assert HierarchicalTopK(9, (3, 9)).nested(99) == Nested("place", (3, 9), (0.5, 0.5), 1)
    assert Matryoshka(TopK(2), (4, 8)).nested(8) == Nested("latent", (4, 8), (0.5, 0.5), 1)
    for m in (1, 2, 3, 16, 31, 65_536):
        ends = Matryoshka(BatchTopK(1)).nested(m).ends
        assert ends[-1] == m
        assert ends[0] >= 1
        assert list(ends) == sorted(set(ends))
    assert TopK(3).nested(99) is None


def test_memory_does_not_grow_with_the_number_of_budgets(monkeypatch):
    """Of a step at 2 and at 32 budgets the largest tensor is the same, and no [budgets, N, D] is made."""
    n, d, m, k = 256, 16, 64, 32
    monkeypatch.setattr(nested, "MOST_ELEMENTS", n * d)
    monkeypatch.setattr(portable, "BLOCK_ELEMENTS", n * d)  # of rows that are gathered
    peaks = {}
    for budgets in ((1, k), tuple(range(1, k + 1))):
        torch.manual_seed(0)
        sae = SAE(SAEConfig(d, m, HierarchicalTopK(k, budgets)))
        optimizer = RowAdam(sae)
        x = torch.randn(n, d)
        train_step(sae, optimizer, x)
        with Allocations() as made:
            train_step(sae, optimizer, x)
        with Allocations() as forward:
            sae.training_forward(x).loss.backward()
        peaks[len(budgets)] = made.largest, forward.largest
    assert peaks[2] == peaks[32]
    assert max(peaks[32]) < 32 * n * d / 4
