"""The public functions: derivatives, shapes, autocast, and what they refuse."""

import math

import pytest
import torch

from fastsae import (
    AuxK,
    BatchTopK,
    Gated,
    GroupMax,
    HierarchicalTopK,
    JumpReLU,
    Matryoshka,
    MultiTopK,
    ReLU,
    SparseCode,
    TopK,
)
from fastsae import functional as F
from fastsae.testing import assert_same, assert_same_code, pre_acts, problem

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = [
    (TopK(3), None),
    (BatchTopK(3), None),
    (BatchTopK(3), 0.5),
    (JumpReLU(), torch.linspace(0, 1, 9)),
    (ReLU(), None),
    (GroupMax(3), None),
]


def away_from_ties(activation, threshold):
    """An fp64 problem whose selection and signs don't change under gradcheck's perturbations of 1e-6."""
    for seed in range(100):
        p = problem(4, 5, 9, seed=seed).to(torch.float64)
        scores = pre_acts(*p.encoder)
        cut = torch.as_tensor(0.0 if threshold is None else threshold, dtype=torch.float64)
        values = torch.cat([scores.flatten(), (scores - cut).flatten()])
        ordered = scores.flatten().sort().values
        if values.abs().min() > 1e-3 and ordered.diff().min() > 1e-4:
            return p
    raise AssertionError("no seed is far from ties")


@pytest.mark.parametrize(("activation", "threshold"), RULES, ids=str)
def test_derivatives_by_finite_differences(exact_backend, activation, threshold):
    p = away_from_ties(activation, threshold)
    leaves = [t.requires_grad_() for t in p]

    def reconstruct(x, W_enc, b_enc, W_dec, b_dec):
        code = F.encode(x, W_enc, b_enc, activation, threshold=threshold, backend=exact_backend)
        return code.values, F.decode(code, W_dec, b_dec, backend=exact_backend)

    assert torch.autograd.gradcheck(reconstruct, leaves)


def test_a_second_derivative_is_refused():
    p = problem(4, 5, 9)
    W_enc = p.W_enc.requires_grad_()
    values = F.encode(p.x, W_enc, None, TopK(3)).values
    (grad,) = torch.autograd.grad(values.square().sum(), W_enc, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("leading", [(), (1,), (33,), (2, 3), (0,), (2, 0, 3), (3, 1, 2, 1)], ids=str)
@pytest.mark.parametrize(("activation", "threshold"), RULES[:4], ids=str)
def test_any_leading_shape(any_backend, activation, threshold, leading):
    n = math.prod(leading)
    p = problem(n, 5, 9, d_out=2)
    code = F.encode(
        p.x.view(*leading, 5), *p.encoder[1:], activation, threshold=threshold, backend=any_backend
    )
    flat = F.encode(*p.encoder, activation, threshold=threshold, backend=any_backend)
    assert_same_code(code, flat)
    assert code.shape == (*leading, 9)
    assert code.n_tokens == n
    x_hat = F.decode(code, p.W_dec, p.b_dec, backend=any_backend)
    assert x_hat.shape == (*leading, 2)
    assert_same(x_hat.view(n, 2), F.decode(flat, p.W_dec, p.b_dec, backend=any_backend))
    if isinstance(activation, TopK):
        assert [t.shape for t in code.topk()] == [(*leading, 3)] * 2


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.T.contiguous().T,
        lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
        lambda x: torch.cat([x, x], 1)[:, 5:],
        lambda x: x[:1].expand(6, 5),
    ],
    ids=["transposed", "strided", "sliced", "expanded"],
)
def test_x_of_any_layout(any_backend, layout):
    p = problem(6, 5, 9)
    x = layout(p.x).detach().requires_grad_()
    dense = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    assert not x.is_contiguous()
    codes = [F.encode(t, p.W_enc, p.b_enc, TopK(3), backend=any_backend) for t in (x, dense)]
    assert_same_code(*codes)
    for code in codes:
        code.values.sum().backward()
    assert_same(x.grad.contiguous(), dense.grad)


def test_arguments_are_left_as_they_were(any_backend):
    p, again = problem(6, 5, 9), problem(6, 5, 9)
    F.decode(F.encode(*p.encoder, TopK(3), backend=any_backend), p.W_dec, p.b_dec, backend=any_backend)
    for a, b in zip(p, again, strict=True):
        assert_same(a, b)


def test_nothing_is_recorded_without_a_gradient():
    p = problem(6, 5, 9)
    code = F.encode(*p.encoder, TopK(3))
    assert not code.values.requires_grad
    assert not F.decode(code, p.W_dec).requires_grad
    p.W_enc.requires_grad_()
    with torch.no_grad():
        assert not F.encode(*p.encoder, TopK(3)).values.requires_grad
    code = F.encode(*p.encoder, TopK(3))
    assert code.values.requires_grad
    assert not code.indices.requires_grad


