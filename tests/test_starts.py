"""Where latents start, and start again: thresholds by data, Anthropic's uniform start, resampling."""

import copy

import pytest
import torch

from fastsae import SAE, BatchTopK, Gated, JumpReLU, ReLU, SAEConfig, TopK
from fastsae.optim import RowAdam
from fastsae.testing import assert_same, assert_unchanged, everything
from fastsae.training import TrainConfig, Trainer, resample_, train_step
from fastsae.training.starts import start_thresholds_, start_uniformly_

pytestmark = pytest.mark.usefixtures("one_thread")
D, M, N = 8, 64, 200


def data(seed=0, n=N):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def trained(activation, steps=4, mode="deferred", **options):
    sae = SAE(SAEConfig(D, M, activation, **options.pop("config", {})), **options)
    sae.reset_parameters(0)
    opt = RowAdam(sae, 0.01, mode=mode)
    for step in range(steps):
        train_step(sae, opt, data(step))
    return sae, opt


@pytest.mark.parametrize("bandwidth", [None, 0.3])
def test_thresholds_let_k_latents_pass(bandwidth):
    sae = SAE(SAEConfig(D, M, JumpReLU(), normalization="scalar")).calibrate_(data())
    threshold = start_thresholds_(sae, data(), 5, bandwidth)
    assert sae.eval().encode_sparse(data()).l0().float().mean().item() == pytest.approx(5, abs=0.02)
    assert sae.config.activation == JumpReLU(threshold, threshold / 4 if bandwidth is None else bandwidth)
    torch.testing.assert_close(sae.threshold, torch.full((M,), threshold))
    with pytest.raises(TypeError, match="activation: got TopK, expected JumpReLU"):
        start_thresholds_(SAE(SAEConfig(D, M, TopK(2))), data(), 5)


def test_a_uniform_start_fires_as_often_as_it_says():
    m, n = 40_000, 1000
    sae = SAE(SAEConfig(D, m, JumpReLU(0.1, 2.0)))
    start_uniformly_(sae, data(n=n), seed=3)
    fired = sae.eval().encode(data(n=n)) > 0
    counts = fired.sum(0)
    assert (counts - n * 10_000 / m).abs().max() <= 1  # one lies at the threshold, to rounding
    assert sae.W_dec.abs().max() <= D**-0.5
    assert sae.W_dec.std().item() == pytest.approx(D**-0.5 / 3**0.5, rel=0.01)
    assert_same(sae.W_enc, sae.W_dec * (D / m))
    again = SAE(SAEConfig(D, m, JumpReLU(0.1, 2.0)))
    start_uniformly_(again, data(n=n), seed=3)
    assert_same(again.W_dec, sae.W_dec)
    start_uniformly_(again, data(n=n), seed=4)
    assert not torch.equal(again.W_dec, sae.W_dec)


def test_a_uniform_start_of_few_latents_fires_on_everything():
    sae = SAE(SAEConfig(D, M, ReLU()))
    start_uniformly_(sae, data())
    assert (sae.eval().encode(data()) > 0).all()
    with pytest.raises(ValueError, match="initial: got 'uniform', expected 'tied' where d_out"):
        start_uniformly_(SAE(SAEConfig(D, M, ReLU(), d_out=3)), data())
    with pytest.raises(ValueError, match=r"x: got shape .*, expected at least one token"):
        start_uniformly_(sae, data()[:0])


@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred"])
@pytest.mark.parametrize(
    ("activation", "config"),
    [
        (TopK(3), {}),
        (JumpReLU(0.5, 0.2), {}),
        (Gated(), {"normalization": "scalar"}),
        (BatchTopK(3), {"d_out": 5, "transcoder": True}),
    ],
    ids=str,
)
def test_dead_rows_point_where_the_loss_is(activation, config, mode):
    sae = SAE(SAEConfig(D, M, activation, **config))
    sae.reset_parameters(0)
    target = torch.randn(N, 5, generator=torch.Generator().manual_seed(9)) if "d_out" in config else None
    opt = RowAdam(sae, 0.01, mode=mode)
    for step in range(4):
        train_step(sae, opt, data(step), target)
    x = torch.zeros(N, D)
    x[:, 0] = 1e-3
    x[7] = data()[7] * 50  # by far the worst: nearly every draw
    dead = torch.zeros(M, dtype=torch.bool)
    dead[[3, 10, 60]] = True
    opt.flush_()
    before, living = everything(sae), ~dead
    lengths = sae.W_enc[living].norm(dim=1).mean() * 0.2, sae.W_dec[living].norm(dim=1).mean()
    assert resample_(sae, opt, x, target, dead=dead, seed=1) == 3
    for name, p in sae.named_parameters():
        if name in ("W_enc", "b_enc", "W_dec"):
            assert_same(p[living], before[name][living], name)
            assert not torch.equal(p[dead], before[name][dead])
    inner = sae.normalise(x)[0]
    direction = inner[7] - sae.b_dec if sae.config.subtract_b_dec else inner[7]
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(sae.W_enc[dead], (unit(direction, dim=0) * lengths[0]).expand(3, -1))
    goal = inner if target is None else sae.normalise_target(target, *sae.normalise(x))
    if target is None:
        size = 1.0 if sae.config.unit_norm_decoder else lengths[1]
        expected = (unit(goal[7] - sae.b_dec, dim=0) * size).expand(3, -1)
        torch.testing.assert_close(sae.W_dec[dead], expected)
    assert (sae.b_enc[dead] == 0).all()
    assert (sae.silent_tokens[dead] == 0).all()
    for param in (sae.W_enc, sae.b_enc, sae.W_dec):
        state = opt.state[param]
        assert (state["exp_avg"][dead] == 0).all()
        assert (state["exp_avg_sq"][dead] == 0).all()
        assert (opt.row_steps(param)[dead] == (4 if mode == "deferred" else 0)).all()
    if isinstance(activation, JumpReLU):
        torch.testing.assert_close(sae.threshold[dead], torch.full((3,), 0.5))
    if isinstance(activation, Gated):
        assert (sae.r_mag[dead] == 0).all()
        assert (sae.b_mag[dead] == 0).all()


