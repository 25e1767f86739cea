"""train_step: the ordinary loop's result, without its tensors; batches it skips; what it learns."""

import copy

import pytest
import torch

import fastsae.backends.torch as portable
from fastsae import SAE, AuxK, BatchTopK, DecoderNormL1, JumpReLU, ReLU, SAEConfig, TopK, backends
from fastsae.optim import RowAdam, row_adam
from fastsae.testing import (
    Allocations,
    NeverWaits,
    assert_close,
    assert_repeatable,
    assert_same,
    assert_unchanged,
    everything,
    poisoned_empty,
)
from fastsae.training import train_step

pytestmark = pytest.mark.usefixtures("one_thread")
triton = pytest.mark.skipif(backends.available()["triton"] is not None, reason="Triton can't run here")

D, D_OUT, M, N = 6, 4, 30, 16
ACTIVATIONS = [TopK(3), BatchTopK(3), JumpReLU(0.25), ReLU()]
LOSSES = {
    "reconstruction": (),
    "AuxK": (AuxK(0.5, k_aux=4, dead_after=2 * N),),
    "L1": (DecoderNormL1(0.3),),
    "AuxK and L1": (AuxK(0.5, k_aux=4, dead_after=2 * N), DecoderNormL1(0.3)),
}


def batch(step, d=D, n=N):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(step), dtype=torch.float64) * 2 + 0.5


def make(activation=TopK(3), losses=(), dtype=torch.float64, **options):  # noqa: B008
    """An SAE unlike its initial self, five of whose latents never fire and so die."""
    extra = {name: options.pop(name) for name in ("backend",) if name in options}
    torch.manual_seed(0)
    sae = SAE(SAEConfig(D, M, activation, losses=losses, **options), dtype=torch.float64, **extra)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        sae.b_enc[::6] = -3
    sae.constrain_weights_()
    return sae.to(dtype)


def ordinary_step(sae, optimizer, x, target=None, scale=None):
    """What train_step fuses. RowAdam keeps unit lengths by itself."""
    terms = sae.train().training_forward(x, target).losses
    loss = sum((scale or {}).get(name, 1) * term for name, term in terms.items())
    optimizer.zero_grad()
    loss.backward()
    if not isinstance(optimizer, RowAdam):
        sae.constrain_gradients_()
    optimizer.step()
    if not isinstance(optimizer, RowAdam):
        sae.constrain_weights_()
    return loss.detach()


def assert_equal_sae(sae, expected, tolerance=1e-9):
    for name, t in expected.state_dict().items():
        if t.dtype == torch.float64:
            torch.testing.assert_close(sae.state_dict()[name], t, rtol=tolerance, atol=tolerance)
        elif t.dtype == torch.float32:  # thresholds and scales
            torch.testing.assert_close(sae.state_dict()[name], t, rtol=1e-6, atol=0)
        else:
            assert_same(sae.state_dict()[name], t, name)


def compare(mode, steps=6, target=False, scale=None, **options):
    """Fused and ordinary steps from the same start; the ordinary optimizer of dense mode is torch's own."""
    fused = make(**options)
    ordinary = copy.deepcopy(fused)
    ordinary.backend = "reference"
    optimizer = RowAdam(fused, 0.01, mode=mode, backend=fused.backend)
    other = (
        torch.optim.Adam(ordinary.parameters(), 0.01)
        if mode == "dense"
        else RowAdam(ordinary, 0.01, mode=mode)
    )
    for step in range(steps):
        x, y = batch(step), batch(100 + step, fused.config.d_out) if target else None
        dead = len(ordinary.dead_latents())
        loss = ordinary_step(ordinary, other, x, y, scale)
        metrics = train_step(fused, optimizer, x, y, scale)
        torch.testing.assert_close(metrics["loss"], loss, rtol=1e-9, atol=0)
        assert_equal_sae(fused, ordinary)
    if "AuxK" in str(fused.config.losses):
        assert dead > 0
    for group in (optimizer, other) if mode != "dense" else (optimizer,):
        group.flush_()
    assert_equal_sae(fused, ordinary)
    return fused


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred"])
def test_equals_the_ordinary_loop(exact_backend, mode, activation, losses):
    compare(mode, activation=activation, losses=LOSSES[losses], backend=exact_backend)


