"""SparseCode: what it holds, what it converts to, what it refuses."""

import copy

import pytest
import torch

from fastsae import SparseCode
from fastsae.testing import assert_same, random_code

pytestmark = pytest.mark.usefixtures("one_thread")

T = torch.tensor


def code_of(values, indices, offsets, m=5, leading=None, **options):
    return SparseCode(T(values), T(indices, dtype=torch.int32), T(offsets), m, leading, **options)


def ragged(**options):
    """Tokens with 2, 0 and 1 entries, one of them 0, and two places of capacity beyond."""
    return code_of([1.0, 0.0, 3.0, 9.0, 9.0], [4, 0, 2, 7, -1], [0, 2, 2, 3], **options)


DENSE = [[0.0, 0.0, 0.0, 0.0, 1.0], [0.0] * 5, [0.0, 0.0, 3.0, 0.0, 0.0]]


def test_properties():
    code = ragged(leading=(3, 1))
    assert code.n_tokens == 3
    assert code.shape == (3, 1, 5)
    assert code.rows().tolist() == [0, 0, 2, 3, 3]
    assert code.l0().tolist() == [[1], [0], [1]]
    assert repr(code) == "SparseCode(shape=(3, 1, 5), capacity 5, dtype=torch.float32, device=cpu)"
    fixed = code_of([1.0, 2.0], [4, 0], [0, 1, 2], per_token=1)
    assert repr(fixed) == "SparseCode(shape=(2, 5), 1 per token, dtype=torch.float32, device=cpu)"


def test_to_dense_and_back():
    code = ragged(leading=(3, 1))
    assert code.to_dense().tolist() == [[row] for row in DENSE]
    again = SparseCode.from_dense(code.to_dense())
    assert again.leading == (3, 1)
    assert again.values.tolist() == [1.0, 3.0]
    assert again.indices.tolist() == [4, 2]
    assert again.indices.dtype == torch.int32
    assert again.offsets.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("shape", [(7, 50), (50,), (2, 3, 50), (0, 50), (2, 0, 50)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_from_dense_round_trip(shape, dtype):
    z = torch.randn(shape).clamp_min(0.5).sub(0.5).to(dtype)
    code = SparseCode.from_dense(z)
    assert code.shape == shape
    assert_same(code.to_dense(), z)
    assert code.l0().equal(z.ne(0).sum(-1))


def test_random_codes_survive_the_round_trip():
    code = random_code(33, 257, spare=5)
    dense = code.to_dense()
    assert_same(SparseCode.from_dense(dense).to_dense(), dense)
    assert code.l0().equal(dense.ne(0).sum(1))


def test_topk_of_a_fixed_code_is_a_view():
    code = code_of([1.0, 2.0, 3.0, 4.0], [4, 0, 1, 2], [0, 2, 4], leading=(2, 1), per_token=2)
    values, indices = code.topk()
    assert values.tolist() == [[[1.0, 2.0]], [[3.0, 4.0]]]
    assert indices.tolist() == [[[4, 0]], [[1, 2]]]
    assert values.data_ptr() == code.values.data_ptr()


def test_topk_of_a_ragged_code_pads_to_the_longest_row():
    values, indices = ragged().topk()
    assert values.tolist() == [[1.0, 0.0], [0.0, 0.0], [3.0, 0.0]]
    assert indices.tolist() == [[4, 0], [0, 0], [2, 0]]
    empty = code_of([], [], [0, 0, 0])
    assert [t.shape for t in empty.topk()] == [(2, 0)] * 2
    none = code_of([], [], [0], leading=(2, 0))
    assert [t.shape for t in none.topk()] == [(2, 0, 0)] * 2


def test_dense_forms_are_differentiable():
    code = ragged()
    values = code.values.requires_grad_()
    (code.to_dense() * torch.arange(15.0).view(3, 5)).sum().backward()
    assert values.grad.tolist() == [4.0, 0.0, 12.0, 0.0, 0.0]
    values.grad = None
    (code.topk()[0] * T([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])).sum().backward()
    assert values.grad.tolist() == [1.0, 2.0, 5.0, 0.0, 0.0]
    z = T([[0.0, 2.0], [3.0, 0.0]], requires_grad=True)
    (SparseCode.from_dense(z).values * T([5.0, 7.0])).sum().backward()
    assert z.grad.tolist() == [[0.0, 5.0], [7.0, 0.0]]


def test_detach_and_to_keep_everything_else():
    code = ragged(leading=(3, 1), mean=torch.ones(3, 1), scale=torch.full((3, 1), 2.0))
    code.values.requires_grad_()
    detached = code.detach()
    assert not detached.values.requires_grad
    wide = code.to(torch.float64)
    assert [t.dtype for t in (wide.values, wide.mean, wide.scale)] == [torch.float64] * 3
    assert [t.dtype for t in (wide.indices, wide.offsets)] == [torch.int32, torch.int64]
    moved = code.to("meta")
    assert {t.device.type for t in (moved.values, moved.indices, moved.offsets, moved.mean)} == {"meta"}
    for other in (detached, wide, moved, copy.deepcopy(detached)):
        assert (other.shape, other.per_token) == (code.shape, code.per_token)
        assert other.mean.shape == other.scale.shape == (3, 1)
    assert code_of([1.0], [0], [0, 1], per_token=1).to(torch.float16).per_token == 1


GOOD = {
    "values": torch.ones(3),
    "indices": T([0, 4, 2]).int(),
    "offsets": T([0, 1, 3]),
    "n_latents": 5,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": [1.0]}, TypeError, "values: got list, expected a tensor"),
        ({"indices": [1]}, TypeError, "indices: got list, expected a tensor"),
        ({"offsets": None}, TypeError, "offsets: got NoneType, expected a tensor"),
        ({"values": torch.ones(3, 1)}, ValueError, r"values: got shape \(3, 1\), expected one dimension"),
        ({"values": torch.ones(2)}, ValueError, "indices: got 3 entries, expected 2, as many as values"),
        ({"values": torch.ones(3).int()}, ValueError, "values: got torch.int32, expected a floating dtype"),
        ({"indices": T([0, 4, 2])}, ValueError, "indices, offsets: got torch.int64, torch.int64, expected"),
        (
            {"offsets": T([0, 1, 3]).int()},
            ValueError,
            "indices, offsets: got torch.int32, torch.int32, expected",
        ),
        ({"offsets": T([], dtype=torch.int64)}, ValueError, "offsets: got no entry, expected N [+] 1"),
        ({"leading": (3,)}, ValueError, r"leading: got \(3,\), expected a shape with product 2"),
        ({"n_latents": 0}, ValueError, "n_latents: got 0, expected an integer >= 1"),
    ],
)
def test_construction_refuses(change, error, message):
    SparseCode(**GOOD)
    with pytest.raises(error, match=message):
        SparseCode(**GOOD | change)


@pytest.mark.parametrize(
    ("z", "error", "message"),
    [
        ([[1.0]], TypeError, "z: got list, expected a tensor"),
        (T(1.0), ValueError, r"z: got shape \(\), torch.float32, expected a floating tensor"),
        (T([1]), ValueError, r"z: got shape \(1,\), torch.int64, expected a floating tensor"),
    ],
)
def test_from_dense_refuses(z, error, message):
    with pytest.raises(error, match=message):
        SparseCode.from_dense(z)
