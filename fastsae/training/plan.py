"""What a training run needs, by arithmetic from its sizes: bytes by part, a step's time by the roofline."""

from __future__ import annotations

import logging
import math
import resource
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastsae.backends.torch import BLOCK_ELEMENTS as OPERATOR_BLOCK
from fastsae.backends.torch import BLOCK_SCORES, BLOCK_WEIGHTS, GROUP, MAX_TOKENS, MIN_COLUMNS
from fastsae.checks import check_choice, check_number, check_type, reject
from fastsae.config import SAEConfig
from fastsae.formats import BLOCK, STATE_DTYPES, WEIGHT_FORMATS
from fastsae.optim.row_adam import BLOCK_ELEMENTS, GRAPH_STEPS
from fastsae.policies import AuxK

__all__ = ["FORMATS", "GPUS", "PARTS", "Gpu", "Workload", "check_fits", "memory", "plan_run", "step_ms"]

_log = logging.getLogger("fastsae")

FORMATS = (
    ("float32", "float32"),
    ("float32", "int8"),
    ("split32", "float32"),
    ("split32", "bfloat16"),
    ("split32", "int8"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "int8"),
    ("bfloat16", "int8_row"),
)
"""Weight formats and state dtypes that plans compare."""
SMALLER = (("split32", "int8"), ("bfloat16", "int8"), ("bfloat16", "int8_row"))
"""What to change to where memory is short: what costs the training least comes first."""
PARTS = ("weights", "states", "counters", "candidates", "workspace", "optimizer", "tokens", "process")

_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
_MODES = ("dense", "lazy", "deferred")
_MOST_LATENTS = 2**31 - 1  # indices of a code are int32

FIRST_STEP = 28 * 2**20
"""Pages of torch's libraries that only a first step touches, 25 MB, and what its threads and oneDNN keep, 2-4
(measured with torch on x86, 2 threads, 2026-11)."""
CUDA_CONTEXT = 2**29
"""An assumption: context, loaded kernels and cuBLAS's workspace of a process on a GPU, not measured here."""

MOST_MAPPED = 2**25
"""glibc's malloc leaves twice the largest block that it freed, up to this size, with the process (mallopt(3),
M_TRIM_THRESHOLD): measured peaks hold 15 to 75 MB more than live tensors do (2026-11)."""

TRITON_SCORES = 8192 * 8448
"""fp32 scores that backend triton holds at a time (its ROWS * CHUNK)."""
TRITON_ROWS = 8192
"""Tokens it scores at a time (its ROWS)."""
TRITON_BLOCK = 256
"""Columns that its append kernel takes at a time."""
TRITON_RUN, TRITON_CHUNKS = 256, 2048
"""Entries of a latent that it sums in one go, and chunks of longer runs (SPLIT and CHUNKS of row_grads)."""
TRITON_PROGRAMS = 2048
"""Partial sums of the pre-bias's gradient."""


class Gpu(NamedTuple):
    """Memory in bytes; FLOP/s of GEMMs with bf16 or fp16, and with fp32 factors; bytes/s; their source."""

    memory: int
    half: float
    single: float
    bandwidth: float
    source: str


