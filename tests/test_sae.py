"""The module: shapes, normalisation, losses by hand, dead latents, thresholds, constraints, dtypes, files."""

import copy
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastsae
from fastsae import SAE, AuxK, BatchTopK, DecoderNormL1, JumpReLU, ReLU, SAEConfig, SparseCode, TopK, shards
from fastsae.testing import assert_same, pre_acts

pytestmark = pytest.mark.usefixtures("one_thread")

D, M, N = 6, 20, 12
ACTIVATIONS = [TopK(3), BatchTopK(3), JumpReLU(0.25), ReLU()]
NORMALIZATIONS = ["none", "scalar", "layer_norm"]


def data(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def make(activation, dtype=torch.float32, **options):
    """An SAE with weights and biases unlike its initial ones, its normalisation set."""
    extra = {name: options.pop(name) for name in ("sparse_grad", "backend") if name in options}
    torch.manual_seed(0)
    sae = SAE(SAEConfig(D, M, activation, **options), dtype=torch.float64, **extra)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    sae.constrain_weights_()
    if sae.config.normalization == "scalar":
        sae.estimate_norm_scale_(data(100, D).double())
    return sae.to(dtype)


def state(sae):
    return {name: t.clone() for name, t in sae.state_dict().items()}


def assert_state(sae, expected):
    assert sae.state_dict().keys() == expected.keys()
    for name, t in sae.state_dict().items():
        assert_same(t, expected[name], name)


def dense_code(scores, activation, threshold=0):
    """relu(scores) where the rule keeps them; ``threshold`` is JumpReLU's."""
    if isinstance(activation, TopK):
        kept = torch.zeros_like(scores).scatter(1, scores.topk(activation.k, dim=1).indices, 1)
    elif isinstance(activation, BatchTopK):
        places = scores.flatten().topk(activation.k * len(scores)).indices
        kept = torch.zeros_like(scores.flatten()).scatter(0, places, 1).view_as(scores)
    else:
        kept = scores > threshold
    return scores.relu() * kept


def normalised(sae, x):
    """x in the space of the loss, and how to come back."""
    if sae.config.normalization == "scalar":
        return x * sae.norm_scale.double(), lambda y: y / sae.norm_scale.double()
    if sae.config.normalization == "layer_norm":
        mean, scale = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-5
        return (x - mean) / scale, lambda y: y * scale + mean
    return x, lambda y: y


# Forward


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_forward_is_the_formula(exact_backend, activation, subtract, normalization):
    sae = make(
        activation, torch.float64, normalization=normalization, subtract_b_dec=subtract, backend=exact_backend
    )
    x = data(N, D).double()
    inner, back = normalised(sae, x)
    scores = pre_acts(inner - sae.b_dec if subtract else inner, sae.W_enc, sae.b_enc)
    z = dense_code(scores, activation, sae.threshold if isinstance(activation, JumpReLU) else 0)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(sae.encode(x), z, **close)
    torch.testing.assert_close(sae.encode_sparse(x).to_dense(), z, **close)
    torch.testing.assert_close(sae(x), back(z @ sae.W_dec + sae.b_dec), **close)
    torch.testing.assert_close(sae.decode(sae.encode_sparse(x)), sae(x), **close)
    if normalization != "layer_norm":
        torch.testing.assert_close(sae.decode(sae.encode(x)), sae(x), **close)


@pytest.mark.parametrize("leading", [(), (N,), (2, 3, 2), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_a_drop_in_module(activation, normalization, leading):
    sae = make(activation, normalization=normalization).eval()
    x = data(*leading, D)
    x_hat = sae(x)
    assert (x_hat.shape, x_hat.dtype) == (x.shape, x.dtype)
    assert sae.encode(x).shape == (*leading, M)
    assert sae.encode_sparse(x).shape == (*leading, M)
    torch.testing.assert_close(sae(x.reshape(-1, D)).view(x.shape), x_hat)


def test_forward_with_a_loss_is_training_forward():
    x = data(N, D)
    a, b = make(TopK(3))(x, return_loss=True), make(TopK(3)).training_forward(x)
    for name in ("x_hat", "loss"):
        assert_same(getattr(a, name), getattr(b, name))
    assert_same(a.x_hat, make(TopK(3))(x))
    assert a.losses.keys() == {"reconstruction"}
    assert_same(a.loss, a.losses["reconstruction"])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_initial_weights(activation):
    sae = SAE(SAEConfig(D, M, activation))
    length = 1.0 if isinstance(activation, TopK | BatchTopK) else 0.1
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((M,), length))
    assert_same(sae.W_enc, sae.W_dec)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    assert not SAE(SAEConfig(D, M, activation, d_out=4)).W_dec.any()
    torch.manual_seed(3)
    first = SAE(sae.config).W_enc
    torch.manual_seed(3)
    assert_same(SAE(sae.config).W_enc, first)


# Normalisation


def test_scalar_normalisation_makes_the_mean_square_the_width():
    sae = SAE(SAEConfig(D, M, ReLU(), normalization="scalar"))
    x = data(200, D)
    sae.calibrate_(x)
    inner = x * sae.norm_scale
    assert inner.square().sum(1).mean().item() == pytest.approx(D, rel=1e-5)


@pytest.mark.parametrize("subtract", [True, False])
def test_scalar_normalisation_makes_units_irrelevant(subtract):
    x = data(200, D).double()
    results = []
    for unit in (1.0, 1024.0):
        sae = make(TopK(3), torch.float64, normalization="scalar", subtract_b_dec=subtract)
        sae.estimate_norm_scale_(x * unit, again=True)
        out = sae.training_forward(x * unit)
        results.append((out.loss, out.code.values, out.x_hat / unit))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_layer_norm_makes_each_tokens_unit_and_offset_irrelevant():
    sae = make(TopK(3), torch.float64, normalization="layer_norm")
    x = data(N, D).double()
    unit, offset = torch.rand(N, 1).double() + 0.5, torch.randn(N, 1).double()
    torch.testing.assert_close(sae.encode(x * unit + offset), sae.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x * unit + offset), sae(x) * unit + offset, rtol=1e-4, atol=1e-4)


def test_layer_norm_of_constant_and_of_single_numbers_is_finite():
    sae = make(TopK(3), normalization="layer_norm")
    assert sae(torch.full((2, D), 7.0)).isfinite().all()
    narrow = SAE(SAEConfig(1, 3, TopK(1), normalization="layer_norm"))
    assert narrow(torch.tensor([[2.0], [3.0]])).isfinite().all()


def test_training_sets_an_unset_scalar_and_inference_asks_for_it():
    sae = SAE(SAEConfig(D, M, ReLU(), normalization="scalar")).eval()
    x = data(N, D)
    for use in (sae, sae.encode, sae.encode_sparse, sae.training_forward):
        with pytest.raises(
            ValueError, match=r"norm_scale: got no value yet, expected sae.calibrate_\(sample\)"
        ):
            use(x)
    with pytest.raises(ValueError, match="norm_scale: got no value yet"):
        sae.decode(torch.ones(N, M))
    sae.train().training_forward(x)
    scale = sae.norm_scale.clone()
    assert scale.item() == pytest.approx((D / x.square().sum(1).mean().item()) ** 0.5)
    sae.training_forward(x * 10)
    assert_same(sae.norm_scale, scale)
    sae.calibrate_(x * 10)
    torch.testing.assert_close(sae.norm_scale, scale / 10)


def test_calibrate_puts_b_dec_at_the_geometric_median():
    x = data(501, D).double()
    x[:50] += 1000  # the mean follows outliers, the geometric median hardly
    sae = SAE(SAEConfig(D, M, TopK(3)), dtype=torch.float64).calibrate_(x)
    distance = lambda point: (x - point).norm(dim=1).sum()  # noqa: E731
    assert distance(sae.b_dec) < distance(x.mean(0))
    nudges = torch.randn(50, D, generator=torch.Generator().manual_seed(0)).double() * 0.1
    assert all(distance(sae.b_dec) < distance(sae.b_dec + nudge) for nudge in nudges)
    plain = SAE(SAEConfig(D, M, ReLU()))
    assert not plain.calibrate_(data(9, D)).b_dec.any()


# Losses


def test_the_loss_of_scaling_monosemanticity_by_hand():
    """E[ ||x - x_hat||^2 + 5 sum_i f_i ||W_dec[i]|| ], f = relu(W_enc x + b_enc), E||x||^2 = D."""
    sae = make(ReLU(), torch.float64, losses=(DecoderNormL1(5),), normalization="scalar")
    x = data(N, D).double()
    out = sae.training_forward(x)
    inner = x * sae.norm_scale.double()
    f = (inner @ sae.W_enc.T + sae.b_enc).relu()
    error = (inner - f @ sae.W_dec - sae.b_dec).square().sum(1).mean()
    sparsity = 5 * (f * sae.W_dec.norm(dim=1)).sum(1).mean()
    close = {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(out.losses["reconstruction"], error, **close)
    torch.testing.assert_close(out.losses["decoder_norm_l1"], sparsity, **close)
    torch.testing.assert_close(out.loss, error + sparsity, **close)
    actual = torch.autograd.grad(out.loss, list(sae.parameters()))
    expected = torch.autograd.grad(error + sparsity, list(sae.parameters()))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_loss_of_topk_by_hand(normalization):
    """The batch's squared error over its variance about its mean, in normalised space."""
    sae = make(TopK(3), torch.float64, normalization=normalization)
    x = data(N, D).double()
    inner, _ = normalised(sae, x)
    z = dense_code(pre_acts(inner - sae.b_dec, sae.W_enc, sae.b_enc), TopK(3))
    error = (inner - z @ sae.W_dec - sae.b_dec).square().sum()
    expected = error / (inner - inner.mean(0)).square().sum()
    torch.testing.assert_close(sae.training_forward(x).loss, expected, rtol=1e-12, atol=0)


def test_a_batch_without_variance_has_no_loss():
    sae = make(TopK(3))
    out = sae.training_forward(torch.ones(N, D))
    assert out.loss == 0
    out.loss.backward()
    assert sae.W_enc.grad.isfinite().all()
    assert sae.training_forward(torch.ones(0, D)).loss == 0


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_transcoder_learns_its_target(normalization):
    """The target goes through x's normalisation, and x_hat comes back out of it."""
    sae = make(ReLU(), torch.float64, d_out=4, normalization=normalization)
    x, target = data(N, D).double(), data(N, 4, seed=2).double()
    _, back = normalised(sae, x)
    out = sae.training_forward(x, target)
    assert out.x_hat.shape == (N, 4)
    unit = back(torch.ones(N, 4).double()) - back(
        torch.zeros(N, 4).double()
    )  # what one unit inside is outside
    expected = ((out.x_hat - target) / unit).square().sum(1).mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=0)


def test_gradients_reach_x():
    sae = make(TopK(3), torch.float64, normalization="layer_norm")
    x = data(4, D).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sae.eval()(x), [x])