@pytest.mark.parametrize(
    ("activation", "selects"),
    [
        (MultiTopK(2, 3), TopK(2)),
        (HierarchicalTopK(3), TopK(3)),
        (Matryoshka(TopK(2)), TopK(2)),
        (Matryoshka(BatchTopK(2), (4, 9)), BatchTopK(2)),
    ],
    ids=str,
)
def test_what_trains_at_several_reconstructions_selects_as_after_training(activation, selects):
    p = problem(6, 5, 9)
    assert_same_code(F.encode(*p.encoder, activation), F.encode(*p.encoder, selects))


def jumped(pre, theta, bandwidth):
    """A dense [N, M] code's pre-activations through :func:`jump`; the SparseCode, f and 1[f > 0]."""
    n, m = pre.shape
    indices = torch.arange(m, dtype=torch.int32).repeat(n)
    code = SparseCode(pre.relu().flatten(), indices, torch.arange(n + 1) * m, m)
    out, active = F.jump(code, theta.log(), bandwidth)
    return out.values.view(n, m), active.view(n, m)


def test_jump_by_hand():
    """theta = 1, bandwidth = 0.5: the band is 0.75..1.25."""
    pre = torch.tensor([[0.8, 1.0, 1.2, 1.3]], dtype=torch.float64, requires_grad=True)
    theta = torch.ones(4, dtype=torch.float64, requires_grad=True)
    f, active = jumped(pre, theta, 0.5)
    assert f.tolist() == [[0.0, 0.0, 1.2, 1.3]]
    assert active.tolist() == [[0, 0, 1, 1]]
    up = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    by_pre, by_theta = torch.autograd.grad((up * f).sum(), (pre, theta), retain_graph=True)
    assert by_pre.tolist() == [[0, 0, 3, 4]]
    assert by_theta.tolist() == [-2, -4, -6, 0]
    by_pre, by_theta = torch.autograd.grad((up * active).sum(), (pre, theta), allow_unused=True)
    assert by_pre is None or not by_pre.any()
    assert by_theta.tolist() == [-2, -4, -6, 0]


