"""Configurations: defaults, JSON, and what they refuse."""

import dataclasses
import json

import pytest

from fastsae import (
    L0,
    L1,
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
    policies,
)

ACTIVATIONS = [TopK(3), BatchTopK(3), JumpReLU(0.25), ReLU()]


@pytest.mark.parametrize(
    ("activation", "d_out", "expected"),
    [  # subtract_b_dec, unit_norm_decoder, reconstruction
        (TopK(3), None, (True, True, "fvu")),
        (BatchTopK(3), None, (True, True, "fvu")),
        (JumpReLU(), None, (False, False, "squared_error")),
        (ReLU(), None, (False, False, "squared_error")),
        (Gated(), None, (True, True, "squared_error")),
        (GroupMax(4), None, (True, True, "fvu")),
        (MultiTopK(3), None, (True, True, "fvu")),
        (HierarchicalTopK(3), None, (True, True, "fvu")),
        (Matryoshka(BatchTopK(3)), None, (True, True, "fvu")),
        (TopK(3), 6, (False, False, "fvu")),
        (Gated(), 6, (False, False, "squared_error")),
        (ReLU(), 6, (False, False, "squared_error")),
    ],
)
def test_defaults_follow_the_variant(activation, d_out, expected):
    config = SAEConfig(8, 20, activation, d_out=d_out)
    assert (config.subtract_b_dec, config.unit_norm_decoder, config.reconstruction) == expected
    assert config.d_out == (d_out or 8)
    assert config.losses == ()


def test_what_is_asked_for_overrides_the_default():
    config = SAEConfig(
        8, 20, ReLU(), subtract_b_dec=True, unit_norm_decoder=True, reconstruction="fvu", losses=AuxK()
    )
    assert (config.subtract_b_dec, config.unit_norm_decoder, config.reconstruction) == (True, True, "fvu")
    assert config.losses == (AuxK(),)
    assert SAEConfig(8, 20, TopK(3), losses=[AuxK()]).losses == (AuxK(),)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("losses", [(), (AuxK(1 / 16, 4, 10),), (DecoderNormL1(5), AuxK())], ids=len)
@pytest.mark.parametrize("normalization", ["none", "scalar", "layer_norm"])
def test_json_round_trip(activation, losses, normalization):
    config = SAEConfig(8, 20, activation, d_out=6, losses=losses, normalization=normalization)
    again = SAEConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    assert again == config
    assert hash(again) == hash(config)


POLICIES = [
    TopK(4),
    BatchTopK(4),
    GroupMax(4),
    JumpReLU(0.25, 0.5),
    ReLU(),
    Gated(0.5),
    MultiTopK(2, 3, 0.25),
    HierarchicalTopK(4),
    HierarchicalTopK(4, (1, 4)),
    Matryoshka(TopK(4)),
    Matryoshka(BatchTopK(4), (5, 20)),
]
TERMS = [
    AuxK(0.5, 3, 7), L1(0.5), DecoderNormL1(0.5), Tanh(0.5, 2.0), L0(0.5), TargetL0(0.5, 3.0),
    PreActivation(0.5), PreActivation(0.5, 7),
]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_json_round_trip_of_every_activation(policy):
    config = SAEConfig(8, 20, policy)
    again = SAEConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    assert again == config
    assert type(again.activation) is type(policy)
    assert hash(again) == hash(config)


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_json_round_trip_of_every_loss(term):
    config = SAEConfig(8, 20, JumpReLU(), losses=term)
    again = SAEConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    assert again == config
    assert again.losses == (term,)
    assert hash(again) == hash(config)


def test_the_round_trips_leave_nothing_out():
    assert {type(policy) for policy in POLICIES} == set(policies.Activation.__args__)
    assert {type(term) for term in TERMS} == set(policies.Loss.__args__)


@pytest.mark.parametrize(
    "options",
    [{"skip": True, "d_out": 6}, {"transcoder": True}, {"n_sites": 4}, {"normalization": "mean_norm"}],
)
def test_json_round_trip_of_structure(options):
    config = SAEConfig(8, 20, TopK(3), **options)
    assert SAEConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config