# AuxK


@pytest.mark.parametrize(("dead", "k_aux"), [((1, 4, 5, 9, 11), 2), ((1, 4, 5), 8), ((7,), 1)])
@pytest.mark.parametrize("reconstruction", ["fvu", "squared_error"])
@pytest.mark.parametrize("subtract", [True, False])
def test_auxk_by_hand(dead, k_aux, reconstruction, subtract):
    term = AuxK(coefficient=0.25, k_aux=k_aux, dead_after=500)
    # with k = 1 and others far ahead, the dead stay dead though some of their scores are positive
    sae = make(TopK(1), torch.float64, losses=(term,), reconstruction=reconstruction, subtract_b_dec=subtract)
    x = data(N, D).double()
    with torch.no_grad():
        fired = sae.encode(x).ne(0).any(0)
    latents = torch.tensor(dead)
    with torch.no_grad():
        sae.b_enc[latents] = -0.5
        sae.b_enc[~torch.zeros(M, dtype=torch.bool).index_fill(0, latents, True)] += 10
    assert fired.any()
    sae.tokens_seen.fill_(1000)
    sae.silent_tokens[latents] = 1000
    out = sae.training_forward(x)
    assert sae.dead_latents().tolist() == list(dead)

    inner = x - sae.b_dec if subtract else x
    z = dense_code(pre_acts(inner, sae.W_enc[latents], sae.b_enc[latents]), TopK(min(k_aux, len(dead))))
    assert z.any()
    residual = (x - out.x_hat).detach()
    squares = (residual - z @ sae.W_dec[latents]).square().sum()
    normaliser = (x - x.mean(0)).square().sum() if reconstruction == "fvu" else N
    expected = 0.25 * min(len(dead) / k_aux, 1) * squares / normaliser
    torch.testing.assert_close(out.losses["auxk"], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.loss, out.losses["reconstruction"] + expected, rtol=1e-12, atol=0)

    parameters = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    grads = [
        torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        for loss in (out.losses["auxk"], expected)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    W_enc_grad, b_enc_grad, W_dec_grad, b_dec_grad = grads[0]
    for grad in (W_enc_grad, b_enc_grad, W_dec_grad):
        assert grad[latents].any()
        assert not grad[fired.index_fill(0, latents, False)].any()
    # b_dec is in the detached residual and, where subtracted, in the encoder's input: never in e_hat
    assert b_dec_grad.any().item() == subtract


def test_auxk_is_zero_and_harmless_where_nothing_is_dead():
    sae = make(TopK(3), losses=(AuxK(dead_after=10_000),))
    out = sae.training_forward(data(N, D))
    assert out.losses["auxk"] == 0
    out.loss.backward()
    plain = make(TopK(3))
    plain.training_forward(data(N, D)).loss.backward()
    for a, b in zip(sae.parameters(), plain.parameters(), strict=True):
        assert_same(a.grad, b.grad)


def test_auxk_measures_the_residual_in_fp32():
    """As the reconstruction loss does: bf16 would round the difference of target and x_hat."""
    term = AuxK(coefficient=1, k_aux=1, dead_after=2 * N)
    sae = make(TopK(3), torch.bfloat16, losses=(term,), reconstruction="squared_error")
    with torch.no_grad():
        sae.b_enc[7] = -1000  # dead, and nothing to offer: its e_hat is 0
        sae.tokens_seen.fill_(2 * N)
        sae.silent_tokens.fill_(N - 1)
        sae.silent_tokens[7] = 2 * N
    out = sae.training_forward(data(N, D).bfloat16())
    torch.testing.assert_close(out.losses["auxk"], out.losses["reconstruction"], rtol=1e-6, atol=0)


# Counters, thresholds, modes


def test_dead_counters():
    sae = SAE(SAEConfig(2, 3, TopK(1), losses=(AuxK(dead_after=4),), subtract_b_dec=False))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
    first, second, none = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2)
    assert sae.dead_latents().tolist() == []
    for x, silent, dead in (
        (torch.cat([first, second]), [0, 0, 2], []),
        (first, [0, 1, 3], []),
        (second, [1, 0, 4], [2]),
        (torch.cat([none, none]), [3, 2, 6], [2]),  # a selected 0 is no firing
        (first, [0, 3, 7], [2]),
        (first, [0, 4, 8], [1, 2]),
    ):
        sae.training_forward(x)
        assert (sae.silent_tokens.tolist(), sae.dead_latents().tolist()) == (silent, dead)
    assert sae.tokens_seen == 8
    assert sae.dead_latents(dead_after=8).tolist() == [2]
    assert sae.dead_latents(dead_after=9).tolist() == []


