"""The plan of a run: its arithmetic against the tensors themselves, its prediction against measured peaks."""

import importlib
import itertools
import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fastsae import SAE, AuxK, ReLU, SAEConfig, TopK, backends
from fastsae.checks import BadType, BadValue
from fastsae.formats import STATE_DTYPES, WEIGHT_FORMATS
from fastsae.optim import RowAdam
from fastsae.training import plan as planning
from fastsae.training import train_step
from fastsae.training.plan import GPUS, PARTS, Workload, check_fits, memory, plan_run

GIB = 2**30
NOTE = Workload(4096, 4096, 2**20, 64, 8192, weight_format="split32")
FORMATS = [(weights, states) for weights in WEIGHT_FORMATS for states in STATE_DTYPES]


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("sizes", [(300, 300, 40), (300, 513, 40), (1, 7, 5)], ids=str)
@pytest.mark.parametrize(("weight_format", "state_dtype"), FORMATS)
def test_weights_states_and_counters_are_those_of_the_tensors(one_thread, weight_format, state_dtype, sizes):
    d_in, d_out, m = sizes
    config = SAEConfig(d_in, m, TopK(2), d_out=d_out, normalization="scalar")
    sae = SAE(config, weight_format=weight_format)
    opt = RowAdam(sae, state_dtype=state_dtype)
    train_step(sae, opt, torch.randn(6, d_in), None if d_in == d_out else torch.randn(6, d_out))
    plan = plan_run(d_in, m, 2, 6, d_out=d_out, weight_format=weight_format, state_dtype=state_dtype)
    remainders = [t for name, t in sae.named_buffers() if name.endswith("_remainder")]
    counters = [t for name, t in sae.named_buffers() if not name.endswith("_remainder")]
    assert plan["weights_bytes"] == size([*sae.parameters(), *remainders])
    assert plan["counters_bytes"] == size(counters)
    assert plan["states_bytes"] == size(t for state in opt.state.values() for t in state.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float32_weights_are_in_the_dtype_of_activations(one_thread, dtype):
    sae = SAE(SAEConfig(5, 9, TopK(2)), dtype=getattr(torch, dtype))
    assert plan_run(5, 9, 2, 4, dtype=dtype)["weights_bytes"] == size(sae.parameters())
    wide = SAE(SAEConfig(5, 9, TopK(2)), dtype=getattr(torch, dtype), weight_format="split32")
    plan = plan_run(5, 9, 2, 4, dtype=dtype, weight_format="split32")
    assert plan["weights_bytes"] == size([*wide.parameters(), wide.W_enc_remainder, wide.W_dec_remainder])


def test_bytes_of_a_weight_and_largest_dictionaries_of_the_design():
    # bytes a weight; the largest M at D = 4096, 2304 and 768 in 140 GB
    known = {
        ("float32", "float32"): (12, 1.4e6, 2.5e6, 7.6e6),
        ("split32", "bfloat16"): (8, 2.1e6, 3.8e6, 11.4e6),
        ("split32", "int8"): (6, 2.8e6, 5.0e6, 15.1e6),
        ("bfloat16", "int8"): (4, 4.2e6, 7.5e6, 22.6e6),
        ("bfloat16", "int8_row"): (3, 5.7e6, 10.1e6, 30.2e6),
    }
    for (weights, states), (per_weight, *largest) in known.items():
        for d, m in zip((4096, 2304, 768), largest, strict=True):
            work = Workload(d, d, 2**20, 64, 8192, weight_format=weights, state_dtype=states)
            assert work.per_weight == pytest.approx(per_weight, abs=0.04)
            assert planning.largest_latents(work, 140 * 10**9) == pytest.approx(m, rel=0.05)


def test_the_largest_dictionary_is_the_last_that_fits():
    room = GPUS["h100"].memory
    found = planning.largest_latents(NOTE, room)
    assert sum(memory(replace(NOTE, latents=found), True).values()) <= room
    assert sum(memory(replace(NOTE, latents=found + 1), True).values()) > room
    assert planning.largest_latents(NOTE, GIB) == 0


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("name", ["d_in", "d_out", "latents", "k", "batch", "accumulate", "k_aux"])
def test_more_of_anything_takes_no_less(monkeypatch, name, on_gpu):
    monkeypatch.setattr(planning, "resident", lambda: GIB)
    work = Workload(64, 64, 5000, 8, 64, k_aux=4)
    sizes = [getattr(work, name) * n for n in (1, 2, 3, 8, 30, 100)]
    plans = [memory(replace(work, **{name: n}), on_gpu) for n in sizes]
    totals = [sum(plan.values()) for plan in plans]
    # a CPU's blocks of scores, whole columns of a fixed size, may be a little smaller for more tokens
    spare = 0 if on_gpu else GIB // 100
    assert all(b >= a - spare for a, b in itertools.pairwise(totals))
    assert totals[-1] > totals[0]
    for part in ("weights", "states", "counters", "tokens", "candidates"):
        assert all(b[part] >= a[part] for a, b in itertools.pairwise(plans)), part


def test_a_dense_optimizer_has_no_coasts_and_moves_every_row():
    gpu, dense = GPUS["h200"], replace(NOTE, mode="dense")
    assert memory(dense, True)["optimizer"] == 0 < memory(NOTE, True)["optimizer"]
    active = 1 - 2.718281828 ** (-8192 * 64 / 2**20)
    sparse, whole = (planning.step_ms(work, gpu)["optimizer"] for work in (NOTE, dense))
    assert sparse == pytest.approx(active * whole, rel=1e-6)
    # two matrices' 12 bytes a weight, read and written
    assert whole == pytest.approx(1e3 * 2 * 2 * 2**20 * 4096 * 12 / 4.3e12, rel=1e-3)


def test_the_time_of_a_step():
    plan = plan_run(4096, 2**20, 64, 8192, "h200", weight_format="split32")
    assert plan["encode_ms"] == pytest.approx(1e3 * 2 * 8192 * 4096 * 2**20 / 790e12, rel=1e-4)
    assert plan["select_ms"] == pytest.approx(1e3 * 8192 * 2**20 * 4 / 4.3e12, rel=1e-4)
    assert plan["decode_ms"] == pytest.approx(1e3 * 8192 * 64 * 4096 * 2 / 4.3e12, rel=1e-3)
    assert plan["backward_ms"] == pytest.approx(1e3 * 8192 * 64 * 8192 * 4 / 4.3e12, rel=1e-3)
    parts = ("encode", "select", "decode", "backward", "optimizer")
    assert plan["floor_ms"] == pytest.approx(sum(plan[f"{part}_ms"] for part in parts), abs=0.01)
    assert "not measured" in plan["assumed"]
    assert "790 TFLOP/s in bf16" in plan["assumed"]
    # fp32 factors are multiplied as such
    single = plan_run(4096, 2**20, 64, 8192, "h200")
    assert single["encode_ms"] == pytest.approx(plan["encode_ms"] * 790 / 60, rel=1e-4)
    assert "60 TFLOP/s in fp32 (no TF32)" in single["assumed"]
    half = plan_run(4096, 2**20, 64, 8192, "h200", dtype="bfloat16")
    assert half["encode_ms"] == plan["encode_ms"]
    assert half["backward_ms"] == pytest.approx(plan["backward_ms"] / 2, rel=1e-3)
    # a few tokens: reading the weights takes longer than multiplying them
    few = plan_run(4096, 2**20, 64, 8, "h200", weight_format="split32")
    assert few["encode_ms"] == pytest.approx(1e3 * 2**20 * 4096 * 2 / 4.3e12, rel=1e-3)


def test_auxk_and_accumulation_are_counted():
    plain, aux = (plan_run(768, 24_576, 32, 4096, "h100", auxk=auxk) for auxk in (False, True))
    for name in ("candidates_bytes", "workspace_bytes", "tokens_bytes", "decode_ms", "select_ms"):
        assert aux[name] > plain[name], name
    assert f"AuxK with {AuxK().resolve_k(768)} dead a token" in aux["assumed"]
    more = plan_run(768, 24_576, 32, 4096, "h100", accumulate=4)
    assert more["encode_ms"] == pytest.approx(4 * plain["encode_ms"], rel=1e-3)
    # encoder input and error of all four batches, at least
    assert more["tokens_bytes"] > plain["tokens_bytes"] + 3 * 4096 * 2 * 768 * 4
    assert more["candidates_bytes"] == plain["candidates_bytes"]


@pytest.mark.skipif(backends.available()["triton"] is not None, reason="Triton can't run here")
def test_constants_of_backend_triton():
    encode = importlib.import_module("fastsae.backends.triton.encode")  # the package's name is the operator
    from fastsae.kernels import encode as kernels
    from fastsae.kernels import row_grads, row_step

    assert (encode.ROWS, encode.ROWS * encode.CHUNK) == (planning.TRITON_ROWS, planning.TRITON_SCORES)
    assert {c.block for c in kernels.CONFIGS.values()} == {planning.TRITON_BLOCK}
    assert (row_grads.SPLIT, row_grads.CHUNKS) == (planning.TRITON_RUN, planning.TRITON_CHUNKS)
    assert {c.programs for c in row_step.ENCODER.values()} == {planning.TRITON_PROGRAMS}


def test_names_and_totals():
    plan = plan_run(64, 1000, 4, 32, "a100")
    assert plan["total_bytes"] == sum(plan[f"{part}_bytes"] for part in PARTS)
    for part in (*PARTS, "total"):
        assert plan[f"{part}_gib"] == round(plan[f"{part}_bytes"] / GIB, 3)
    assert plan["fits"] is True
    assert plan["formats"].keys() == {f"{weights}/{states}" for weights, states in planning.FORMATS}
    own = plan["formats"]["float32/float32"]
    assert own == {name: plan[name] for name in ("bytes_per_weight", "largest_latents", "fits")}
    assert plan["formats"]["bfloat16/int8_row"]["largest_latents"] > own["largest_latents"]
    on_cpu = plan_run(64, 1000, 4, 32)
    assert not {"fits", "floor_ms", "formats", "largest_latents"} & on_cpu.keys()
    assert on_cpu["process_bytes"] > 100 * 2**20


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"d_in": 0}, BadValue, "d_in: got 0, expected an integer >= 1"),
        ({"d_out": -1}, BadValue, "d_out: got -1, expected an integer >= 1"),
        ({"batch": 1.5}, BadType, "batch: got float, expected an integer"),
        ({"accumulate": 0}, BadValue, "accumulate: got 0, expected an integer >= 1"),
        ({"k": 101}, BadValue, r"k: got 101, expected an integer in 1..100 \(latents\)"),
        ({"latents": 2**31}, BadValue, "latents: got 2147483648, expected an integer in 1..2147483647"),
        ({"weight_format": "int4"}, BadValue, "weight_format: got 'int4', expected one of 'float32'"),
        ({"state_dtype": "int4"}, BadValue, "state_dtype: got 'int4', expected one of"),
        ({"mode": "eager"}, BadValue, "mode: got 'eager', expected one of 'dense', 'lazy', 'deferred'"),
        ({"dtype": "float64"}, BadValue, "dtype: got 'float64', expected one of 'float32', 'bfloat16'"),
        ({"gpu": "tpu"}, BadValue, "gpu: got 'tpu', expected one of 'h200', 'h100', 'a100'"),
        ({"auxk": 1}, BadType, "auxk: got int, expected True or False"),
    ],
)  # fmt: skip
def test_bad_input_is_named(changed, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        plan_run(**({"d_in": 8, "latents": 100, "k": 4, "batch": 16} | changed))


CONFIG = SAEConfig(4096, 2**20, TopK(64))


@pytest.mark.parametrize(
    ("room", "advice"),
    [
        (120, None),
        (60, "weight_format split32 with state_dtype int8 fits, in 49.4 GiB"),
        (40, "weight_format bfloat16 with state_dtype int8 fits, in 33.4 GiB"),
        (30, "weight_format bfloat16 with state_dtype int8_row fits, in 25.4 GiB"),
        (20, "no format of weights and states fits, only fewer latents or a smaller batch"),
    ],
)
def test_a_run_that_cannot_fit_on_a_gpu_is_told(monkeypatch, caplog, room, advice):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room * GIB, 140 * GIB))
    with caplog.at_level(logging.WARNING, logger="fastsae"):
        found = check_fits(CONFIG, 8192, device="cuda")
    assert caplog.messages == ([found] if advice else [])
    if advice is None:
        assert found is None
    else:
        assert found == f"this run needs 97.3 GiB, more than the {room} GiB that are free on cuda: {advice}"