def test_a_skip_or_another_width_makes_a_transcoder():
    assert not SAEConfig(8, 20, TopK(3)).transcoder
    assert SAEConfig(8, 20, TopK(3), d_out=6).transcoder
    assert SAEConfig(8, 20, TopK(3), skip=True).transcoder
    assert SAEConfig(8, 20, TopK(3), transcoder=True).d_out == 8


def test_a_short_json_takes_the_defaults():
    data = {"d_in": 8, "n_latents": 20, "activation": {"type": "TopK", "k": 3}}
    assert SAEConfig.from_dict(data) == SAEConfig(8, 20, TopK(3))
    assert data["activation"] == {"type": "TopK", "k": 3}


def test_frozen():
    config = SAEConfig(8, 20, TopK(3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_in = 9
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.activation.k = 9
    assert dataclasses.replace(config, n_latents=30).n_latents == 30


@pytest.mark.parametrize(("d_in", "k"), [(1, 1), (2, 1), (4, 2), (64, 32), (96, 64), (384, 256), (768, 512)])
def test_k_aux_is_the_power_of_two_nearest_half_the_width(d_in, k):
    """Nearest by ratio: 48 is closer to 64, 192 to 256 and 384 to 512, than to the power below."""
    assert AuxK().resolve_k(d_in) == k
    assert AuxK(k_aux=7).resolve_k(d_in) == 7


def config_with(**change):
    return SAEConfig(**{"d_in": 8, "n_latents": 20, "activation": TopK(3)} | change)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TopK(0), ValueError, "k: got 0, expected an integer >= 1"),
        (lambda: TopK(2.5), TypeError, "k: got float, expected an integer"),
        (lambda: TopK(True), TypeError, "k: got bool, expected an integer"),
        (lambda: TopK("3"), TypeError, "k: got str, expected an integer"),
        (lambda: BatchTopK(-1), ValueError, "k: got -1, expected an integer >= 1"),
        (lambda: JumpReLU(-0.1), ValueError, "threshold: got -0.1, expected a number >= 0"),
        (lambda: JumpReLU(NAN), ValueError, "threshold: got nan, expected a number >= 0"),
        (lambda: JumpReLU(INF), ValueError, "threshold: got inf, expected a number >= 0"),
        (lambda: AuxK(-1), ValueError, "coefficient: got -1, expected a number >= 0"),
        (lambda: AuxK(coefficient=INF), ValueError, "coefficient: got inf, expected a number >= 0"),
        (lambda: AuxK(k_aux=0), ValueError, "k_aux: got 0, expected an integer >= 1"),
        (lambda: AuxK(dead_after=0), ValueError, "dead_after: got 0, expected an integer >= 1"),
        (lambda: AuxK(dead_after=1e7), TypeError, "dead_after: got float, expected an integer"),
        (lambda: DecoderNormL1("5"), TypeError, "coefficient: got str, expected a number"),
        (lambda: DecoderNormL1(NAN), ValueError, "coefficient: got nan, expected a number >= 0"),
        (lambda: DecoderNormL1(INF), ValueError, "coefficient: got inf, expected a number >= 0"),
        (lambda: config_with(d_in=0), ValueError, "d_in: got 0, expected an integer >= 1"),
        (lambda: config_with(d_in=8.0), TypeError, "d_in: got float, expected an integer"),
        (lambda: config_with(n_latents=True), TypeError, "n_latents: got bool, expected an integer"),
        (lambda: config_with(d_out=0), ValueError, "d_out: got 0, expected an integer >= 1"),
        (lambda: config_with(activation="topk"), TypeError, "activation: got str, expected TopK, BatchTopK"),
        (lambda: config_with(activation=AuxK()), TypeError, "activation: got AuxK, expected TopK, BatchTopK"),
        (lambda: config_with(activation=TopK(21)), ValueError, r"k: got 21, expected an integer in 1\.\.20"),
        (lambda: config_with(activation=BatchTopK(21)), ValueError, r"k: got 21, expected .* in 1\.\.20"),
        (lambda: config_with(losses=(TopK(1),)), TypeError, "losses: got TopK, expected loss terms such as"),
        (lambda: config_with(losses=AuxK), TypeError, "losses: got type, expected loss terms"),
        (lambda: config_with(losses=None), TypeError, "losses: got NoneType, expected loss terms"),
        (lambda: config_with(losses=(AuxK(), AuxK(1))), ValueError, "losses: got .*, expected at most one"),
        (
            lambda: config_with(normalization="batch"),
            ValueError,
            "normalization: got 'batch', expected one of",
        ),
        (lambda: config_with(reconstruction="l1"), ValueError, "reconstruction: got 'l1', expected one of"),
        (lambda: config_with(subtract_b_dec=1), TypeError, "subtract_b_dec: got int, expected True, False"),
        (
            lambda: config_with(unit_norm_decoder="yes"),
            TypeError,
            "unit_norm_decoder: got str, expected True",
        ),
        (
            lambda: config_with(d_out=6, subtract_b_dec=True),
            ValueError,
            "subtract_b_dec: got True, expected False for a transcoder",
        ),
        (lambda: JumpReLU(bandwidth=0), ValueError, "bandwidth: got 0, expected a number > 0"),
        (lambda: Gated(-1), ValueError, "aux_coefficient: got -1, expected a number >= 0"),
        (lambda: GroupMax(0), ValueError, "k: got 0, expected an integer >= 1"),
        (lambda: MultiTopK(3, 1), ValueError, "multiple: got 1, expected an integer >= 2"),
        (lambda: MultiTopK(3, 4, -1), ValueError, "weight: got -1, expected a number >= 0"),
        (lambda: HierarchicalTopK(3, (1, 2)), ValueError, r"budgets: got \(1, 2\), expected .* end with 3"),
        (lambda: HierarchicalTopK(3, (2, 1, 3)), ValueError, "budgets: got .*, expected ascending integers"),
        (lambda: HierarchicalTopK(3, (1, 1, 3)), ValueError, "budgets: got .*, expected ascending integers"),
        (lambda: HierarchicalTopK(3, ()), ValueError, "budgets: got .*, expected ascending integers"),
        (lambda: HierarchicalTopK(3, (0, 3)), ValueError, "budgets: got 0, expected an integer >= 1"),
        (lambda: HierarchicalTopK(3, 3), TypeError, "budgets: got int, expected ascending integers"),
        (lambda: Matryoshka(ReLU()), TypeError, "inner: got ReLU, expected TopK or BatchTopK"),
        (lambda: Matryoshka(TopK(3), (5, 4)), ValueError, "widths: got .*, expected ascending integers"),
        (lambda: L1(-1), ValueError, "coefficient: got -1, expected a number >= 0"),
        (lambda: L0(INF), ValueError, "coefficient: got inf, expected a number >= 0"),
        (lambda: Tanh(1, 0), ValueError, "scale: got 0, expected a number > 0"),
        (lambda: TargetL0(1, 0), ValueError, "target: got 0, expected a number > 0"),
        (lambda: PreActivation(1, 0), ValueError, "dead_after: got 0, expected an integer >= 1"),
        (
            lambda: config_with(activation=GroupMax(3)),
            ValueError,
            r"k: got 3, expected a divisor of .* \(20\)",
        ),
        (lambda: config_with(activation=GroupMax(40)), ValueError, r"k: got 40, expected .* in 1\.\.20"),
        (
            lambda: config_with(activation=MultiTopK(6)),
            ValueError,
            r"k \* multiple: got 6 x 4, expected at most 20",
        ),
        (lambda: config_with(activation=HierarchicalTopK(21)), ValueError, r"k: got 21, expected .* 1\.\.20"),
        (lambda: config_with(activation=Matryoshka(TopK(21))), ValueError, r"k: got 21, expected .* 1\.\.20"),
        (
            lambda: config_with(activation=Matryoshka(TopK(3), (5, 19))),
            ValueError,
            r"widths: got \(5, 19\), expected widths that end with 20",
        ),
        (
            lambda: config_with(activation=Gated(), losses=DecoderNormL1(1)),
            ValueError,
            "losses: got .*, expected L1 or AuxK beside Gated",
        ),
        (lambda: config_with(losses=L0(1)), ValueError, "losses: got L0.*, expected JumpReLU beside it"),
        (lambda: config_with(losses=TargetL0(1, 2)), ValueError, "losses: got TargetL0.*, expected JumpReLU"),
        (lambda: config_with(losses=PreActivation()), ValueError, "losses: got Pre.*, expected JumpReLU"),
        (
            lambda: config_with(activation=JumpReLU(), losses=(AuxK(), PreActivation())),
            ValueError,
            "losses: got .*, expected AuxK or PreActivation, not both",
        ),
        (lambda: config_with(n_sites=0), ValueError, "n_sites: got 0, expected an integer >= 1"),
        (lambda: config_with(n_sites=3), ValueError, r"d_in: got 8, expected a multiple of n_sites \(3\)"),
        (lambda: config_with(n_sites=4, d_out=6), ValueError, "d_out: got 6, expected a multiple of n_sites"),
        (
            lambda: config_with(transcoder=False, d_out=6),
            ValueError,
            r"transcoder: got False, expected True where d_out \(6\)",
        ),
        (
            lambda: config_with(skip=True, transcoder=False),
            ValueError,
            "skip: got True, expected a transcoder",
        ),
        (lambda: config_with(skip=1), TypeError, "skip: got int, expected True"),
        (lambda: config_with(transcoder=1), TypeError, "transcoder: got int, expected True"),
        (
            lambda: config_with(transcoder=True, subtract_b_dec=True),
            ValueError,
            "subtract_b_dec: got True, expected False for a transcoder",
        ),
    ],
)
def test_construction_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


