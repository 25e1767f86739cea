"""Ours against the classes of the same name in other libraries: codes, reconstructions, losses, gradients.

Each peer gets seeded random weights, which are copied to ours, and both take the same batch, in fp64. Where
definitions differ, coefficients are translated exactly; what can't be translated is written out as ``extra``,
the terms that a peer's loss has and ours lacks, and the sum must then agree. `make test-peers` installs the
peers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from fastsae import (
    L0,
    L1,
    SAE,
    AuxK,
    BatchTopK,
    DecoderNormL1,
    Gated,
    GroupMax,
    JumpReLU,
    Matryoshka,
    MultiTopK,
    PreActivation,
    ReLU,
    SAEConfig,
    Tanh,
    TargetL0,
    TopK,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # sae_lens imports transformer_lens.utils, whose own warning of its new name this is
    pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning"),
]

D, M, N, K = 8, 40, 24, 4
BANDWIDTH, TARGET, C, ALPHA = 0.5, 5.0, 0.7, 4.0
WIDTHS = (5, 15, M)
DEAD = torch.arange(3, 13)
SQUARED = {"reconstruction": "squared_error"}
EXACT, SINGLE = 1e-12, 1e-6
"""Relative differences: of fp64, and where a peer computes a part in fp32."""

NAMES = {
    "W_enc": "W_enc", "encoder.weight": "W_enc", "b_enc": "b_enc", "encoder.bias": "b_enc", "b_gate": "b_enc",
    "gate_bias": "b_enc", "W_dec": "W_dec", "decoder.weight": "W_dec", "b_dec": "b_dec", "bias": "b_dec",
    "decoder_bias": "b_dec", "decoder.bias": "b_dec", "r_mag": "r_mag", "b_mag": "b_mag", "mag_bias": "b_mag",
    "threshold": "log_threshold", "W_skip": "W_skip",
}  # fmt: skip
"""The peers' parameters and ours."""
TRANSPOSED = {"W_enc", "decoder.weight"}


@pytest.fixture
def sae_lens():
    return pytest.importorskip("sae_lens")


@pytest.fixture
def trainers():
    """The modules of dictionary_learning's trainers."""
    pytest.importorskip("dictionary_learning")
    # it changes torch, so that torch.compile breaks for others
    pytest.importorskip("nnsight").DEFAULT_PATCHER.__exit__(None, None, None)
    return lambda name: pytest.importorskip(f"dictionary_learning.trainers.{name}")