@triton
@pytest.mark.parametrize(
    ("mode", "activation", "losses"),
    [
        ("dense", TopK(3), "AuxK"),
        ("lazy", BatchTopK(3), "AuxK and L1"),
        ("deferred", TopK(3), "AuxK and L1"),
        ("deferred", JumpReLU(0.25), "AuxK"),
        ("lazy", ReLU(), "L1"),
    ],
    ids=str,
)
def test_triton_equals_the_ordinary_loop_in_fp32(mode, activation, losses):
    """No further from the fp64 loop than the ordinary fp32 loop is; eps keeps Adam from dividing noise."""
    runs = {}
    for name, backend, dtype in (
        ("kernels", "triton", torch.float32),
        ("eager", "reference", torch.float32),
        ("exact", "reference", torch.float64),
    ):
        sae = make(activation, LOSSES[losses], dtype, backend=backend)
        optimizer = RowAdam(sae, 0.01, eps=0.01, mode=mode, backend=backend)
        step = train_step if name == "kernels" else ordinary_step
        for number in range(4):
            step(sae, optimizer, batch(number).to(dtype))
        assert name != "exact" or "AuxK" not in losses or len(sae.dead_latents()) > 0
        runs[name] = everything(sae)
    for name, exact in runs["exact"].items():
        if exact.dtype == torch.float64:
            assert_close(runs["kernels"][name], runs["eager"][name], exact, name)
        elif not exact.is_floating_point():
            assert_same(runs["kernels"][name], exact, name)


@triton
@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred"])
@pytest.mark.parametrize(
    ("activation", "normalization"), [(TopK(3), "scalar"), (BatchTopK(3), "layer_norm")], ids=str
)
def test_the_host_never_waits_for_the_device(monkeypatch, activation, normalization, mode):
    """So that a TopK or BatchTopK step can be captured in a CUDA graph."""
    monkeypatch.setattr(row_adam, "_on_host", lambda t: False)
    monkeypatch.setattr(row_adam, "GRAPH_STEPS", 64)
    sae = make(
        activation, LOSSES["AuxK and L1"], torch.float32, backend="triton", normalization=normalization
    )
    optimizer = RowAdam(sae, 0.01, mode=mode, backend="triton")
    batches = [batch(number).float() for number in range(4)]
    for x in batches[:2]:
        train_step(sae, optimizer, x)  # the first waits: it sets the scale
    with NeverWaits():
        metrics = [train_step(sae, optimizer, x) for x in (batches[2], batches[2] * torch.nan, batches[3])]
    assert [int(m["skipped"]) for m in metrics] == [0, 1, 0]
    assert metrics[0]["n_dead"] > 0


@pytest.mark.parametrize("normalization", ["none", "scalar", "layer_norm"])
@pytest.mark.parametrize("target", [False, True], ids=["itself", "a target"])
@pytest.mark.parametrize("reconstruction", ["fvu", "squared_error"])
@pytest.mark.parametrize("activation", [TopK(3), ReLU()], ids=str)
def test_equals_it_in_every_space(activation, reconstruction, target, normalization):
    options = {"activation": activation, "losses": LOSSES["AuxK and L1"], "reconstruction": reconstruction}
    compare("dense", target=target, normalization=normalization, d_out=D_OUT if target else None, **options)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("unit_norm", [True, False])
def test_equals_it_with_and_without_constraints(subtract, unit_norm):
    options = {"subtract_b_dec": subtract, "unit_norm_decoder": unit_norm}
    sae = compare("dense", losses=LOSSES["AuxK and L1"], **options)
    lengths = sae.W_dec.norm(dim=1)
    assert torch.allclose(lengths, torch.ones(M).double()) == unit_norm


@pytest.mark.parametrize(
    "scale", [{"decoder_norm_l1": 0.25}, {"auxk": 3, "reconstruction": 0.5}, {"auxk": 0}], ids=str
)
def test_scale_multiplies_loss_terms(scale):
    compare("dense", losses=LOSSES["AuxK and L1"], scale=scale)


