"""The step by blocks of latents: the sparse step's result, when it is taken, and the memory it takes."""

import copy

import pytest
import torch

import fastsae.training.dense as dense_step
from fastsae import (
    L0,
    L1,
    SAE,
    AuxK,
    DecoderNormL1,
    Gated,
    GroupMax,
    JumpReLU,
    PreActivation,
    ReLU,
    SAEConfig,
    Tanh,
    TopK,
)
from fastsae.optim import RowAdam, row_adam
from fastsae.testing import Allocations, assert_same, assert_unchanged, everything
from fastsae.training import train_step

pytestmark = pytest.mark.usefixtures("one_thread")

D, M, N = 6, 40, 16
CASES = {
    "ReLU": (ReLU(), ()),
    "ReLU, all charges": (ReLU(), (L1(0.2), DecoderNormL1(0.3), Tanh(0.1))),
    "JumpReLU, narrow": (JumpReLU(0.5, 0.01), (L0(0.3), Tanh(0.2))),
    "JumpReLU, wide": (JumpReLU(0.5, 3.0), (L0(0.3), DecoderNormL1(0.2))),
    "Gated": (Gated(0.5), (L1(0.3),)),
}
SPACES = {
    "plain": {},
    "centred": {"subtract_b_dec": True, "unit_norm_decoder": True, "reconstruction": "fvu"},
    "layer norm, skip": {"normalization": "layer_norm", "skip": True, "d_out": 4},
    "sites": {"n_sites": 2, "normalization": "scalar"},
}


def make(activation, losses=(), dtype=torch.float64, d=D, m=M, **options):
    torch.manual_seed(0)
    options.setdefault("n_sites", 1)
    if isinstance(activation, Gated) and options["n_sites"] > 1:
        options["unit_norm_decoder"] = False
    sae = SAE(SAEConfig(d, m, activation, losses=losses, **options), dtype=torch.float64)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        sae.b_enc[::8] = -6  # some never fire
    sae.constrain_weights_()
    return sae.to(dtype)


def batch(seed, d=D, n=N):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 0.5


def inputs(sae, seed, n=N):
    x = batch(seed, sae.config.d_in, n).to(sae.dtype)
    return x, batch(100 + seed, sae.config.d_out, n).to(sae.dtype) if sae.config.transcoder else None


def take(monkeypatch, way, block=7 * N):
    """Let steps go one way, in blocks of some latents."""
    monkeypatch.setattr(dense_step, "FEW_SCORES", 0 if way == "dense" else 10**9)
    monkeypatch.setattr(dense_step, "DENSE_SHARE", -1.0)
    monkeypatch.setattr(dense_step, "BLOCK_SCORES", block)


@pytest.fixture
def made_densely(monkeypatch):
    """A list that grows with each batch that is made densely."""
    made, original = [], dense_step.fill_densely
    monkeypatch.setattr("fastsae.training.step.fill_densely", lambda *a: made.append(1) or original(*a))
    return made