@pytest.fixture
def sparsify(monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    return pytest.importorskip("sparsify")


@dataclass(frozen=True)
class Case:
    """A peer and what ours is called.

    factor: their loss is so many times ours.
    extra: (sae, x) to what their loss has besides; a term that only has a gradient less its own value.
    few: only so few latents are dead that AuxK is scaled down.
    """

    peer: str
    options: dict[str, Any]
    activation: Any
    losses: tuple = ()
    config: dict[str, Any] = field(default_factory=dict)
    factor: float = 1.0
    extra: Callable[[SAE, torch.Tensor], torch.Tensor] | None = None
    few: bool = False


def data(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def pair(peer, config):
    """The peer in fp64 with random weights, and ours with the same ones.

    Rules that fix the number of active latents get such biases that every pre-activation is positive.
    """
    peer = peer.double()
    for place, (name, p) in enumerate(peer.named_parameters()):
        ours = NAMES[name]
        p.copy_(0.4 * data(*p.shape, seed=10 + place))
        if ours == "log_threshold":
            p.copy_(0.3 + p.abs())
        elif ours == "b_enc" and hasattr(config.activation, "k"):
            p.add_(8)
        elif ours == "W_dec" and config.unit_norm_decoder:
            p.div_(p.norm(dim=0 if name in TRANSPOSED else 1, keepdim=True))
    sae = SAE(config, dtype=torch.float64)
    parameters = dict(sae.named_parameters())
    for name, p in peer.named_parameters():
        mine = parameters.pop(NAMES[name])
        mine.copy_(p.T if name in TRANSPOSED else p.double().log() if name == "threshold" else p)
    assert not parameters
    return peer, sae


def close(name, got, expected, tolerance=EXACT):
    got, expected = got.detach(), expected.detach()
    assert got.shape == expected.shape, name
    size = max(float(expected.abs().max()), 1e-300)
    error = float((got - expected).abs().max()) / size
    assert error <= tolerance, f"{name}: a relative difference of {error:.2g}, at most {tolerance:g} expected"


def gradients(peer):
    """By our names and in our shapes; of log theta, theta times theta's."""
    found = {}
    for name, p in peer.named_parameters():
        if p.grad is not None:
            grad = p.grad.T if name in TRANSPOSED else p.grad.double() * p if name == "threshold" else p.grad
            found[NAMES[name]] = grad.double()
    return found


def assert_same_step(sae, ours, peer, theirs, tolerance=EXACT, without=()):
    """The loss and the gradient of every parameter, those ``without`` one at the peer aside."""
    close("loss", ours, theirs.double(), tolerance)
    ours.backward()
    theirs.backward()
    expected = gradients(peer)
    assert expected.keys() == dict(sae.named_parameters()).keys() - set(without)
    for name, grad in expected.items():
        # SAELens keeps its thresholds, and so their gradients, in fp32
        single = name == "log_threshold" and peer.threshold.dtype == torch.float32
        close(f"gradient of {name}", getattr(sae, name).grad, grad, max(tolerance, SINGLE * single))


def assert_same_forward(sae, peer, x):
    code = peer.encode(x)
    close("code", sae.encode(x), code)
    close("decode", sae.decode(sae.encode_sparse(x)), peer.decode(code))
    close("decode of a dense code", sae.decode(code), peer.decode(code))
    assert 0 < (code != 0).sum() < code.numel()


def kill(sae, dead):
    sae.silent_tokens[dead] = AuxK().dead_after


def auxk(coefficient, **options):
    return AuxK(coefficient, k_aux=D // 2, **options)


# SAELens: squared errors summed over D, mean over tokens; AuxK without a normaliser


def gated_decoder_moves(sae, x):
    """SAELens lets the auxiliary reconstruction move the decoder, which the paper freezes, and weighs the L1
    by rows' lengths: they are 1, with a gradient along the rows, which our unit-norm constraint takes out."""
    pi = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu().detach()
    moved = (pi @ sae.W_dec + sae.b_dec - x).square().sum(1).mean()
    moved = moved + C * (pi * sae.W_dec.norm(dim=1)).sum(1).mean()
    return moved - moved.detach()


def spread_of_l0(sae, x):
    """SAELens averages the squares of tokens' distances from the target, we square that of the mean: the
    variance of L0 over tokens is on top."""
    found = sae.encode_normalised(x, None, None)
    l0 = x.new_zeros(N + 1).index_add(0, found.code.rows().long(), found.active)[:N]
    return C * 2 / TARGET * (l0 - l0.mean()).square().mean()


_TOPK = {"k": K, "aux_loss_coefficient": C}
_STE = {"jumprelu_bandwidth": BANDWIDTH, "l0_coefficient": C}
_JUMP = JumpReLU(bandwidth=BANDWIDTH)
_CENTRED = {"subtract_b_dec": True}
LENS = {
    "standard": Case(
        "StandardTrainingSAE", {"l1_coefficient": C}, ReLU(), (DecoderNormL1(C),), _CENTRED
    ),
    "standard, not centred": Case(
        "StandardTrainingSAE", {"l1_coefficient": C, "apply_b_dec_to_input": False},
        ReLU(), (DecoderNormL1(C),),
    ),
    "topk": Case("TopKTrainingSAE", _TOPK, TopK(K), (auxk(C),), SQUARED),
    "topk, few dead": Case("TopKTrainingSAE", _TOPK, TopK(K), (auxk(C),), SQUARED, few=True),
    # selection by activation times row length, whose gradient cancels: at length 1 the same
    "topk by rows' lengths": Case(
        "TopKTrainingSAE", {**_TOPK, "rescale_acts_by_decoder_norm": False}, TopK(K), (auxk(C),), SQUARED
    ),
    "batchtopk": Case("BatchTopKTrainingSAE", _TOPK, BatchTopK(K), (auxk(C),), SQUARED),
    # the sum over prefixes, where ours is the mean
    "matryoshka": Case(
        "MatryoshkaBatchTopKTrainingSAE", {**_TOPK, "matryoshka_widths": list(WIDTHS)},
        Matryoshka(BatchTopK(K), WIDTHS), (auxk(C / len(WIDTHS)),), SQUARED, factor=len(WIDTHS),
    ),
    "jumprelu": Case("JumpReLUTrainingSAE", _STE, _JUMP, (L0(C),), _CENTRED),
    "jumprelu, not centred": Case(
        "JumpReLUTrainingSAE", {**_STE, "apply_b_dec_to_input": False}, _JUMP, (L0(C),)
    ),
    # SAELens' pre-activation loss is of dead latents only, which is ours with dead_after
    "jumprelu, tanh": Case(
        "JumpReLUTrainingSAE",
        {
            **_STE, "jumprelu_sparsity_loss_mode": "tanh", "jumprelu_tanh_scale": 3.0,
            "pre_act_loss_coefficient": 0.1,
        },
        _JUMP, (Tanh(C, scale=3.0), PreActivation(0.1, dead_after=AuxK().dead_after)), _CENTRED,
    ),
    "jumprelu, target": Case(
        "JumpReLUTrainingSAE", {**_STE, "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": TARGET},
        _JUMP, (TargetL0(2 * TARGET * C, TARGET),), _CENTRED, extra=spread_of_l0,
    ),
    "gated": Case("GatedTrainingSAE", {"l1_coefficient": C}, Gated(), (L1(C),), extra=gated_decoder_moves),
}  # fmt: skip
LENS_TERMS = {
    "auxk": "auxiliary_reconstruction_loss", "gated_aux": "auxiliary_reconstruction_loss", "l1": "l1_loss",
    "decoder_norm_l1": "l1_loss", "l0_penalty": "l0_loss", "target_l0": "l0_loss", "tanh": "l0_loss",
    "pre_activation": "pre_act_loss",
}  # fmt: skip


def lens_step(sae_lens, peer, x, dead):
    coefficients = {name: getattr(c, "value", c) for name, c in peer.get_coefficients().items()}
    mask = torch.zeros(M, dtype=torch.bool).index_fill(0, dead, True)
    module = pytest.importorskip("sae_lens.saes.sae")
    return peer.training_forward_pass(module.TrainStepInput(x, coefficients, mask, 0, False))


def lens_pair(sae_lens, case):
    config = getattr(sae_lens, f"{case.peer}Config")(d_in=D, d_sae=M, dtype="float64", **case.options)
    ours = SAEConfig(D, M, case.activation, losses=case.losses, **case.config)
    return pair(getattr(sae_lens, case.peer)(config), ours)


@pytest.mark.parametrize("name", LENS)
def test_sae_lens_trains_alike(sae_lens, name):
    case, x = LENS[name], data(N, D)
    peer, sae = lens_pair(sae_lens, case)
    dead = DEAD[:2] if case.few else DEAD
    kill(sae, dead)
    assert_same_forward(sae, peer, x)
    theirs, ours = lens_step(sae_lens, peer, x, dead), sae.training_forward(x)
    close("reconstruction", sae.decode(ours.code), theirs.sae_out)
    squares = torch.stack([t for term, t in theirs.losses.items() if "mse" in term]).sum()
    close("reconstruction loss", case.factor * ours.losses.pop("reconstruction"), squares)
    extra = 0 if case.extra is None else case.extra(sae, x)
    for term, loss in ours.losses.items():
        more = extra if term == "target_l0" else 0  # the one extra that has a value
        close(term, case.factor * loss + more, theirs.losses[LENS_TERMS[term]])
    assert_same_step(sae, case.factor * ours.loss + extra, peer, theirs.loss)


def test_sae_lens_auxk_lets_negative_activations_through(sae_lens):
    # its AuxK takes pre-activations as they are, where the paper's code is the dictionary's, after the ReLU
    peer, sae = lens_pair(sae_lens, LENS["topk"])
    x, k = data(N, D), D // 2
    with torch.no_grad():
        for bias in (peer.b_enc, sae.b_enc):
            bias[DEAD] -= 20
    kill(sae, DEAD)
    theirs, ours = lens_step(sae_lens, peer, x, DEAD), sae.training_forward(x)
    missed = (x - sae.decode(ours.code)).detach()
    close("auxk without ReLU'd entries", ours.losses["auxk"], C * missed.square().sum(1).mean())
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)[:, DEAD]
    chosen = pre.topk(k).indices
    z = torch.zeros_like(pre).scatter(1, chosen, pre.gather(1, chosen))
    through = C * (missed - z @ sae.W_dec[DEAD]).square().sum(1).mean()
    assert (z <= 0).all()
    assert_same_step(sae, ours.losses["reconstruction"] + through, peer, theirs.loss)


def test_sae_lens_pre_activation_loss_is_of_dead_latents_only(sae_lens):
    # Anthropic's, and ours without dead_after, is of all latents
    case = LENS["jumprelu, tanh"]
    peer, sae = lens_pair(sae_lens, replace(case, losses=(PreActivation(0.1),)))
    x = data(N, D)
    ours = sae.training_forward(x).losses["pre_activation"]
    assert lens_step(sae_lens, peer, x, DEAD[:0]).losses["pre_act_loss"] == 0
    close("of all", ours, lens_step(sae_lens, peer, x, torch.arange(M)).losses["pre_act_loss"])
    assert ours > 0


def test_sae_lens_can_pass_thresholds_gradient_to_the_encoder(sae_lens):
    # an option (Anthropic's training) that ours lacks: to each pre-activation minus its threshold's gradient
    case = replace(LENS["jumprelu, not centred"], losses=(L0(C),))
    case = replace(case, options={**case.options, "jumprelu_ste_to_input": True})
    peer, sae = lens_pair(sae_lens, case)
    x = data(N, D)
    sae.training_forward(x).loss.backward()
    lens_step(sae_lens, peer, x, DEAD[:0]).loss.backward()
    by_theta = sae.log_threshold.grad / sae.threshold
    close("b_enc", sae.b_enc.grad - by_theta, peer.b_enc.grad)
    close("W_dec", sae.W_dec.grad, peer.W_dec.grad)
    close("b_dec", sae.b_dec.grad, peer.b_dec.grad)
    close("threshold", by_theta, peer.threshold.grad.double(), SINGLE)


@pytest.mark.parametrize(
    ("name", "options", "activation", "config"),
    [
        ("StandardSAE", {}, ReLU(), _CENTRED),
        ("StandardSAE", {"apply_b_dec_to_input": False}, ReLU(), {}),
        ("TopKSAE", {"k": K}, TopK(K), {}),
        ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}, TopK(K), {}),
        ("JumpReLUSAE", {"apply_b_dec_to_input": False}, JumpReLU(), {}),
        ("GatedSAE", {}, Gated(), {}),
        ("Transcoder", {}, ReLU(), {}),
        ("SkipTranscoder", {}, ReLU(), {"skip": True}),
        ("JumpReLUTranscoder", {}, JumpReLU(), {}),
        ("JumpReLUSkipTranscoder", {}, JumpReLU(), {"skip": True}),
    ],
    ids=str,
)
def test_sae_lens_infers_alike(sae_lens, name, options, activation, config):
    module = pytest.importorskip("sae_lens.saes.transcoder") if "Transcoder" in name else sae_lens
    width = {"d_out": D + 3, "apply_b_dec_to_input": False} if "Transcoder" in name else {}
    cfg = getattr(module, f"{name}Config")(d_in=D, d_sae=M, dtype="float64", **options, **width)
    config = {"d_out": D + 3, "transcoder": True, **config} if width else config
    peer, sae = pair(getattr(module, name)(cfg), SAEConfig(D, M, activation, **SQUARED, **config))
    x, target = data(N, D), data(N, D + 3, seed=2) if width else None
    if "Skip" in name:
        code = peer.encode(x)
        close("code", sae.encode(x), code)
        close("decode", sae.decode(code), peer.decode(code))
    else:
        assert_same_forward(sae, peer, x)
    close("reconstruction", sae(x), peer(x))
    if name == "GatedSAE":
        return  # its training class has a loss of its own
    # these classes have no loss: the squared error, whose gradient has none for thresholds, which only mask
    theirs = (peer(x) - (x if target is None else target)).square().sum(1).mean()
    without = ["log_threshold"] if "JumpReLU" in name else []
    assert_same_step(sae, sae.training_forward(x, target).loss, peer, theirs, without=without)


