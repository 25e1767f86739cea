"""Every architecture: loss and gradients against dense formulas, the fused step against the ordinary loop."""

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastsae.training.dense as dense_step
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
    PreActivation,
    ReLU,
    SAEConfig,
    Tanh,
    TargetL0,
    TopK,
    backends,
)
from fastsae.optim import RowAdam
from fastsae.testing import (
    assert_close,
    assert_same,
    assert_unchanged,
    everything,
    poisoned_empty,
)
from fastsae.training import train_step

pytestmark = pytest.mark.usefixtures("one_thread")
triton = pytest.mark.skipif(backends.available()["triton"] is not None, reason="Triton can't run here")

D, M, N = 6, 32, 16
AUXK = AuxK(0.5, k_aux=4, dead_after=2 * N)
JUMP, WIDE = JumpReLU(0.5, 0.4), JumpReLU(0.5, 2.0)  # of the latter bands reach below 0
CASES = {
    "TopK, AuxK": (TopK(3), {"losses": (AUXK, DecoderNormL1(0.3))}),
    "TopK, many dead": (TopK(3), {"losses": (AuxK(0.5, k_aux=9, dead_after=2 * N),)}),
    "BatchTopK, AuxK": (BatchTopK(3), {"losses": (AUXK,)}),
    "GroupMax": (GroupMax(4), {"losses": (AUXK,)}),
    "ReLU, L1": (ReLU(), {"losses": (L1(0.3),), "unit_norm_decoder": True}),
    "ReLU, DecoderNormL1": (ReLU(), {"losses": (DecoderNormL1(0.3),)}),
    "ReLU, Tanh": (ReLU(), {"losses": (Tanh(0.3, 2.0),), "subtract_b_dec": True}),
    "JumpReLU, L0": (JUMP, {"losses": (L0(0.3),)}),
    "JumpReLU, wide": (WIDE, {"losses": (Tanh(0.3), L0(0.1), DecoderNormL1(0.2))}),
    "JumpReLU, TargetL0": (JUMP, {"losses": (TargetL0(0.3, 4.0), L1(0.1))}),
    "JumpReLU, AuxK": (JUMP, {"losses": (AUXK, L0(0.1)), "subtract_b_dec": True}),
    "JumpReLU, PreActivation": (WIDE, {"losses": (PreActivation(0.3), Tanh(0.1))}),
    "JumpReLU, PreActivation of the silent": (WIDE, {"losses": (PreActivation(0.3, dead_after=2 * N),)}),
    "Gated": (Gated(), {"losses": (L1(0.3),)}),
    "Gated, AuxK": (Gated(0.7), {"losses": (L1(0.3), AUXK)}),
    "Gated, free": (
        Gated(0.7),
        {"losses": (L1(0.3),), "unit_norm_decoder": False, "subtract_b_dec": False},
    ),
    "MultiTopK": (MultiTopK(3, 3, 0.25), {"losses": (AUXK,)}),
    "HierarchicalTopK": (HierarchicalTopK(5), {"losses": (AUXK,)}),
    "HierarchicalTopK, budgets": (HierarchicalTopK(5, (2, 5)), {"losses": (DecoderNormL1(0.2),)}),
    "Matryoshka, TopK": (Matryoshka(TopK(4)), {"losses": (AUXK, Tanh(0.1))}),
    "Matryoshka, BatchTopK": (Matryoshka(BatchTopK(4), (8, 20, 32)), {"unit_norm_decoder": False}),
    "transcoder": (TopK(3), {"d_out": 4, "losses": (AUXK,)}),
    "skip transcoder": (TopK(3), {"d_out": 4, "skip": True, "losses": (AUXK,)}),
    "skip, JumpReLU": (JUMP, {"d_out": 4, "skip": True, "losses": (L0(0.1),)}),
    "skip, Gated": (Gated(), {"skip": True, "losses": (L1(0.1),)}),
    "skip, Matryoshka": (Matryoshka(TopK(4)), {"d_out": 4, "skip": True}),
    "crosscoder": (
        TopK(3),
        {"n_sites": 2, "losses": (DecoderNormL1(0.3), AUXK), "unit_norm_decoder": False},
    ),
    "crosscoder, ReLU": (ReLU(), {"n_sites": 3, "losses": (DecoderNormL1(0.3),), "normalization": "scalar"}),
    "crosscoder, Tanh": (WIDE, {"n_sites": 2, "losses": (Tanh(0.3), L0(0.1), PreActivation(0.2))}),
}
FIXED = {name: case for name, case in CASES.items() if case[0].rule in ("topk", "groupmax")}
DENSE = {name: case for name, case in CASES.items() if case[0].rule == "threshold" and "AuxK" not in name}
# where each costs too much: every rule, every penalty, a skip and sites
COVERING = [
    "TopK, AuxK",
    "BatchTopK, AuxK",
    "GroupMax",
    "ReLU, L1",
    "JumpReLU, AuxK",
    "JumpReLU, PreActivation",
    "Gated, AuxK",
    "MultiTopK",
    "HierarchicalTopK",
    "Matryoshka, TopK",
    "skip, JumpReLU",
    "crosscoder, Tanh",
]