@pytest.mark.parametrize("activation", [TopK(3), ReLU()], ids=str)
def test_deferred_is_close_to_dense(activation):
    """What idle rows still owe is read stale; nothing more is lost than that, far less than lazy loses.

    In one run a token's choice may flip, after which it goes its own way: six are added up (0.16 and 0.05 of
    lazy's distance, TopK and ReLU).
    """
    error = dict.fromkeys(("dense", "lazy", "deferred"), 0.0)
    for run in range(6):
        weights = {}
        for mode in error:
            sae = make(activation)
            optimizer = RowAdam(sae, 1e-3, mode=mode)
            for step in range(60):
                train_step(sae, optimizer, batch(100 * run + step, n=4))
            optimizer.flush_()
            weights[mode] = sae.W_dec.detach()
            error[mode] += (weights[mode] - weights["dense"]).norm().item()
    assert error["deferred"] < 0.25 * error["lazy"]


def test_deferred_differs_from_dense_by_the_square_of_the_learning_rate():
    errors = []
    for lr in (4e-4, 1e-4):
        weights = []
        for mode in ("dense", "deferred"):
            sae = make(TopK(3))
            optimizer = RowAdam(sae, lr, mode=mode)
            for step in range(20):
                train_step(sae, optimizer, batch(step))
            optimizer.flush_()
            weights.append(sae.W_dec.detach())
        errors.append((weights[0] - weights[1]).norm().item())
    assert errors[1] < errors[0] / 12  # a quarter of the rate: a sixteenth of the error, to higher orders


@pytest.mark.parametrize("activation", ACTIVATIONS[2:], ids=str)
def test_spare_capacity_of_a_code_is_ignored(monkeypatch, activation):
    """A backend that can't know how many scores pass may return more places than it fills."""
    encode = portable.encode

    def spacious(*args):
        values, indices, offsets = encode(*args)
        if args[5] == "topk":  # AuxK's codes have a fixed size
            return values, indices, offsets
        rubbish = torch.full((5,), 2**30)
        return torch.cat([values, rubbish * torch.nan]), torch.cat([indices, rubbish.int()]), offsets

    monkeypatch.setattr(portable, "encode", spacious)
    compare("dense", activation=activation, losses=LOSSES["AuxK and L1"])
    sae = make(activation, losses=LOSSES["AuxK and L1"])
    roomy = sae.training_forward(batch(0))
    roomy.loss.backward()
    monkeypatch.undo()
    tight = make(activation, losses=LOSSES["AuxK and L1"])
    out = tight.training_forward(batch(0))
    out.loss.backward()
    assert len(roomy.code.values) == len(out.code.values) + 5
    assert_same(roomy.x_hat, out.x_hat)
    for a, b in zip(sae.parameters(), tight.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14)


def test_metrics():
    sae = make(losses=LOSSES["AuxK and L1"])
    for step in range(3):
        train_step(sae, RowAdam(sae, 0.0), batch(step))
    twin = copy.deepcopy(sae)
    x = batch(3)
    out = twin.training_forward(x)
    metrics = train_step(sae, RowAdam(sae), x, scale={"auxk": 2})
    assert list(metrics) == [
        "loss", "reconstruction", "auxk", "decoder_norm_l1", "fvu", "l0", "n_dead", "skipped",
    ]  # fmt: skip
    assert all(isinstance(t, torch.Tensor) and t.ndim == 0 and not t.requires_grad for t in metrics.values())
    expected = dict(out.losses)
    expected["auxk"] = 2 * out.losses["auxk"]
    expected |= {"loss": sum(expected.values()), "fvu": out.losses["reconstruction"]}
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-10, atol=0)
    assert expected["auxk"] > 0
    assert metrics["l0"] == out.code.l0().float().mean()
    assert metrics["n_dead"] == len(twin.dead_latents()) > 0
    assert metrics["skipped"] == 0


def test_every_term_is_reported_where_nothing_is_dead():
    sae = make(losses=(AuxK(),))
    metrics = train_step(sae, RowAdam(sae), batch(0))
    assert metrics["auxk"] == 0
    assert metrics["n_dead"] == 0


@pytest.mark.parametrize("leading", [(N,), (2, 8), (4, 1, 4)], ids=str)
def test_any_leading_shape(leading):
    sae, flat = (
        make(losses=LOSSES["AuxK and L1"], d_out=D_OUT),
        make(losses=LOSSES["AuxK and L1"], d_out=D_OUT),
    )
    for module, shape in ((sae, leading), (flat, (N,))):
        train_step(module, RowAdam(module), batch(0).view(*shape, D), batch(1, D_OUT).view(*shape, D_OUT))
    assert_unchanged(everything(sae), everything(flat))