def test_inference_counts_nothing():
    sae = make(BatchTopK(3), losses=(AuxK(),))
    before = state(sae)
    sae(data(N, D))
    sae.encode(data(N, D))
    sae.eval().training_forward(data(N, D))
    assert_state(sae, before)


def test_batchtopk_threshold_is_a_running_mean_of_the_smallest_positive_value():
    sae = make(BatchTopK(15))
    assert sae.threshold == -1
    smallest = []
    for seed in range(3):
        values = sae.training_forward(data(N, D, seed=seed)).code.values
        assert values.min() == 0  # so many are kept that some aren't positive
        smallest.append(values[values > 0].min().item())
    expected = smallest[0]
    for t, value in enumerate(smallest[1:], start=1):
        decay = (t + 1) / (t + 10)
        expected = decay * expected + (1 - decay) * value
    assert sae.threshold.item() == pytest.approx(expected, rel=1e-6)
    sae_threshold = expected
    sae.tokens_seen.fill_(10**6 * N)
    value = sae.training_forward(data(N, D, seed=4)).code.values
    expected = 0.999 * sae_threshold + 0.001 * value[value > 0].min().item()
    assert sae.threshold.item() == pytest.approx(expected, rel=1e-6)
    before = sae.threshold.clone()
    with torch.no_grad():
        sae.b_enc.fill_(-1000)
    sae.training_forward(data(N, D))  # nothing positive was kept
    assert_same(sae.threshold, before)