def batch(seed, d=D, n=N):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 0.5


def make(activation, options, dtype=torch.float64, backend="torch", **more):
    """A dictionary unlike its initial self, of which a sixth has been silent for long."""
    torch.manual_seed(0)
    config = SAEConfig(D, M, activation, **(options | more))
    sae = SAE(config, dtype=torch.float64, backend=backend)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        sae.b_enc[::6] -= 1.5
    sae.constrain_weights_()
    sae.silent_tokens[::6] = 2 * N
    if "norm_scale" in sae.state_dict():
        sae.norm_scale.copy_(torch.linspace(0.5, 0.75, sae.norm_scale.numel()).view(sae.norm_scale.shape))
    return sae.to(dtype)


def inputs(sae, seed, n=N):
    """x, and of a transcoder its target."""
    x = batch(seed, n=n).to(sae.dtype)
    return x, batch(100 + seed, sae.config.d_out, n).to(sae.dtype) if sae.config.transcoder else None


@pytest.fixture(params=["sparse", "dense"])
def path(request, monkeypatch):
    """Which way train_step goes where the rule leaves it the choice."""
    force(monkeypatch, request.param)
    return request.param


def force(monkeypatch, way):
    monkeypatch.setattr(dense_step, "FEW_SCORES", 0 if way == "dense" else 10**9)
    monkeypatch.setattr(dense_step, "DENSE_SHARE", -1.0)
    monkeypatch.setattr(dense_step, "BLOCK_SCORES", 7 * N)


# The formulas, dense. Everything that only selects is a constant; a straight-through rule is a term that is 0
# and has the derivative.


def zero_with_gradient(by, derivative):
    return derivative * (by - by.detach())


def largest(scores, k):
    """1 at each row's k largest."""
    return torch.zeros_like(scores).scatter(1, scores.topk(k, dim=1).indices, 1.0)


def activate(config, p, pre, k=None):
    """f, what counts as active (with the gradient of thresholds), what penalties charge."""
    activation = config.activation
    inner = getattr(activation, "inner", activation)
    if isinstance(activation, JumpReLU):
        theta, width = p["log_threshold"].exp(), activation.bandwidth
        on = (pre > theta).to(pre.dtype)
        band = ((pre - theta).abs() < width / 2).to(pre.dtype)
        f = pre * on + zero_with_gradient(theta, -(theta / width).detach() * band)
        return f, on + zero_with_gradient(theta, -band / width), f
    if isinstance(activation, Gated):
        wx, gates = pre - p["b_enc"], pre.relu()
        f = (pre > 0) * (p["r_mag"].exp() * wx + p["b_mag"]).relu()
        return f, (f > 0).to(f.dtype), gates
    if isinstance(activation, ReLU):
        kept = torch.ones_like(pre)
    elif isinstance(activation, GroupMax):
        kept = largest(pre.detach().reshape(len(pre) * activation.k, -1), 1).view(pre.shape)
    elif isinstance(inner, BatchTopK):
        kept = largest(pre.detach().reshape(1, -1), inner.k * len(pre)).view(pre.shape)
    else:
        kept = largest(pre.detach(), k or inner.k)
    f = (pre * kept).relu()
    return f, (f > 0).to(f.dtype), f


def parts(config, p, pre, f):
    """Codes whose reconstructions are compared with the target, their weights, and which of them is f's."""
    activation = config.activation
    if isinstance(activation, MultiTopK):
        k, most = activation.k, activation.k * activation.multiple
        return [activate(config, p, pre, k)[0], activate(config, p, pre, most)[0]], [1.0, activation.weight]
    if isinstance(activation, HierarchicalTopK):
        budgets = activation.budgets or range(1, activation.k + 1)
        return [activate(config, p, pre, k)[0] for k in budgets], [1 / len(budgets)] * len(budgets)
    if isinstance(activation, Matryoshka):
        widths = activation.widths or (1, 3, 7, 15, 32)
        latent = torch.arange(M)
        return [f * (latent < width) for width in widths], [1 / len(widths)] * len(widths)
    return [f], [1.0]


