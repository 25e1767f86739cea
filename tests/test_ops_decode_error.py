"""decode_error: the reconstruction's error and its square, against the dense fp64 product."""

import pytest
import torch

from fastsae.testing import (
    assert_close,
    assert_repeatable,
    assert_same,
    poisoned_empty,
    problem,
    random_code,
)

pytestmark = pytest.mark.usefixtures("one_thread")

decode_error = torch.ops.fastsae.decode_error


def usable(backend, dtype):
    """Skip what Triton's interpreter gets wrong (bf16) and its kernels don't do (fp64)."""
    if backend == "triton":
        from fastsae.backends.triton.support import interpreting

        if dtype == torch.float64 or (dtype == torch.bfloat16 and interpreting()):
            pytest.skip(f"triton: no {dtype} here")


def operands(n, d, m, dtype=torch.float32, bias=True):
    p, code = problem(n, d, m).to(dtype), random_code(n, m, spare=5)
    return code.values.to(dtype), code.indices, code.offsets, p.W_dec, p.b_dec if bias else None, p.x


def plain(values, indices, offsets, W_dec, b_dec, target):
    """Error and squares in the dtype of what is given, through the dense code."""
    stored = int(offsets[-1])
    rows = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
    code = values.new_zeros(len(offsets) - 1, len(W_dec))
    code[rows, indices[:stored].long()] = values[:stored]
    error = code @ W_dec - target if b_dec is None else code @ W_dec + b_dec - target
    wide = torch.promote_types(error.dtype, torch.float32)
    return error, error.to(wide).square().sum(1)


def to(args, dtype):
    return [a.to(dtype) if a is not None and a.is_floating_point() else a for a in args]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "d", "m"), [(0, 3, 50), (1, 1, 1), (5, 1, 50), (33, 24, 257), (3, 70, 400)])
def test_against_the_dense_product(any_backend, n, d, m, dtype, bias):
    usable(any_backend, dtype)
    args = operands(n, d, m, dtype, bias)
    error, squares = decode_error(*args, any_backend)
    assert squares.dtype == torch.promote_types(dtype, torch.float32)
    for name, actual, eager, exact in zip(
        ("error", "squares"), (error, squares), plain(*args), plain(*to(args, torch.float64)), strict=True
    ):
        assert_close(actual, eager, exact, name)


def test_it_is_decode_less_the_target(any_backend):
    args = operands(9, 24, 50)
    error, squares = decode_error(*args, any_backend)
    x_hat = torch.ops.fastsae.decode(*args[:-1], any_backend)
    torch.testing.assert_close(error, x_hat - args[-1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(squares, error.square().sum(1))


def test_two_runs_agree_and_no_place_is_left_unwritten(backend, two_threads):
    args = operands(33, 24, 257)
    assert_repeatable(lambda: decode_error(*args, backend))
    expected = decode_error(*args, backend)
    with poisoned_empty():
        actual = decode_error(*args, backend)
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b)
