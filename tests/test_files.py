"""Dictionaries on disk: shards, what a crash leaves, what is refused, and how much memory it takes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsae import ReLU, SAEConfig, TopK, shards
from fastsae.files import open_dictionary, write_dictionary
from fastsae.shards import Rows

M, D = 13, 5
CONFIG = SAEConfig(D, M, TopK(3))
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def bits(t):
    return t.contiguous().view(-1).view(torch.uint8)


def noise(shape, dtype=torch.float32, seed=0):
    """Any bits that the dtype can have, NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), generator=generator)
    return data.to(torch.uint8).view(dtype).view(shape)


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (M, D), "b_enc": (M,), "W_dec": (M, D), "b_dec": (D,), "norm_scale": ()}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return made | {"silent_tokens": torch.randint(9, (M,), generator=generator, dtype=torch.int32)}


def read(folder):
    """All of a dictionary's tensors, checked block by block."""
    tensors, found = open_dictionary(folder).tensors, {}
    for name in tensors.pieces:
        rows = tensors.rows(name)
        found[name] = torch.empty(rows.shape, dtype=rows.dtype)
        tensors.copy_into(name, found[name])
    return found


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, t in expected.items():
        assert (got[name].shape, got[name].dtype) == (t.shape, t.dtype), name
        assert torch.equal(bits(got[name]), bits(t)), name