def test_sae_lens_layer_norm_is_undone_without_its_eps(sae_lens):
    config = sae_lens.TopKSAEConfig(D, M, dtype="float64", k=K, normalize_activations="layer_norm")
    peer, sae = pair(sae_lens.TopKSAE(config), SAEConfig(D, M, TopK(K), normalization="layer_norm"))
    x = 3 * data(N, D) + 1
    close("code", sae.encode(x), peer.encode(x))
    std, mean = x.std(1, keepdim=True), x.mean(1, keepdim=True)
    close("reconstruction", (sae(x) - mean) / (std + 1e-5) * std + mean, peer(x))


# dictionary_learning: squared errors too; AuxK over the residual's variance, without min(n_dead / k_aux, 1)


def lower_half_of_the_band(sae, x):
    """dictionary_learning's L0 looks at JumpReLU's output, the paper's at its input: what is in the band but
    below the threshold is 0 there and doesn't pull."""
    pre, theta = x @ sae.W_enc.T + sae.b_enc, sae.log_threshold.exp()
    below = ((pre <= theta) & (pre > theta - BANDWIDTH / 2)).sum(0)
    slope = 2 * C / TARGET * ((pre > theta).sum(1).double().mean() / TARGET - 1)
    missing = slope / (BANDWIDTH * N) * (theta * below).sum()
    return (missing - missing.detach()).sum()