def test_a_run_that_cannot_fit_on_a_cpu_is_told(monkeypatch, caplog):
    free = {"/proc/meminfo": 8 * GIB, "/proc/self/status": GIB}
    monkeypatch.setattr(planning, "_kibibytes", lambda file, name: free[file])
    small = SAEConfig(64, 2**20, TopK(32), losses=(AuxK(),))
    assert check_fits(small, 512) is None
    large = SAEConfig(512, 2**20, ReLU())
    found = check_fits(large, 512)
    assert (
        "more than the 8 GiB that are free on cpu: weight_format split32 with state_dtype int8 fits" in found
    )
    # what this process holds already isn't wanted a second time
    free["/proc/self/status"] = 100 * GIB
    assert check_fits(small, 512) is None
    free["/proc/meminfo"] = None
    assert check_fits(large, 512) is None
    # a format that is as small as any is told of no other
    free["/proc/meminfo"] = GIB
    found = check_fits(large, 512, weight_format="bfloat16", state_dtype="int8_row")
    assert found.endswith("no format of weights and states fits, only fewer latents or a smaller batch")


def test_free_memory_of_this_machine():
    assert planning.free_memory("cpu") > 2**26
    assert 100 * 2**20 < planning.resident() < 100 * GIB
    assert planning._kibibytes("/proc/nothing", "VmRSS") is None
    assert planning._kibibytes("/proc/self/status", "VmNothing") is None