@pytest.fixture(params=[2**21, 48, 1], ids=["whole", "small", "row by row"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_BYTES", request.param)


@pytest.mark.parametrize("limit", [2**30, 300, 100, 1], ids=["one", "few", "more", "a row each"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_every_dtype(tmp_path, blocks, dtype, limit):
    dtype = getattr(torch, dtype)
    tensors = {"W_enc": noise((M, D), dtype), "b_enc": noise((M,), dtype, 1), "cube": noise((M, 2, 3), dtype)}
    tensors |= {"b_dec": noise((D,), dtype), "scalar": noise((), dtype), "empty": noise((0, 4), dtype)}
    tensors |= {"narrow": noise((M, 0), dtype), "step": torch.tensor(3)}
    write_dictionary(tmp_path, CONFIG, tensors, "bfloat16", limit)
    config, weight_format, found = open_dictionary(tmp_path)
    assert (config, weight_format) == (CONFIG, "bfloat16")
    whole = {name: found.rows(name) for name in found.pieces}
    assert_same({name: r.read(0, r.shape[0] if r.shape else 1) for name, r in whole.items()}, tensors)
    for lo, hi in ((0, 0), (2, 5), (M - 1, M), (M, M)):
        assert torch.equal(bits(whole["cube"].read(lo, hi)), bits(tensors["cube"][lo:hi]))
    n_files = len(list(tmp_path.glob("*.safetensors")))
    assert n_files == (1 if limit == 2**30 else M if limit == 1 else n_files)
    assert (tmp_path / INDEX).exists() == (n_files > 1)


def test_strided_tensors_and_rows_made_on_demand(tmp_path, blocks):
    strided, asked = torch.randn(D, 2 * M).T[::2], []

    def make(lo, hi):
        asked.append((lo, hi))
        return strided[lo:hi].double()

    write_dictionary(tmp_path, CONFIG, {"W_enc": strided, "W_dec": Rows((M, D), torch.float64, make)})
    assert_same(read(tmp_path), {"W_enc": strided, "W_dec": strided.double()})
    size = max(1, shards.BLOCK_BYTES // (8 * D))
    assert asked == [(lo, min(lo + size, M)) for lo in range(0, M, size)]


@pytest.mark.parametrize("made", [torch.ones(1, D), torch.ones(M, D).double(), torch.ones(M, D + 1)])
def test_rows_of_another_shape_or_dtype_are_refused(tmp_path, made):
    with pytest.raises(ValueError, match=r"rows 0:13 of W_enc: got .*, expected \(13, 5\) in torch.float32"):
        write_dictionary(tmp_path, CONFIG, {"W_enc": Rows((M, D), torch.float32, lambda lo, hi: made)})
    with pytest.raises(ValueError, match=r"W_enc: got torch.complex64, expected one of"):
        write_dictionary(tmp_path, CONFIG, {"W_enc": torch.ones(M, D, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())


def test_one_file_is_as_safetensors_has_it(tmp_path):
    write_dictionary(tmp_path, CONFIG, weights())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", SINGLE]
    assert_same(load_file(tmp_path / SINGLE), weights())
    before = (tmp_path / SINGLE).read_bytes()
    write_dictionary(tmp_path, CONFIG, weights())
    assert (tmp_path / SINGLE).read_bytes() == before
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["format"], config["weight_format"]) == ("fastsae/1", "float32")


def test_shards_are_as_the_hub_has_them(tmp_path):
    write_dictionary(tmp_path, CONFIG, weights(), max_shard_bytes=200)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights().values())
    assert {"W_enc[0:3]", "W_dec[0:3]", "b_enc[0:3]", "b_dec", "norm_scale"} <= index["weight_map"].keys()
    files = {name: load_file(tmp_path / name) for name in sorted(set(index["weight_map"].values()))}
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", INDEX, *files}
    assert {key: name for name, tensors in files.items() for key in tensors} == index["weight_map"]
    assert all(sum(t.nbytes for t in tensors.values()) <= 200 for tensors in files.values())
    parts = [
        tensors[key] for tensors in files.values() for key in sorted(tensors) if key.startswith("W_enc[")
    ]
    assert torch.equal(torch.cat(parts), weights()["W_enc"])


def test_dictionaries_of_before_weight_formats_are_read(tmp_path):
    save_file(weights(), tmp_path / SINGLE, {"format": "fastsae/1"})
    (tmp_path / "config.json").write_text(json.dumps({"format": "fastsae/1", **CONFIG.to_dict()}))
    assert open_dictionary(tmp_path)[:2] == (CONFIG, "float32")
    assert_same(read(tmp_path), weights())


def test_a_config_edited_by_hand_holds(tmp_path):
    write_dictionary(tmp_path, CONFIG, weights())
    data = json.loads((tmp_path / "config.json").read_text())
    data["activation"]["k"] = 4
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert open_dictionary(tmp_path).config.activation == TopK(4)


# Crashes


class Crash(BaseException):
    """The power fails."""


@pytest.fixture
def crash_at(monkeypatch):
    """crash_at(k, once): the k-th thing that is done to files fails, and all later ones unless ``once``."""
    real = {(os, name): getattr(os, name) for name in ("replace", "fsync", "unlink")}
    real[shards, "to_bytes"] = shards.to_bytes

    def arm(k, once=False):
        done = 0
        for (module, name), function in real.items():

            def count(*args, name=name, function=function, **kwargs):
                nonlocal done
                done += 1
                if done == k or (done > k and not once):
                    raise Crash(name)
                return function(*args, **kwargs)

            monkeypatch.setattr(module, name, count)

    def disarm():
        for (module, name), function in real.items():
            monkeypatch.setattr(module, name, function)

    arm.off = disarm
    return arm


OLD, NEW = (CONFIG, "split32", weights(1)), (SAEConfig(D, M, ReLU()), "bfloat16", weights(2))


def save(folder, what, limit):
    config, weight_format, tensors = what
    write_dictionary(folder, config, tensors, weight_format, limit)


def which(folder):
    found, there = open_dictionary(folder), read(folder)
    for what in (OLD, NEW):
        if found[:2] == what[:2]:
            assert_same(there, what[2])  # never the weights of the other
            return what
    raise AssertionError(found)


def check_folder(folder):
    """Nothing lies there but the dictionary."""
    expected = {"config.json", SINGLE}
    if (folder / INDEX).exists():
        names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        expected = {"config.json", INDEX} | names
    assert {path.name for path in folder.iterdir()} == expected


@pytest.mark.parametrize("once", [False, True], ids=["crash", "failure"])
@pytest.mark.parametrize("new_limit", [2**30, 250], ids=["to one file", "to shards"])
@pytest.mark.parametrize("old_limit", [2**30, 200], ids=["from one file", "from shards"])
def test_whatever_fails_the_old_dictionary_or_the_new_is_whole(
    tmp_path, crash_at, old_limit, new_limit, once
):
    seen = []
    for k in range(1, 200):
        folder = tmp_path / str(k)
        save(folder, OLD, old_limit)
        crash_at(k, once)
        try:
            save(folder, NEW, new_limit)
        except Crash as crash:
            failed = str(crash)
        else:
            break
        finally:
            crash_at.off()
        seen.append(which(folder) is NEW)
        if once and failed != "unlink":  # what can't be removed stays, until the next save
            check_folder(folder)
        save(folder, NEW, new_limit)
        assert which(folder) is NEW
        check_folder(folder)
    assert k > 8
    assert seen == sorted(seen)  # once it is the new one, it stays so
    assert not seen[0]
    assert seen[-1]


def test_a_crash_in_the_first_save_leaves_nothing_or_the_new_one(tmp_path, crash_at):
    for k in range(1, 200):
        folder = tmp_path / str(k)
        crash_at(k)
        try:
            save(folder, NEW, 250)
        except Crash:
            pass
        else:
            break
        finally:
            crash_at.off()
        if (folder / "config.json").exists():
            assert which(folder) is NEW
        else:
            with pytest.raises(ValueError, match=r"config.json: got no readable file"):
                open_dictionary(folder)
        save(folder, NEW, 2**30)
        check_folder(folder)


def test_only_our_own_leftovers_are_removed(tmp_path):
    theirs = ["model-00001-of-00002.safetensors", "a.tmp", ".model.safetensors.x.tmp", "notes.txt"]
    ours = ["model-0123abcd-00001-of-00002.safetensors", f".{SINGLE}.0123abcd.tmp", ".config.json.123.tmp"]
    for name in theirs + ours:
        (tmp_path / name).touch()
    write_dictionary(tmp_path, CONFIG, weights())
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", SINGLE, *theirs}


# What is refused


def reindex(change):
    def damage(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def rename_to(name):
    return reindex(lambda index: index["weight_map"].update({"W_enc[0:3]": name}))


def reshard(change):
    """Damage that changes the tensors of the first shard."""

    def damage(folder):
        path = min(folder.glob("model-*.safetensors"))
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


def overlap(index):
    index["weight_map"]["W_enc[2:5]"] = index["weight_map"]["W_enc[3:7]"]


def first_shard(folder):
    return min(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename_to("../secret.safetensors"), r"the file '../secret.safetensors', expected the name of a"),
        (rename_to("/etc/x.safetensors"), r"index.json: got the file '/etc/x.safetensors', expected"),
        (rename_to(".."), r"index.json: got the file '..', expected"),
        (rename_to("a/b.safetensors"), r"index.json: got the file 'a/b.safetensors', expected"),
        (rename_to("model.bin"), r"index.json: got the file 'model.bin', expected"),
        (rename_to(7), r"index.json: got the file 7, expected"),
        (rename_to("other.safetensors"), r"other.safetensors: got no whole safetensors file"),
        (reindex(lambda index: index.pop("weight_map")), "index.json: got JSON of another kind, expected"),
        (reindex(lambda index: index.update(weight_map=3)), "index.json: got JSON of another kind, expected"),
        (lambda folder: (folder / INDEX).write_text("[1"), "index.json: got text that isn't JSON"),
        (lambda folder: (folder / INDEX).write_text("[" * 10**5), "index.json: got text that isn't JSON"),
        (
            reindex(lambda index: index["weight_map"].pop("W_enc[3:7]")),
            r"got W_enc\[7:11\], expected pieces of it that follow each other, here from row 3",
        ),
        (
            reindex(lambda index: index["weight_map"].pop("W_enc[11:13]")),
            r"index.json: got \d+ bytes of tensors, expected its total_size, \d+",
        ),
        (reindex(overlap), r"00002-of-00004.safetensors: got no W_enc\[2:5\], expected what model"),
        (reshard(lambda t: t.update({"W_enc[0:3]": torch.ones(4, D)})), r"got W_enc\[0:3\] \(4, 5\) in"),
        (
            reshard(lambda t: t.update({"W_enc[0:3]": torch.ones(3, D).double()})),
            r"W_enc\[3:7\] \(4, 5\) in torch.float32, expected \(4, 5\) in torch.float64",
        ),
        (reshard(lambda t: t.update({"W_enc[0:3]": torch.ones(3, D + 1)})), r"got W_enc\[3:7\] \(4, 5\)"),
        (
            lambda folder: os.truncate(first_shard(folder), 500),
            "of-00004.safetensors: got no whole safetensors",
        ),
        (lambda folder: first_shard(folder).unlink(), "00001-of-00004.safetensors: got no whole safetensors"),
        (lambda folder: first_shard(folder).write_bytes(b"\x80\x04pickle" * 99), "got no whole safetensors"),
        (
            reindex(lambda index: index["metadata"].update(config="{")),
            "index.json: got text that isn't JSON",
        ),
        (
            reindex(lambda index: index["metadata"].update(config="[]")),
            "index.json: got a config of another format",
        ),
    ],
)
def test_damaged_shards_are_refused(tmp_path, damage, message):
    write_dictionary(tmp_path, CONFIG, weights(), max_shard_bytes=200)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_dictionary(tmp_path)


def test_overlapping_pieces_are_refused(tmp_path):
    pieces = {"W_enc[0:8]": torch.ones(8, D), "W_enc[7:13]": torch.ones(6, D)}
    save_file(pieces, tmp_path / "a.safetensors")
    data = {"metadata": {"total_size": 280}, "weight_map": dict.fromkeys(pieces, "a.safetensors")}
    (tmp_path / INDEX).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"got W_enc\[7:13\], expected pieces .* from row 8"):
        shards.StoredTensors(tmp_path, "model")
    save_file(pieces | {"W_enc": torch.ones(M, D)}, tmp_path / "a.safetensors")
    data["weight_map"]["W_enc"] = "a.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"got W_enc"):
        shards.StoredTensors(tmp_path, "model")


@pytest.mark.parametrize("limit", [2**30, 200])
def test_what_is_expected_and_finite(tmp_path, limit, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 16)
    tensors = weights()
    tensors["W_dec"][-1, -1] = torch.nan
    write_dictionary(tmp_path, CONFIG, tensors, max_shard_bytes=limit)
    found = open_dictionary(tmp_path).tensors
    expected = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    found.check(expected)
    for changes, message in (
        ({"W_enc": ((M + 1, D), torch.float32)}, r"got W_enc \(13, 5\), expected \(14, 5\)"),
        ({"W_enc": ((M, D), torch.float16)}, r"got W_enc in torch.float32, expected torch.float16"),
        ({"W_skip": ((), torch.float32)}, r"got W_skip missing, expected \(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            found.check(expected | changes)
    del expected["b_dec"]
    with pytest.raises(ValueError, match=r"got b_dec \(5,\), expected no such tensor"):
        found.check(expected)
    with pytest.raises(ValueError, match="got NaN or Inf in W_dec, expected finite weights"):
        found.copy_into("W_dec", torch.empty(M, D))


# Memory

MEMORY = """
import json, sys, tempfile, threading, time
from pathlib import Path
import torch
from fastsae import SAEConfig, TopK
from fastsae.files import open_dictionary, write_dictionary
from fastsae.shards import Rows
from fastsae.training.checkpoint import load_checkpoint, save_checkpoint

M, D, KIND = 50_000, 512, sys.argv[1]
torch.set_num_threads(1)


def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def growth(work):
    done, peak, start = threading.Event(), [0], anonymous()

    def sample():
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.0005)

    thread = threading.Thread(target=sample)
    thread.start()
    work()
    done.set()
    thread.join()
    return (max(peak[0], anonymous()) - start) / (2 * M * D * 4)


def load_dictionary():
    found = open_dictionary(folder).tensors
    for name, t in there.items():
        found.copy_into(name, t)


def read_checkpoint():
    tree = load_checkpoint(path)
    for name, t in there.items():
        t.copy_(tree[name])


there = {name: torch.randn(M, D) for name in ("W_enc", "W_dec")} | {"b_dec": torch.zeros(D)}
given = {name: t if KIND == "plain" else Rows(tuple(t.shape), t.dtype, lambda lo, hi, t=t: t[lo:hi] + 1 - 1)
         for name, t in there.items()}
figures = {}
with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    # torch imports some 30 MB when first a tensor says for itself how it is copied
    small = save_checkpoint(folder / "small", 1, {"t": torch.ones(9)}, max_shard_bytes=4)
    torch.ones(9).copy_(load_checkpoint(small)["t"])
    for limit in (2**30, 30_000_000):
        figures[f"save {limit}"] = growth(
            lambda: write_dictionary(folder, SAEConfig(D, M, TopK(3)), given, max_shard_bytes=limit))
        figures[f"load {limit}"] = growth(load_dictionary)
        figures[f"save checkpoint {limit}"] = growth(
            lambda: save_checkpoint(folder, limit, there, max_shard_bytes=limit))
        path = folder / f"step-{limit:09d}" if limit < 10**9 else next(folder.glob("step-*"))
        figures[f"load checkpoint {limit}"] = growth(read_checkpoint)
figures["the method: a copy"] = growth(lambda: [t.clone() for t in there.values()])
print(json.dumps(figures))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "made"])
def test_memory_beyond_the_weights_is_a_few_blocks(kind):
    """Anonymous memory, of 205 MB of weights, that saving and loading take; what copying takes shows."""
    output = subprocess.run(
        [sys.executable, "-c", MEMORY, kind], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    figures = json.loads(output)
    assert figures.pop("the method: a copy") > 0.9
    assert max(figures.values()) < 0.2, figures
