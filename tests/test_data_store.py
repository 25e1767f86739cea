"""Activations on disk: complete or absent, and every damaged file named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastsae
from fastsae.checks import BadType, BadValue
from fastsae.data import Activations, ActivationStore, collect, open_activations
from fastsae.data.store import fetch_rows

SLOW_COLLECT = """
import sys, time, torch
from fastsae.data import collect
def chunks():
    for i in range(1000):
        yield torch.randn(64, 8)
        if i == 5:
            print("half way", flush=True)
            time.sleep(60)
collect(chunks(), sys.argv[1])
"""


def visible(folder):
    """All but the files of locks, which stay."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock"))


def chunks(n=100, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for size in (n // 2, n - n // 2):
        ids = torch.randint(0, 1000, (size,), generator=generator)
        yield Activations(torch.randn(size, d, generator=generator), ids)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trip(tmp_path, dtype):
    store = collect(chunks(), tmp_path / "a" / "store", dtype=dtype, metadata={"model": "m"})
    x = torch.cat([chunk.x for chunk in chunks()])
    ids = torch.cat([chunk.token_ids for chunk in chunks()])
    assert (store.n_tokens, store.d_in, store.dtype, len(store)) == (100, 6, dtype, 100)
    assert store.manifest["model"] == "m"
    assert torch.equal(store[:], x.to(getattr(torch, dtype)).float())
    rows = np.array([5, 99, 5, 0])
    assert torch.equal(store[rows], store[:][rows])
    assert torch.equal(store[torch.from_numpy(rows)], store[rows])
    assert store.token_ids.dtype == np.int32
    assert store.token_ids.tolist() == ids.tolist()
    store.verify()
    again = open_activations(tmp_path / "a" / "store")
    assert torch.equal(again[10:20], store[10:20])
    assert isinstance(again.array, np.memmap)
    # Other programs can read the file, and nothing else is left lying there.
    loaded = load_file(tmp_path / "a" / "store" / "activations.safetensors")["activations"]
    assert torch.equal(loaded, x.to(getattr(torch, dtype)))
    assert visible(tmp_path / "a") == ["store"]


def test_plain_tensors_and_nan(tmp_path):
    x = torch.randn(20, 3)
    x[4, 1], x[5, 2] = float("nan"), float("inf")
    store = collect(x.split(7), tmp_path / "store", dtype="float16")
    assert store.token_ids is None
    assert store[4:6].isnan().sum() == 1
    assert store[5:6].isinf().sum() == 1


def test_rows_are_integers(tmp_path):
    store = collect(chunks(), tmp_path / "store")
    mask = np.zeros(100, bool)
    mask[[3, 7]] = True
    sources = [store, store.array, store[:]]
    for bad, message in (
        (mask, r"rows: got bool \[100\], expected integers"),
        (np.array([1.0]), r"rows: got float64 \[1\], expected integers"),
    ):
        for rows in (bad, torch.from_numpy(bad)):
            with pytest.raises(BadValue, match=message + " or a slice$"):
                store[rows]
        for x in sources:
            with pytest.raises(BadValue, match=message):
                fetch_rows(x, bad)
    for x in sources:
        for row in (100, -101):
            with pytest.raises(IndexError):
                fetch_rows(x, np.array([0, row]))
        for dtype in (np.uint8, np.int32, np.uint64):
            assert torch.equal(fetch_rows(x, mask.nonzero()[0].astype(dtype)), store[:][[3, 7]])


def test_head(tmp_path):
    store = collect(chunks(), tmp_path / "store", dtype="bfloat16")
    head = store.head(30)
    assert (len(head), head.manifest["n_tokens"], head.d_in, head.dtype) == (30, 30, 6, "bfloat16")
    assert torch.equal(head[:], store[:30])
    assert head.token_ids.tolist() == store.token_ids[:30].tolist()
    assert np.shares_memory(head.array, store.array)
    head.verify()
    with pytest.raises(IndexError):
        head[np.array([30])]
    with pytest.raises(BadValue, match="n: got 101, expected an integer >= 1 and <= 100"):
        store.head(101)


def test_reads_are_copies(tmp_path):
    store = collect(chunks(), tmp_path / "store")
    store[:10].zero_()
    store[np.arange(10)].zero_()
    assert store[:10].abs().sum() > 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "chunks: got no tokens"),
        ([torch.zeros(3)], r"chunks: got torch.float32 \[3\]"),
        ([torch.zeros(3, 2, dtype=torch.int64)], "chunks: got torch.int64"),
        ([torch.zeros(3, 2), torch.zeros(3, 4)], r"expected floating \[n, 2\]"),
        ([Activations(torch.zeros(3, 2), torch.zeros(2))], "2 token ids for 3 tokens"),
        ([Activations(torch.zeros(3, 2), torch.zeros(3)), torch.zeros(1, 2)], "token ids for 3 of 4 tokens"),
        ([torch.full((2, 2), 7e4)], "dtype: got 'float16' and activations up to 7e[+]04"),
    ],
)
def test_bad_chunks_leave_nothing(tmp_path, bad, message):
    with pytest.raises(BadValue, match=message):
        collect(bad, tmp_path / "store", dtype="float16")
    assert not visible(tmp_path)