def test_the_mode_of_the_module_stays():
    for training in (True, False):
        sae = make(BatchTopK(3)).train(training)
        train_step(sae, RowAdam(sae), batch(0))
        assert sae.training is training
        assert sae.threshold > 0
        assert sae.tokens_seen == N
        with pytest.raises(ValueError, match="x: got"):
            train_step(sae, RowAdam(sae), batch(0)[:, 1:])
        assert sae.training is training


def test_gradients_are_neither_left_nor_read():
    sae, twin = make(), make()
    sae.W_enc.grad = torch.full_like(sae.W_enc, 1000.0)
    for module in (sae, twin):
        optimizer = RowAdam(module)
        for step in range(3):
            train_step(module, optimizer, batch(step))
    assert_unchanged(everything(sae), everything(twin))
    assert (sae.W_enc.grad == 1000).all()
    assert all(p.grad is None for p in (sae.b_enc, sae.W_dec, sae.b_dec))


def test_rows_that_are_only_padding_stay():
    """Entries of value 0 have indices, but no gradient flows through them."""
    sae = make(TopK(20))
    with torch.no_grad():
        sae.b_enc.fill_(-20)
        sae.b_enc[:5] = 5
    optimizer = RowAdam(sae, mode="lazy")
    before = everything(sae)
    train_step(sae, optimizer, batch(0))
    for name in ("W_enc", "b_enc", "W_dec"):
        assert optimizer.row_steps(getattr(sae, name)).tolist() == [1] * 5 + [0] * (M - 5)
        assert_same(getattr(sae, name)[5:], before[name][5:])


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
@pytest.mark.parametrize("given", ["the SAE", "what learns"])
def test_a_frozen_parameter_stays(name, given):
    sae = make(activation=ReLU())
    getattr(sae, name).requires_grad_(False)
    before = everything(sae)
    learning = [p for p in sae.parameters() if p.requires_grad]
    optimizer = RowAdam(sae if given == "the SAE" else learning)
    train_step(sae, optimizer, batch(0))
    train_step(sae, optimizer, batch(1))
    optimizer.flush_()
    assert getattr(sae, name) not in optimizer.state
    for other, _ in sae.named_parameters():
        assert torch.equal(getattr(sae, other), before[other]) == (other == name)


# Skipped batches


def spoilt(number):
    def spoil(x):
        x[3, 2] = number
        return x

    return spoil


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("normalization", ["none", "scalar"])
@pytest.mark.parametrize(
    "spoil",
    [
        spoilt(torch.nan),
        spoilt(torch.inf),
        spoilt(-torch.inf),
        lambda x: x * 1e30,  # squared errors overflow
        lambda x: x * 1e14,  # squared gradients overflow in Adam's second moment
    ],
    ids=["NaN", "Inf", "-Inf", "1e30", "1e14"],
)
def test_a_batch_that_leads_to_nan_or_inf_changes_nothing(activation, normalization, spoil):
    sae = make(
        activation,
        LOSSES["AuxK and L1"],
        torch.float32,
        normalization=normalization,
        reconstruction="squared_error",
    )
    optimizer = RowAdam(sae, mode="deferred")
    for step in range(3):
        train_step(sae, optimizer, batch(step).float())
    before = everything(sae, optimizer)
    metrics = train_step(sae, optimizer, spoil(batch(4).float()))
    assert_unchanged(everything(sae, optimizer), before)
    assert metrics["skipped"] == 1
    assert metrics["loss"].isnan()
    assert metrics.keys() == train_step(sae, optimizer, batch(5).float()).keys()
    assert all(p.isfinite().all() for p in sae.parameters())


def test_a_first_batch_that_is_skipped_sets_no_scale():
    sae = SAE(SAEConfig(D, M, ReLU(), normalization="scalar"))
    optimizer = RowAdam(sae)
    before = everything(sae)
    x = batch(0).float()
    x[0, 0] = torch.nan
    assert train_step(sae, optimizer, x)["skipped"] == 1
    assert_unchanged(everything(sae), before)
    assert train_step(sae, optimizer, batch(0).float())["skipped"] == 0
    assert sae.norm_scale > 0


