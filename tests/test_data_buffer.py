"""The shuffle buffer: every token once, seeded, resumable to the bit."""

from __future__ import annotations

import pytest
import torch

from fastsae.checks import BadType, BadValue
from fastsae.data import Activations, ShuffleBuffer


def stream(sizes, d=3):
    """Chunks of numbered tokens: row i is [i, i, ...]."""
    total = sum(sizes)
    return list(torch.arange(total, dtype=torch.float32)[:, None].expand(total, d).split(list(sizes)))


def numbers(batches):
    return torch.cat([batch[:, 0] for batch in batches]).long()


class Source:
    """A source that knows its place."""

    def __init__(self, chunks):
        self.chunks, self.at, self.start, self.read = chunks, 0, 0, 0

    def __iter__(self):
        self.at, self.start = self.start, 0
        while self.at < len(self.chunks):
            self.at += 1
            self.read += 1
            yield self.chunks[self.at - 1]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.start = state["at"]


@pytest.mark.parametrize("sizes", [[7] * 40, [100], [1000, 1, 0, 3], [5], [64], [32, 32]])
@pytest.mark.parametrize("size", [16, 64])
def test_every_token_once(sizes, size):
    batches = list(ShuffleBuffer(stream(sizes), 8, size=size, drop_last=False))
    assert sorted(numbers(batches).tolist()) == list(range(sum(sizes)))
    assert all(len(batch) == 8 for batch in batches[:-1])


def test_last_batch_dropped():
    batches = list(ShuffleBuffer(stream([100]), 8, size=16))
    assert len(batches) == 12
    assert len(numbers(batches).unique()) == 96


def test_empty_source():
    assert list(ShuffleBuffer([], 4, size=8)) == []


def test_mixes_over_the_whole_buffer():
    first = numbers(list(ShuffleBuffer(stream([10] * 400), 100, size=1000))[:5])
    assert first.max() > 900  # the first half of what comes out is from all of the first 1000 tokens
    assert first.max() < 1000
    assert (first.diff() == 1).float().mean() < 0.05


def test_memory_is_bounded():
    buffer = ShuffleBuffer(stream([10] * 400), 100, size=1000)
    for _ in buffer:
        assert buffer._pool["x"].shape == (1000, 3)
        assert sum(map(len, buffer._pending.values())) <= 10


def test_seed():
    def run(seed):
        return numbers(ShuffleBuffer(stream([50] * 4), 10, size=100, seed=seed))

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_each_pass_in_another_order():
    buffer = ShuffleBuffer(stream([50] * 4), 10, size=100)
    first, second = numbers(buffer), numbers(buffer)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)


@pytest.mark.parametrize("steps", [0, 1, 4, 7, 20, 31, 33])
@pytest.mark.parametrize("stateful", [False, True])
def test_resume_is_exact(steps, stateful):
    sizes = [13] * 25
    make = (lambda: Source(stream(sizes))) if stateful else (lambda: stream(sizes))
    whole = ShuffleBuffer(make(), 10, size=50, seed=3, drop_last=False)
    expected = list(whole)
    expected_next_pass = list(whole)

    first = ShuffleBuffer(make(), 10, size=50, seed=3, drop_last=False)
    batches = iter(first)
    done = [next(batches) for _ in range(steps)]
    state = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in first.state_dict().items()}
    assert all(isinstance(value, (torch.Tensor, int, str)) for value in state.values())
    list(batches)  # what the dying run still does must not matter

    second = ShuffleBuffer(make(), 10, size=50, seed=99, drop_last=False)
    second.load_state_dict(state)
    rest = list(second)
    assert len(done + rest) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(done + rest, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(second, expected_next_pass, strict=True))
    if stateful:
        assert second.source.read == 2 * 25 - state["chunks"]  # no chunk read twice


def test_state_of_another_buffer():
    state = ShuffleBuffer(stream([5]), 2, size=8).state_dict()
    with pytest.raises(BadValue, match="state: got size 8, expected size 16"):
        ShuffleBuffer(stream([5]), 2, size=16).load_state_dict(state)


def test_several_hooks_stay_aligned():
    chunks = [{"a.b": x, "c": x.repeat(1, 2) + 0.5} for x in stream([10] * 10)]
    buffer = ShuffleBuffer(chunks, 7, size=30, drop_last=False)
    batches = iter(buffer)
    seen = [next(batches) for _ in range(5)]
    state = buffer.state_dict()
    resumed = ShuffleBuffer(chunks, 7, size=30, drop_last=False)
    resumed.load_state_dict(state)
    seen += list(resumed)
    assert all(torch.equal(batch["a.b"][:, 0] + 0.5, batch["c"][:, 5]) for batch in seen)
    assert sorted(numbers([batch["a.b"] for batch in seen]).tolist()) == list(range(100))


def test_activations_and_dtypes():
    x = stream([20])[0].bfloat16()
    (batch,) = ShuffleBuffer([Activations(x, torch.arange(20))], 20, size=40)
    assert batch.dtype == torch.bfloat16
    assert torch.equal(batch[:, 0].sort().values, x[:, 0])


def test_nan_goes_through():
    x = stream([20])[0].clone()
    x[3] = float("nan")
    (batch,) = ShuffleBuffer([x], 20, size=40)
    assert batch.isnan().all(1).sum() == 1


def test_bad_arguments():
    with pytest.raises(BadValue, match="size"):
        ShuffleBuffer([], 10, size=19)
    with pytest.raises(BadValue, match="batch_size"):
        ShuffleBuffer([], 0)
    with pytest.raises(BadValue, match=r"source: got a chunk \[4\]"):
        list(ShuffleBuffer([torch.zeros(4)], 1, size=4))
    with pytest.raises(BadValue, match=r"source: got a chunk \[4, 2\], expected \[n, 3\]"):
        list(ShuffleBuffer([torch.zeros(4, 3), torch.zeros(4, 2)], 1, size=9))
    with pytest.raises(BadType, match="source: got list"):
        list(ShuffleBuffer([[1.0]], 1, size=4))
    with pytest.raises(BadValue, match="same number of tokens for each of a, b"):
        list(ShuffleBuffer([{"a": torch.zeros(4, 3), "b": torch.zeros(5, 3)}], 1, size=9))