def test_batchtopk_encodes_by_the_batch_in_training_and_by_its_threshold_after():
    sae = make(BatchTopK(3))
    x = data(N, D)
    by_batch = sae.encode(x)
    assert_same(sae.eval().encode(x), by_batch)  # unset: the batch's own rule
    sae.threshold.fill_(1.25)
    scores = pre_acts(x - sae.b_dec, sae.W_enc, sae.b_enc)
    assert_same(sae.encode(x), torch.where(scores > 1.25, scores, 0))
    # by threshold, a token's code doesn't depend on its company
    torch.testing.assert_close(sae.encode(x[:1]), sae.encode(x)[:1])
    assert_same(sae.train().encode(x), by_batch)


def test_jumprelu_has_a_threshold_per_latent():
    sae = SAE(SAEConfig(D, M, JumpReLU(0.25)))
    torch.testing.assert_close(sae.threshold, torch.full((M,), 0.25), rtol=1e-6, atol=0)
    with torch.no_grad():
        sae.log_threshold.copy_(torch.linspace(0, 2, M).log())
    x = data(N, D)
    scores = pre_acts(x, sae.W_enc, sae.b_enc)
    assert sae.threshold[0] == 0
    assert_same(sae.encode(x), torch.where(scores > sae.threshold, scores, 0))