def normalised(config, norm_scale, x, like=None):
    """x in the space of the loss; ``like``: the input whose layer norm a target is under."""
    if config.normalization == "none":
        return x, None
    if config.normalization == "layer_norm":
        like = x if like is None else like
        mean, std = like.mean(1, keepdim=True), like.std(1, keepdim=True) + 1e-5
        return (x - mean) / std, (mean, std)
    scale = norm_scale.to(x.dtype).reshape(-1, 1).expand(-1, x.shape[1] // norm_scale.numel())
    return x * scale.reshape(-1), scale.reshape(-1)


def formulas(config, p, x, target, dead, norm_scale=None):
    """Raw x_hat, the dense code, and every loss term, of parameters ``p`` by name."""
    z, _ = normalised(config, norm_scale, x)
    goal, back = normalised(config, norm_scale, x if target is None else target, x)
    entered = z - p["b_dec"] if config.subtract_b_dec else z
    pre = entered @ p["W_enc"].T + p["b_enc"]
    f, active, charged = activate(config, p, pre)
    skip = z @ p["W_skip"].T if config.skip else 0.0

    def decode(code):
        return code @ p["W_dec"] + p["b_dec"] + skip

    scale = 1 / len(x)
    if config.reconstruction == "fvu":
        scale = 1 / (goal - goal.mean(0)).square().sum()
    codes, weights = parts(config, p, pre, f)
    errors = [(goal - decode(code)).square().sum() for code in codes]
    terms = {"reconstruction": scale * sum(w * e for w, e in zip(weights, errors, strict=True))}
    if isinstance(config.activation, Gated):
        frozen = charged @ p["W_dec"].detach() + p["b_dec"].detach() + (skip.detach() if config.skip else 0.0)
        missed = (goal - frozen).square().sum()
        terms["gated_aux"] = config.activation.aux_coefficient * scale * missed
    if isinstance(config.activation, MultiTopK):
        charged = codes[1]  # whatever the loss looks at is charged
    lengths = p["W_dec"].view(M, config.n_sites, -1).norm(dim=2).sum(1)
    for term in config.losses:
        c = term.coefficient
        if isinstance(term, AuxK):
            k, silent = min(term.k_aux, int(dead.sum())), pre[:, dead]
            second = (silent * largest(silent.detach(), k)).relu()
            e = (goal - decode(f)).detach()
            missed = (e - second @ p["W_dec"][dead]).square().sum()
            terms["auxk"] = c * min(int(dead.sum()) / term.k_aux, 1) * scale * missed
        elif isinstance(term, L1):
            terms["l1"] = c * charged.sum(1).mean()
        elif isinstance(term, DecoderNormL1):
            terms["decoder_norm_l1"] = c * (charged * lengths).sum(1).mean()
        elif isinstance(term, Tanh):
            terms["tanh"] = c * (term.scale * charged * lengths).tanh().sum(1).mean()
        elif isinstance(term, L0):
            terms["l0_penalty"] = c * active.sum(1).mean()
        elif isinstance(term, TargetL0):
            terms["target_l0"] = c * (active.sum(1).mean() / term.target - 1) ** 2
        else:
            short = (p["log_threshold"].exp() - pre).relu() * lengths
            short = short if term.dead_after is None else short[:, dead]
            terms["pre_activation"] = c * short.sum(1).mean()
    x_hat = decode(f)
    if config.normalization == "layer_norm":
        x_hat = x_hat * back[1] + back[0]
    elif config.normalization != "none":
        x_hat = x_hat / back
    return x_hat, f, terms


def by_formulas(sae, x, target, dtype=torch.float64):
    """x_hat, code, terms, and each term's gradient by each parameter, by name."""
    p = {n: t.detach().to(dtype).requires_grad_() for n, t in sae.named_parameters()}
    dead = sae.silent_tokens >= 2 * N
    scale = sae.norm_scale if "norm_scale" in sae.state_dict() else None
    target = None if target is None else target.to(dtype)
    x_hat, f, terms = formulas(sae.config, p, x.to(dtype), target, dead, scale)
    return results(x_hat, f, terms, p)


def by_module(sae, x, target):
    out = sae.train().training_forward(x, target)
    return results(out.x_hat, out.code.to_dense(), out.losses, dict(sae.named_parameters()))


def both(sae, x, target):
    expected = by_formulas(sae, x, target)  # first: the module counts
    return by_module(sae, x, target), expected


def results(x_hat, f, terms, p):
    found = {"x_hat": x_hat.detach(), "code": f.detach()}
    for name, term in terms.items():
        found[name] = term.detach()
        # a target for the L0 that is met, and thresholds that are far, have no gradient at all
        grads = (
            torch.autograd.grad(term, list(p.values()), retain_graph=True, materialize_grads=True)
            if term.requires_grad
            else [torch.zeros_like(t) for t in p.values()]
        )
        found |= {f"{name} by {what}": grad for what, grad in zip(p, grads, strict=True)}
    return found


def assert_equal_results(found, expected):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(
            found[name], t, rtol=1e-9, atol=1e-11, check_dtype=False, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_formulas(exact_backend, case):
    sae = make(*CASES[case], backend=exact_backend)
    x, target = inputs(sae, 3)
    expected = by_formulas(sae, x, target)
    assert_equal_results(by_module(sae, x, target), expected)
    # what is compared isn't all zero
    assert all(t.any() for name, t in expected.items() if " by " not in name)
    for term in set(expected) & {"auxk", "gated_aux", "target_l0", *(t.name for t in sae.config.losses)}:
        assert any(t.any() for name, t in expected.items() if name.startswith(f"{term} by ")), term
    for name in dict(sae.named_parameters()):
        assert sum(t.any() for key, t in expected.items() if key.endswith(f" by {name}")), name


@triton
@pytest.mark.parametrize("case", COVERING)
def test_triton_is_as_close_to_the_formulas_as_eager(case):
    sae = make(*CASES[case], torch.float32, "triton")
    x, target = inputs(sae, 3, n=3)
    exact, eager = (by_formulas(sae, x, target, dtype) for dtype in (torch.float64, torch.float32))
    found = by_module(sae, x, target)
    assert found.keys() == exact.keys()
    for name in exact:
        # that b_enc cancels in a gate's magnitude is exact in the formula alone
        if not (isinstance(sae.config.activation, Gated) and name == "reconstruction by b_enc"):
            assert_close(found[name], eager[name], exact[name], name)


NORMALIZATIONS = ["none", "scalar", "unit_scalar", "mean_norm", "layer_norm"]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("subtract", "unit_norm"), [(True, False), (False, True)], ids=str)
@pytest.mark.parametrize(
    "case", ["TopK, AuxK", "JumpReLU, wide", "Gated, AuxK", "HierarchicalTopK", "Matryoshka, TopK"]
)
def test_the_formulas_hold_in_every_space(case, subtract, unit_norm, normalization):
    options = {"subtract_b_dec": subtract, "unit_norm_decoder": unit_norm, "normalization": normalization}
    sae = make(*CASES[case], **options)
    x, target = inputs(sae, 3)
    assert_equal_results(*both(sae, x, target))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("case", ["skip transcoder", "skip, Gated", "transcoder", "crosscoder"])
def test_they_hold_with_a_target_and_sites(case, normalization):
    sae = make(*CASES[case], normalization=normalization, reconstruction="squared_error")
    x, target = inputs(sae, 3)
    assert_equal_results(*both(sae, x, target))


@pytest.mark.parametrize("n_sites", [1, 2])
@pytest.mark.parametrize("normalization", ["scalar", "unit_scalar", "mean_norm"])
def test_a_scale_makes_what_its_name_says(normalization, n_sites):
    sae = SAE(SAEConfig(D, M, TopK(3), n_sites=n_sites, normalization=normalization), dtype=torch.float64)
    x = batch(0) * torch.linspace(1, 5, D)
    sae.train().training_forward(x)
    width = D // n_sites
    sites = sae.normalise(x)[0].view(N, n_sites, width)
    size = sites.norm(dim=2).mean(0) if normalization == "mean_norm" else sites.square().sum(2).mean(0)
    expected = {"scalar": width, "unit_scalar": 1, "mean_norm": width**0.5}[normalization]
    torch.testing.assert_close(size, torch.full_like(size, expected), rtol=1e-6, atol=0)


# The fused step


def ordinary_step(sae, optimizer, x, target=None, clip=None):
    """What train_step fuses. RowAdam keeps unit lengths by itself."""
    loss = sae.train().training_forward(x, target).loss
    optimizer.zero_grad()
    loss.backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(sae.parameters(), clip)
    if not isinstance(optimizer, RowAdam):
        sae.constrain_gradients_()
    optimizer.step()
    if not isinstance(optimizer, RowAdam):
        sae.constrain_weights_()
    return loss.detach()


def assert_equal_sae(sae, expected):
    for name, t in expected.state_dict().items():
        if t.is_floating_point():
            small = 1e-6 if t.dtype == torch.float32 else 1e-8
            torch.testing.assert_close(
                sae.state_dict()[name], t, rtol=small, atol=small, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert_same(sae.state_dict()[name], t, name)


def compare(case, mode, backend, clip, steps=3):
    fused = make(*CASES[case], backend=backend)
    ordinary = copy.deepcopy(fused)
    ordinary.backend = "reference"
    optimizer = RowAdam(fused, 0.01, mode=mode, backend=backend)
    other = (
        torch.optim.Adam(ordinary.parameters(), 0.01)
        if mode == "dense"
        else RowAdam(ordinary, 0.01, mode=mode)
    )
    for step in range(steps):
        x, target = inputs(fused, step)
        loss = ordinary_step(ordinary, other, x, target, clip)
        metrics = train_step(fused, optimizer, x, target, clip=clip)
        torch.testing.assert_close(metrics["loss"], loss, rtol=1e-7, atol=0)  # l0 is fp32
        assert metrics["skipped"] == 0
        assert_equal_sae(fused, ordinary)
    return fused


@pytest.mark.parametrize(("mode", "clip"), [("dense", None), ("lazy", None), ("deferred", 0.5)])
@pytest.mark.parametrize("case", CASES)
def test_a_step_equals_the_ordinary_loop(monkeypatch, case, mode, clip):
    force(monkeypatch, "sparse")
    compare(case, mode, "torch", clip)


@pytest.mark.parametrize("case", COVERING)
def test_it_equals_it_on_every_exact_backend(exact_backend, monkeypatch, case):
    force(monkeypatch, "sparse")
    compare(case, "deferred", exact_backend, 0.5, steps=2)


@pytest.mark.parametrize(("mode", "clip"), [("dense", 0.5), ("deferred", None)])
@pytest.mark.parametrize("case", DENSE)
def test_a_dense_step_equals_it(monkeypatch, case, mode, clip):
    force(monkeypatch, "dense")
    compare(case, mode, "torch", clip)


@triton
@pytest.mark.parametrize(
    ("case", "mode", "clip"),
    [
        ("TopK, AuxK", "deferred", 0.5),
        ("BatchTopK, AuxK", "dense", None),
        ("GroupMax", "lazy", None),
        ("JumpReLU, wide", "deferred", None),
        ("Gated, AuxK", "lazy", None),
        ("MultiTopK", "dense", None),
        ("HierarchicalTopK", "deferred", 0.5),
        ("skip transcoder", "deferred", None),
    ],
)
def test_triton_equals_it_in_fp32(monkeypatch, case, mode, clip):
    """No further from the fp64 loop than the ordinary fp32 loop is; eps keeps Adam from dividing noise."""
    force(monkeypatch, "sparse")
    runs = {}
    for name, backend, dtype in (
        ("kernels", "triton", torch.float32),
        ("eager", "reference", torch.float32),
        ("exact", "reference", torch.float64),
    ):
        sae = make(*CASES[case], dtype, backend)
        optimizer = RowAdam(sae, 0.01, eps=0.01, mode=mode, backend=backend)
        for step in range(2):
            x, target = inputs(sae, step, n=4)
            if name == "kernels":
                train_step(sae, optimizer, x, target, clip=clip)
            else:
                ordinary_step(sae, optimizer, x, target, clip)
        runs[name] = everything(sae)
    for name, exact in runs["exact"].items():
        if exact.dtype == torch.float64:
            assert_close(runs["kernels"][name], runs["eager"][name], exact, name)
        elif not exact.is_floating_point():
            assert_same(runs["kernels"][name], exact, name)


def train(case, dtype=torch.float32, backend="torch", steps=2, mode="deferred", clip=None):
    sae = make(*CASES[case], dtype, backend)
    optimizer = RowAdam(sae, 0.01, mode=mode, backend=backend)
    for step in range(steps):
        train_step(sae, optimizer, *inputs(sae, step), clip=clip)
    return sae, optimizer


@pytest.mark.parametrize("case", CASES)
def test_two_runs_agree_to_the_bit_and_no_place_is_left_unwritten(monkeypatch, case):
    for way in ("sparse", "dense") if case in DENSE else ("sparse",):
        force(monkeypatch, way)

        def run():
            return [t for t in everything(*train(case, clip=1.0)).values() if isinstance(t, torch.Tensor)]

        expected = run()
        with poisoned_empty():
            poisoned = run()
        for a, b in zip(poisoned, expected, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("spoiled", ["x", "target"])
@pytest.mark.parametrize("case", CASES)
def test_a_batch_with_nan_changes_nothing(monkeypatch, case, spoiled):
    for way in ("sparse", "dense") if case in DENSE else ("sparse",):
        force(monkeypatch, way)
        sae, optimizer = train(case)
        x, target = inputs(sae, 5)
        if spoiled == "target" and target is None:
            pytest.skip("reconstructs its input")
        (x if spoiled == "x" else target)[3, 2] = torch.nan
        before = everything(sae, optimizer)
        for clip in (None, 1.0):
            metrics = train_step(sae, optimizer, x, target, clip=clip)
            assert metrics["skipped"] == 1
            assert metrics["loss"].isnan()
            assert_unchanged(everything(sae, optimizer), before)
        assert train_step(sae, optimizer, *inputs(sae, 6))["skipped"] == 0


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case[0].rule != "batchtopk"])
def test_four_batches_are_one_of_four_times_the_size(monkeypatch, case):
    for way in ("sparse", "dense") if case in DENSE else ("sparse",):
        force(monkeypatch, way)
        saes = [make(*CASES[case]) for _ in range(2)]
        optimizers = [RowAdam(sae, 0.01) for sae in saes]
        for step in range(2):
            x, target = inputs(saes[0], step)
            one = train_step(saes[0], optimizers[0], x, target, clip=1.0)
            for i, part in enumerate(x.chunk(4)):
                goal = None if target is None else target.chunk(4)[i]
                four = train_step(saes[1], optimizers[1], part, goal, clip=1.0, accumulate=i < 3)
            for name, number in one.items():
                torch.testing.assert_close(
                    four[name].double(), number.double(), rtol=1e-6 if name == "l0" else 1e-9, atol=0
                )
        assert_equal_sae(saes[1], saes[0])


@pytest.mark.parametrize("case", CASES)
def test_states_files_and_copies_are_whole(tmp_path, monkeypatch, case):
    for way in ("sparse", "dense") if case in DENSE else ("sparse",):
        force(monkeypatch, way)
        sae, optimizer = train(case)
        copied, other = copy.deepcopy(sae), make(*CASES[case], torch.float32)
        other.load_state_dict(sae.state_dict())
        assert_unchanged(everything(other), everything(sae))
        resumed = RowAdam(other, 0.5)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for step in range(3, 5):
            for module, its in ((sae, optimizer), (other, resumed)):
                train_step(module, its, *inputs(module, step))
        assert_unchanged(everything(other), everything(sae))
        states = [tree_leaves(its.state_dict()["state"]) for its in (resumed, optimizer)]
        for a, b in zip(*states, strict=True):
            assert_same(a, b)
        assert any(not torch.equal(a, b) for a, b in zip(copied.parameters(), sae.parameters(), strict=True))

        x, _ = inputs(sae, 9)
        optimizer.flush_()
        sae.eval().save(tmp_path / way)
        again = SAE.load(tmp_path / way)
        assert again.config == sae.config
        assert_unchanged(everything(again), everything(sae))
        assert_same(again.eval()(x), sae(x))
        assert_same(copy.deepcopy(sae)(x), sae(x))


@pytest.mark.parametrize("case", CASES)
def test_inference_is_the_formula_without_what_only_training_sees(case):
    sae = make(*CASES[case]).eval()
    x, target = inputs(sae, 3)
    before = everything(sae)
    code = sae.encode_sparse(x)
    expected = by_formulas(sae, x, target)  # an unset threshold of BatchTopK leaves the batch's own rule
    torch.testing.assert_close(code.to_dense(), expected["code"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sae(x), expected["x_hat"], rtol=1e-10, atol=1e-12)
    if sae.config.activation.rule == "threshold" and not isinstance(sae.config.activation, Gated):
        assert (code.values > 0).all()
    assert_unchanged(everything(sae), before)
    out = sae.training_forward(x, target)
    assert_unchanged(everything(sae), before)
    assert_same(out.x_hat, sae(x))
    sae.train().training_forward(x, target)
    assert sae.tokens_seen == N


@pytest.mark.parametrize("case", CASES)
def test_no_tokens_are_refused_by_the_step_alone(case):
    sae = make(*CASES[case])
    optimizer = RowAdam(sae)
    x, target = inputs(sae, 0, n=0)
    before = everything(sae, optimizer)
    with pytest.raises(ValueError, match=r"x: got shape \(0, 6\), expected at least one token"):
        train_step(sae, optimizer, x, target)
    assert_unchanged(everything(sae, optimizer), before)
    assert sae.eval()(x).shape == (0, sae.config.d_out)
    assert sae.encode_sparse(x).offsets.tolist() == [0]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, (torch.bfloat16, torch.float16)[i % 2]) for i, case in enumerate(CASES)]
    + [
        (case, (torch.float16, torch.bfloat16)[i % 2])
        for i, case in enumerate(CASES)
        if case in COVERING[::3]
    ],
    ids=str,
)
def test_half_precision_weights_learn(monkeypatch, case, dtype):
    for way in ("sparse", "dense") if case in DENSE else ("sparse",):
        force(monkeypatch, way)
        sae = make(*CASES[case], dtype)
        optimizer = RowAdam(sae, 0.01)
        x, target = inputs(sae, 0)
        losses = [train_step(sae, optimizer, x, target)["loss"] for _ in range(20)]
        assert losses[-1] < 0.85 * losses[0]
        assert {p.dtype for n, p in sae.named_parameters() if n != "log_threshold"} == {dtype}


