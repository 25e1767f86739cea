"""``python -m fastsae.benchmarks compile``: every Triton kernel's default configs, for GPUs not at hand.

What is compiled is recorded, not listed: each operator's launchers run once per dtype, width and architecture
on CPU tensors, under a stand-in for Triton's driver, and Triton itself says what it would compile for each
launch, just before it would. So specialisations are those of a real run, and a new kernel is covered as soon
as an operator launches it.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError
from triton.runtime.driver import driver

from fastsae.backends.triton import support
from fastsae.benchmarks.launches import operator_calls
from fastsae.checks import reject

__all__ = ["SHARED_LIMIT", "broken_limits", "compile_all", "record"]

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a block may have, by architecture (CUDA C++ programming guide, table 29)."""
SPILLS = {
    ("row_update.row_update_kernel", 16384): (240, "32 warps leave a lane 64 registers for 16 elements each"),
    ("row_step.decoder_step_kernel", 16384): (216, "the same, and few models are that wide"),
}
"""By kernel and width: bytes a thread that may be spilled, and why. The others may not at all."""
WGMMA = {"encode_fused.filter_scores"}
"""Kernels whose products of half-precision matrices must be Hopper's own instructions, wgmma, on sm_90."""
CASES = {
    80: [(torch.float32, 768), (torch.bfloat16, 768), (torch.bfloat16, 4096)],
    90: [
        *product((torch.float32, torch.bfloat16), (768, 4096)),
        *((torch.bfloat16, width) for width in (512, 2048, 8192, 16384)),
        (torch.float16, 768),
    ],
    100: [(torch.float32, 768), (torch.bfloat16, 768), (torch.bfloat16, 4096)],
}
"""Dtypes of the weights and widths of the input: one for each entry of the config tables. Not every
combination, because fp16 kernels are the bf16 ones but for the type's name, and tables hardly differ by
architecture."""
FORMATS = {
    90: [
        ("split32", "int8", torch.float32, 768),
        ("split32", "int8", torch.bfloat16, 4096),
        ("bfloat16", "int8_row", torch.bfloat16, 768),
        ("bfloat16", "int8_row", torch.float32, 4096),
        ("bfloat16", "bfloat16", torch.bfloat16, 768),
        ("bfloat16", "bfloat16", torch.bfloat16, 4096),
    ]
}
"""Formats of weights and states, the dtype of tokens, and the width: each format of a tensor once at either
width; not every combination, which differ by loads and stores alone."""


@dataclass
class Launch:
    """What Triton would compile for one launch, and (operator, dtype, width) of the calls that need it."""

    kernel: Any
    arch: int
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, int]
    callers: set[tuple[str, str, int]] = field(default_factory=set)


class _Driver:
    """Stands in for Triton's driver: a GPU of the given architecture that nothing is ever run on."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return f"sm_{self.arch}, absent"

    def get_current_stream(self, device: str) -> int:
        return 0


class _ZeroIndices(TorchFunctionMode):
    """Makes new integer tensors hold 0: no kernel writes them, and launchers may index with them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like, torch.Tensor.new_empty) and not made.is_floating_point():
            made.zero_()
        return made


@contextmanager
def _absent_gpu(arch: int, note: Callable[..., bool]) -> Iterator[None]:
    """Hand ``note`` what Triton would compile for ``arch``. It returns True, and nothing runs."""
    with (
        mock.patch.object(driver, "_active", _Driver(arch)),
        mock.patch.object(support, "WITHOUT_GPU", arch),
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note),
        _ZeroIndices(),
    ):
        yield


