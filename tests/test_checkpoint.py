"""Checkpoints of any size: every bit, shards, and tensors that lie in several files."""

import copy
import os

import pytest
import torch
from torch import nn

from fastsae import shards
from fastsae.optim import RowAdam
from fastsae.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def noise(shape, dtype):
    """Any bits that the dtype can have, NaN among them."""
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize))
    return data.to(torch.uint8).view(dtype).view(shape)


def assert_bits(got, expected):
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    copied = torch.empty_like(expected).copy_(got)
    assert torch.equal(copied.view(-1).view(torch.uint8), expected.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize("limit", [2**30, 500, 90, 1])
@pytest.mark.parametrize("block", [2**21, 48, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_every_dtype(tmp_path, monkeypatch, dtype, block, limit):
    monkeypatch.setattr(shards, "BLOCK_BYTES", block)
    dtype = getattr(torch, dtype)
    shapes = [(13, 5), (31,), (7, 2, 3), (), (0, 4), (4, 0), (1, 9)]
    tree = {"tensors": [noise(shape, dtype) for shape in shapes], "other": {3: [1, None, "x"]}}
    tree["strided"] = noise((5, 26), dtype).T[::2]
    got = load_checkpoint(save_checkpoint(tmp_path, 1, tree, max_shard_bytes=limit))
    assert got["other"] == tree["other"]
    for there, t in zip([*got["tensors"], got["strided"]], [*tree["tensors"], tree["strided"]], strict=True):
        assert_bits(there, t.contiguous())
    files = list((tmp_path / "step-000000001").glob("*.safetensors"))
    assert (len(files) == 1) == (limit >= 213 * dtype.itemsize)
    sizes = [sum(t.nbytes for t in shards._map_file(path)[0].values()) for path in files]
    assert max(sizes) <= max(limit, 9 * dtype.itemsize)  # or the longest row


@pytest.fixture
def split(tmp_path):
    """A tensor in four files, and itself."""
    t = torch.randn(20, 6)
    path = save_checkpoint(tmp_path, 1, {"t": t}, max_shard_bytes=6 * 6 * 4)
    assert len(list(path.glob("*.safetensors"))) == 4
    return load_checkpoint(path)["t"], t


def test_a_split_tensor_is_one_to_its_user(split):
    got, t = split
    assert (got.shape, got.dtype, got.device, len(got)) == (t.shape, t.dtype, t.device, 20)
    assert torch.equal(got, t)
    assert torch.equal(got[3:9] + 1, t[3:9] + 1)
    assert torch.equal(copy.deepcopy(got), t)
    for made in (got.to("cpu", copy=True), got.double(), got.to(torch.bfloat16), got.clone(), got.detach()):
        assert type(made) is torch.Tensor
        assert torch.equal(made, t.to(made.dtype))
    assert torch.equal(torch.zeros(20, 6, dtype=torch.float64).copy_(got), t.double())


def test_a_split_tensor_is_copied_without_being_joined(split, monkeypatch):
    got, t = split

    def cat(*args, **kwargs):
        raise AssertionError("joined")

    monkeypatch.setattr(torch, "cat", cat)
    layer = nn.Linear(6, 20, bias=False)
    layer.load_state_dict({"weight": got})
    assert torch.equal(layer.weight, t)
    assert torch.equal(got.to("cpu", torch.float64), t.double())


def test_modules_and_optimizers_load_from_shards(tmp_path):
    def make():
        layer = nn.Linear(8, 50)
        opt = RowAdam([layer.weight, layer.bias], lr=0.1)
        layer(torch.randn(4, 8)).square().sum().backward()
        opt.step()
        return layer, opt

    layer, opt = make()
    tree = {"layer": dict(layer.state_dict()), "opt": opt.state_dict()}
    tree = load_checkpoint(save_checkpoint(tmp_path, 1, tree, max_shard_bytes=200))
    for again, its in (make(), (nn.Linear(8, 50), None)):  # states that are there, and none yet
        its = its or RowAdam([again.weight, again.bias])
        again.load_state_dict(tree["layer"])
        its.load_state_dict(tree["opt"])
        assert torch.equal(again.weight, layer.weight)
        for p, q in zip(layer.parameters(), again.parameters(), strict=True):
            for name, t in opt.state[p].items():
                assert_bits(its.state[q][name], t)
                assert type(its.state[q][name]) is torch.Tensor


def test_what_is_loaded_can_be_changed_and_the_file_stays(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"a": torch.ones(100)})
    load_checkpoint(path)["a"].zero_()
    assert load_checkpoint(path)["a"].sum() == 100


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: min(path.glob("*.safetensors")).unlink(),
        lambda path: os.truncate(max(path.glob("*.safetensors")), 120),
        lambda path: (path / "state.safetensors.index.json").unlink(),
        lambda path: (path / "state.json").unlink(),
        lambda path: (path / "state.json").write_text("[]"),
        lambda path: (path / "state.json").write_text('{"tensor": "/b"}'),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    path = save_checkpoint(tmp_path, 1, {"a": torch.ones(100)}, max_shard_bytes=100)
    load_checkpoint(path)
    damage(path)
    with pytest.raises(ValueError, match=r"step-000000001: got a checkpoint .* delete it to resume from"):
        load_checkpoint(path)


@pytest.mark.parametrize("limit", [2**30, 100])
def test_an_interrupted_save_leaves_the_older_checkpoint(tmp_path, monkeypatch, limit):
    save_checkpoint(tmp_path, 1, {"a": torch.ones(100)})
    for name in ("fsync", "replace"):
        real, left = getattr(os, name), 100
        for k in range(100):
            left = k

            def fail(*args, real=real):
                nonlocal left
                left -= 1
                if left < 0:
                    raise OSError("no space left on device")
                return real(*args)

            monkeypatch.setattr(os, name, fail)
            try:
                save_checkpoint(tmp_path, 2, {"a": torch.zeros(100)}, max_shard_bytes=limit)
            except OSError:
                monkeypatch.setattr(os, name, real)
            else:
                break
            found = latest_checkpoint(tmp_path)
            assert load_checkpoint(found)["a"].sum() == (100 if found.name == "step-000000001" else 0)
        monkeypatch.setattr(os, name, real)
        assert load_checkpoint(latest_checkpoint(tmp_path))["a"].sum() == 0
        assert not [path for path in latest_checkpoint(tmp_path).iterdir() if path.name.startswith(".")]
        for path in tmp_path.glob("step-000000002/*"):
            path.unlink()
        (tmp_path / "step-000000002").rmdir()