def data_with(**change):
    return {**SAEConfig(8, 20, TopK(3), losses=(AuxK(),)).to_dict(), **change}


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], TypeError, "config: got list, expected a JSON object"),
        ({"d_in": 8}, ValueError, r"config: got no \['activation', 'n_latents'\], expected the keys"),
        (data_with(d_sae=3), ValueError, r"config: got unknown keys \['d_sae'\], expected keys among"),
        (data_with(activation="TopK"), TypeError, "activation: got str, expected an object such as"),
        (data_with(activation={"k": 3}), ValueError, "activation.type: got None, expected one of 'TopK'"),
        (data_with(activation={"type": "Gelu"}), ValueError, "activation.type: got 'Gelu', expected one of"),
        (data_with(activation={"type": "AuxK"}), TypeError, "activation: got AuxK, expected TopK"),
        (
            data_with(activation={"type": "TopK"}),
            TypeError,
            "activation: got .*, expected the fields of TopK",
        ),
        (
            data_with(activation={"type": "TopK", "k": "3"}),
            TypeError,
            "activation: got .*, expected the fields",
        ),
        (data_with(activation={"type": "TopK", "k": 0}), ValueError, "k: got 0, expected an integer >= 1"),
        (
            data_with(activation={"type": "TopK", "k": 3, "beta": 1}),
            ValueError,
            r"activation: got unknown keys \['beta'\], expected keys among \['k'\]",
        ),
        (data_with(losses={"type": "AuxK"}), TypeError, "losses: got dict, expected a list of loss terms"),
        (data_with(losses=["AuxK"]), TypeError, "losses: got str, expected an object such as"),
        (data_with(losses=[{"type": "TopK", "k": 1}]), TypeError, "losses: got TopK, expected loss terms"),
        (data_with(d_in="8"), TypeError, "d_in: got str, expected an integer"),
    ],
)
def test_from_dict_refuses(data, error, message):
    with pytest.raises(error, match=message):
        SAEConfig.from_dict(data)