GPUS = {
    "h200": Gpu(
        139 * 2**30, 790e12, 60e12, 4.3e12,
        "bf16 and bandwidth as measured with a large GEMM and copy, fp32 90 % of the datasheet's 67 TFLOP/s",
    ),
    "h100": Gpu(
        79 * 2**30, 790e12, 60e12, 3.0e12,
        "bf16 as measured on an H200, the same chip; 90 % of the datasheet's 67 TFLOP/s fp32 and 3.35 TB/s",
    ),
    "a100": Gpu(
        79 * 2**30, 280e12, 17.5e12, 1.8e12,
        "90 % of the datasheet's 312 and 19.5 TFLOP/s and 2.0 TB/s",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """What memory and time of a training run depend on.

    Args:
        d_in, d_out, latents, k: of the dictionary; k is of TopK or BatchTopK.
        batch, accumulate: tokens a batch, batches a step.
        weight_format, state_dtype, mode: see :class:`fastsae.SAE` and :class:`fastsae.optim.RowAdam`.
        k_aux: dead latents a token of AuxK, 0 without it; counted as if enough latents were dead.
        dtype: of activations, and of "float32" weights: "float32", "bfloat16" or "float16".

    Raises:
        ValueError, TypeError: a size below 1, k > latents, or a name that there isn't.
    """

    d_in: int
    d_out: int
    latents: int
    k: int
    batch: int
    accumulate: int = 1
    weight_format: str = "float32"
    state_dtype: str = "float32"
    k_aux: int = 0
    mode: str = "deferred"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("d_in", "d_out", "latents", "k", "batch", "accumulate"):
            check_number(name, getattr(self, name), integer=True, low=1)
        check_number("k_aux", self.k_aux, integer=True, low=0)
        if self.latents > _MOST_LATENTS:
            reject("latents", self.latents, f"an integer in 1..{_MOST_LATENTS}")
        if self.k > self.latents:
            reject("k", self.k, f"an integer in 1..{self.latents} (latents)")
        check_choice("weight_format", self.weight_format, WEIGHT_FORMATS)
        check_choice("state_dtype", self.state_dtype, STATE_DTYPES)
        check_choice("mode", self.mode, _MODES)
        check_choice("dtype", self.dtype, _DTYPES)

    @property
    def item(self) -> int:
        """Bytes of a number of the activations."""
        return _DTYPES[self.dtype]

    @property
    def plane(self) -> int:
        """Bytes a weight of what is multiplied: the remainders of split32 aren't."""
        return self.item if self.weight_format == "float32" else 2

    @property
    def weight_bytes(self) -> int:
        """(M d_in + M d_out) b + (M + d_out) c:  b = 4 or the dtype's for float32, 4 for split32, 2 for
        bfloat16; biases in c = 4 bytes, or float32's as its weights."""
        stored = {"float32": self.item, "split32": 4, "bfloat16": 2}[self.weight_format]
        bias = self.item if self.weight_format == "float32" else 4
        return self.latents * (self.d_in + self.d_out) * stored + (self.latents + self.d_out) * bias

    @property
    def state_bytes(self) -> int:
        """Moments of both matrices as ``state_dtype`` has them, of biases in fp32, and when each row was last
        up to date, 4 bytes. Of a row of width d:

            float32  8 d;   bfloat16  4 d;   int8  2 d + 2 ceil(d / 256);   int8_row  d + ceil(d / 256) + 4
        """

        def moments(d: int) -> int:
            codes = d + -(-d // BLOCK)
            return {"float32": 8 * d, "bfloat16": 4 * d, "int8": 2 * codes, "int8_row": codes + 4}[
                self.state_dtype
            ]

        matrices = moments(self.d_in) + moments(self.d_out) + 2 * 4
        return self.latents * matrices + (self.latents + self.d_out) * (8 + 4)

    @property
    def counter_bytes(self) -> int:
        """When each latent last fired, int32; tokens_seen and norm_scale."""
        return 4 * self.latents + 8 + 4

    @property
    def per_weight(self) -> float:
        """Bytes of weights and states for each entry of the two matrices."""
        return (self.weight_bytes + self.state_bytes) / (self.latents * (self.d_in + self.d_out))

    @property
    def entries(self) -> int:
        """Places in the code of a step's tokens."""
        return self.accumulate * self.batch * (min(self.k, self.latents) + min(self.k_aux, self.latents))

    @property
    def active(self) -> float:
        """Rows of each matrix that a step updates: M (1 - exp(-entries / M)), latents firing evenly."""
        return self.latents * (1 if self.mode == "dense" else -math.expm1(-self.entries / self.latents))


def memory(work: Workload, on_gpu: bool) -> dict[str, int]:
    """Bytes by part at a training step's peak; on a CPU of backend torch, on a GPU of triton.

        weights, states, counters   exactly what the tensors of SAE and RowAdam take
        candidates                  lists of the scores that may be among a token's best
        workspace                   blocks of scores; the code and its transpose; what has a number a latent
        optimizer                   the table of coasts; a CPU's blocks of rows that are updated
        tokens                      input, error and copies of them; all batches' of a step are kept
        process                     Python with torch and fastsae: on a CPU what this very process holds now,
                                    and FIRST_STEP; on a GPU CUDA_CONTEXT

    Parts that aren't alive at one time are added up all the same, for allocators keep what was freed. Not in
    it: checkpoints, activations held in memory, evaluation.
    """
    of_device = _on_gpu(work) if on_gpu else _on_cpu(work)
    fixed = {"weights": work.weight_bytes, "states": work.state_bytes, "counters": work.counter_bytes}
    parts = fixed | of_device | {"tokens": _tokens(work, on_gpu)}
    parts["process"] = CUDA_CONTEXT if on_gpu else resident() + FIRST_STEP
    return {name: parts[name] for name in PARTS}


def _on_cpu(work: Workload) -> dict[str, int]:
    m, n, wide = work.latents, min(work.batch, MAX_TOKENS), max(work.d_in, work.d_out)
    columns = max(MIN_COLUMNS, min(BLOCK_SCORES // n, BLOCK_WEIGHTS // work.d_in) // GROUP * GROUP, work.k)
    columns = min(m, columns)
    scores = n * columns * 4
    freed = 2 * min(n * columns * 4, MOST_MAPPED)  # what malloc keeps on top of the heap
    # narrow weights are upcast and a subset's are gathered: a block of them
    copied = columns * work.d_in * 4 * (work.plane < 4 or work.k_aux > 0)
    kept = max(work.k, work.k_aux)
    rows = min(m if work.mode == "dense" else work.entries, m, max(1, BLOCK_ELEMENTS // wide))
    block = max(rows * wide, min(OPERATOR_BLOCK, work.entries * wide)) * 4
    return {
        # values, columns, and their order where lists are cut back to k
        "candidates": n * (4 * kept + 64) * (4 + 4 + 8 + 8),
        # transpose and backward, as profiled (2026-11); dead latents [M] bool, with AuxK their ids
        "workspace": scores + freed + copied + 60 * work.entries + m * (10 if work.k_aux else 1),
        # three groups' coasts; a block of rows, see _row_blocks
        "optimizer": 3 * 256 * 8 + math.ceil(block * _row_blocks(work)),
    }


def _row_blocks(work: Workload) -> float:
    """fp32 copies of a block of rows that an update on a CPU holds at a time.

    Gradient, its part across the row, weight, two moments, a temporary; bits for stochastic rounding and what
    becomes of them; codes are padded to whole blocks of 256 columns. As profiled (2026-11).
    """
    wide = max(work.d_in, work.d_out)
    padded = -(-wide // BLOCK) * BLOCK / wide
    extra = {"float32": 0.0, "bfloat16": 5.0}.get(work.state_dtype, 5.5 + 2 * padded)
    return 6 + extra + (work.weight_format != "float32")


def _on_gpu(work: Workload) -> dict[str, int]:
    m, n = work.latents, min(work.batch, TRITON_ROWS)
    columns = min(m, TRITON_SCORES // n // 128 * 128 or TRITON_SCORES // TRITON_ROWS)
    capacity = 0
    for k in filter(None, (work.k, work.k_aux)):
        capacity += 1 << (max(4 * k if k <= 256 else 2 * k, k + TRITON_BLOCK) - 1).bit_length()
    slots = 2 * min(TRITON_CHUNKS, -(-work.entries // TRITON_RUN))
    sums = slots * (work.d_in + work.d_out + 2) + min(TRITON_PROGRAMS, m) * work.d_in
    # db and last_step's copy; dead and fired latents; in mode dense the place of every row
    per_latent = 4 + 4 + (2 if work.k_aux else 1) + (24 if work.mode == "dense" else 0)
    coasts = 7 * GRAPH_STEPS * 8 if work.mode == "deferred" else 0
    return {
        # values and columns; count, tau and replays
        "candidates": work.batch * (capacity * (4 + 4) + 3 * 4 * (2 if work.k_aux else 1)),
        # of each entry eight int64 (place, order twice, row, its sum, latents, starts, tokens), 24 bytes of
        # torch's radix sort, 12 of value, gradient and flags
        "workspace": n * columns * 4 + 100 * work.entries + 4 * sums + per_latent * m,
        # three groups' coasts, and four copies of one while it is added to
        "optimizer": coasts,
    }


def _tokens(work: Workload, on_gpu: bool) -> int:
    """Input, its finite and normalised copy, what W_enc multiplies; error and a temporary, with AuxK three
    more; on a CPU the error times its scale, in fp32. Of more batches: two of each, code and all."""
    n, many = work.batch * work.accumulate, work.accumulate > 1
    errors = work.d_out * (2 if work.k_aux else 1)
    alive = work.batch * (4 * work.d_in + 2 * errors) * work.item
    code = (work.item + 4) * work.entries
    kept = (n * (work.d_in + errors) * work.item + code) if many else code
    joined = n * max(work.d_in, errors) * work.item + code if many else 0
    return alive + kept + joined + (0 if on_gpu else n * errors * 4)


def resident() -> int:
    """Bytes of memory that this process holds."""
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _kibibytes("/proc/self/status", "VmRSS") or peak


def _kibibytes(file: str, name: str) -> int | None:
    """The bytes in the line ``name: n kB`` of a file in /proc; None where there is none."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return next((1024 * int(size) for size in found), None)


def step_ms(work: Workload, gpu: Gpu) -> dict[str, float]:
    """Milliseconds a step by the roofline, by part: the time of its arithmetic or of its bytes, whichever is
    more; no two parts overlap, nothing waits. N tokens a step, P entries, R active rows:

        encode     2 N d_in M FLOPs at the rate of the dtype of W_enc's plane (fp32: never TF32), or its bytes
        select     N M fp32 scores, read once (with AuxK twice)
        decode     P rows of W_dec's plane
        backward   of each entry a row of the error and one of x
        optimizer  2 R times the bytes of a latent's weights and states, read and written
    """
    n = work.batch * work.accumulate
    rate = gpu.half if work.plane == 2 else gpu.single
    passes = work.accumulate * -(-work.batch // TRITON_ROWS)
    plane = passes * work.latents * work.d_in * work.plane
    per_row = (work.weight_bytes + work.state_bytes) / work.latents
    seconds = {
        "encode": max(2 * n * work.d_in * work.latents / rate, plane / gpu.bandwidth),
        "select": n * work.latents * 4 * (2 if work.k_aux else 1) / gpu.bandwidth,
        "decode": work.entries * work.d_out * work.plane / gpu.bandwidth,
        "backward": work.entries * (work.d_in + work.d_out) * work.item / gpu.bandwidth,
        "optimizer": 2 * work.active * per_row / gpu.bandwidth,
    }
    return {name: 1e3 * value for name, value in seconds.items()}


def largest_latents(work: Workload, room: int) -> int:
    """The largest M that fits into ``room`` bytes on a GPU, all else as it is; 0 where M = k doesn't."""

    def fits(m: int) -> bool:
        return sum(memory(replace(work, latents=m), on_gpu=True).values()) <= room

    if not fits(work.k):
        return 0
    low, high = work.k, _MOST_LATENTS + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def plan_run(
    d_in: int,
    latents: int,
    k: int,
    batch: int,
    gpu: str | None = None,
    *,
    d_out: int | None = None,
    accumulate: int = 1,
    weight_format: str = "float32",
    state_dtype: str = "float32",
    auxk: bool = False,
    mode: str = "deferred",
    dtype: str = "float32",
) -> dict[str, Any]:
    """What a run needs, before anything is allocated: see :func:`memory`, and with ``gpu`` :func:`step_ms`.

    Without ``gpu`` the run is one on this machine's CPU. ``auxk`` adds AuxK with its own default k_aux.

    Returns:
        ``{part}_gib`` (3 digits) and ``{part}_bytes`` of each of PARTS and of ``total``;
        ``bytes_per_weight``, of weights and states. With ``gpu``: ``fits``, ``largest_latents``,
        ``{part}_ms`` and their sum ``floor_ms``, a prediction, not measured; ``formats``: by
        "weight_format/state_dtype" its bytes_per_weight, largest_latents and fits. ``assumed``: what this
        rests on.

    Raises:
        ValueError, TypeError: a size below 1, k > latents, or an unknown name.
    """
    check_type("auxk", auxk, bool, "True or False")
    check_number("d_in", d_in, integer=True, low=1)
    k_aux = AuxK().resolve_k(d_in) if auxk else 0
    work = Workload(
        d_in, d_in if d_out is None else d_out, latents, k, batch, accumulate, weight_format, state_dtype,
        k_aux, mode, dtype,
    )  # fmt: skip
    if gpu is not None:
        check_choice("gpu", gpu, GPUS)
    parts = memory(work, on_gpu=gpu is not None)
    parts["total"] = sum(parts.values())
    plan: dict[str, Any] = {f"{name}_gib": round(size / 2**30, 3) for name, size in parts.items()}
    plan |= {f"{name}_bytes": size for name, size in parts.items()}
    plan["bytes_per_weight"] = round(work.per_weight, 3)
    if gpu is None:
        return plan | {"assumed": "a CPU, backend torch; process: this one, and what a first step loads"}
    card = GPUS[gpu]
    plan["fits"] = parts["total"] <= card.memory
    plan["largest_latents"] = largest_latents(work, card.memory)
    milliseconds = step_ms(work, card)
    plan |= {f"{name}_ms": round(value, 3) for name, value in milliseconds.items()}
    plan["floor_ms"] = round(sum(milliseconds.values()), 3)
    plan["formats"] = {}
    for weights, states in FORMATS:
        other = replace(work, weight_format=weights, state_dtype=states)
        plan["formats"][f"{weights}/{states}"] = {
            "bytes_per_weight": round(other.per_weight, 3),
            "largest_latents": largest_latents(other, card.memory),
            "fits": sum(memory(other, on_gpu=True).values()) <= card.memory,
        }
    rate, kind = (card.half, "bf16") if work.plane == 2 else (card.single, "fp32 (no TF32)")
    plan["assumed"] = (
        f"not measured: {gpu} with {card.memory / 2**30:.0f} GiB, of which {CUDA_CONTEXT / 2**30:.1f} are "
        f"CUDA's, {rate / 1e12:.4g} TFLOP/s in {kind}, {card.bandwidth / 1e12:.1f} TB/s ({card.source}); "
        f"backend triton, latents firing evenly, {f'AuxK with {k_aux} dead a token' if auxk else 'no AuxK'}"
    )
    return plan


def check_fits(
    config: SAEConfig,
    batch: int,
    *,
    accumulate: int = 1,
    weight_format: str = "float32",
    state_dtype: str = "float32",
    mode: str = "deferred",
    dtype: str = "float32",
    device: str = "cpu",
) -> str | None:
    """Log a warning, and return it, where a run is going to need more memory than ``device`` has free.

    It says which of SMALLER would fit. Of ReLU, whose codes have no fixed size, a lower bound is taken.
    """
    auxk = config.loss(AuxK)
    k = getattr(config.activation.selection(training=True), "k", 1)
    work = Workload(
        config.d_in, config.d_out, config.n_latents, k, batch, accumulate,
        weight_format, state_dtype, 0 if auxk is None else auxk.resolve_k(config.d_in), mode, dtype,
    )  # fmt: skip
    on_gpu, free = torch.device(device).type == "cuda", free_memory(device)
    if free is None or _needed(work, on_gpu) <= free:
        return None
    needed = _gib(_needed(work, on_gpu))
    message = f"this run needs {needed}, more than the {_gib(free)} that are free on {device}: "
    smaller = (replace(work, weight_format=weights, state_dtype=states) for weights, states in SMALLER)
    fitting = next((other for other in smaller if _needed(other, on_gpu) <= free), None)
    if fitting is None:
        message += "no format of weights and states fits, only fewer latents or a smaller batch"
    else:
        message += (
            f"weight_format {fitting.weight_format} with state_dtype {fitting.state_dtype} fits,"
            f" in {_gib(_needed(fitting, on_gpu))}"
        )
    _log.warning("%s", message)
    return message


def free_memory(device: str) -> int | None:
    """Bytes that a process may still take on ``device``; None where that can't be known."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    return _kibibytes("/proc/meminfo", "MemAvailable")


def _needed(work: Workload, on_gpu: bool) -> int:
    """What a run takes beyond what its process holds already."""
    parts = memory(work, on_gpu)
    return sum(parts.values()) - parts["process"] + (0 if on_gpu else FIRST_STEP)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
