"""Synthetic features: what the docstring says of their frequencies holds; a perfect dictionary scores 1."""

import json
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import multivariate_normal, norm

from fastsae import SAE, JumpReLU, SAEConfig, TopK
from fastsae.data import open_activations
from fastsae.evaluate import Recovery, SyntheticDictionary, evaluate, score, write_activations

pytestmark = pytest.mark.usefixtures("one_thread")

N = 100_000
ALARM = 1e-6
"""Chance that a statistical test raises a false alarm, were its seed drawn anew."""
CASES = {
    "uniform": {},
    "zipf": {"frequencies": "zipf"},
    "capped": {"frequencies": "zipf", "exponent": 2.0, "mean_active": 4.0},
    "pairs": {"correlation": 0.8},
    "groups": {"correlation": 0.99, "group_size": 5, "frequencies": "zipf"},
    "hierarchy": {"hierarchy": 3},
    "all": {"hierarchy": 2, "correlation": 0.7, "frequencies": "zipf"},
}


def make(**options) -> SyntheticDictionary:
    return SyntheticDictionary(**{"d_in": 16, "n_features": 31, "seed": 5} | options)


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(truth):
    x, c = truth.sample_with_coefficients(N, generator())
    return x.double(), c.double()


def assert_means(samples, expected):
    """The mean of each column of ``samples`` [n, columns] is ``expected``, as far as n samples can tell."""
    n, columns = samples.shape
    bound = norm.isf(ALARM / 2 / columns) * samples.std(0) / math.sqrt(n)
    error = (samples.mean(0) - expected).abs()
    assert (error <= bound).all(), (error / bound).max()


def assert_rates(events, p):
    """Events [n, columns] happen with the probabilities ``p``, as far as n tokens can tell."""
    n, columns = events.shape
    bound = norm.isf(ALARM / 2 / columns) * (p * (1 - p) / n).sqrt()
    error = (events.double().mean(0) - p).abs()
    assert (error <= bound).all(), (error / bound).max()