def test_a_first_batch_that_is_refused_sets_no_scale():
    sae = SAE(SAEConfig(D, M, ReLU(), normalization="scalar"))
    with pytest.raises(ValueError, match="x: got a sample with mean"):
        train_step(sae, RowAdam(sae), torch.zeros(N, D))
    assert sae.norm_scale == -1


def test_an_error_that_overflows_in_half_precision_is_skipped():
    """Its square, in fp32, doesn't."""
    sae = make(dtype=torch.float16, reconstruction="squared_error")
    with torch.no_grad():
        sae.W_dec.copy_(-sae.W_enc)
    optimizer = RowAdam(sae)
    x = batch(0).half()
    x[0, 0] = 5e4
    assert train_step(sae, optimizer, x)["skipped"] == 1
    assert all(p.isfinite().all() for p in sae.parameters())


@pytest.mark.parametrize("activation", [ReLU(), TopK(3)], ids=str)
def test_nan_is_not_encoded(activation):
    """It ranks first: every latent would be active."""
    n, m = 64, 5000
    sae = SAE(SAEConfig(D, m, activation))
    sae.b_enc.data -= 10
    optimizer = RowAdam(sae)
    train_step(sae, optimizer, batch(0, n=n).float())
    with Allocations() as made:
        assert train_step(sae, optimizer, batch(0, n=n).float() * torch.nan)["skipped"] == 1
    assert made.largest <= portable.BLOCK_SCORES
    assert made.largest < n * m * 1.01


def test_a_target_with_nan_is_skipped():
    sae = make(d_out=D_OUT)
    optimizer = RowAdam(sae)
    train_step(sae, optimizer, batch(1), batch(2, D_OUT))
    before = everything(sae, optimizer)
    assert train_step(sae, optimizer, batch(0), torch.full((N, D_OUT), torch.nan).double())["skipped"] == 1
    assert_unchanged(everything(sae, optimizer), before)


# Memory, determinism, dtypes