def test_the_draw_goes_by_the_squared_loss_and_the_seed():
    """Half of the tokens have twice the loss of the others: four fifths of the draws."""
    m = 4000
    sae = SAE(SAEConfig(2, m, ReLU()))
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)  # x_hat = 0: the loss is ||x||^2
    x = torch.eye(2).repeat(50, 1) * torch.tensor([1.0, 2**0.5])
    opt = RowAdam(sae)
    twin, other = copy.deepcopy((sae, opt)), None
    dead = torch.ones(m, dtype=torch.bool)
    resample_(sae, opt, x, dead=dead, seed=0)
    share = (sae.W_enc[:, 1] > 0).float().mean().item()
    assert share == pytest.approx(0.8, abs=4 * (0.8 * 0.2 / m) ** 0.5)
    resample_(*twin, x, dead=dead, seed=0)
    assert_same(twin[0].W_enc, sae.W_enc)
    resample_(*twin, x, dead=dead, seed=1)
    other = twin[0].W_enc
    assert not torch.equal(other, sae.W_enc)


def test_nothing_dead_changes_nothing_and_bad_samples_are_refused():
    sae, opt = trained(TopK(3))
    before = everything(sae, opt)
    assert resample_(sae, opt, data()) == 0
    assert_unchanged(everything(sae, opt), before)
    for x in (data()[:0], data() * torch.nan):
        with pytest.raises(ValueError, match="x: got a sample that is empty or holds NaN or Inf"):
            resample_(sae, opt, x, dead=torch.ones(M, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"x: got shape \(200, 7\)"):
        resample_(sae, opt, data()[:, 1:])
    with pytest.raises(TypeError, match="opt: got Adam"):
        resample_(sae, torch.optim.Adam(sae.parameters()), data())
    assert_unchanged(everything(sae, opt), before)


def test_narrow_formats_are_resampled_too():
    sae, opt = trained(TopK(3), weight_format="split32")
    dead = torch.zeros(M, dtype=torch.bool)
    dead[5] = True
    assert resample_(sae, opt, data(), dead=dead) == 1
    torch.testing.assert_close(sae.full_precision("W_dec")[5].norm(), torch.tensor(1.0), rtol=1e-6, atol=0)
    assert train_step(sae, opt, data())["skipped"] == 0


def test_the_trainer_resamples_until_the_rate_falls(monkeypatch):
    from fastsae.training import trainer as training

    calls = []
    monkeypatch.setattr(training, "resample_", lambda sae, opt, x, target, dead, seed: calls.append(seed))
    batches = [data(step, 16) for step in range(20)]
    batches[4][0, 0] = torch.nan  # a step that is skipped resamples nothing
    config = TrainConfig(resample_every=5, decay=0.3, progress=False, seed=100)
    Trainer(SAE(SAEConfig(D, M, TopK(3))), batches, config).fit()
    assert calls == [110]  # not 105, whose batch was skipped; from 15 on the rate falls
    with pytest.raises(ValueError, match="resample_every: got 0"):
        TrainConfig(resample_every=0)


def test_resampling_by_the_trainer_revives():
    sae = SAE(SAEConfig(D, M, ReLU()))
    with torch.no_grad():
        sae.b_enc[: M // 2] = -100
    batches = [data(step, 64) for step in range(30)]
    alive = {}
    for every in (None, 5):
        twin = copy.deepcopy(sae)
        config = TrainConfig(resample_every=every, dead_after=128, progress=False, lr=1e-3)
        Trainer(twin, batches, config).fit()
        alive[every] = (twin.eval().encode(data(99, 2000)) > 0).any(0)
    assert not alive[None][: M // 2].any()
    assert alive[5][: M // 2].sum() > M // 8


def test_thresholds_may_learn_at_a_rate_of_their_own():
    moved = {}
    for rate in (1.0, 10.0):
        sae = SAE(SAEConfig(D, M, JumpReLU(0.5, 0.5)))
        sae.reset_parameters(0)
        start = sae.log_threshold.detach().clone()
        config = TrainConfig(threshold_rate=rate, lr=1e-3, warmup=0.0, progress=False)
        trainer = Trainer(sae, [data(step) for step in range(5)], config)
        trainer.fit()
        rates = {group["lr"] for group in trainer.opt.param_groups}
        assert len(rates) == (1 if rate == 1 else 2)
        moved[rate] = (sae.log_threshold - start).abs().max().item()
    assert moved[10.0] > 5 * moved[1.0] > 0
