"""code_grad: the gradient of each stored entry, against the dense fp64 product."""

import pytest
import torch

from fastsae.testing import assert_close, assert_repeatable, assert_same, poisoned_empty, problem, random_code

pytestmark = pytest.mark.usefixtures("one_thread")

code_grad = torch.ops.fastsae.code_grad


def plain(grad_x_hat, W_dec, code):
    """grad_values[j] = <grad_x_hat[row of j], W_dec[indices[j]]>, and 0 beyond offsets[-1]."""
    stored = int(code.offsets[-1])
    grad = grad_x_hat.new_zeros(len(code.values))
    grad[:stored] = (grad_x_hat @ W_dec.T)[code.rows()[:stored], code.indices[:stored].long()]
    return grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "d", "m"), [(0, 3, 50), (1, 1, 1), (5, 1, 50), (33, 24, 257), (3, 70, 1000)])
def test_against_the_dense_product(any_backend, n, d, m, dtype):
    p = problem(n, d, m).to(dtype)
    code = random_code(n, m, spare=5)
    actual = code_grad(p.x, p.W_dec, code.indices, code.offsets, any_backend)
    assert_close(actual, plain(p.x, p.W_dec, code), plain(p.x.double(), p.W_dec.double(), code))


def test_a_wide_gradient_over_narrow_weights(any_backend):
    """The fused step keeps gradients in fp32 beside bf16 weights; the sum is fp32's."""
    p = problem(5, 24, 50)
    W_dec, code = p.W_dec.bfloat16(), random_code(5, 50)
    actual = code_grad(p.x, W_dec, code.indices, code.offsets, any_backend)
    assert_close(actual, plain(p.x, W_dec.float(), code), plain(p.x.double(), W_dec.double(), code))


def test_two_runs_agree_and_no_place_is_left_unwritten(backend, two_threads):
    p, code = problem(33, 24, 257), random_code(33, 257, spare=5)

    def run():
        return [code_grad(p.x, p.W_dec, code.indices, code.offsets, backend)]

    assert_repeatable(run)
    with poisoned_empty():
        poisoned = run()
    assert_same(poisoned[0], run()[0])