def record(arch: int, calls: Iterable[tuple[tuple[str, str, int], Callable[[], Any]]]) -> list[Launch]:
    """The distinct launches that the calls, each with the name it goes by, make on ``arch``."""
    launches: dict[tuple, Launch] = {}

    def note(caller: tuple[str, str, int], *, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        usual = {"num_warps": None, "num_stages": None, "num_ctas": 1, "maxnreg": None}
        options = json.loads(compile["specialization_data"])["options"]
        launch = launches.setdefault(
            (fn.module, fn.name, key),
            Launch(
                fn.jit_function,
                arch,
                compile["signature"],
                compile["constants"],
                compile["configs"][0],
                {name: options[name] for name, value in usual.items() if options[name] != value},
            ),
        )
        launch.callers.add(caller)
        return True

    for caller, call in calls:
        with _absent_gpu(arch, partial(note, caller)), torch.no_grad():
            call()
    return list(launches.values())


def compile_all(archs: Iterable[int]) -> list[dict[str, Any]]:
    """A row for each distinct launch of each operator on each architecture.

    Raises ValueError under TRITON_INTERPRET, which leaves nothing to compile.
    """
    if support.interpreting():
        reject("TRITON_INTERPRET", "1", "0 or unset: interpreted kernels can't be compiled")
    calls = {arch: operator_calls(CASES[arch], FORMATS.get(arch, ())) for arch in archs}
    launches = [launch for arch in archs for launch in record(arch, calls[arch])]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # Triton works without the interpreter lock
        return list(pool.map(_compile, launches))


def _compile(launch: Launch) -> dict[str, Any]:
    names = launch.kernel.arg_names
    row = {
        "kernel": f"{launch.kernel.module.rpartition('.')[2]}.{launch.kernel.__name__}",
        "arch": launch.arch,
        "ops": _distinct(op for op, _, _ in launch.callers),
        "dtypes": _distinct(dtype for _, dtype, _ in launch.callers),
        "widths": _distinct(width for _, _, width in launch.callers),
        "pointers": [t for t in _flat(launch.signature.values()) if t.startswith("*")],
        "config": {
            ".".join([names[i], *map(str, place)]): value if isinstance(value, int | None) else str(value)
            for (i, *place), value in launch.constants.items()
        }
        | launch.options,
        "error": None,
    }
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attrs)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", launch.arch, 32), options=launch.options)
    except (TritonError, RuntimeError) as error:  # the latter from its passes
        return row | {"error": f"{type(error).__name__}: {error}"} | dict.fromkeys(_MEASURED)
    cubin = next(path for name, path in compiled.metadata_group.items() if name.endswith(".cubin"))
    registers, spill_bytes = _resource_usage(cubin)
    return row | {
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared_bytes": compiled.metadata.shared,
        "wgmma": "wgmma" in compiled.asm["ptx"],
    }


_MEASURED = ("registers", "spill_bytes", "shared_bytes", "wgmma")


def _resource_usage(cubin: str) -> tuple[int, int]:
    """Registers and bytes spilled a thread: its stack, unless no instruction stores to that."""
    report = _cuobjdump("-res-usage", cubin)  # ... REG:128 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:408 ...
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", report)[1])  # type: ignore[index]
        for name in ("REG", "STACK", "LOCAL")
    )
    spills = stack + local and " STL" in _cuobjdump("-sass", cubin)
    return registers, stack + local if spills else 0


def _cuobjdump(what: str, cubin: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, what, cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _flat(types: Iterable[Any]) -> Iterator[str]:
    """The types of arguments, those within tuples too."""
    for t in types:
        yield from (t,) if isinstance(t, str) else _flat(t)


def _distinct(items: Iterable[Any]) -> list[Any]:
    return sorted(set(items))


def broken_limits(rows: Iterable[dict[str, Any]]) -> list[str]:
    """What is wrong with the rows, a line each; empty where all is well.

    All compile; shared memory is within SHARED_LIMIT, spills within SPILLS; wgmma is where WGMMA asks for it.
    """
    wrong = []
    for row in rows:
        name = f"{row['kernel']} for sm_{row['arch']} ({', '.join(row['dtypes'])})"
        if row["error"]:
            wrong.append(f"{name} doesn't compile. {row['error']}")
            continue
        if row["shared_bytes"] > (limit := SHARED_LIMIT[row["arch"]]):
            wrong.append(f"{name}: {row['shared_bytes']:,} bytes of shared memory, at most {limit:,}")
        limit = max(SPILLS.get((row["kernel"], width), (0, ""))[0] for width in row["widths"])
        if row["spill_bytes"] > limit:
            wrong.append(f"{name}: {row['spill_bytes']} bytes spilled a thread, at most {limit}")
        halves = "float32" not in row["dtypes"]
        if row["kernel"] in WGMMA and row["arch"] == 90 and halves and not row["wgmma"]:
            wrong.append(f"{name}: no wgmma in its PTX")
    return wrong