def ideal(truth, normalization="none", copies=1, order=None, sites=1) -> SAE:
    """The dictionary that IS the truth: W_enc is dual to it, so that pre-activations are coefficients."""
    sae = SAE(
        SAEConfig(
            truth.d_in,
            copies * truth.n_features,
            JumpReLU(1e-3),
            normalization=normalization,
            n_sites=sites,
        )
    )
    scale = torch.tensor(1.0)
    if sae.config.normalization == "scalar":
        scale = torch.tensor(0.5) if sites == 1 else torch.linspace(0.5, 2, sites)
        sae.norm_scale.copy_(scale)
    scale = scale.reshape(-1).repeat_interleave(truth.d_in // scale.numel())
    directions = truth.directions * truth.scale
    seen = directions.double() * scale
    if normalization == "layer_norm":
        seen = seen - seen.mean(1, keepdim=True)
    with torch.no_grad():
        sae.W_enc.copy_(torch.linalg.pinv(seen).T.repeat(copies, 1))
        sae.W_dec.copy_((directions * scale).repeat(copies, 1))
        if order is not None:
            sae.W_enc.copy_(sae.W_enc[order].clone())
            sae.W_dec.copy_(sae.W_dec[order].clone())
    return sae


def test_features_are_unit_directions_with_the_stated_frequencies():
    truth = make(frequencies="zipf", mean_active=2.0)
    assert truth.directions.dtype == torch.float32
    assert torch.allclose(truth.directions.norm(dim=1), torch.ones(31))
    weight = torch.arange(1, 32, dtype=torch.float64).reciprocal()
    assert torch.allclose(truth.probabilities, 2 * weight / weight.sum())
    assert torch.allclose(make().probabilities, torch.full((31,), 3 / 31, dtype=torch.float64))
    capped = make(**CASES["capped"]).probabilities
    assert capped[0] == 0.9
    free = capped[capped < 0.9]
    assert 2 <= len(free) < 31
    rank = torch.arange(32 - len(free), 32, dtype=torch.float64)
    assert torch.allclose(free * rank**2, (free * rank**2)[0].expand_as(free))
    family = make(hierarchy=3, n_features=30).probabilities
    assert torch.equal(family[1:4], family[:1].expand(3) / 2)
    assert torch.equal(family[29], family[28] / 2)  # a last family that isn't whole


@pytest.mark.parametrize("mean_active", [0.1, 3.0, 12.0])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_probabilities_sum_to_mean_active(options, mean_active):
    p = make(**options | {"mean_active": mean_active}).probabilities
    assert p.sum().item() == pytest.approx(mean_active, rel=1e-12)
    assert 0 < p.min() <= p.max() <= 0.9


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_each_feature_fires_as_often_as_it_says(options):
    truth = make(**options)
    x, c = draw(truth)
    assert_rates(c > 0, truth.probabilities)
    fired = c[c > 0]
    assert 0.5 <= fired.min() < 0.51
    assert 1.49 < fired.max() <= 1.5
    assert_means(torch.stack([fired, fired.square()], dim=1), torch.tensor([1, 13 / 12]))
    assert torch.allclose(x, truth.scale * c @ truth.directions.double(), atol=1e-4)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_the_power_is_the_width(options):
    truth = make(**options)
    x, _ = draw(truth)
    assert_means(x.square().sum(1, keepdim=True), torch.tensor([16.0]))


def test_the_power_counts_that_features_fire_together():
    """Its two sums from the joint frequencies that scipy's bivariate normal gives, with no chance in it."""
    truth = make(n_features=6, correlation=0.6, group_size=3, frequencies="zipf", mean_active=1.5)
    p, threshold = truth.probabilities, norm.ppf(truth.probabilities)
    expected = 13 / 12 * p.sum()
    cosine = truth.directions.double() @ truth.directions.double().T
    for g in range(6):
        for h in set(range(6)) - {g}:
            rho = 0.6 if g // 3 == h // 3 else 0.0
            normal = multivariate_normal([0, 0], [[1, rho], [rho, 1]], abseps=1e-12, releps=1e-12)
            expected += normal.cdf([threshold[g], threshold[h]]) * cosine[g, h]
    assert truth.scale**2 * expected.item() == pytest.approx(16, rel=1e-7)


def test_correlated_features_fire_together():
    truth = make(correlation=0.8, group_size=3)
    _, c = draw(truth)
    threshold = norm.ppf(3 / 31)
    both = multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]]).cdf([threshold, threshold])
    assert both > 4 * (3 / 31) ** 2
    fires = c > 0
    inside = torch.stack([fires[:, g] & fires[:, g + 1] for g in range(0, 30, 3)], dim=1)
    assert_rates(inside, torch.full((10,), both, dtype=torch.float64))
    across = torch.stack([fires[:, g + 2] & fires[:, g + 3] for g in range(0, 27, 3)], dim=1)
    assert_rates(across, torch.full((9,), (3 / 31) ** 2, dtype=torch.float64))


def test_children_fire_only_with_their_parent():
    truth = make(hierarchy=2)
    _, c = draw(truth)
    fires, p = c > 0, truth.probabilities
    parent = torch.arange(31) // 3 * 3
    assert not (fires & ~fires[:, parent]).any()
    # siblings: each on half of the parent's tokens, independently
    siblings = torch.stack([fires[:, g + 1] & fires[:, g + 2] for g in range(0, 30, 3)], dim=1)
    assert_rates(siblings, p[0:30:3] / 4)
    assert_rates((fires[:, 0:27:3] & fires[:, 4:31:3]), p[0:27:3] * p[4:31:3])  # and other families' too


def test_equal_seeds_give_equal_features_and_tokens():
    a, b, c = make(), make(), make(seed=6)
    assert a == b
    assert hash(a) == hash(b)
    assert torch.equal(a.directions, b.directions)
    assert torch.equal(a.sample(50, generator()), b.sample(50, generator()))
    assert not torch.equal(a.sample(50, generator()), a.sample(50, generator(1)))
    assert a != c
    assert not torch.isclose(a.directions, c.directions).any()
    assert SyntheticDictionary(**json.loads(json.dumps(make(**CASES["all"]).to_dict()))) == make(
        **CASES["all"]
    )


def test_a_dictionary_of_the_same_seed_does_not_start_as_the_solution():
    truth = SyntheticDictionary(seed=3)
    sae = SAE(SAEConfig(64, 128, TopK(3)))
    sae.reset_parameters(3)
    assert score(sae.W_dec, truth).mmcs < 0.45


def test_a_random_dictionary_finds_nothing():
    truth = SyntheticDictionary()
    result = score(torch.randn(128, 64, generator=generator()), truth)
    assert 0.25 < result.mcc < result.mmcs < 0.4
    assert result.recovered == 0