# Constraints and optimizers


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_constraints_keep_a_unit_norm_decoder(sparse_grad):
    sae = make(TopK(3), torch.float64, sparse_grad=sparse_grad)
    sae.training_forward(data(N, D).double()).loss.backward()
    assert sae.W_dec.grad.is_sparse == sparse_grad
    before = sae.W_dec.grad.to_dense().clone()
    sae.constrain_gradients_()
    after = sae.W_dec.grad.to_dense()
    along = (before * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
    torch.testing.assert_close(after, before - along, rtol=1e-10, atol=1e-12)
    assert along.abs().max() > 1e-3
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, M)[:, None])
    direction = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    sae.constrain_weights_()
    torch.testing.assert_close(sae.W_dec, direction)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(M).double())


def test_constraints_leave_a_free_decoder_alone():
    sae = make(ReLU())
    sae.training_forward(data(N, D)).loss.backward()
    before, grad = state(sae), sae.W_dec.grad.clone()
    sae.constrain_gradients_()
    sae.constrain_weights_()
    assert_state(sae, before)
    assert_same(sae.W_dec.grad, grad)
    make(TopK(3)).constrain_gradients_()  # before the first backward there is nothing to do


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda sae: [torch.optim.SGD(sae.parameters(), lr=0.3, momentum=0.9)],
        lambda sae: [torch.optim.AdamW(sae.parameters(), lr=0.01)],
        lambda sae: [
            torch.optim.SparseAdam([sae.W_enc, sae.W_dec], lr=0.01),
            torch.optim.Adam([sae.b_enc, sae.b_dec], lr=0.01),
        ],
    ],
    ids=["SGD", "AdamW", "SparseAdam"],
)
def test_any_optimizer_lowers_the_loss(optimizer):
    torch.manual_seed(0)
    sae = SAE(SAEConfig(D, M, TopK(3)))
    optimizers = optimizer(sae)
    sae.sparse_grad = len(optimizers) > 1
    x, losses = data(200, D), []
    for _ in range(30):
        loss = sae(x, return_loss=True).loss
        losses.append(loss.item())
        for opt in optimizers:
            opt.zero_grad()
        loss.backward()
        sae.constrain_gradients_()
        for opt in optimizers:
            opt.step()
        sae.constrain_weights_()
    assert losses[-1] < 0.8 * losses[0]
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(M))


def test_options_change_more_than_the_size_of_the_gradient():
    """An option that only multiplied the loss would do nothing under Adam."""
    x = data(N, D)

    def direction(activation=TopK(3), **options):  # noqa: B008
        sae = make(activation, **options)
        sae.training_forward(x).loss.backward()
        grad = torch.cat([p.grad.flatten() for p in sae.parameters()])
        return grad / grad.norm()

    base = direction()
    for options in (
        {"activation": TopK(4)},
        {"activation": BatchTopK(3)},
        {"subtract_b_dec": False},
        {"unit_norm_decoder": False},
        {"normalization": "layer_norm"},
        {"losses": (DecoderNormL1(1),)},
    ):
        assert direction(**options) @ base < 0.999