@pytest.mark.parametrize(
    ("case", "formats"),
    [(case, (("split32", "int8"), ("bfloat16", "int8_row"))[i % 2]) for i, case in enumerate(COVERING)],
    ids=str,
)
def test_weights_and_states_in_fewer_bytes_learn(monkeypatch, case, formats):
    for way in ("sparse", "dense") if case in DENSE else ("sparse",):
        force(monkeypatch, way)
        torch.manual_seed(0)
        sae = SAE(SAEConfig(D, M, CASES[case][0], **CASES[case][1]), weight_format=formats[0])
        sae.silent_tokens[::6] = 2 * N
        optimizer = RowAdam(sae, 0.02, state_dtype=formats[1])
        x, target = inputs(sae, 0)
        losses = [train_step(sae, optimizer, x, target)["loss"] for _ in range(25)]
        assert losses[-1] < 0.9 * losses[0]
        assert all(p.isfinite().all() for p in sae.parameters())


FROZEN = [
    ("TopK, AuxK", "b_dec"),
    ("JumpReLU, wide", "log_threshold"),
    ("JumpReLU, wide", "W_dec"),
    ("Gated", "r_mag"),
    ("Gated", "b_mag"),
    ("Gated", "W_enc"),
    ("skip transcoder", "W_skip"),
    ("HierarchicalTopK", "W_dec"),
    ("crosscoder, Tanh", "log_threshold"),
]