@pytest.mark.parametrize(
    ("normalization", "sites"), [("none", 1), ("scalar", 1), ("scalar", 4), ("layer_norm", 1)]
)
@pytest.mark.parametrize("options", [{}, CASES["all"]], ids=["uniform", "all"])
def test_the_truth_itself_scores_one(options, normalization, sites):
    truth = make(**options, d_in=40)
    sae = ideal(truth, normalization, sites=sites).train()
    result = score(sae, truth, n_tokens=1500)
    ones = [result.mmcs, result.mcc, result.recovered, result.precision, result.recall, result.f1]
    assert ones == pytest.approx([1] * 6, abs=1e-6)
    assert result.shrinkage == pytest.approx(1, abs=1e-4)
    assert torch.equal(result.match, torch.arange(31))
    if normalization != "layer_norm":  # whose decoder would have to be centred too
        assert result.fvu < 1e-8
    assert 2.5 < result.l0 < 3.5
    assert result.tokens == 1500
    assert sae.training


def test_topk_with_the_true_k_scores_one():
    """One feature fires on each token that TopK(1) can be exact on: one feature in all, nearly always."""
    truth = make(d_in=8, n_features=1, mean_active=0.9)
    sae = SAE(SAEConfig(8, 1, TopK(1)))
    with torch.no_grad():
        sae.W_enc.copy_(truth.directions)
        sae.W_dec.copy_(truth.directions)
    result = score(sae, truth, n_tokens=2000)
    assert [result.mmcs, result.f1, result.shrinkage] == pytest.approx([1, 1, 1], abs=1e-5)
    assert result.l0 == pytest.approx(0.9, abs=norm.isf(ALARM / 2) * math.sqrt(0.09 / 2000))


def test_order_and_copies_of_latents():
    truth = make(d_in=40)
    order = torch.randperm(31, generator=generator())
    permuted = score(ideal(truth, order=order), truth, n_tokens=1000)
    assert torch.equal(order[permuted.match], torch.arange(31))
    assert [permuted.mcc, permuted.f1, permuted.shrinkage] == pytest.approx([1, 1, 1], abs=1e-4)
    twice = score(ideal(truth, copies=2), truth, n_tokens=1000)
    assert [twice.mmcs, twice.mcc, twice.recovered, twice.f1] == pytest.approx([1] * 4, abs=1e-6)
    assert twice.l0 == pytest.approx(2 * permuted.l0)
    assert twice.fvu > 0.5  # both copies reconstruct
    merged = score(truth.directions[:1].expand(62, 40), truth)  # the best cosine of one feature alone
    assert merged.mcc < 0.2


def test_fewer_latents_than_features_are_not_found():
    truth = make(d_in=40)
    half = ideal(truth)
    with torch.no_grad():
        half.W_enc[15:] = 0
        half.W_dec[15:] = 0
    result = score(half, truth)
    assert result.recovered == pytest.approx(15 / 31)
    assert result.mcc == pytest.approx(15 / 31, abs=1e-6)
    assert result.precision == 1
    # of 16,384 tokens' 3 firings each
    assert result.recall == pytest.approx(15 / 31, abs=norm.isf(ALARM / 2) * math.sqrt(0.25 / (3 * 16_384)))
    assert result.dead_share == pytest.approx(16 / 31)
    small = score(truth.directions[:15], truth)
    assert small.mcc == pytest.approx(15 / 31, abs=1e-6)
    assert small.match.tolist() == [*range(15), *[-1] * 16]


def test_known_faults_cost_what_they_should():
    """Halved activations: a slope of 1/2. A latent that always fires: false alarms on most tokens."""
    truth = make(d_in=40)
    sae = ideal(truth)
    with torch.no_grad():
        sae.W_enc *= 0.5
    result = score(sae, truth)
    assert result.shrinkage == pytest.approx(0.5, abs=1e-4)
    assert result.f1 == 1
    assert 0.25 < result.fvu < 0.3  # a quarter of E||x||^2, over the variance about the mean
    noisy = ideal(truth)
    with torch.no_grad():
        noisy.b_enc[0] = 1.0
    result = score(noisy, truth)
    assert result.recall == 1
    hits = result.precision * result.l0  # a token
    assert result.l0 - hits == pytest.approx(1 - 3 / 31, abs=norm.isf(ALARM / 2) * math.sqrt(0.09 / 16_384))