def lengths_squared(sae, x):
    """AutoEncoderNew multiplies activations by the rows' lengths, and so does the trainer again."""
    lengths, code = sae.W_dec.norm(dim=1), sae.encode(x)
    return C * (code * (lengths.square() - lengths)).sum(1).mean()


_RATE = {"steps": 10, "warmup_steps": 1, "layer": 0, "lm_name": ""}
_L1 = {"l1_penalty": C, "sparsity_warmup_steps": None}
_AUX = {"k": K, "auxk_alpha": ALPHA}
DICTIONARY = {
    "standard.StandardTrainer": Case(
        "AutoEncoder", _L1, ReLU(), (L1(C),), {**_CENTRED, "unit_norm_decoder": True}
    ),
    "standard.StandardTrainerAprilUpdate": Case("AutoEncoder", _L1, ReLU(), (DecoderNormL1(C),), _CENTRED),
    "standard.StandardTrainerAprilUpdate, new": Case(
        "AutoEncoderNew", _L1, ReLU(), (DecoderNormL1(C),), extra=lengths_squared
    ),
    "gdm.GatedSAETrainer": Case("GatedAutoEncoder", _L1, Gated(), (L1(C),)),
    "jumprelu.JumpReluTrainer": Case(
        "JumpReluAutoEncoder",
        {"bandwidth": BANDWIDTH, "sparsity_penalty": C, "sparsity_warmup_steps": None, "target_l0": TARGET},
        _JUMP, (TargetL0(C, TARGET),), extra=lower_half_of_the_band,
    ),
    "top_k.TopKTrainer": Case("AutoEncoderTopK", _AUX, TopK(K), (auxk(ALPHA),), SQUARED),
    "top_k.TopKTrainer, few dead": Case("AutoEncoderTopK", _AUX, TopK(K), (auxk(ALPHA),), SQUARED, few=True),
    "batch_top_k.BatchTopKTrainer": Case("BatchTopKSAE", _AUX, BatchTopK(K), (auxk(ALPHA),), SQUARED),
    # the mean of terms that have been divided by their number already
    "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer": Case(
        "MatryoshkaBatchTopKSAE", {**_AUX, "group_fractions": [0.125, 0.25, 0.625]},
        Matryoshka(BatchTopK(K), WIDTHS), (auxk(ALPHA * len(WIDTHS)),), SQUARED, factor=1 / len(WIDTHS),
    ),
}  # fmt: skip


