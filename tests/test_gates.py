"""The quality gates: what dictionaries of known features must find, and that the controls do not."""

import dataclasses

import pytest
import torch

from fastsae.benchmarks import gates, quality
from fastsae.benchmarks.gates import GATES, family_rows, gate_rows, learn
from fastsae.data import Batches
from fastsae.evaluate import SyntheticDictionary, score

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ("TopK", "control: TopK, untied, no AuxK")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in GATES]
)
def test_gates_are_passed_and_controls_fail(name):
    gate = GATES[name]
    assert gate.passed(learn(gate, seed=0)) != gate.control


@pytest.mark.slow
@pytest.mark.parametrize(
    "formats", [("split32", "int8"), ("bfloat16", "int8"), ("bfloat16", "int8_row")], ids=str
)
@pytest.mark.parametrize("name", ["TopK", "BatchTopK"])
def test_gates_are_passed_in_fewer_bytes(name, formats):
    assert GATES[name].passed(learn(GATES[name], 0, weight_format=formats[0], state_dtype=formats[1]))


def test_each_bound_of_a_gate_counts():
    truth = SyntheticDictionary(seed=0)
    found = score(truth.directions, truth, n_tokens=256)
    found = dataclasses.replace(found, mmcs=0.99, recovered=0.97, fvu=0.155, l0=3.0)
    gate = dataclasses.replace(GATES["TopK"], l0=(2.8, 3.2))
    assert gate.passed(found)
    for worse in ({"mmcs": 0.98}, {"recovered": 0.96}, {"fvu": 0.16}, {"l0": 2.7}, {"l0": 3.3}):
        assert not gate.passed(dataclasses.replace(found, **worse)), worse


def test_what_is_learned_is_not_what_it_started_with():
    """Data and dictionary from one seed: the initial weights still know nothing of the features."""
    truth = SyntheticDictionary(seed=0)
    found = learn(GATES["TopK"], seed=0, steps=1)
    assert found.mmcs < 0.4
    assert found == learn(GATES["TopK"], seed=0, steps=1)
    assert score(truth.directions, truth, n_tokens=256).mmcs == pytest.approx(1)


def test_rows_say_where_a_gate_fails(monkeypatch):
    monkeypatch.setattr(gates, "learn", lambda gate, seed: learn(gate, seed, steps=1))
    rows = list(gate_rows(seeds=[5]))
    assert [row["backend"] for row in rows] == list(GATES)
    assert [row["failed"] for row in rows] == [not gate.control for gate in GATES.values()]
    assert {row["seed"] for row in rows} == {5}
    assert all(0 < row["mmcs"] < 0.6 and row["seconds"] > 0 for row in rows)


def test_every_family_is_trained_on_the_same_batches(monkeypatch, small_activations):
    orders: list[list[float]] = []
    real = Batches.__iter__

    def watch(self):
        nonlocal orders
        mine: list[float] = []
        for batch in real(self):
            if isinstance(batch, dict):
                mine.append(next(iter(batch.values())).sum().item())
                orders += [mine] if len(mine) == 1 else []
            yield batch

    monkeypatch.setattr(Batches, "__iter__", watch)
    rows = list(family_rows())
    assert [row["backend"] for row in rows] == list(gates.FAMILIES)
    assert all(0 < row["fvu"] < 10 and 0 <= row["dead_share"] <= 1 and row["l0"] > 0 for row in rows)
    assert len(orders) == len(rows)
    assert all(order == orders[0] and len(order) == 4 for order in orders)


@pytest.fixture
def small_activations(monkeypatch, tmp_path):
    """The demo, but of 64 random tokens and 48 latents."""
    from safetensors.torch import save_file

    from fastsae.data import open_activations

    save_file(
        {"x": torch.randn(96, 12, generator=torch.Generator().manual_seed(0))}, tmp_path / "x.safetensors"
    )
    store = open_activations(tmp_path / "x.safetensors")
    monkeypatch.setattr(quality, "cached_activations", lambda *args, **options: store)
    small = {"tokens": 64, "batch_size": 16, "latents": 64, "k": 4}
    monkeypatch.setattr(gates, "DEMO", gates.DEMO | small)