@pytest.mark.parametrize("n_latents", [20, 31, 70])
def test_scores_equal_their_definitions(n_latents, monkeypatch):
    """On a dictionary that is nothing special, in one dense computation."""
    truth, half = make(**CASES["all"]), 10
    torch.manual_seed(0)
    sae = SAE(SAEConfig(16, n_latents, TopK(4)))
    with torch.no_grad():
        sae.W_dec[:half] += truth.directions[:half]
        sae.b_enc.normal_(std=0.2)
    drawn, original = [], SyntheticDictionary.sample_with_coefficients

    def record(*arguments):
        drawn.append(original(*arguments))
        return drawn[-1]

    monkeypatch.setattr(SyntheticDictionary, "sample_with_coefficients", record)
    result = score(sae, truth, n_tokens=1100)
    x, c = (torch.cat(blocks[: len(blocks) // 2])[:1100] for blocks in zip(*drawn, strict=True))
    c, f, W = c.double(), sae.eval().encode(x).detach().double(), sae.W_dec.detach().double()

    cosine = truth.directions.double() @ torch.nn.functional.normalize(W, dim=1).T
    g, i = linear_sum_assignment(-cosine.numpy())
    true, found = c[:, g], f[:, i]
    hits = ((true > 0) & (found > 0)).sum()
    c_hat = found * W.norm(dim=1)[i] / truth.scale
    expected = {
        "mmcs": cosine.max(1).values.mean(),
        "mcc": cosine[g, i].sum() / 31,
        "recovered": (cosine.max(1).values > 0.9).double().mean(),
        "precision": hits / (found > 0).sum(),
        "recall": hits / (c > 0).sum(),
        "f1": 2 * hits / ((found > 0).sum() + (c > 0).sum()),
        "shrinkage": (true * c_hat)[true > 0].sum() / true.square().sum(),
        "fvu": evaluate(sae, [x]).fvu,
        "l0": (f > 0).double().sum(1).mean(),
        "dead_share": (~(f > 0).any(0)).double().mean(),
    }
    got = result.to_dict()
    assert {name: got[name] for name in expected} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-5
    )
    assert result.n_latents == n_latents


def test_to_dict_has_none_for_what_was_not_measured():
    truth = make()
    found = score(truth.directions, truth)
    assert isinstance(found, Recovery)
    numbers = found.to_dict()
    assert numbers["mmcs"] == pytest.approx(1)
    assert numbers["f1"] is None
    assert numbers["tokens"] == 0
    assert "match" not in numbers
    json.dumps(numbers, allow_nan=False)


def test_a_file_of_tokens_names_its_features(tmp_path):
    truth = make(**CASES["all"])
    path = tmp_path / "new" / "synth.safetensors"
    write_activations(path, truth, 2500, seed=4)
    assert SyntheticDictionary.open(path) == truth
    assert torch.equal(SyntheticDictionary.open(path).directions, truth.directions)
    x = open_activations(path)[:]
    assert x.shape == (2500, 16)
    assert_means(x.double().square().sum(1, keepdim=True), torch.tensor([16.0]))
    write_activations(str(path), truth, 1100, seed=4)  # in its place
    assert torch.equal(open_activations(path)[:], x[:1100])
    write_activations(path, truth, 1100, seed=5)
    same = (open_activations(path)[:] == x[:1100]).all(1)
    assert not (same & x[:1100].any(1)).any()  # on some tokens nothing fires
    assert [file.name for file in path.parent.iterdir()] == ["synth.safetensors"]


def test_scoring_takes_other_tokens_than_training(tmp_path, monkeypatch):
    truth, seen = make(), []
    sae = ideal(make(d_in=16, n_features=4))
    original = SyntheticDictionary.sample_with_coefficients
    write_activations(tmp_path / "x.safetensors", truth, 1024)
    monkeypatch.setattr(
        SyntheticDictionary,
        "sample_with_coefficients",
        lambda *arguments: seen.append(original(*arguments)) or seen[-1],
    )
    score(sae, truth, n_tokens=1024)
    trained, scored = open_activations(tmp_path / "x.safetensors")[:], seen[0][0]
    assert not ((trained == scored).all(1) & scored.any(1)).any()


def test_the_file_does_not_depend_on_how_it_is_cut(tmp_path, monkeypatch):
    import fastsae.shards

    truth = make()
    write_activations(tmp_path / "a.safetensors", truth, 3000)
    monkeypatch.setattr(fastsae.shards, "BLOCK_BYTES", 700 * 64)
    write_activations(tmp_path / "b.safetensors", truth, 3000)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_eval_synthetic(fastsae, tmp_path):
    truth = make(d_in=40)
    ideal(truth).save(tmp_path / "sae")
    file, out = tmp_path / "synth.safetensors", tmp_path / "score.json"
    write_activations(file, truth, 1000)
    code, shown, err = fastsae("eval", tmp_path / "sae", "--synthetic", file, "--json", out)
    assert code == 0, err
    assert "mmcs" in shown
    assert json.loads(out.read_text()) == score(SAE.load(tmp_path / "sae"), truth).to_dict()
    assert json.loads(out.read_text())["f1"] == 1


def test_eval_synthetic_says_what_is_wrong(fastsae, tmp_path):
    ideal(make(d_in=40)).save(tmp_path / "sae")
    write_activations(tmp_path / "narrow.safetensors", make(), 100)
    foreign = tmp_path / "sae" / "model.safetensors"
    for arguments, message in [
        (
            ("narrow.safetensors",),
            "dictionary: got a dictionary with d_in = 40, d_out = 40, expected 16 for both",
        ),
        (("missing.safetensors",), "missing.safetensors: got no whole safetensors file"),
        (
            (foreign,),
            "got a file that doesn't say which features are behind it, expected an activations file",
        ),
        (("x.npy",), "expected a file named *.safetensors"),
        (("narrow.safetensors", "--activations", "x.npy"), "beside --activations, expected one of the two"),
    ]:
        name, *rest = arguments
        code, _, err = fastsae("eval", tmp_path / "sae", "--synthetic", tmp_path / name, *rest)
        assert code == 1
        assert message in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_in": 0}, "d_in: got 0"),
        ({"n_features": 2.5}, "n_features: got float"),
        ({"mean_active": 0}, "mean_active: got 0, expected a number > 0"),
        ({"mean_active": 28}, "mean_active: got 28, expected a number <= 27.9 with 31 features"),
        ({"mean_active": 22, "hierarchy": 1}, "mean_active: got 22, expected a number <= 21.15"),
        ({"frequencies": "power"}, "frequencies: got 'power', expected one of 'uniform', 'zipf'"),
        ({"exponent": -1}, "exponent: got -1"),
        ({"correlation": 1}, "correlation: got 1, expected a number >= 0 and <= 0.99"),
        ({"group_size": 1}, "group_size: got 1"),
        ({"hierarchy": -1}, "hierarchy: got -1"),
        ({"seed": "0"}, "seed: got str"),
    ],
)
def test_bad_features_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, _: score(torch.randn(4, 15), t), r"W_dec: got torch.float32 \[4, 15\], expected floating"),
        (lambda t, _: score(torch.ones(4, 16).int(), t), "W_dec: got torch.int32"),
        (lambda t, _: score(torch.full((4, 16), math.nan), t), "W_dec: got NaN or Inf"),
        (lambda t, _: score("runs/demo", t), "dictionary: got str, expected an SAE or W_dec"),
        (lambda t, _: score(torch.randn(4, 16), t.directions), "truth: got Tensor"),
        (lambda t, _: score(torch.randn(4, 16), t, n_tokens=0), "n_tokens: got 0"),
        (lambda t, _: score(SAE(SAEConfig(16, 8, TopK(1), d_out=4)), t), "d_in = 16, d_out = 4, expected 16"),
        (lambda t, _: t.sample(-1, generator()), "n: got -1"),
        (lambda t, _: t.sample(1, 0), "generator: got int"),
        (lambda t, p: write_activations(p / "x.npy", t, 5), "path: got .*x.npy', expected a file named"),
        (lambda t, p: write_activations(p / "x.safetensors", t, 0), "n_tokens: got 0"),
        (lambda t, p: write_activations(p / "x.safetensors", "t", 5), "truth: got str"),
        (lambda t, p: SyntheticDictionary.open(3), "path: got int"),
    ],
)
def test_bad_calls_are_refused(call, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        call(make(), tmp_path)
    assert not [*tmp_path.iterdir()]