# dtypes, copies, compilation


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_any_dtype(dtype, normalization, activation):
    sae = make(
        activation, dtype, normalization=normalization, losses=(AuxK(dead_after=1), DecoderNormL1(0.1))
    )
    out = sae.training_forward(data(N, D).to(dtype))
    wide = torch.promote_types(dtype, torch.float32)
    assert out.x_hat.dtype == out.code.values.dtype == dtype
    assert {t.dtype for t in (out.loss, *out.losses.values())} == {wide}
    out.loss.backward()
    for name, p in sae.named_parameters():
        assert p.grad.dtype == (wide if name == "log_threshold" else dtype)
        assert p.grad.isfinite().all()
    for name in ("threshold", "norm_scale"):
        assert name not in sae.state_dict() or sae.state_dict()[name].dtype == torch.float32
    full = sae.full_precision("W_dec")
    assert full.dtype == wide
    assert torch.equal(full.to(dtype), sae.W_dec)
    assert not full.requires_grad


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_autocast_casts_the_forward_and_keeps_losses_in_fp32(activation, normalization):
    sae = make(activation, normalization=normalization, losses=(AuxK(dead_after=1), DecoderNormL1(0.1)))
    x = data(N, D)
    with torch.autocast("cpu", torch.bfloat16):
        out = sae(x, return_loss=True)
        assert sae(x).dtype == torch.bfloat16
    assert out.code.values.dtype == torch.bfloat16
    assert {t.dtype for t in (out.loss, *out.losses.values())} == {torch.float32}
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in sae.parameters())
    exact = make(activation, normalization=normalization)(x, return_loss=True).losses["reconstruction"]
    torch.testing.assert_close(out.losses["reconstruction"], exact, rtol=0.1, atol=0)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_autocast_takes_what_a_layer_before_it_gives(normalization):
    """Under autocast a linear layer gives bf16, and so do encode and decode."""
    sae = make(ReLU(), normalization=normalization)
    layer = torch.nn.Linear(D, D)
    with torch.autocast("cpu", torch.bfloat16):
        h = layer(data(N, D))
        assert h.dtype == torch.bfloat16
        assert sae(h, return_loss=True).loss.dtype == torch.float32
        assert sae(h, target=h, return_loss=True).loss.isfinite()
        if normalization != "layer_norm":
            torch.testing.assert_close(
                sae.decode(sae.encode(h)).float(), sae(h).float(), rtol=0.05, atol=0.05
            )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_copies_are_equal_and_apart(activation, normalization):
    sae = make(activation, normalization=normalization)
    sae.training_forward(data(N, D))
    loaded = SAE(sae.config)
    loaded.load_state_dict(sae.state_dict())
    for other in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae)), loaded):
        assert_state(other, state(sae))
        assert_same(other(data(N, D)), sae(data(N, D)))
        before = state(sae)
        other.training_forward(data(N, D))
        with torch.no_grad():
            other.W_dec.add_(1)
        assert_state(sae, before)


def test_parameters_and_buffers():
    sae = SAE(SAEConfig(D, M, BatchTopK(3), d_out=4, normalization="scalar"))
    shapes = {name: tuple(t.shape) for name, t in sae.state_dict().items()}
    weights = {"W_enc": (M, D), "b_enc": (M,), "W_dec": (M, 4), "b_dec": (4,)}
    assert {name: tuple(p.shape) for name, p in sae.named_parameters()} == weights
    assert shapes == weights | {"threshold": (), "norm_scale": (), "silent_tokens": (M,), "tokens_seen": ()}
    assert "n_latents=20" in repr(sae)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_materialising_from_the_meta_device(activation):
    sae = SAE(SAEConfig(D, M, activation, normalization="scalar"), device="meta").to_empty(device="cpu")
    sae.load_state_dict(make(activation, normalization="scalar").state_dict())
    assert_same(sae(data(N, D)), make(activation, normalization="scalar")(data(N, D)))


def test_a_failed_cast_loses_no_buffer():
    sae = make(BatchTopK(3), normalization="scalar")
    before = state(sae)

    def fail(t):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        sae._apply(fail)
    assert_state(sae, before)


# torch._dynamo itself makes the instance it warns of
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile():
    torch._dynamo.reset()
    sae = make(TopK(3))
    compiled = torch.compile(sae, backend="aot_eager", fullgraph=True)
    x = data(N, D)
    assert_same(compiled(x), sae(x))