@pytest.mark.parametrize(("case", "name"), FROZEN, ids=str)
def test_a_frozen_parameter_stays_and_the_others_learn(monkeypatch, case, name):
    for way in ("sparse", "dense") if case in DENSE else ("sparse",):
        force(monkeypatch, way)
        sae = make(*CASES[case])
        getattr(sae, name).requires_grad_(False)
        twin, before = copy.deepcopy(sae), everything(sae)
        optimizer = RowAdam(sae, 0.01, mode="dense")
        other = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], 0.01)
        for step in range(3):
            train_step(sae, optimizer, *inputs(sae, step))
            ordinary_step(twin, other, *inputs(sae, step))
        assert_equal_sae(sae, twin)
        for what in dict(sae.named_parameters()):
            assert torch.equal(getattr(sae, what), before[what]) == (what == name), what


@pytest.mark.parametrize("case", CASES)
def test_latents_that_fire_are_counted_as_the_formulas_say(path, case):
    if path == "dense" and case not in DENSE:
        pytest.skip("is never made densely")
    sae = make(*CASES[case])
    with torch.no_grad():
        sae.b_enc[::6] -= 10
    optimizer, silent = RowAdam(sae, 0.01), sae.silent_tokens.clone()
    for step in range(3):
        x, target = inputs(sae, step)
        fired = (by_formulas(sae, x, target)["code"] > 0).any(0)
        metrics = train_step(sae, optimizer, x, target)
        silent = torch.where(fired, 0, silent + N).int()
        assert_same(sae.silent_tokens, silent)
        assert metrics["n_dead"] == int(sae.dead_mask().sum())
    assert sae.tokens_seen == 3 * N
    assert 0 < int((silent > 0).sum()) < M