def test_bad_arguments(tmp_path):
    with pytest.raises(BadValue, match="dtype: got 'int8', expected one of"):
        collect(chunks(), tmp_path / "store", dtype="int8")
    with pytest.raises(BadType, match="chunks: got dict"):
        collect([Activations({"a": torch.zeros(1, 2)}, torch.zeros(1))], tmp_path / "store")
    collect(chunks(), tmp_path / "store")
    with pytest.raises(BadValue, match="which exists already"):
        collect(chunks(), tmp_path / "store")


def test_killed_run_leaves_no_store_and_is_cleaned_up(tmp_path):
    root = str(Path(fastsae.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW_COLLECT, str(tmp_path / "store")], env=env, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout.readline() == b"half way\n"
        collect(chunks(), tmp_path / "other")  # sweeps, but not what a living run writes
        assert visible(tmp_path) == [".store.fastsae-partial", "other"]
        os.kill(child.pid, signal.SIGKILL)
    assert not (tmp_path / "store").exists()
    assert visible(tmp_path) == [".store.fastsae-partial", "other"]
    with pytest.raises(BadValue, match=r"no manifest.json"):
        ActivationStore.open(tmp_path / "store")
    (tmp_path / ".foreign.partial").mkdir()
    (
        tmp_path / ".fourth.fastsae-partial-old"
    ).mkdir()  # died between replacing a store and removing the old one
    collect(chunks(), tmp_path / "third")  # another name: sweeps the dead run's leftovers all the same
    assert visible(tmp_path) == [".foreign.partial", "other", "third"]
    assert collect(chunks(), tmp_path / "store").n_tokens == 100


def damage_manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: os.truncate(p / "activations.safetensors", 1000), "1656 bytes are missing at its end"),
        (lambda p: os.truncate(p / "activations.safetensors", 100), "expected a whole safetensors file"),
        (lambda p: os.truncate(p / "activations.safetensors", 0), "expected a whole safetensors file"),
        (lambda p: os.truncate(p / "token_ids.safetensors", 300), "token_ids.safetensors"),
        (lambda p: (p / "token_ids.safetensors").unlink(), "which doesn't exist"),
        (lambda p: (p / "manifest.json").write_text("{"), "damaged manifest"),
        (lambda p: (p / "manifest.json").write_text("[]"), "damaged manifest"),
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
        (lambda p: damage_manifest(p, format=99), "format 99.*, expected format 1"),
        (lambda p: damage_manifest(p, n_tokens=99), "contradict its manifest.json"),
        (lambda p: damage_manifest(p, dtype="float16"), "contradict its manifest.json"),
    ],
)
def test_damaged_store(tmp_path, damage, message):
    collect(chunks(), tmp_path / "store")
    damage(tmp_path / "store")
    with pytest.raises(BadValue, match=message) as caught:
        open_activations(tmp_path / "store")
    assert str(caught.value).count("\n") == 0


def test_checksum(tmp_path):
    store = collect(chunks(), tmp_path / "store")
    with open(store.path / "activations.safetensors", "r+b") as file:
        file.seek(1000)
        file.write(b"\x01\x02\x03")
    with pytest.raises(BadValue, match="activations differ from their checksum"):
        ActivationStore.open(store.path).verify()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", ">f4"])
def test_user_npy(tmp_path, dtype):
    x = np.random.default_rng(0).normal(size=(30, 5)).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    store = open_activations(tmp_path / "x.npy")
    assert (store.n_tokens, store.d_in) == (30, 5)
    np.testing.assert_array_equal(store[np.array([3, 1])].numpy(), x[[3, 1]].astype(np.float32))
    np.testing.assert_array_equal(store[:].numpy(), x.astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_user_safetensors(tmp_path, dtype):
    x = torch.randn(30, 5).to(dtype)
    save_file({"hidden": x, "bias": torch.zeros(5)}, tmp_path / "x.safetensors", metadata={"a": "b"})
    assert torch.equal(open_activations(str(tmp_path / "x.safetensors"))[:], x.float())
    save_file({"other": torch.zeros(2, 2), "activations": x}, tmp_path / "y.safetensors")
    assert torch.equal(open_activations(tmp_path / "y.safetensors")[:], x.float())


def test_bad_user_files(tmp_path):
    np.save(tmp_path / "ints.npy", np.zeros((3, 2), np.int64))
    np.save(tmp_path / "flat.npy", np.zeros(3))
    np.save(tmp_path / "none.npy", np.zeros((0, 3)))
    np.save(tmp_path / "objects.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    np.save(tmp_path / "cut.npy", np.zeros((100, 100)))
    os.truncate(tmp_path / "cut.npy", 5000)
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "junk.npy").write_bytes(b"junk" * 10)
    np.savez(tmp_path / "archive.npz", a=np.zeros((2, 2)))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, tmp_path / "two.safetensors")
    save_file({"a": torch.zeros(2, 2, dtype=torch.int32)}, tmp_path / "ints.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "list.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    (tmp_path / "words.txt").write_text("words")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 13
    for path in [*files, tmp_path / "missing.npy", tmp_path]:
        with pytest.raises(BadValue, match=r"^activations: got .*, expected ") as caught:
            open_activations(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadType, match="activations: got int"):
        open_activations(3)