def test_gated_by_hand():
    pi = torch.tensor([0.5, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    code = SparseCode(pi, torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([0, 2, 3]), 2)
    b_enc, r_mag, b_mag = (
        torch.tensor(t, dtype=torch.float64, requires_grad=True)
        for t in ([0.1, -0.2], [0.3, 0.0], [0.2, -1.0])
    )
    f = F.gated(code, b_enc, r_mag, b_mag).values
    stretch = math.exp(0.3)
    torch.testing.assert_close(f.tolist(), [stretch * 0.4 + 0.2, 0.0, 1.2], rtol=1e-12, atol=1e-12)
    f.sum().backward()
    torch.testing.assert_close(pi.grad.tolist(), [stretch, 0.0, 1.0], rtol=1e-12, atol=0)
    torch.testing.assert_close(b_enc.grad.tolist(), [-stretch, -1.0], rtol=1e-12, atol=0)
    torch.testing.assert_close(r_mag.grad.tolist(), [stretch * 0.4, 2.2], rtol=1e-12, atol=0)
    assert b_mag.grad.tolist() == [1, 1]


def test_k_is_cut_to_the_subset():
    p = problem(6, 5, 9)
    code = F.encode(*p.encoder, TopK(5), subset=torch.tensor([2, 7]))
    assert code.topk()[1].sort(1).values.tolist() == [[2, 7]] * 6
    assert F.encode(*p.encoder, TopK(5), subset=torch.tensor([], dtype=torch.int64)).topk()[0].shape == (6, 0)


def test_autocast_casts_and_gradients_come_back_wide(backend):
    p = problem(6, 5, 9)
    half = p.to(torch.bfloat16)
    leaves = [t.requires_grad_() for t in p]
    with torch.autocast("cpu", torch.bfloat16):
        code = F.encode(*p.encoder, TopK(3), backend=backend)
        x_hat = F.decode(code, p.W_dec, p.b_dec, backend=backend)
    expected = F.encode(*half.encoder, TopK(3), backend=backend)
    assert_same_code(code, expected)
    assert code.values.dtype == torch.bfloat16
    assert_same(x_hat, F.decode(expected, half.W_dec, half.b_dec, backend=backend))
    x_hat.float().square().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 and leaf.grad.any() for leaf in leaves)


def test_autocast_takes_mixed_inputs_and_leaves_fp64_alone():
    p = problem(6, 5, 9)
    with torch.autocast("cpu", torch.bfloat16):
        code = F.encode(p.x.bfloat16(), p.W_enc, p.b_enc, TopK(3))
        assert F.decode(code, p.W_dec).dtype == torch.bfloat16
        wide = p.to(torch.float64)
        code = F.encode(*wide.encoder, TopK(3))
        assert code.values.dtype == torch.float64
        assert F.decode(code, wide.W_dec).dtype == torch.float64
    with torch.autocast("cpu", enabled=False), pytest.raises(ValueError, match=r"x: got torch.bfloat16"):
        F.encode(p.x.bfloat16(), p.W_enc, p.b_enc, TopK(3))


def test_shapes_alone_on_the_meta_device():
    p = problem(6, 5, 9).to("meta")
    code = F.encode(*p.encoder, TopK(3))
    assert code.values.shape == (18,)
    assert F.decode(code, p.W_dec, p.b_dec).shape == (6, 5)


def encode_with(**change):
    p = problem(6, 5, 9)
    arguments = {"x": p.x, "W_enc": p.W_enc, "b_enc": p.b_enc, "activation": TopK(3)} | change
    return F.encode(arguments.pop("x"), arguments.pop("W_enc"), arguments.pop("b_enc"), **arguments)


ints = torch.tensor


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: got list, expected a tensor"),
        ({"x": torch.ones(())}, ValueError, r"x: got shape \(\), expected \[\.\.\., 5\]"),
        ({"x": torch.ones(2, 6)}, ValueError, r"x: got shape \(2, 6\), expected \[\.\.\., 5\]"),
        ({"x": torch.ones(2, 5).double()}, ValueError, "x: got torch.float64, expected torch.float32"),
        ({"x": torch.ones(2, 5).int()}, ValueError, "x: got torch.int32, expected torch.float32"),
        ({"x": torch.ones(2, 5, device="meta")}, ValueError, "x: got a tensor on meta, expected one on cpu"),
        ({"W_enc": None}, TypeError, "W_enc: got NoneType, expected a tensor"),
        ({"W_enc": torch.ones(5)}, ValueError, r"W_enc: got shape \(5,\).*, expected a contiguous"),
        ({"W_enc": torch.ones(5, 9).T}, ValueError, r"W_enc: got .*contiguous=False, expected a contiguous"),
        ({"W_enc": torch.ones(9, 5).int()}, ValueError, "W_enc: got torch.int32, expected float32, bfloat16"),
        ({"b_enc": 0.0}, TypeError, "b_enc: got float, expected a tensor or None"),
        ({"b_enc": torch.ones(5)}, ValueError, r"b_enc: got \(5,\) .*, expected \(9,\) torch.float32 on cpu"),
        ({"b_enc": torch.ones(9).half()}, ValueError, r"b_enc: got \(9,\) torch.float16 .*, expected \(9,\)"),
        ({"b_enc": torch.ones(9, device="meta")}, ValueError, "b_enc: got .* on meta, expected .* on cpu"),
        (
            {"activation": "topk"},
            TypeError,
            r"activation: got str, expected one of fastsae.policies, such as TopK\(32\)",
        ),
        ({"activation": TopK}, TypeError, "activation: got type, expected one of fastsae.policies"),
        ({"activation": AuxK()}, TypeError, "activation: got AuxK, expected one of fastsae.policies"),
        ({"activation": Gated()}, ValueError, r"activation: got Gated\(.*, expected ReLU\(\) for its gate"),
        ({"activation": GroupMax(4)}, ValueError, r"k: got 4, expected a divisor of 9 \(rows of W_enc\)"),
        ({"activation": GroupMax(10)}, ValueError, r"k: got 10, expected an integer in 1\.\.9"),
        (
            {"activation": GroupMax(3), "subset": torch.tensor([1])},
            ValueError,
            "subset: got latents, expected None with GroupMax",
        ),
        (
            {"activation": GroupMax(3), "threshold": 0.5},
            ValueError,
            r"threshold: got shape \(\), expected None for GroupMax",
        ),
        (
            {"activation": Matryoshka(TopK(3)), "threshold": 0.5},
            ValueError,
            r"threshold: got shape \(\), expected None for TopK",
        ),
        ({"activation": TopK(10)}, ValueError, r"k: got 10, expected an integer in 1\.\.9"),
        ({"activation": BatchTopK(10)}, ValueError, r"k: got 10, expected an integer in 1\.\.9"),
        ({"threshold": 0.5}, ValueError, r"threshold: got shape \(\), expected None for TopK"),
        (
            {"activation": ReLU(), "threshold": 0.5},
            ValueError,
            r"threshold: got shape \(\), expected None for ReLU",
        ),
        (
            {"activation": JumpReLU(), "threshold": torch.ones(5)},
            ValueError,
            r"threshold: got shape \(5,\), expected \[9\] for JumpReLU",
        ),
        (
            {"activation": BatchTopK(3), "threshold": torch.ones(9)},
            ValueError,
            r"threshold: got shape \(9,\), expected a scalar for BatchTopK",
        ),
        (
            {"activation": BatchTopK(3), "threshold": "high"},
            TypeError,
            "threshold: got str, expected a tensor or a number",
        ),
        ({"subset": [1, 2]}, TypeError, "subset: got list, expected a tensor of latents"),
        (
            {"subset": ints([1]).int()},
            ValueError,
            r"subset: got torch.int32 \(1,\), expected torch.int64 \[S\]",
        ),
        (
            {"subset": ints([[1]])},
            ValueError,
            r"subset: got torch.int64 \(1, 1\), expected torch.int64 \[S\]",
        ),
        ({"subset": ints([1, 9])}, ValueError, r"subset: got .*, expected ascending latents in 0\.\.8"),
        ({"subset": ints([-1, 1])}, ValueError, r"subset: got .*, expected ascending latents in 0\.\.8"),
        ({"subset": ints([2, 1])}, ValueError, r"subset: got .*, expected ascending latents in 0\.\.8"),
        ({"subset": ints([2, 2])}, ValueError, r"subset: got .*, expected ascending latents in 0\.\.8"),
        ({"subset": ints([1]).to("meta")}, ValueError, "subset: got a tensor on meta, expected one on cpu"),
        ({"backend": "tritn"}, ValueError, "backend: got 'tritn', expected one of 'auto', "),
    ],
)
def test_encode_refuses(change, error, message):
    with pytest.raises(error, match=message):
        encode_with(**change)


