"""decode: against the dense fp64 product, forward and gradients."""

import pytest
import torch

from fastsae import SparseCode
from fastsae import functional as F
from fastsae.testing import (
    assert_matches,
    assert_repeatable,
    assert_same,
    decode_at,
    poisoned_empty,
    problem,
    random_code,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 3, 50), (1, 1, 1), (5, 1, 50), (33, 24, 257), (7, 5, 1000)]  # N, d_out, M


def with_values(code, values):
    return SparseCode(values, code.indices, code.offsets, code.n_latents)


def operands(n, d_out, m, dtype, spare=0):
    p = problem(n, d_out, m).to(dtype)
    code = random_code(n, m, spare=spare)
    return code, {"values": code.values.to(dtype), "W_dec": p.W_dec, "b_dec": p.b_dec}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(any_backend, shape, dtype):
    code, inputs = operands(*shape, dtype)
    assert_matches(
        lambda values, W_dec, b_dec: F.decode(with_values(code, values), W_dec, b_dec, backend=any_backend),
        lambda values, W_dec, b_dec: decode_at(code, values, W_dec, b_dec),
        inputs,
    )
    del inputs["b_dec"]
    assert_matches(
        lambda values, W_dec: F.decode(with_values(code, values), W_dec, backend=any_backend),
        lambda values, W_dec: decode_at(code, values, W_dec),
        inputs,
    )


def test_by_hand(any_backend):
    code = SparseCode(
        torch.tensor([2.0, 3.0, 0.5]), torch.tensor([2, 0, 2]).int(), torch.tensor([0, 2, 2, 3]), 3, (3, 1)
    )
    W_dec, b_dec = torch.tensor([[1.0, 0.0], [9.0, 9.0], [0.0, 10.0]]), torch.tensor([0.25, -0.25])
    x_hat = F.decode(code, W_dec, b_dec, backend=any_backend)
    assert x_hat.tolist() == [[[3.25, 19.75]], [[0.25, -0.25]], [[0.25, 4.75]]]


def gradients(backend, code, inputs, **options):
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    rest = [leaves[name] for name in ("W_dec", "b_dec") if name in leaves]
    x_hat = F.decode(with_values(code, leaves["values"]), *rest, backend=backend, **options)
    weights = torch.arange(x_hat.numel(), dtype=x_hat.dtype).view(x_hat.shape) + 1
    return [x_hat, *torch.autograd.grad((x_hat * weights).sum(), list(leaves.values()))]


def test_what_lies_beyond_the_last_offset_is_ignored(any_backend):
    code, inputs = operands(9, 5, 50, torch.float32, spare=6)  # NaN at latent 2^30
    stored = int(code.offsets[-1])
    exact = SparseCode(code.values[:stored], code.indices[:stored], code.offsets, 50)
    x_hat, grad_values, *rest = gradients(any_backend, code, inputs)
    expected = gradients(any_backend, exact, inputs | {"values": inputs["values"][:stored]})
    assert_same(grad_values[:stored], expected[1])
    assert not grad_values[stored:].any()
    for a, b in zip((x_hat, *rest), (expected[0], *expected[2:]), strict=True):
        assert_same(a, b)


def test_entries_of_value_zero_give_their_rows_no_gradient(any_backend):
    """Padding reads a row of W_dec, but the row isn't active: a row-sparse gradient leaves it out."""
    code = SparseCode(
        torch.tensor([0.0, 2.0, 0.0]), torch.tensor([3, 1, 1]).int(), torch.tensor([0, 2, 3]), 5
    )
    W_dec = torch.ones(5, 2, requires_grad=True)
    F.decode(code, W_dec, sparse_grad=True, backend=any_backend).sum().backward()
    assert W_dec.grad.coalesce().indices().tolist() == [[1]]
    assert W_dec.grad.to_dense().tolist() == [[0, 0], [2, 2], [0, 0], [0, 0], [0, 0]]


def test_a_latent_that_fires_on_every_token(any_backend):
    indices = torch.stack([torch.full((33,), 7), torch.arange(33) + 8], 1).flatten().int()
    code = SparseCode(torch.rand(66), indices, torch.arange(0, 67, 2), 50)
    p = problem(33, 24, 50)
    assert_matches(
        lambda values, W_dec: F.decode(with_values(code, values), W_dec, backend=any_backend),
        lambda values, W_dec: decode_at(code, values, W_dec),
        {"values": code.values, "W_dec": p.W_dec},
    )


@pytest.mark.parametrize(
    "upstream", [torch.ones(()).expand(9, 5), torch.ones(5, 9).T], ids=["expanded", "transposed"]
)
def test_an_upstream_gradient_of_any_layout(backend, upstream):
    code, inputs = operands(9, 5, 50, torch.float32)
    assert_matches(
        lambda values, W_dec, b_dec: F.decode(with_values(code, values), W_dec, b_dec, backend=backend),
        lambda values, W_dec, b_dec: decode_at(code, values, W_dec, b_dec),
        inputs,
        upstream,
    )


def test_a_sparse_gradient_equals_the_dense_one(backend):
    code, inputs = operands(9, 5, 50, torch.float32)
    dense, sparse = (gradients(backend, code, inputs, sparse_grad=flag)[2] for flag in (False, True))
    assert sparse.is_sparse
    assert sparse.is_coalesced()
    assert sparse.indices()[0].diff().gt(0).all()
    assert_same(sparse.to_dense(), dense)


def test_two_runs_agree_to_the_bit(backend, two_threads):
    code, inputs = operands(33, 24, 1000, torch.float32)
    assert_repeatable(lambda: gradients(backend, code, inputs))


def test_no_place_is_left_unwritten(backend):
    code, inputs = operands(9, 5, 50, torch.float32, spare=4)
    expected = gradients(backend, code, inputs)
    with poisoned_empty():
        actual = gradients(backend, code, inputs)
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b)


def test_only_asked_for_gradients_are_computed(backend):
    code, inputs = operands(9, 5, 50, torch.float32)
    full = gradients(backend, code, inputs)[1:]
    for asked in range(3):
        values, W_dec, b_dec = (t.detach().requires_grad_(i == asked) for i, t in enumerate(inputs.values()))
        x_hat = F.decode(with_values(code, values), W_dec, b_dec, backend=backend)
        (x_hat * (torch.arange(45.0).view(9, 5) + 1)).sum().backward()
        grads = values.grad, W_dec.grad, b_dec.grad
        assert [grad is not None for grad in grads] == [i == asked for i in range(3)]
        assert_same(grads[asked], full[asked])