@pytest.mark.parametrize("losses", ["reconstruction", "AuxK and L1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("mode", "d_out"), [("lazy", 16), ("deferred", 12), ("dense", 16)])
def test_no_tensor_of_the_size_of_a_weight_or_of_the_scores(
    small_blocks, monkeypatch, losses, mode, d_out, dtype
):
    """Most latents are dead, so that AuxK works on nearly all rows."""
    n, d, m = 24, 16, 2000
    monkeypatch.setattr(row_adam, "BLOCK_ELEMENTS", m)
    torch.manual_seed(0)
    sae = SAE(SAEConfig(d, m, TopK(3), losses=LOSSES[losses], d_out=d_out), dtype=dtype)
    optimizer = RowAdam(sae, mode=mode)
    x, y = batch(0, d, n).to(dtype), batch(1, d_out, n).to(dtype)
    for _ in range(3):  # the first step makes the moments
        train_step(sae, optimizer, x, y)
    with Allocations() as made:
        metrics = train_step(sae, optimizer, x, y)
    if "AuxK" in losses:
        assert metrics["n_dead"] > 0.9 * m
    assert made.largest <= 2 * m < min(m * d_out, n * m) / 5, made.made_by


@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred"])
def test_two_runs_agree_to_the_bit(backend, two_threads, mode):
    def run():
        sae = make(losses=LOSSES["AuxK and L1"], dtype=torch.float32, backend=backend)
        optimizer = RowAdam(sae, mode=mode, backend=backend)
        for step in range(5):
            train_step(sae, optimizer, batch(step).float())
        return [t for t in everything(sae, optimizer).values() if isinstance(t, torch.Tensor)]

    assert_repeatable(run)


def test_no_place_is_left_unwritten(backend):
    def run():
        sae = make(losses=LOSSES["AuxK and L1"], dtype=torch.float32, backend=backend)
        optimizer = RowAdam(sae, backend=backend)
        for step in range(5):
            train_step(sae, optimizer, batch(step).float())
        return everything(sae)

    expected = run()
    with poisoned_empty():
        assert_unchanged(run(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_half_precision_weights_learn(activation, dtype):
    sae = make(activation, LOSSES["AuxK and L1"], dtype)
    optimizer = RowAdam(sae, 0.01)
    x = batch(0, n=64).to(dtype)
    expected = copy.deepcopy(sae)(x, return_loss=True).loss
    metrics = [train_step(sae, optimizer, x) for _ in range(40)]
    # the module rounds x_hat before it compares it
    torch.testing.assert_close(metrics[0]["loss"], expected.detach(), rtol=torch.finfo(dtype).eps, atol=0)
    assert metrics[-1]["reconstruction"] < 0.7 * metrics[0]["reconstruction"]
    assert {p.dtype for n, p in sae.named_parameters() if n != "log_threshold"} == {dtype}
    assert {t.dtype for t in optimizer.state[sae.W_enc].values()} == {torch.float32, torch.int32}
    assert all(p.isfinite().all() for p in sae.parameters())


# What is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"opt": torch.optim.Adam([torch.ones(1)])}, TypeError, "opt: got Adam, expected a RowAdam"),
        (
            {"opt": RowAdam([torch.nn.Parameter(torch.ones(2, 2))])},
            ValueError,
            "opt: got .*, expected RowAdam",
        ),
        ({"x": [[1.0] * D]}, TypeError, "x: got list, expected a tensor"),
        ({"x": torch.ones(0, D).double()}, ValueError, r"x: got shape \(0, 6\), expected at least one token"),
        ({"x": torch.ones(2, 5).double()}, ValueError, r"x: got shape \(2, 5\), expected \[\.\.\., 6\]"),
        ({"x": torch.ones(2, D)}, ValueError, "x: got torch.float32, expected torch.float64"),
        ({"x": torch.ones(2, D).int()}, ValueError, "x: got torch.int32, expected torch.float64"),
        ({"target": [0.0]}, TypeError, "target: got list, expected a tensor"),
        ({"target": torch.ones(2, D)}, ValueError, "target: got torch.float32, expected torch.float64"),
        (
            {"target": torch.ones(3, D).double()},
            ValueError,
            r"target: got shape \(3, 6\), expected \(16, 6\)",
        ),
        ({"scale": {"l1": 1}}, ValueError, "scale: got a multiplier of 'l1', expected names among"),
        (
            {"scale": {"auxk": 1}},
            ValueError,
            r"scale: got a multiplier of 'auxk', expected .*\['reconstruction'\]",
        ),
        ({"scale": {"reconstruction": -1}}, ValueError, r"scale\['reconstruction'\]: got -1, expected"),
        ({"scale": {"reconstruction": "1"}}, TypeError, r"scale\['reconstruction'\]: got str, expected"),
    ],
)
def test_refused_before_any_work(change, error, message):
    sae = make(normalization="scalar")
    optimizer = RowAdam(sae)
    before = everything(sae, optimizer)
    with pytest.raises(error, match=message):
        train_step(**{"sae": sae, "opt": optimizer, "x": batch(0)} | change)
    assert_unchanged(everything(sae, optimizer), before)


def test_a_transcoder_asks_for_its_target_before_any_work():
    sae = make(d_out=D_OUT, normalization="scalar")
    optimizer = RowAdam(sae)
    before = everything(sae, optimizer)
    with pytest.raises(ValueError, match=r"target: got None, expected a tensor \[\.\.\., 4\]"):
        train_step(sae, optimizer, batch(0))
    assert_unchanged(everything(sae, optimizer), before)


def test_an_optimizer_on_another_backend_is_refused():
    sae = make(backend="torch")
    with pytest.raises(ValueError, match="opt: got one on backend 'reference', expected 'torch'"):
        train_step(sae, RowAdam(sae, backend="reference"), batch(0))
    assert RowAdam(sae).backend == "torch"


def test_inputs_are_cast_to_the_weights_and_autocast_does_not_apply():
    losses = []
    for enabled in (False, True):
        sae = make(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            x = batch(0).to(torch.bfloat16 if enabled else torch.float32)
            losses.append(train_step(sae, RowAdam(sae), x if enabled else x.bfloat16().float())["loss"])
    assert_same(*losses)


def test_an_optimizer_that_lets_a_unit_norm_decoder_go_is_refused():
    sae = make()
    with pytest.raises(ValueError, match=r"opt: got .*, expected RowAdam"):
        train_step(sae, RowAdam(sae.parameters()), batch(0))
    free = make(ReLU())
    train_step(free, RowAdam(free.parameters()), batch(0))