def test_the_command(fastsae, tmp_path):
    options = (
        "--d-in", 4096, "--d-out", 1024, "--latents", 2**20, "--k", 64, "--batch", 2048, "--accumulate", 4,
        "--weight-format", "split32", "--state-dtype", "int8", "--auxk", "--mode", "lazy",
        "--dtype", "bfloat16",
    )  # fmt: skip
    code, out, err = fastsae("plan", *options, "--gpu", "h100", "--json", tmp_path / "new" / "plan.json")
    assert code == 0, err
    found = json.loads((tmp_path / "new" / "plan.json").read_text())
    expected = plan_run(
        4096, 2**20, 64, 2048, "h100", d_out=1024, accumulate=4, weight_format="split32", state_dtype="int8",
        auxk=True, mode="lazy", dtype="bfloat16",
    )  # fmt: skip
    assert found == expected
    for text in ("total_gib", "floor_ms", "not measured", "bfloat16/int8_row", "bytes a weight", "fits"):
        assert text in out
    assert "_bytes" not in out.replace("bytes_per_weight", "")
    code, out, _ = fastsae("plan", "--d-in", 64, "--latents", 1000)
    assert (code, "process_gib" in out, "floor_ms" in out) == (0, True, False)
    code, _, err = fastsae("plan", "--d-in", 64, "--latents", 1000, "--weight-format", "int3")
    assert (code, "weight_format: got 'int3', expected one of" in err) == (1, True)