@pytest.mark.parametrize("block", [1, 7 * N], ids=["single latents", "blocks of 7"])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_sparse_step(monkeypatch, made_densely, case, space, block):
    runs = []
    for way in ("dense", "sparse"):
        take(monkeypatch, way, block)
        sae = make(*CASES[case], **SPACES[space])
        optimizer, found = RowAdam(sae, 0.01), {}
        for step in range(3):
            metrics = train_step(sae, optimizer, *inputs(sae, step), clip=0.5 if step == 1 else None)
            found |= {f"{name} at {step}": t for name, t in metrics.items()}
        optimizer.flush_()
        runs.append(found | everything(sae))
    assert len(made_densely) == 3
    assert runs[0].keys() == runs[1].keys()
    for name, t in runs[1].items():
        if t.is_floating_point():
            torch.testing.assert_close(
                runs[0][name].double(), t.double(), rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert_same(runs[0][name], t, name)


def test_latents_that_fire_for_no_token_are_not_touched(monkeypatch):
    """Nor do they under the sparse step, so that lazy and deferred modes mean the same."""
    take(monkeypatch, "dense")
    sae = make(ReLU(), (L1(0.1),))
    with torch.no_grad():
        sae.b_enc[::8] = -100
    before, optimizer = everything(sae), RowAdam(sae, 0.1, mode="lazy")
    train_step(sae, optimizer, batch(0))
    for name in ("W_enc", "b_enc", "W_dec"):
        assert_same(getattr(sae, name)[::8], before[name][::8], name)
        assert not optimizer.row_steps(getattr(sae, name))[::8].any()
        assert optimizer.row_steps(getattr(sae, name))[1::8].all()


def test_pre_activation_moves_latents_that_never_fire(monkeypatch):
    sae = make(JumpReLU(0.5, 0.1), (PreActivation(0.3),))
    with torch.no_grad():
        sae.b_enc[::8] = -100
    before, optimizer = everything(sae), RowAdam(sae, 0.1)
    train_step(sae, optimizer, batch(0))
    assert (sae.b_enc[::8] > before["b_enc"][::8]).all()
    assert (sae.log_threshold[::8] < before["log_threshold"][::8]).all()


# When it is taken


def firing(share, m=64):
    """A ReLU dictionary of whose latents a share fires for each token."""
    sae = SAE(SAEConfig(4, m, ReLU()))
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(-1)
        sae.b_enc[: int(m * share)] = 1
    return sae


def test_it_pays_where_more_than_a_share_fires(monkeypatch):
    monkeypatch.setattr(dense_step, "FEW_SCORES", 0)
    x = torch.randn(100, 4)
    assert dense_step.DENSE_SHARE == 1 / 16
    assert not dense_step.pays(firing(0), x)
    assert not dense_step.pays(firing(4 / 64), x)
    assert dense_step.pays(firing(5 / 64), x)
    monkeypatch.setattr(dense_step, "DENSE_SHARE", 0.5)
    assert not dense_step.pays(firing(0.5), x)
    assert dense_step.pays(firing(0.6), x)


def test_it_pays_where_a_code_would_have_too_many_entries(monkeypatch):
    monkeypatch.setattr(dense_step, "FEW_SCORES", 0)
    x = torch.randn(100, 4)
    monkeypatch.setattr(dense_step, "MOST_ENTRIES", 100)
    assert not dense_step.pays(firing(1 / 64), x)
    monkeypatch.setattr(dense_step, "MOST_ENTRIES", 99)
    assert dense_step.pays(firing(1 / 64), x)


def test_it_does_not_pay_for_few_scores(monkeypatch):
    x = torch.randn(100, 4)
    monkeypatch.setattr(dense_step, "FEW_SCORES", 100 * 64)
    assert not dense_step.pays(firing(1), x)
    monkeypatch.setattr(dense_step, "FEW_SCORES", 100 * 64 - 1)
    assert dense_step.pays(firing(1), x)


def test_a_sample_of_tokens_decides(monkeypatch):
    monkeypatch.setattr(dense_step, "FEW_SCORES", 0)
    sae = firing(0)
    with torch.no_grad():
        sae.W_enc[:, 0] = 1
    x = torch.zeros(1000, 4)
    x[::15, 0] = 5  # 15 = 1000 // SAMPLE: those that are looked at
    assert dense_step.SAMPLE == 64
    assert dense_step.pays(sae, x)
    assert not dense_step.pays(sae, x.roll(1, 0))


@pytest.mark.parametrize(
    ("activation", "losses", "pays"),
    [
        (ReLU(), (), True),
        (JumpReLU(0.5, 3.0), (L0(0.1),), True),
        (Gated(), (L1(0.1),), True),
        (TopK(M), (), False),
        (GroupMax(M), (), False),
        (ReLU(), (AuxK(),), False),
        (Gated(), (AuxK(),), False),
    ],
    ids=str,
)
def test_only_rules_with_a_threshold_take_it_and_not_beside_auxk(monkeypatch, activation, losses, pays):
    take(monkeypatch, "dense")
    assert dense_step.pays(make(activation, losses), batch(0)) is pays


@pytest.mark.parametrize("dead_after", [None, 5])
def test_pre_activation_always_takes_it(made_densely, dead_after):
    sae = make(JumpReLU(1e3, 0.1), (PreActivation(0.1, dead_after),))
    assert dense_step.pays(sae, batch(0))
    train_step(sae, RowAdam(sae), batch(0))
    assert len(made_densely) == 1


def test_the_first_batch_of_a_step_decides_for_all(monkeypatch, made_densely):
    monkeypatch.setattr(dense_step, "FEW_SCORES", 0)
    sae = firing(1)
    with torch.no_grad():
        sae.W_enc[:, 0] = 1
    fires, silent = torch.zeros(N, 4), torch.zeros(N, 4)
    silent[:, 0] = -50
    for xs, expected in (((fires, silent), 2), ((silent, fires), 0)):
        made_densely.clear()
        optimizer = RowAdam(sae, 0.0)
        for x in xs:
            metrics = train_step(sae, optimizer, x, accumulate=x is xs[0])
        assert len(made_densely) == expected
        assert metrics["l0"] == 32


def test_a_resumed_run_goes_the_same_way(monkeypatch, made_densely):
    """Which way is taken is a function of weights and batch: here it changes in the course of training."""
    monkeypatch.setattr(dense_step, "FEW_SCORES", 0)
    monkeypatch.setattr(dense_step, "DENSE_SHARE", 0.3)
    sae = make(ReLU(), (L1(3.0),), torch.float32)
    optimizer, ways = RowAdam(sae, 0.05), []
    for step in range(12):
        if step == 3:
            kept = copy.deepcopy(sae.state_dict()), copy.deepcopy(optimizer.state_dict())
        before = len(made_densely)
        train_step(sae, optimizer, batch(step).float())
        ways.append(len(made_densely) > before)
    assert True in ways[3:]
    assert False in ways[3:]
    other = make(ReLU(), (L1(3.0),), torch.float32)
    other.load_state_dict(kept[0])
    resumed, again = RowAdam(other, 0.05), []
    resumed.load_state_dict(kept[1])
    for step in range(3, 12):
        before = len(made_densely)
        train_step(other, resumed, batch(step).float())
        again.append(len(made_densely) > before)
    assert again == ways[3:]
    assert_unchanged(everything(other), everything(sae))


# Memory


@pytest.mark.parametrize(("clip", "accumulate"), [(None, False), (1.0, True)])
@pytest.mark.parametrize("case", [*CASES, "PreActivation"])
def test_where_nearly_all_fires_no_tensor_is_larger_than_a_block(monkeypatch, case, clip, accumulate):
    n, d, m, block = 32, 8, 1000, 512
    activation, losses = CASES.get(case, (JumpReLU(0.5, 3.0), (PreActivation(0.1), Tanh(0.1))))
    take(monkeypatch, "dense", block)
    monkeypatch.setattr(row_adam, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr("fastsae.training.dense.SAMPLE", 2)
    monkeypatch.setattr("fastsae.backends.torch.BLOCK_SCORES", block)
    sae = make(activation, losses, torch.float32, d=d, m=m)
    with torch.no_grad():
        for name in {"b_enc", "b_mag"} & {name for name, _ in sae.named_parameters()}:
            getattr(sae, name).fill_(20)
    optimizer = RowAdam(sae)
    xs = batch(0, d, n).float().chunk(2 if accumulate else 1)

    def step():
        for i, x in enumerate(xs):
            metrics = train_step(sae, optimizer, x, clip=clip, accumulate=i + 1 < len(xs))
        return metrics

    assert step()["l0"] > 0.9 * m  # it makes the moments, too
    with Allocations() as made:
        step()
    # vectors over the latents, and the code of the two tokens that are looked at
    assert made.largest <= max(block, 2 * m) < n * m / 10, made.made_by