def decode_with(values=None, indices=None, offsets=None, m=9, **change):
    code = SparseCode(
        torch.ones(3) if values is None else values,
        ints([0, 4, 8] if indices is None else indices).int(),
        ints([0, 1, 3] if offsets is None else offsets),
        m,
    )
    return F.decode(**{"code": code, "W_dec": torch.ones(9, 2), "b_dec": torch.ones(2)} | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"code": torch.ones(2, 9)}, TypeError, "code: got Tensor, expected a SparseCode"),
        ({"m": 10}, ValueError, "code: got a code over 10 latents, expected 9, the rows of W_dec"),
        (
            {"values": torch.ones(3).half()},
            ValueError,
            "code: got torch.float16 on cpu, expected torch.float32",
        ),
        (
            {"indices": [0, 4, 9]},
            ValueError,
            r"code.indices: got values in 0\.\.9, expected values in 0\.\.8",
        ),
        (
            {"indices": [0, -1, 8]},
            ValueError,
            r"code.indices: got values in -1\.\.8, expected values in 0\.\.8",
        ),
        (
            {"offsets": [0, 1, 4]},
            ValueError,
            r"code.offsets: got .*, expected offsets ascending from 0 to at most 3",
        ),
        ({"offsets": [0, 3, 1]}, ValueError, r"code.offsets: got .*, expected offsets ascending from 0"),
        ({"offsets": [1, 2, 3]}, ValueError, r"code.offsets: got .*, expected offsets ascending from 0"),
        ({"W_dec": "w"}, TypeError, "W_dec: got str, expected a tensor"),
        ({"W_dec": torch.ones(2, 9).T}, ValueError, "W_dec: got .*contiguous=False, expected a contiguous"),
        (
            {"W_dec": torch.ones(9, 2).long()},
            ValueError,
            "W_dec: got torch.int64, expected float32, bfloat16",
        ),
        ({"W_dec": torch.ones(8, 2)}, ValueError, "code: got a code over 9 latents, expected 8"),
        ({"b_dec": [0.0, 0.0]}, TypeError, "b_dec: got list, expected a tensor or None"),
        ({"b_dec": torch.ones(9)}, ValueError, r"b_dec: got \(9,\) .*, expected \(2,\) torch.float32 on cpu"),
        ({"backend": "fast"}, ValueError, "backend: got 'fast', expected one of 'auto', "),
    ],
)
def test_decode_refuses(change, error, message):
    with pytest.raises(error, match=message):
        decode_with(**change)


def test_what_the_tables_change_is_fine_unchanged():
    assert encode_with().shape == (6, 9)
    assert decode_with().tolist() == [[2.0, 2.0], [3.0, 3.0]]
