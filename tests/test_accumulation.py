"""One optimizer step from several batches: the result of one large batch; what is kept, skipped, refused."""

import copy
import gc
import os
import signal
import weakref

import pytest
import torch

import fastsae.backends.torch as portable
from fastsae import (
    L0,
    L1,
    SAE,
    AuxK,
    BatchTopK,
    DecoderNormL1,
    Gated,
    GroupMax,
    HierarchicalTopK,
    JumpReLU,
    Matryoshka,
    MultiTopK,
    ReLU,
    SAEConfig,
    TargetL0,
    TopK,
    backends,
    losses,
)
from fastsae.data import Batches
from fastsae.optim import RowAdam, row_adam
from fastsae.testing import (
    Allocations,
    NeverWaits,
    assert_close,
    assert_same,
    assert_unchanged,
    everything,
    poisoned_empty,
)
from fastsae.training import NotFinite, TrainConfig, Trainer, train_step
from fastsae.training import step as step_module
from fastsae.training.logs import read_log
from fastsae.training.pieces import _below
from fastsae.training.step import drop_batches

pytestmark = pytest.mark.usefixtures("one_thread")
triton = pytest.mark.skipif(backends.available()["triton"] is not None, reason="Triton can't run here")

D, D_OUT, M, N = 6, 4, 30, 32
# five latents die in the middle of the third step, so that only the fourth may work on them; k_aux is more
AUXK = AuxK(0.5, k_aux=8, dead_after=2 * N + N // 4)
NORM = DecoderNormL1(0.3)
CONFIGS = {
    "TopK": {"activation": TopK(3)},
    "TopK, AuxK": {"activation": TopK(3), "losses": (AUXK,)},
    "ReLU, L1": {"activation": ReLU(), "losses": (NORM,)},
    "ReLU, AuxK and L1": {"activation": ReLU(), "losses": (NORM, AUXK)},
    "JumpReLU, AuxK": {"activation": JumpReLU(0.25), "losses": (AUXK,)},
    "JumpReLU, learning": {"activation": JumpReLU(0.5, 1.5), "losses": (L0(0.2), TargetL0(0.3, 4.0))},
    "Gated, AuxK": {"activation": Gated(0.5), "losses": (L1(0.2), AUXK)},
    "GroupMax, AuxK": {"activation": GroupMax(3), "losses": (AUXK,)},
    "MultiTopK, AuxK": {"activation": MultiTopK(2), "losses": (AUXK,)},
    "Matryoshka": {"activation": Matryoshka(TopK(3))},
    "HierarchicalTopK, skip": {"activation": HierarchicalTopK(3), "d_out": D_OUT, "skip": True},
    "squared error": {"losses": (AUXK, NORM), "reconstruction": "squared_error"},
    "a target": {"losses": (AUXK,), "d_out": D_OUT, "normalization": "layer_norm"},
    "a target, scaled": {"losses": (AUXK, NORM), "d_out": D_OUT, "normalization": "scalar"},
    "layer norm": {"losses": (AUXK, NORM), "normalization": "layer_norm"},
    "free": {"losses": (AUXK,), "subtract_b_dec": False, "unit_norm_decoder": False},
    "multipliers": {
        "losses": (AUXK, NORM),
        "scale": {"auxk": 3, "decoder_norm_l1": 0.25, "reconstruction": 0.5},
    },
}


def batch(seed, d=D, n=N):
    """Tokens whose mean drifts, so that no part of them has the mean of all."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 0.5
    return x + torch.linspace(-1, 1, n, dtype=torch.float64)[:, None]


def make(activation=TopK(3), losses=(), dtype=torch.float64, backend="auto", **options):  # noqa: B008
    torch.manual_seed(0)
    sae = SAE(SAEConfig(D, M, activation, losses=losses, **options), dtype=torch.float64, backend=backend)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        sae.b_enc[::6] = -6
    sae.constrain_weights_()
    if "norm_scale" in sae.state_dict():
        sae.norm_scale.fill_(0.75)
    return sae.to(dtype)


def big_step(sae, optimizer, xs, ys=None, scale=None):
    """One step from all of ``xs``; the metrics of the last call."""
    for i, x in enumerate(xs):
        y = None if ys is None else ys[i]
        metrics = train_step(sae, optimizer, x, y, scale, accumulate=i + 1 < len(xs))
    return metrics


def run(
    sizes, mode="deferred", dtype=torch.float64, *, steps=4, scale=None, eps=1e-8, inputs=batch, **options
):
    """Take steps on tokens cut in ``sizes``; return all metrics, weights, states and counters by name."""
    sae = make(dtype=dtype, **options)
    optimizer = RowAdam(sae, 0.01, eps=eps, mode=mode, backend=sae.backend)
    target, found = sae.config.d_out != D, {}
    for step in range(steps):
        x = inputs(step, n=sum(sizes)).to(dtype)
        y = batch(100 + step, D_OUT, sum(sizes)).to(dtype).split(sizes) if target else None
        dead = int(sae.dead_mask().sum())
        metrics = big_step(sae, optimizer, x.split(sizes), y, scale)
        found |= {f"{name} at step {step}": t for name, t in metrics.items()}
    if any(isinstance(term, AuxK) for term in sae.config.losses):
        assert dead > 0
        assert found[f"auxk at step {steps - 1}"] > 0
        assert found[f"auxk at step {steps - 2}"] == 0
    return found | everything(sae, optimizer)


def assert_equal_runs(found, expected):
    """To rounding in fp64, with the same counters."""
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        if not isinstance(t, torch.Tensor):
            assert found[name] == t, name
        elif t.dtype == torch.float64:
            torch.testing.assert_close(
                found[name], t, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
        elif t.dtype == torch.float32:  # thresholds, scales and l0
            torch.testing.assert_close(found[name], t, rtol=1e-6, atol=0, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert_same(found[name], t, name)


def assert_as_close(found, single, exact):
    """No further from fp64 than one large batch is."""
    assert found.keys() == single.keys() == exact.keys()
    for name, t in single.items():
        if isinstance(t, torch.Tensor) and t.dtype == torch.float32:
            assert_close(found[name], t, exact[name].double(), name)
        elif isinstance(t, torch.Tensor) and not t.is_floating_point():
            assert_same(found[name], t, name)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred"])
def test_equals_one_large_batch(mode, config):
    options = CONFIGS[config]
    assert_equal_runs(run([8] * 4, mode, **options), run([N], mode, **options))


@pytest.mark.parametrize("config", ["TopK, AuxK", "ReLU, AuxK and L1", "a target, scaled"])
def test_equals_it_on_every_exact_backend(exact_backend, config):
    options = CONFIGS[config] | {"backend": exact_backend}
    assert_equal_runs(run([8] * 4, **options), run([N], **options))


@pytest.mark.parametrize("sizes", [[1, 7, 24], [31, 1], [16, 8, 4, 2, 1, 1]], ids=str)
def test_equals_it_whatever_the_sizes(sizes):
    options = CONFIGS["multipliers"]
    assert_equal_runs(run(sizes, **options), run([N], **options))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred"])
def test_is_as_close_to_fp64_as_one_large_batch(mode, config):
    """eps keeps Adam from dividing noise."""
    options = CONFIGS[config] | {"eps": 0.01}
    exact = run([N], mode, **options)
    single = run([N], mode, torch.float32, **options)
    assert_as_close(run([8] * 4, mode, torch.float32, **options), single, exact)


def copies(seed, n=N):
    """The same eight tokens four times, each time in another order: of all BatchTopK chooses as of eight."""
    generator = torch.Generator().manual_seed(seed)
    x = batch(seed, n=n // 4)
    return torch.cat([x[torch.randperm(n // 4, generator=generator)] for _ in range(4)])


@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred"])
def test_batchtopk_equals_one_large_batch_of_alike_pieces(mode):
    options = {"activation": BatchTopK(3), "losses": (AUXK, NORM), "inputs": copies}
    assert_equal_runs(run([8] * 4, mode, **options), run([N], mode, **options))


def test_batchtopk_selects_within_each_batch_and_moves_its_threshold_once():
    sae = make(BatchTopK(3))
    xs = [batch(i, n=8) * (i + 1) for i in range(4)]  # one batch of all would choose more of the last
    with torch.no_grad():
        codes = [copy.deepcopy(sae).train().encode_sparse(x) for x in xs]
    metrics = big_step(sae, RowAdam(sae, 0.0), xs)
    assert metrics["l0"] == sum(code.l0().float().mean() for code in codes) / 4
    smallest = torch.stack([code.values[code.values > 0].min() for code in codes]).min()
    assert_same(sae.threshold, smallest.float())
    before, tokens = sae.threshold.clone(), int(sae.tokens_seen)
    assert tokens == N
    big_step(sae, RowAdam(sae, 0.0), [2 * x for x in xs])
    with torch.no_grad():
        values = [copy.deepcopy(sae).train().encode_sparse(2 * x).values for x in xs]
    smallest = torch.stack([v[v > 0].min() for v in values]).min().float()
    share = 2 / (2 + 9)  # of the second step
    torch.testing.assert_close(sae.threshold, share * before + (1 - share) * smallest, rtol=1e-6, atol=0)


# latents die in the second step: only the third may work on them
SOON = AuxK(0.5, k_aux=8, dead_after=20)


@triton
@pytest.mark.parametrize(
    ("mode", "activation", "losses"),
    [
        ("dense", TopK(3), (SOON,)),
        ("deferred", TopK(3), (SOON, NORM)),
        ("lazy", JumpReLU(0.25), (SOON,)),
        ("lazy", ReLU(), (NORM,)),
    ],
    ids=str,
)
def test_triton_is_as_close_to_fp64_as_one_large_batch(mode, activation, losses):
    options = {"activation": activation, "losses": losses, "eps": 0.01, "steps": 3}
    exact = run([16], mode, **options)
    single, several = (
        run(sizes, mode, torch.float32, backend="triton", **options) for sizes in ([16], [5, 4, 7])
    )
    assert_as_close(several, single, exact)


@triton
def test_triton_takes_a_single_token():
    sae = make(losses=(NORM,), dtype=torch.float32, backend="triton")
    exact = make(losses=(NORM,))
    x = batch(0, n=2)[:1]
    big_step(sae, RowAdam(sae, 0.01, eps=0.01, backend="triton"), [x.float()])
    big_step(exact, RowAdam(exact, 0.01, eps=0.01), [x])
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert (getattr(sae, name).double() - getattr(exact, name)).abs().max() < 1e-5, name


@triton
@pytest.mark.parametrize("activation", [TopK(3), BatchTopK(3)], ids=str)
def test_the_host_never_waits_for_the_device(monkeypatch, activation):
    monkeypatch.setattr(row_adam, "_on_host", lambda t: False)
    monkeypatch.setattr(row_adam, "GRAPH_STEPS", 64)
    losses = (AuxK(0.5, k_aux=8, dead_after=8), NORM)
    sae = make(activation, losses, torch.float32, "triton", normalization="scalar")
    optimizer = RowAdam(sae, 0.01, backend="triton")
    xs = [list(batch(step, n=8).float().split(4)) for step in range(4)]
    for parts in xs[:2]:
        big_step(sae, optimizer, parts)
    with NeverWaits():
        spoilt = [xs[2][0], xs[2][1] * torch.nan]
        metrics = [big_step(sae, optimizer, parts) for parts in (xs[2], spoilt, spoilt[::-1], xs[3])]
    assert [int(m["skipped"]) for m in metrics] == [0, 1, 1, 0]
    assert metrics[0]["n_dead"] > 0
    assert metrics[0]["auxk"] > 0


@pytest.mark.parametrize("losses", [(NORM,), (AUXK, NORM)], ids=str)
def test_spare_places_of_every_batch_are_ignored(monkeypatch, losses):
    """A backend that can't know how many scores pass may return more places than it fills."""
    encode = portable.encode
    expected = run([N], activation=ReLU(), losses=losses)

    def spacious(*args):
        values, indices, offsets = encode(*args)
        if args[5] == "topk":  # AuxK's codes have a fixed size
            return values, indices, offsets
        rubbish = torch.full((5,), 2**30)
        return torch.cat([values, rubbish * torch.nan]), torch.cat([indices, rubbish.int()]), offsets

    monkeypatch.setattr(portable, "encode", spacious)
    assert_equal_runs(run([8] * 4, activation=ReLU(), losses=losses), expected)


def test_codes_with_spare_places_join():
    """What lies beyond a code's end is neither read nor left in the middle of the whole."""
    parts = [([1.0, 2.0, 3.0], [0, 2, 3], 2), ([], [0, 0], 3), ([4.0, 5.0], [0, 1, 2], 0), ([6.0], [0, 1], 4)]
    roomy, full = [], []
    for values, offsets, spare in parts:
        indices, rubbish = torch.arange(len(values)), torch.full((spare,), 2**30)
        v, i, o = torch.tensor(values), indices.int(), torch.tensor(offsets)
        full.append((v, i, o))
        roomy.append((torch.cat([v, rubbish * torch.nan]), torch.cat([i, rubbish.int()]), o))
    expected = _below(full)
    got = _below(roomy, roomy=True)
    assert_same(got[2], expected[2])
    assert expected[0].tolist() == [1, 2, 3, 4, 5, 6]
    for a, b in zip(got[:2], expected[:2], strict=True):
        assert_same(a[:6], b)
        assert len(a) == 6 + 9


# The variance over all tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
def test_the_joined_spread_is_that_of_all_rows(offset, dtype):
    x = (batch(0, n=400) + offset).to(dtype)
    exact = losses.spread(x.double()).squares
    single = losses.spread(x)
    assert single.mean is None
    parts = [losses.spread(part, with_mean=True) for part in x.split([1, 9, 90, 300])]
    joined = losses.joined_spread(parts)
    assert joined.n == 400
    assert_close(joined.squares, single.squares, exact)
    assert (joined.mean - x.double().mean(0)).abs().max() <= 1e-6
    assert abs(joined.squares - exact) <= 4 * torch.finfo(joined.squares.dtype).eps * exact


def test_a_step_of_one_batch_has_the_spread_it_always_had():
    x = batch(0).float()
    centred = x - x.mean(0)
    assert_same(losses.error_scale(x, "fvu"), 1 / torch.linalg.vector_norm(centred).square())
    only = losses.spread(x, with_mean=True)
    assert losses.joined_spread([only]) is only


def test_no_variance_is_no_loss():
    sae = make()
    metrics = big_step(sae, RowAdam(sae), [torch.ones(3, D).double()] * 3)
    assert metrics["loss"] == metrics["fvu"] == metrics["skipped"] == 0


# What is kept


@pytest.mark.parametrize("config", ["multipliers", "a target"])
def test_a_batch_that_is_kept_changes_nothing(config):
    options = dict(CONFIGS[config])
    scale = options.pop("scale", None)
    sae = make(**options)
    optimizer = RowAdam(sae)
    y = batch(1, sae.config.d_out)
    train_step(sae, optimizer, batch(0), y, scale)
    before = everything(sae, optimizer)
    for i in range(3):
        train_step(sae.eval(), optimizer, batch(2 + i), y, scale, accumulate=True)
        assert_unchanged(everything(sae, optimizer), before)
    assert not sae.training
    assert train_step(sae, optimizer, batch(5), y, scale)["skipped"] == 0
    assert sae.tokens_seen == 5 * N


def test_metrics_are_of_all_tokens_so_far():
    options = dict(CONFIGS["TopK, AuxK"])
    sae = make(**options)
    optimizer = RowAdam(sae, 0.0)
    for step in range(3):
        train_step(sae, optimizer, batch(step))
    x, single = batch(3), []
    for n in (8, 16, 24, 32):
        twin = copy.deepcopy(sae)
        single.append(train_step(twin, RowAdam(twin, 0.0), x[:n]))
    for i, part in enumerate(x.split(8)):
        metrics = train_step(sae, optimizer, part, accumulate=i < 3)
        assert metrics.keys() == single[i].keys()
        for name in ("loss", "reconstruction", "auxk", "fvu", "l0", "skipped", *["n_dead"] * (i == 3)):
            torch.testing.assert_close(metrics[name], single[i][name], rtol=1e-6, atol=0)


def test_neither_states_nor_copies_hold_it():
    sae, twin = make(), make()
    optimizer = RowAdam(sae)
    train_step(sae, optimizer, batch(0), accumulate=True)
    one, other = copy.deepcopy((sae, optimizer))
    train_step(one, other, batch(1))
    train_step(twin, RowAdam(twin), batch(1))
    assert_unchanged(everything(one), everything(twin))
    train_step(sae, optimizer, batch(1))
    assert sae.tokens_seen == 2 * N


def test_it_goes_with_its_optimizer_its_step_and_on_demand():
    sae = make()
    optimizer = RowAdam(sae)
    train_step(sae, optimizer, batch(0), accumulate=True)
    drop_batches(optimizer)
    drop_batches(optimizer)
    train_step(sae, optimizer, batch(1))
    assert sae.tokens_seen == N
    train_step(sae, optimizer, batch(0), accumulate=True)
    kept = weakref.ref(step_module._begun[optimizer].pieces[0])
    train_step(sae, optimizer, batch(1))
    assert optimizer not in step_module._begun
    gc.collect()
    assert kept() is None
    train_step(sae, optimizer, batch(0), accumulate=True)
    kept = weakref.ref(step_module._begun[optimizer].pieces[0])
    del optimizer
    gc.collect()
    assert kept() is None


def test_two_optimizers_keep_their_own():
    a, b, alone = make(), make(), make()
    first, second = RowAdam(a), RowAdam(b)
    for part in batch(0).split(8)[:3]:
        train_step(a, first, part, accumulate=True)
        train_step(b, second, part * 2, accumulate=True)
    train_step(a, first, batch(0)[24:])
    assert b.tokens_seen == 0
    big_step(alone, RowAdam(alone), batch(0).split(8))
    assert_unchanged(everything(a), everything(alone))


def test_shapes_of_tokens_may_differ():
    flat, shaped = make(), make()
    big_step(flat, RowAdam(flat), batch(0).split(16))
    big_step(shaped, RowAdam(shaped), [batch(0)[:16].view(2, 8, D), batch(0)[16:].view(4, 1, 4, D)])
    assert_unchanged(everything(shaped), everything(flat))


@pytest.mark.parametrize("mode", ["lazy", "deferred", "dense"])
def test_no_tensor_of_the_size_of_a_weight_or_of_the_scores(small_blocks, monkeypatch, mode):
    n, m = 24, 4000
    monkeypatch.setattr(row_adam, "BLOCK_ELEMENTS", m)
    torch.manual_seed(0)
    sae = SAE(SAEConfig(D, m, TopK(3), losses=(AuxK(k_aux=4, dead_after=2 * n), NORM)))
    optimizer = RowAdam(sae, mode=mode)
    xs = batch(0, n=n).float().split(6)
    for _ in range(3):
        big_step(sae, optimizer, xs)
    with Allocations() as made:
        assert big_step(sae, optimizer, xs)["auxk"] > 0
    assert made.largest <= 2 * m < m * D / 2, made.made_by


def test_one_batch_costs_no_copy_and_no_second_mean(monkeypatch):
    joined = []
    join = step_module.join

    def watched(sae, pieces, *more):
        (piece,) = pieces
        joined.append((piece, join(sae, pieces, *more)))
        assert pieces == []  # so that the parts go where there is a whole
        return joined[0][1]

    monkeypatch.setattr(step_module, "join", watched)
    sae = make(ReLU(), (NORM,))
    train_step(sae, RowAdam(sae), batch(0))
    piece, forward = joined[0]
    assert piece.spread.mean is None
    assert piece.x is forward.x
    (error,), ((values, _, offsets),) = piece.errors, piece.codes
    assert error is forward.error
    assert values is forward.values
    assert values is forward.code.values
    assert offsets is forward.offsets


def test_two_runs_agree_to_the_bit_and_no_place_is_left_unwritten(backend):
    def go():
        return run([3, 5], dtype=torch.float32, steps=3, backend=backend, losses=(auxk,))

    auxk = AuxK(0.5, k_aux=8, dead_after=10)
    expected = go()
    with poisoned_empty():
        assert_unchanged(go(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_learn(dtype):
    sae = make(losses=(NORM,), dtype=dtype)
    optimizer = RowAdam(sae, 0.01)
    xs = batch(0, n=64).to(dtype).split(16)
    rows = [big_step(sae, optimizer, xs) for _ in range(40)]
    assert rows[-1]["reconstruction"] < 0.7 * rows[0]["reconstruction"]
    assert {p.dtype for p in sae.parameters()} == {dtype}


@pytest.mark.parametrize(("weight_format", "allowed"), [("split32", 1e-5), ("bfloat16", 2**-7)])
def test_narrow_weights_take_the_same_step(weight_format, allowed):
    """bf16 rounds the same weights up, but for a few that lie at the edge."""
    saes = []
    for sizes in ([N], [8] * 4):
        torch.manual_seed(0)
        sae = SAE(SAEConfig(D, M, TopK(3), losses=(NORM,)), weight_format=weight_format)
        big_step(sae, RowAdam(sae, 0.01, eps=0.01), batch(0).float().split(sizes))
        saes.append(sae)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        single, several = (sae.full_precision(name) for sae in saes)
        torch.testing.assert_close(several, single, rtol=allowed, atol=1e-6)
        assert (several - single).abs().gt(1e-5 * single.abs().max()).float().mean() < 0.05


# Steps that are skipped


@pytest.mark.parametrize("activation", [TopK(3), BatchTopK(3), ReLU()], ids=str)
@pytest.mark.parametrize("where", [0, 1, 3])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30, 1e14])
def test_nan_in_any_batch_skips_the_step(activation, where, bad):
    sae = make(activation, (AUXK, NORM), torch.float32, reconstruction="squared_error")
    optimizer = RowAdam(sae)
    for step in range(3):
        big_step(sae, optimizer, batch(step).float().split(8))
    before, xs = everything(sae, optimizer), list(batch(4).float().split(8))
    xs[where] = xs[where] * bad
    for i, x in enumerate(xs):
        metrics = train_step(sae, optimizer, x, accumulate=i < 3)
        assert metrics["skipped"] == (i >= where)
        assert metrics["loss"].isnan() == (i >= where)
    assert_unchanged(everything(sae, optimizer), before)
    assert big_step(sae, optimizer, batch(5).float().split(8))["skipped"] == 0
    assert sae.tokens_seen == 4 * N


def test_the_first_batch_sets_the_scale():
    sae, other = make(normalization="scalar"), make(normalization="scalar")
    other.estimate_norm_scale_(batch(0)[:8], again=True)
    sae.unset_norm_scale_()
    xs = batch(0).split(8)
    for module in (sae, other):
        big_step(module, RowAdam(module), xs)
    assert_unchanged(everything(sae), everything(other))


@pytest.mark.parametrize("where", [0, 2])
def test_a_first_step_that_is_skipped_sets_no_scale(where):
    sae = make(normalization="scalar", dtype=torch.float32)
    sae.unset_norm_scale_()
    optimizer = RowAdam(sae)
    before, xs = everything(sae), list(batch(0).float().split(8))
    xs[where] = xs[where] * torch.nan
    assert big_step(sae, optimizer, xs)["skipped"] == 1
    assert_unchanged(everything(sae), before)
    assert big_step(sae, optimizer, batch(0).float().split(8))["skipped"] == 0
    assert sae.norm_scale > 0
    sae.unset_norm_scale_()
    train_step(sae, optimizer, xs[where], accumulate=True)
    assert sae.norm_scale == -1 or where != 0  # of NaN nothing is left, whatever becomes of the step


# What is refused


def test_what_does_not_fit_the_batches_kept_is_refused_and_they_stay():
    sae, expected = make(losses=(NORM,)), make(losses=(NORM,))
    optimizer = RowAdam(sae)
    scale = {"decoder_norm_l1": 0.5}
    for part in batch(0).split(16):
        train_step(sae, optimizer, part, scale=scale, accumulate=True)
    twin = copy.deepcopy(sae)
    for changes, message in (
        ({"sae": twin}, "(opt: got one that lacks parameters|sae: got another one)"),
        ({"scale": {"decoder_norm_l1": 0.6}}, r"scale: got .*0.6.*, expected .*0.5.* the 2 batches kept"),
        ({"scale": None}, r"scale: got .*, as for the 2 batches kept for this step"),
        ({"x": batch(1, 5)}, r"x: got shape \(32, 5\)"),
        ({"x": batch(1)[:0]}, r"x: got shape \(0, 6\), expected at least one token"),
    ):
        with pytest.raises(ValueError, match=message):
            train_step(**{"sae": sae, "opt": optimizer, "x": batch(1), "scale": scale} | changes)
    train_step(sae, optimizer, batch(1), scale={"decoder_norm_l1": 0.5, "reconstruction": 1})
    big_step(expected, RowAdam(expected), [*batch(0).split(16), batch(1)], scale=scale)
    assert_unchanged(everything(sae), everything(expected))


def test_another_dictionary_with_the_same_weights_is_refused():
    sae, other = make(), make()
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        setattr(other, name, getattr(sae, name))
    optimizer = RowAdam(sae)
    train_step(sae, optimizer, batch(0), accumulate=True)
    with pytest.raises(ValueError, match="sae: got another one, expected that of the 1 batches kept"):
        train_step(other, optimizer, batch(0))


def test_accumulate_must_be_a_bool():
    sae = make()
    with pytest.raises(TypeError, match="accumulate: got int, expected True or False"):
        train_step(sae, RowAdam(sae), batch(0), accumulate=3)


# The trainer


def trainer(out, batches, accumulate=4, **changes):
    torch.manual_seed(0)
    x = batch(0, 8, 640).float()
    sae = SAE(SAEConfig(8, 32, TopK(3), losses=(AuxK(1 / 8, 4, 200),), normalization="scalar")).calibrate_(x)
    config = {"lr": 1e-2, "log_every": 1, "checkpoint_every": 5, "progress": False} | changes
    batches = Batches(x, 8, seed=1) if batches is None else batches
    return Trainer(sae, batches, TrainConfig(out=out, accumulate=accumulate, **config))


def rows(out):
    return read_log(out / "log.jsonl")


def same_weights(a, b):
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


def test_a_run_of_big_steps_is_that_of_big_batches(tmp_path):
    x = batch(0, 8, 640).float()
    big = trainer(tmp_path / "big", list(x.split(32)), 1, sparsity_warmup=0.5)
    small = trainer(tmp_path / "small", list(x.split(8)), 4, sparsity_warmup=0.5)
    ends = [big.fit(), small.fit()]
    assert [t.n_steps for t in (big, small)] == [20, 20]
    assert len(rows(tmp_path / "small")) == 20
    for a, b in zip(rows(tmp_path / "big"), rows(tmp_path / "small"), strict=True):
        for name in ("step", "tokens", "lr", "dead_share", "skipped"):
            assert a[name] == b[name], name
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert ends[1]["tokens"] == 640
    names = [p.name for p in (tmp_path / "small/checkpoints").iterdir()]
    assert sorted(names) == ["step-000000015", "step-000000020"]


@pytest.mark.parametrize("kind", ["batches", "list"])
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, kind):
    def source():
        return None if kind == "batches" else list(batch(0, 8, 640).float().split(8))

    whole = trainer(tmp_path / "whole", source())
    whole.fit()
    parts = trainer(tmp_path / "parts", source())
    take, calls = parts._take_step, []

    def interrupted(batches):
        calls.append(0)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return take(batches)

    parts._take_step = interrupted
    parts.fit()
    assert parts.step == 8
    again = trainer(tmp_path / "parts", source())
    again.fit(resume=True)
    kept = ("step", "loss", "fvu", "l0", "tokens", "lr")
    a, b = ([[row[k] for k in kept] for row in rows(tmp_path / name)] for name in ("whole", "parts"))
    assert a == b
    assert same_weights(again.sae, whole.sae)


