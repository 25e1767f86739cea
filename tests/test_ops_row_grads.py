"""row_grads: sums of tokens over each active latent, against the dense fp64 product."""

import pytest
import torch

from fastsae.testing import assert_close, assert_repeatable, assert_same, poisoned_empty, problem, random_code

pytestmark = pytest.mark.usefixtures("one_thread")

row_grads = torch.ops.fastsae.row_grads


def operands(n, d, m, dtype=torch.float32):
    """Coefficients, tokens and the feature-major places of a random code."""
    code = random_code(n, m, spare=3)
    _, starts, tokens, order = torch.ops.fastsae.transpose(
        code.values, code.indices, code.offsets, m, "reference"
    )
    coefs = code.values.nan_to_num(7)[order] if len(order) else code.values
    return coefs.to(dtype), problem(n, d, m).x.to(dtype), starts, tokens


def plain(coefs, x, starts, tokens):
    """grad[r] = sum of coefs[j] * x[tokens[j]] over starts[r] <= j < starts[r + 1], as a dense product."""
    first, last = int(starts[0]), int(starts[-1])
    rows = torch.arange(len(starts) - 1).repeat_interleave(starts.diff())
    dense = x.new_zeros(len(starts) - 1, len(x))
    dense.index_put_((rows, tokens[first:last]), coefs[first:last], accumulate=True)
    return dense @ x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "d", "m"), [(0, 3, 50), (1, 1, 1), (5, 1, 50), (33, 24, 257), (70, 3, 4)])
def test_against_the_dense_product(any_backend, n, d, m, dtype):
    """Halves are summed and returned in fp32."""
    coefs, x, starts, tokens = operands(n, d, m, dtype)
    exact = plain(coefs.double(), x.double(), starts, tokens)
    actual = row_grads(coefs, x, starts, tokens, any_backend)
    assert_close(actual, plain(coefs.float(), x.float(), starts, tokens), exact)


def test_fp64_stays_fp64(exact_backend):
    coefs, x, starts, tokens = operands(5, 3, 50, torch.float64)
    actual = row_grads(coefs, x, starts, tokens, exact_backend)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, plain(coefs, x, starts, tokens), rtol=1e-14, atol=1e-14)


def test_a_slice_of_the_rows(any_backend):
    coefs, x, starts, tokens = operands(33, 3, 257)
    whole = row_grads(coefs, x, starts, tokens, any_backend)
    for lo, hi in ((0, 1), (3, 10), (10, 10), (100, len(starts) - 1)):
        assert_same(row_grads(coefs, x, starts[lo : hi + 1], tokens, any_backend), whole[lo:hi])


def test_unused_rows_are_zero(any_backend):
    coefs, x, starts, tokens = operands(2, 3, 1000)
    used = int((starts.diff() > 0).sum())
    assert used < len(starts) - 1
    assert not row_grads(coefs, x, starts, tokens, any_backend)[used:].any()


def test_two_runs_agree_and_no_place_is_left_unwritten(backend, two_threads):
    args = operands(33, 24, 257)
    assert_repeatable(lambda: [row_grads(*args, backend)])
    with poisoned_empty():
        poisoned = row_grads(*args, backend)
    assert_same(poisoned, row_grads(*args, backend))
