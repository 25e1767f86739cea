"""Batches of rows: every row once a pass, described by a few integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastsae.checks import BadType, BadValue
from fastsae.data import Batches, collect, split_rows

N, D = 103, 4


@pytest.fixture(params=["tensor", "array", "store"])
def x(request, tmp_path):
    tensor = torch.arange(N, dtype=torch.float32)[:, None].expand(N, D).contiguous()
    if request.param == "tensor":
        return tensor
    return tensor.numpy() if request.param == "array" else collect([tensor], tmp_path / "store")


def numbers(batches):
    return torch.cat([batch[:, 0] for batch in batches]).long()


def test_one_pass(x):
    batches = list(Batches(x, 10, drop_last=False))
    assert [len(batch) for batch in batches] == [10] * 10 + [3]
    assert all(batch.dtype == torch.float32 and batch.shape[1] == D for batch in batches)
    assert sorted(numbers(batches).tolist()) == list(range(N))
    assert len(Batches(x, 10, drop_last=False)) == 11
    assert len(list(Batches(x, 10))) == len(Batches(x, 10)) == 10


def test_in_order(x):
    assert numbers(Batches(x, 10, shuffle=False, drop_last=False)).tolist() == list(range(N))


def test_several_passes(x):
    batches = Batches(x, 10, n_tokens=3 * N, drop_last=False)
    seen = numbers(batches)
    assert len(seen) == 3 * N
    passes = seen.view(3, N)
    assert all(sorted(one.tolist()) == list(range(N)) for one in passes)
    assert not torch.equal(passes[0], passes[1])
    assert torch.equal(numbers(batches), seen)  # again: the same


def test_batch_longer_than_the_data():
    seen = numbers(Batches(torch.arange(5.0)[:, None], 12, n_tokens=24))
    assert torch.bincount(seen).tolist() == [5, 5, 5, 5, 4] or torch.bincount(seen).sum() == 24


def test_rows_and_seed(x):
    train, held_out = split_rows(N, 20, seed=1)
    seen = numbers(Batches(x, 7, rows=train, drop_last=False))
    assert sorted(seen.tolist()) == sorted(train.tolist())
    assert not set(seen.tolist()) & set(held_out.tolist())
    assert torch.equal(seen, numbers(Batches(x, 7, rows=torch.from_numpy(train), drop_last=False)))
    assert not torch.equal(seen, numbers(Batches(x, 7, rows=train, drop_last=False, seed=1)))


@pytest.mark.parametrize("steps", [0, 3, 10, 11, 24, 30])
def test_resume_is_exact(x, steps):
    expected = list(Batches(x, 10, seed=5, n_tokens=300))
    first = Batches(x, 10, seed=5, n_tokens=300)
    batches = iter(first)
    done = [next(batches) for _ in range(steps)]
    state = first.state_dict()
    assert all(type(value) is int for value in state.values())
    second = Batches(x, 10, seed=5, n_tokens=300)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert torch.equal(numbers(done + list(second)), numbers(expected))


def test_state_of_other_batches(x):
    state = Batches(x, 10, seed=5).state_dict()
    with pytest.raises(BadValue, match="state: got seed 5 and 103 rows, expected seed 6"):
        Batches(x, 10, seed=6).load_state_dict(state)


def test_several_by_name_give_the_same_rows(x):
    double = torch.arange(N, dtype=torch.float32)[:, None] * 2
    train, _ = split_rows(N, 20, seed=1)
    options = {"rows": train, "seed": 5, "n_tokens": 300, "drop_last": False}
    expected = list(Batches(x, 10, **options))
    first = Batches({"x": x, "double": double}, 10, **options)
    assert len(first) == len(expected) == 30
    batches = iter(first)
    done = [next(batches) for _ in range(11)]
    second = Batches({"x": x, "double": double}, 10, **options)
    second.load_state_dict(first.state_dict())
    assert first.state_dict() == Batches(x, 10, **options).state_dict() | {"pass": 1, "position": 27}
    got = done + list(second)
    assert all([*batch] == ["x", "double"] and batch["double"].shape == (10, 1) for batch in got)
    assert torch.equal(numbers([batch["x"] for batch in got]), numbers(expected))
    assert torch.equal(numbers([batch["double"] for batch in got]), 2 * numbers(expected))


def test_low_precision_comes_as_float32(tmp_path):
    tensor = torch.randn(50, 3)
    for dtype in ("float16", "bfloat16"):
        store = collect([tensor], tmp_path / dtype, dtype=dtype)
        (batch,) = Batches(store, 50, shuffle=False)
        assert torch.equal(batch, tensor.to(getattr(torch, dtype)).float())


def test_split_rows():
    train, held_out = split_rows(1000, 100, seed=0)
    assert (len(train), len(held_out)) == (900, 100)
    assert sorted([*train, *held_out]) == list(range(1000))
    assert not np.array_equal(train, np.sort(train))
    assert np.array_equal(held_out, split_rows(1000, 100, seed=0)[1])
    assert not np.array_equal(held_out, split_rows(1000, 100, seed=1)[1])
    assert len(split_rows(10, 0, seed=0)[1]) == 0
    with pytest.raises(BadValue, match="held_out: got 10"):
        split_rows(10, 10, seed=0)


def test_bad_arguments():
    x = torch.zeros(10, 2)
    with pytest.raises(BadValue, match="batch_size: got 11, expected at most the 10 tokens"):
        Batches(x, 11)
    with pytest.raises(BadValue, match="rows: got rows 3 to 10"):
        Batches(x, 1, rows=[3, 10])
    with pytest.raises(BadValue, match="rows: got float64"):
        Batches(x, 1, rows=[0.5])
    with pytest.raises(BadValue, match="x: got"):
        Batches(x[0], 1)
    with pytest.raises(BadType, match="x: got list"):
        Batches([[1.0]], 1)
    with pytest.raises(BadValue, match="x: got 10 rows for 'a', 9 rows for 'b', expected as many rows"):
        Batches({"a": x, "b": x[1:]}, 1)
    with pytest.raises(BadValue, match="x: got an empty mapping, expected as many rows"):
        Batches({}, 1)
    with pytest.raises(BadType, match="x: got dict, expected an ActivationStore"):
        Batches({"a": {"b": x}}, 1)