def test_batches_that_make_no_whole_step_are_left_out(tmp_path, caplog):
    x = batch(0, 8, 640).float()
    left = trainer(None, list(x[: 8 * 11].split(8)))
    assert left.n_steps == 2
    left.fit()
    assert left.sae.tokens_seen == 64
    short = trainer(tmp_path, list(x[: 8 * 11].split(8)), n_steps=5, warmup=0.0, decay=1.0)
    assert short.fit()["step"] == 2
    assert short.sae.tokens_seen == 64
    assert short.opt not in step_module._begun
    assert "the activations ended after 2 of 5 steps" in caplog.text
    assert rows(tmp_path)[-1]["lr"] == short.opt.param_groups[0]["lr"]


def test_a_step_that_an_error_broke_off_leaves_nothing():
    x = list(batch(0, 8, 640).float().split(8))

    def broken():
        yield from x[:6]
        raise RuntimeError("the disk")

    t = trainer(None, broken(), n_steps=3)
    with pytest.raises(RuntimeError, match="the disk"):
        t.fit()
    assert t.step == 1
    t.activations = x
    t.fit()
    assert t.sae.tokens_seen == 3 * 32


def test_nan_is_counted_and_stops_by_step(tmp_path):
    x = list(batch(0, 8, 640).float().split(8))
    x[5] = x[5] * torch.nan
    x[6] = x[6] * torch.inf
    final = trainer(tmp_path / "skip", x).fit()
    assert final["skipped"] == 1
    assert [row["loss"] is None for row in rows(tmp_path / "skip")] == [i == 1 for i in range(20)]
    assert final["tokens"] == 19 * 32
    with pytest.raises(NotFinite, match="NaN or Inf in a batch of step 2"):
        trainer(tmp_path / "stop", x, on_nan="stop").fit()
    assert trainer(tmp_path / "stop", x).fit(resume=True)["skipped"] == 1


def test_another_number_of_batches_a_step_is_another_run(tmp_path):
    trainer(tmp_path, None, n_steps=5).fit()
    with pytest.raises(ValueError, match="a checkpoint with accumulate = 4, expected accumulate = 2"):
        trainer(tmp_path, None, 2, n_steps=5).fit(resume=True)


def test_what_the_trainer_refuses():
    for value, error in ((0, ValueError), (1.5, TypeError), (None, TypeError)):
        with pytest.raises(error, match="accumulate: got"):
            TrainConfig(accumulate=value)
    x = list(batch(0, 8, 24).float().split(8))
    with pytest.raises(ValueError, match="accumulate: got 4, expected at most the 3 batches"):
        trainer(None, x)


def test_the_speed_counts_the_tokens_of_every_batch(monkeypatch, tmp_path):
    clock = iter(range(10_000))
    monkeypatch.setattr("fastsae.training.trainer.time.perf_counter", lambda: next(clock))
    x = batch(0, 8, 640).float()
    trainer(tmp_path, [x[:8], x[8:24], x[24:25], x[25:32]] * 4, log_every=2).fit()
    assert [row["tokens_per_s"] for row in rows(tmp_path)] == [64, 64]