# Faults that published implementations have


@pytest.mark.parametrize("case", CASES)
def test_fault_no_zero_grad(path, case):
    """A gradient that lies about is neither read, nor added to, nor left behind."""
    if path == "dense" and case not in DENSE:
        pytest.skip("is never made densely")
    sae, twin = make(*CASES[case]), make(*CASES[case])
    for parameter in sae.parameters():
        parameter.grad = torch.full_like(parameter, 1000.0)
    for module in (sae, twin):
        optimizer = RowAdam(module, 0.01)
        for step in range(2):
            train_step(module, optimizer, *inputs(module, step))
    assert_unchanged(everything(sae), everything(twin))
    assert all((p.grad == 1000).all() for p in sae.parameters())
    assert all(p.grad is None for p in twin.parameters())


@pytest.mark.parametrize("case", ["TopK, AuxK", "ReLU, L1", "Gated", "HierarchicalTopK", "GroupMax"])
def test_fault_renormalised_before_the_step(path, case):
    """Adam's first step is lr * sign of the gradient less its part along the row; then the length is 1."""
    sae = make(*CASES[case])
    x, target = inputs(sae, 0)
    results = by_formulas(sae, x, target)
    grad = sum(t for name, t in results.items() if name.endswith(" by W_dec"))
    before = sae.W_dec.detach().clone()
    grad = grad - before * (grad * before).sum(1, keepdim=True)
    moved = before - 0.5 * grad / (grad.abs() + 1e-8)
    train_step(sae, RowAdam(sae, 0.5), x, target)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(M).double(), rtol=1e-12, atol=0)
    clear = (grad.abs() > 1e-6).all(1)
    assert clear.sum() > 8
    expected = torch.nn.functional.normalize(moved, dim=1)
    torch.testing.assert_close(sae.W_dec[clear], expected[clear], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", [name for name in CASES if "AuxK" in str(CASES[name])])
def test_fault_b_dec_twice_in_auxk(case):
    """Where b_dec moves with the target, AuxK sees no difference; it has no gradient for b_dec itself."""
    sae = make(*CASES[case], subtract_b_dec=False, transcoder=True)
    x, target = inputs(sae, 0)
    shift = torch.linspace(-2, 3, sae.config.d_out).double()
    before = by_module(copy.deepcopy(sae), x, target)
    with torch.no_grad():
        sae.b_dec += shift
    after = by_module(copy.deepcopy(sae), x, target + shift)
    torch.testing.assert_close(after["auxk"], before["auxk"], rtol=1e-9, atol=0)
    assert before["auxk"] > 0
    assert not before["auxk by b_dec"].any()


@pytest.mark.parametrize("case", FIXED)
def test_fault_gradient_through_entries_of_zero(case):
    """With two latents that can fire, the places of all others are padding."""
    sae = make(*CASES[case])
    with torch.no_grad():
        sae.b_enc.fill_(-100)
        sae.b_enc[:2] = 5
    sae.silent_tokens.zero_()
    x, target = inputs(sae, 0)
    code = copy.deepcopy(sae).encode_sparse(x)
    assert (code.values == 0).any()
    assert (code.values > 0).any()
    for name, grad in by_module(copy.deepcopy(sae), x, target).items():
        if name.endswith(("W_enc", "b_enc", "W_dec")):
            assert not grad[2:].any(), name
    before, optimizer = everything(sae), RowAdam(sae, 0.1, mode="lazy")
    train_step(sae, optimizer, x, target)
    for name in ("W_enc", "b_enc", "W_dec"):
        assert_same(getattr(sae, name)[2:], before[name][2:], name)
        assert not optimizer.row_steps(getattr(sae, name))[2:].any()


ENC, ALL = {"W_enc", "b_enc"}, {"W_enc", "b_enc", "W_dec"}
MOVES = [
    ("TopK, AuxK", "auxk", ALL | {"b_dec"}),  # by the encoder's input
    ("TopK, AuxK", "decoder_norm_l1", ALL | {"b_dec"}),
    ("transcoder", "auxk", ALL),
    ("ReLU, L1", "l1", ENC),
    ("ReLU, DecoderNormL1", "decoder_norm_l1", ALL),
    ("JumpReLU, L0", "l0_penalty", {"log_threshold"}),
    ("JumpReLU, TargetL0", "target_l0", {"log_threshold"}),
    ("JumpReLU, TargetL0", "l1", ENC | {"log_threshold"}),
    ("JumpReLU, wide", "tanh", ALL | {"log_threshold"}),
    ("JumpReLU, PreActivation", "pre_activation", ALL | {"log_threshold"}),
    ("Gated, free", "gated_aux", ENC),
    ("Gated, free", "l1", ENC),
    ("Gated, free", "reconstruction", {"W_enc", "W_dec", "b_dec", "r_mag", "b_mag"}),
    ("skip, Gated", "gated_aux", ENC),
]


@pytest.mark.parametrize(("case", "term", "moved"), MOVES, ids=str)
def test_fault_a_term_moves_what_it_claims_and_nothing_else(case, term, moved):
    """In particular AuxK's gradient reaches the encoder."""
    sae = make(*CASES[case])
    found = by_module(sae, *inputs(sae, 3))
    assert {n for n, _ in sae.named_parameters() if (found[f"{term} by {n}"].abs() > 1e-12).any()} == moved


CHANGES = [
    (TopK(3), {}, {"activation": TopK(4)}),
    (TopK(3), {}, {"subtract_b_dec": False}),
    (TopK(3), {}, {"normalization": "layer_norm"}),
    (TopK(3), {}, {"normalization": "scalar"}),
    (TopK(3), {"losses": (AUXK,)}, {"losses": ()}),
    (TopK(3), {"losses": (AUXK,)}, {"losses": (AuxK(1.0, 4, 2 * N),)}),
    (TopK(3), {"losses": (AUXK,)}, {"losses": (AuxK(0.5, 3, 2 * N),)}),
    (TopK(3), {"losses": (AUXK,)}, {"losses": (AuxK(0.5, 4, 2 * N + 1),)}),
    (TopK(3), {"losses": (DecoderNormL1(1.0),)}, {"reconstruction": "squared_error"}),
    (TopK(3), {"losses": (DecoderNormL1(1.0),)}, {"losses": (DecoderNormL1(2.0),)}),
    (TopK(3), {"losses": (DecoderNormL1(1.0),), "unit_norm_decoder": False}, {"n_sites": 2}),
    (TopK(3), {"d_out": 4}, {"skip": True}),
    (ReLU(), {"losses": (L1(1.0),)}, {"losses": (L1(2.0),)}),
    (ReLU(), {"losses": (L1(1.0),)}, {"losses": (DecoderNormL1(1.0),)}),
    (ReLU(), {"losses": (Tanh(1.0),)}, {"losses": (Tanh(1.0, 1.0),)}),
    (JUMP, {}, {"activation": JumpReLU(0.5, 0.8)}),
    (JUMP, {}, {"activation": JumpReLU(0.4, 0.4)}),
    (JUMP, {"losses": (L0(1.0),)}, {"losses": (L0(2.0),)}),
    (JUMP, {"losses": (TargetL0(1.0, 4.0),)}, {"losses": (TargetL0(1.0, 5.0),)}),
    (JUMP, {"losses": (PreActivation(1.0),)}, {"losses": (PreActivation(1.0, 2 * N),)}),
    (Gated(), {}, {"activation": Gated(2.0)}),
    (GroupMax(4), {}, {"activation": GroupMax(8)}),
    (MultiTopK(3), {}, {"activation": MultiTopK(3, weight=0.5)}),
    (MultiTopK(3), {}, {"activation": MultiTopK(3, multiple=2)}),
    (HierarchicalTopK(5), {}, {"activation": HierarchicalTopK(5, (1, 5))}),
    (HierarchicalTopK(5), {}, {"activation": TopK(5)}),
    (Matryoshka(TopK(3)), {}, {"activation": Matryoshka(TopK(3), (4, 32))}),
    (Matryoshka(TopK(3)), {}, {"activation": TopK(3)}),
    (Matryoshka(TopK(3)), {}, {"activation": Matryoshka(BatchTopK(3))}),
]


@pytest.mark.parametrize(("activation", "options", "change"), CHANGES, ids=str)
def test_fault_an_option_that_only_scales_the_loss(activation, options, change):
    """Each turns the gradient, in the fused step as well: its weights go another way."""
    directions, moved = [], []
    for more in ({}, change):
        sae = make(**{"activation": activation, "options": options} | more) if "activation" in more else (
            make(activation, options | more)
        )  # fmt: skip
        x, target = inputs(sae, 3)
        twin = copy.deepcopy(sae)
        twin.train().training_forward(x, target).loss.backward()
        grads = [p.grad for n, p in twin.named_parameters() if n != "W_skip"]
        directions.append(torch.cat([g.flatten() for g in grads if g is not None]))
        before = {n: p.detach().clone() for n, p in sae.named_parameters()}
        train_step(sae, RowAdam(sae, 1e-3, betas=(0.0, 0.0), eps=1e3), x, target)  # nearly plain descent
        steps = [(p - before[n]).detach().flatten() for n, p in sae.named_parameters() if n != "W_skip"]
        moved.append(torch.cat(steps))
    for pair in (directions, moved):
        assert torch.nn.functional.cosine_similarity(*pair, dim=0) < 1 - 1e-5