def test_train_warns_before_it_builds(fastsae, monkeypatch, caplog, tmp_path):
    import numpy as np

    from fastsae.training import run

    np.save(tmp_path / "x.npy", np.zeros((100, 16), dtype=np.float32))
    monkeypatch.setattr(planning, "free_memory", lambda device: 2**20)
    built = []

    def build(config, **options):
        built.append(config.d_in)
        raise BadValue("stop here")

    monkeypatch.setattr(run, "SAE", build)
    options = ("--latents", 64, "--k", 4, "--batch-size", 8, "--device", "cpu", "--state-dtype", "bfloat16")
    with caplog.at_level(logging.WARNING, logger="fastsae"):
        code, _, _ = fastsae(
            "train", "--activations", tmp_path / "x.npy", "--out", tmp_path / "run", *options
        )
    assert (code, built) == (1, [16])
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert ["this run needs" in message for message in warned] == [True]


PEAK = """
import sys, torch
from fastsae import SAE, AuxK, SAEConfig, TopK
from fastsae.optim import RowAdam
from fastsae.training import train_step
from fastsae.training.plan import Workload, memory

weight_format, state_dtype, *sizes = sys.argv[1:]
d, m, k, n, auxk = map(int, sizes)
losses = (AuxK(dead_after=n),) if auxk else ()
k_aux = AuxK().resolve_k(d) if auxk else 0
work = Workload(d, d, m, k, n, weight_format=weight_format, state_dtype=state_dtype, k_aux=k_aux)
planned = sum(memory(work, on_gpu=False).values())
torch.manual_seed(0)
sae = SAE(SAEConfig(d, m, TopK(k), losses=losses), weight_format=weight_format)
opt = RowAdam(sae, state_dtype=state_dtype)
for _ in range(5):
    train_step(sae, opt, torch.randn(n, d))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(planned, 1024 * int(status["VmHWM"].split()[0]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weight_format", "state_dtype", "sizes"),
    [
        ("float32", "float32", (64, 2**20, 32, 512, 0)),
        ("bfloat16", "int8", (64, 2**20, 32, 512, 0)),
        ("split32", "int8", (384, 2**16, 32, 1024, 1)),
    ],
)
def test_peak_memory_is_as_planned(weight_format, state_dtype, sizes):
    command = [sys.executable, "-c", PEAK, weight_format, state_dtype, *map(str, sizes)]
    planned, peak = map(
        int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    )
    assert planned == pytest.approx(peak, rel=0.10)
