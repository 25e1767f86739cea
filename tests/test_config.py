"""Configurations: defaults, JSON, and what they refuse."""

import dataclasses
import json

import pytest

from fastsae import AuxK, BatchTopK, DecoderNormL1, JumpReLU, ReLU, SAEConfig, TopK

ACTIVATIONS = [TopK(3), BatchTopK(3), JumpReLU(0.25), ReLU()]


@pytest.mark.parametrize(
    ("activation", "d_out", "expected"),
    [  # subtract_b_dec, unit_norm_decoder, reconstruction
        (TopK(3), None, (True, True, "fvu")),
        (BatchTopK(3), None, (True, True, "fvu")),
        (JumpReLU(), None, (False, False, "squared_error")),
        (ReLU(), None, (False, False, "squared_error")),
        (TopK(3), 6, (False, False, "fvu")),
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