# Files


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_files_keep_every_bit(tmp_path, dtype, normalization, activation):
    sae = make(activation, dtype, normalization=normalization, losses=(AuxK(), DecoderNormL1(2)))
    sae.training_forward(data(N, D).to(dtype))
    sae.save(tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    for load in (SAE.load, fastsae.load):
        again = load(tmp_path / "new" / "folder", device="cpu")
        assert again.config == sae.config
        assert_state(again, state(sae))
        assert all(p.requires_grad and p.is_leaf for p in again.parameters())
        assert_same(again(data(N, D).to(dtype)), sae(data(N, D).to(dtype)))


def test_loading_in_another_dtype(tmp_path):
    sae = make(BatchTopK(3), normalization="scalar")
    sae.threshold.fill_(1 / 3)
    sae.save(str(tmp_path))
    for dtype in (torch.bfloat16, torch.float64):
        again = SAE.load(str(tmp_path), dtype=dtype)
        assert_same(again.W_enc, sae.W_enc.to(dtype))
        assert_same(again.threshold, sae.threshold)
        assert_same(again.norm_scale, sae.norm_scale)


def test_saving_again_replaces_what_was_there(tmp_path):
    make(TopK(3)).save(tmp_path)
    sae = make(ReLU(), d_out=4)
    sae.save(tmp_path)
    assert_state(SAE.load(tmp_path), state(sae))
    assert SAE.load(tmp_path).config == sae.config


@pytest.mark.parametrize("failing", ["the weights", "the config", "flushing"])
def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch, failing):
    old = make(TopK(3))
    old.save(tmp_path)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    home, name = {
        "the weights": (shards, "to_bytes"),
        "the config": (Path, "write_text"),
        "flushing": (os, "fsync"),
    }[failing]
    monkeypatch.setattr(home, name, fail)
    with pytest.raises(OSError, match="no space left"):
        make(ReLU(), d_out=4).save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_state(SAE.load(tmp_path), state(old))