def dictionary_trainer(trainers, name, case):
    module, cls = name.split(",")[0].split(".")
    options = {**_RATE, **case.options}
    if "standard" in name:
        options["dict_class"] = getattr(pytest.importorskip("dictionary_learning.dictionary"), case.peer)
    trainer = getattr(trainers(module), cls)(activation_dim=D, dict_size=M, device="cpu", **options)
    assert type(trainer.ae).__name__ == case.peer
    return trainer


@pytest.mark.parametrize("name", DICTIONARY)
def test_dictionary_learning_trains_alike(trainers, name):
    case, x, live = DICTIONARY[name], data(N, D), {}
    trainer = dictionary_trainer(trainers, name, case)
    peer, sae = pair(trainer.ae, SAEConfig(D, M, case.activation, losses=case.losses, **case.config))
    if hasattr(case.activation, "k"):
        live = {} if case.activation.rule == "topk" else {"use_threshold": False}  # unset as yet
        # it counts this batch before it looks for the dead, and we after: to it what fires here is alive
        fired = (peer.encode(x, **live) != 0).any(0)
        dead = (~fired).nonzero().flatten()[: 2 if case.few else None]
        error = (x - peer.decode(peer.encode(x, **live))).detach()
        share = min(len(dead) / (D // 2), 1)
        variance = (error - error.mean(0)).square().sum(1).mean()
        case = replace(case, losses=(auxk(case.losses[0].coefficient / float(variance) / share),))
        sae.config = replace(sae.config, losses=case.losses)
        kill(sae, dead)
        trainer.num_tokens_since_fired[dead] = trainer.dead_feature_threshold
        trainer.num_tokens_since_fired[fired] = trainer.dead_feature_threshold
        assert len(dead) == 2 if case.few else len(dead) >= D // 2
    code = peer.encode(x, **live)
    close("code", sae.encode(x), code)
    close("decode", sae.decode(sae.encode_sparse(x)), peer.decode(code))
    logged = trainer.loss(x, step=0, logging=True)
    ours = sae.training_forward(x)
    close("reconstruction", sae.decode(ours.code), logged[1])
    terms = logged.losses
    squares = terms["mse_loss" if "mse_loss" in terms else "l2_loss"]  # "l2_loss" beside it isn't squared
    assert float(case.factor * ours.losses["reconstruction"].detach()) == pytest.approx(squares, rel=1e-6)
    if "auxk_loss" in terms:
        mine = float(case.factor * ours.losses["auxk"].detach())
        assert mine == pytest.approx(ALPHA * terms["auxk_loss"], rel=1e-6)
        assert mine > 0
    extra = 0 if case.extra is None else case.extra(sae, x)
    # AuxK, and the mean L0, are made in fp32
    tolerance = SINGLE if "auxk_loss" in terms or "jumprelu" in name else EXACT
    assert_same_step(sae, case.factor * ours.loss + extra, peer, trainer.loss(x, step=0), tolerance)


# sparsify: the fraction of variance unexplained; auxk_loss and multi_topk_fvu come without their coefficients


def sparsify_pair(sparsify, activation, options, **config):
    cfg = sparsify.SparseCoderConfig(num_latents=M, k=K, **options)
    return pair(sparsify.SparseCoder(D, cfg, dtype=torch.float64), SAEConfig(D, M, activation, **config))


@pytest.mark.parametrize("activation", [TopK(K), GroupMax(K)], ids=str)
@pytest.mark.parametrize("kind", ["autoencoder", "transcoder", "skip"])
def test_sparsify_trains_alike(sparsify, activation, kind):
    options = {} if kind == "autoencoder" else {"transcode": True, "skip_connection": kind == "skip"}
    config = {} if kind == "autoencoder" else {"transcoder": True, "skip": kind == "skip"}
    peer, sae = sparsify_pair(sparsify, activation, {**options, "activation": activation.rule}, **config)
    x, target = data(N, D), None if kind == "autoencoder" else data(N, D, seed=2)
    encoded, code = peer.encode(x), sae.encode_sparse(x)
    dense = torch.zeros_like(encoded.pre_acts).scatter(1, encoded.top_indices, encoded.top_acts)
    close("code", code.to_dense(), dense)
    close("decode", sae.decode(code), peer.decode(encoded.top_acts, encoded.top_indices))
    theirs, ours = peer(x, target), sae.training_forward(x, target)
    close("reconstruction", ours.x_hat, theirs.sae_out)
    assert_same_step(sae, ours.loss, peer, theirs.fvu)


@pytest.mark.parametrize("dead", [DEAD, DEAD[:2], DEAD[:0]], ids=len)
def test_sparsify_auxk_gives_the_encoder_no_gradient(sparsify, dead):
    # its encoder's backward drops the gradient of pre-activations, from which AuxK is made
    peer, sae = sparsify_pair(sparsify, TopK(K), {}, losses=(auxk(ALPHA),))
    kill(sae, dead)
    x, mask = data(N, D), torch.zeros(M, dtype=torch.bool).index_fill(0, dead, True)
    theirs, ours = peer(x, dead_mask=mask), sae.training_forward(x)
    close("auxk", ours.losses["auxk"], ALPHA * theirs.auxk_loss)
    without = -ours.losses["auxk"]
    if len(dead):
        pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)[:, dead].relu().detach()
        k = min(D // 2, len(dead))
        z = torch.zeros_like(pre).scatter(1, pre.topk(k).indices, pre.topk(k).values)
        missed = (x - ours.x_hat).detach() - z @ sae.W_dec[dead]
        share = min(len(dead) / (D // 2), 1)
        without = without + ALPHA * share * missed.square().sum() / (x - x.mean(0)).square().sum()
    assert_same_step(sae, ours.loss + without, peer, theirs.fvu + ALPHA * theirs.auxk_loss)


def test_sparsify_multi_topk_gives_the_encoder_no_gradient(sparsify):
    # as AuxK. Its trainer adds an eighth of the term
    peer, sae = sparsify_pair(sparsify, MultiTopK(K), {"multi_topk": True})
    x = data(N, D)
    out, ours = peer(x), sae.training_forward(x).loss
    theirs = out.fvu + out.multi_topk_fvu / 8
    scores = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()

    def fvu(scores, k):
        z = torch.zeros_like(scores).scatter(1, scores.topk(k).indices, scores.topk(k).values)
        return (z @ sae.W_dec + sae.b_dec - x).square().sum() / (x - x.mean(0)).square().sum()

    extra = (fvu(scores.detach(), 4 * K) - fvu(scores, 4 * K)) / 8
    assert_same_step(sae, ours + extra, peer, theirs)


def test_sparsify_moves_latents_that_are_not_active(sparsify):
    # where fewer than k are positive it fills up with zeros, to which its encoder's backward gives a gradient
    peer, sae = sparsify_pair(sparsify, TopK(K), {})
    x = data(N, D)
    with torch.no_grad():
        for bias in (peer.encoder.bias, sae.b_enc):
            bias.sub_(9)
    out, ours = peer(x), sae.training_forward(x)
    assert (out.latent_acts == 0).any()
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).gather(1, out.latent_indices)
    filled = torch.where(out.latent_acts == 0, pre - pre.detach(), 0)
    pull = 2 * (ours.x_hat - x).detach() / (x - x.mean(0)).square().sum()
    slopes = (sae.W_dec.detach()[out.latent_indices] * pull[:, None]).sum(2)
    assert_same_step(sae, ours.loss + (filled * slopes).sum(), peer, out.fvu)


# What frames a step


def test_sparsify_and_dictionary_learning_project_gradients_alike(sparsify, trainers):
    peer, sae = sparsify_pair(sparsify, TopK(K), {})
    x = data(N, D)
    peer(x).fvu.backward()
    sae.training_forward(x).loss.backward()
    raw = peer.W_dec.grad.clone()
    peer.remove_gradient_parallel_to_decoder_directions()
    sae.constrain_gradients_()
    close("sparsify", sae.W_dec.grad, peer.W_dec.grad)
    project = trainers("trainer").remove_gradient_parallel_to_decoder_directions
    # it adds 1e-6 to lengths
    close("dictionary_learning", sae.W_dec.grad, project(peer.W_dec.detach().T, raw.T, D, M).T, 1e-5)


def test_batch_topk_thresholds(sae_lens, trainers):
    """All follow the smallest positive kept value, at first by taking it as it is, SAELens a hundredth of it
    (it starts at 0). Decays differ after that: 0.999, SAELens 0.99, ours what SAE.count_firing_ says."""
    x = data(N, D)
    lens, sae = lens_pair(sae_lens, LENS["batchtopk"])
    smallest = sae.train().encode_sparse(x).values.min()
    sae.training_forward(x)
    lens_step(sae_lens, lens, x, DEAD[:0])
    close("SAELens", lens.topk_threshold, 0.01 * smallest.detach())
    name = "batch_top_k.BatchTopKTrainer"
    trainer = dictionary_trainer(trainers, name, DICTIONARY[name])
    trainer.threshold_start_step = -1
    peer, again = pair(trainer.ae, SAEConfig(D, M, BatchTopK(K), **SQUARED))
    trainer.loss(x, step=0)
    again.training_forward(x)
    close("dictionary_learning", again.threshold.double(), peer.threshold.double(), 1e-6)
    code = peer.encode(x + 0.1)  # by the threshold
    close("code", again.eval().encode(x + 0.1), code)
    close("code of the exported JumpReLU", again.as_jump_relu().encode(x + 0.1), code)
    inference = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(D, M, dtype="float64"))
    state = {name: t.clone() for name, t in lens.state_dict().items()}
    state["topk_threshold"].fill_(sae.threshold.item())
    lens.process_state_dict_for_saving_inference(state)
    inference.load_state_dict(state)
    close("SAELens' exported code", sae.eval().encode(x + 0.1), inference.encode(x + 0.1))


def test_inputs_are_scaled_alike(sae_lens, trainers, capfd):
    x = 3 * data(N, D) + 1
    scaler = pytest.importorskip("sae_lens.training.activation_scaler").ActivationScaler()
    scaler.estimate_scaling_factor(D, iter([x]), 1)
    norm = pytest.importorskip("dictionary_learning.training").get_norm_factor([x], steps=1)
    for kind, theirs in (("mean_norm", scaler.scaling_factor), ("unit_scalar", 1 / norm)):
        sae = SAE(SAEConfig(D, M, TopK(K), normalization=kind), dtype=torch.float64).calibrate_(x)
        assert float(sae.norm_scale) == pytest.approx(float(theirs), rel=1e-6)