def rewrite(change):
    """Damage that changes the tensors of a file."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def reconfigure(change):
    """Damage that changes the JSON."""

    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def spoil(tensors, name, number):
    tensors[name].view(-1)[-1] = number


WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "config.json: got no readable file, expected"),
        (lambda folder: (folder / CONFIG).unlink(), "config.json: got no readable file, expected"),
        (lambda folder: (folder / WEIGHTS).unlink(), "model.safetensors: got no whole safetensors file"),
        (
            lambda folder: os.truncate(folder / WEIGHTS, 700),
            "model.safetensors: got no whole safetensors file",
        ),
        (lambda folder: os.truncate(folder / WEIGHTS, 4), "model.safetensors: got no whole safetensors file"),
        (lambda folder: os.truncate(folder / WEIGHTS, 0), "model.safetensors: got no whole safetensors file"),
        (
            lambda folder: (folder / WEIGHTS).write_bytes(b"\x80\x04pickle" * 99),
            "got no whole safetensors file",
        ),
        (lambda folder: os.truncate(folder / CONFIG, 50), "config.json: got text that isn't JSON"),
        (
            lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x00"),
            "config.json: got text that isn't JSON",
        ),
        (
            lambda folder: (folder / CONFIG).write_text("[]"),
            "config.json: got a config of another format, expected",
        ),
        (
            lambda folder: (folder / CONFIG).write_text('{"d_in": 6, "d_sae": 20}'),
            "a config of another format",
        ),
        (reconfigure(lambda c: c.update(format="fastsae/99")), 'another format, expected one with "format"'),
        (
            reconfigure(lambda c: c.update(extra=1)),
            r"config: got unknown keys \['extra'\], expected keys among",
        ),
        (reconfigure(lambda c: c.pop("d_in")), r"config: got no \['d_in'\], expected the keys"),
        (reconfigure(lambda c: c["activation"].update(k=21)), r"k: got 21, expected an integer in 1\.\.20"),
        (
            reconfigure(lambda c: c.update(n_latents=21)),
            r"model.safetensors: got W_dec \(20, 6\), expected \(21, 6\)",
        ),
        (rewrite(lambda t: t.pop("b_enc")), r"model.safetensors: got b_enc missing, expected \(20,\)"),
        (rewrite(lambda t: t.update(W_skip=torch.ones(1))), r"got W_skip \(1,\), expected no such tensor"),
        (rewrite(lambda t: t.update(W_enc=torch.ones(6, 20))), r"got W_enc \(6, 20\), expected \(20, 6\)"),
        (rewrite(lambda t: spoil(t, "W_dec", torch.nan)), "got NaN or Inf in W_dec, expected finite weights"),
        (
            rewrite(lambda t: spoil(t, "b_dec", -torch.inf)),
            "got NaN or Inf in b_dec, expected finite weights",
        ),
        (
            rewrite(lambda t: spoil(t, "norm_scale", torch.nan)),
            "got NaN or Inf in norm_scale, expected finite",
        ),
        (rewrite(lambda t: t.update(W_enc=t["W_enc"].int())), "got W_enc in torch.int32, expected"),
        (rewrite(lambda t: t.update(W_enc=t["W_enc"].half())), "got W_enc in torch.float16, expected"),
        (
            rewrite(lambda t: t.update(silent_tokens=torch.ones(20))),
            "got silent_tokens in torch.float32, expected",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    make(TopK(3), normalization="scalar").save(tmp_path / "sae")
    SAE.load(tmp_path / "sae")
    damage(tmp_path / "sae")
    with pytest.raises((ValueError, TypeError), match=message):
        SAE.load(tmp_path / "sae")


# What is refused


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda sae: SAE({"d_in": 4}), TypeError, "config: got dict, expected an SAEConfig"),
        (lambda sae: SAE(sae.config, dtype="float32"), TypeError, "dtype: got str, expected a torch dtype"),
        (
            lambda sae: SAE(sae.config, dtype=torch.int32),
            ValueError,
            "dtype: got torch.int32, expected float32",
        ),
        (
            lambda sae: SAE(sae.config, weight_format="int4"),
            ValueError,
            "weight_format: got 'int4', expected one of",
        ),
        (lambda sae: SAE(sae.config, backend="x"), ValueError, "backend: got 'x', expected one of"),
        (lambda sae: sae([1.0]), TypeError, "x: got list, expected a tensor"),
        (lambda sae: sae(torch.ones(2, 5)), ValueError, r"x: got shape \(2, 5\), expected \[\.\.\., 6\]"),
        (
            lambda sae: sae.encode(torch.ones(6).int()),
            ValueError,
            "x: got torch.int32, expected torch.float32",
        ),
        (
            lambda sae: sae(torch.ones(2, 6, device="meta")),
            ValueError,
            "x: got a tensor on meta, expected one on cpu",
        ),
        (lambda sae: sae.decode([1.0]), TypeError, "code: got list, expected a tensor"),
        (
            lambda sae: sae.decode(torch.ones(2, 19)),
            ValueError,
            r"code: got shape \(2, 19\), expected \[\.\.\., 20\]",
        ),
        (
            lambda sae: sae.decode(SparseCode.from_dense(torch.ones(2, 21))),
            ValueError,
            "code: got a code over 21 latents, expected 20",
        ),
        (
            lambda sae: sae.training_forward(torch.ones(2, 6), torch.ones(2, 5)),
            ValueError,
            r"target: got shape \(2, 5\), expected \[\.\.\., 6\]",
        ),
        (
            lambda sae: sae.training_forward(torch.ones(2, 6), torch.ones(3, 6)),
            ValueError,
            r"target: got shape \(3, 6\), expected \(2, 6\), as x",
        ),
        (
            lambda sae: sae.training_forward(torch.ones(2, 6), [0.0]),
            TypeError,
            "target: got list, expected a",
        ),
        (
            lambda sae: sae.calibrate_(torch.ones(0, 6)),
            ValueError,
            "x: got a sample that is empty or holds NaN",
        ),
        (
            lambda sae: sae.calibrate_(torch.full((2, 6), torch.nan)),
            ValueError,
            "x: got a sample that is empty",
        ),
        (lambda sae: sae.full_precision("W_skip"), ValueError, "name: got 'W_skip', expected one of 'W_enc'"),
    ],
)
def test_refused(use, error, message):
    sae = make(TopK(3))
    with pytest.raises(error, match=message):
        use(sae)


@pytest.mark.parametrize(
    "target", [None, torch.ones(N, D), torch.ones(N + 1, 4)], ids=["none", "wide", "long"]
)
def test_a_refused_target_counts_nothing(target):
    sae = SAE(SAEConfig(D, M, BatchTopK(3), d_out=4, normalization="scalar"))
    before = state(sae)
    with pytest.raises(ValueError, match="target: got"):
        sae.training_forward(data(N, D), target)
    assert_state(sae, before)


def test_a_transcoder_asks_for_a_target_and_layer_norm_for_a_sparse_code():
    with pytest.raises(ValueError, match=r"target: got None, expected a tensor \[\.\.\., 4\]"):
        make(ReLU(), d_out=4).training_forward(data(N, D))
    sae = make(ReLU(), normalization="layer_norm")
    with pytest.raises(ValueError, match="code: got a dense tensor, expected a SparseCode, which carries"):
        sae.decode(torch.ones(2, M))
    with pytest.raises(ValueError, match="code: got a code without mean and scale"):
        sae.decode(SparseCode.from_dense(torch.ones(2, M)))


@pytest.mark.parametrize("x", [torch.ones(2, 5), torch.zeros(2, 6), torch.full((2, 6), torch.inf)], ids=str)
def test_a_refused_batch_sets_no_scale(x):
    sae = SAE(SAEConfig(D, M, ReLU(), normalization="scalar"))
    before = state(sae)
    with pytest.raises(ValueError, match="x: got"):
        sae.training_forward(x)
    assert_state(sae, before)
