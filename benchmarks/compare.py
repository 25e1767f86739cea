"""``--compare BASE``: the same cases on another commit of this repository and on the working tree, in turns.

Each side is a process with a copy of its library and the same cases: same seeds, same weights. One measures
while the other waits on its pipe. A round asks base, this, this, base, the next one the other way round, so
that neither drift nor order favours a side. It gives one ratio this/base of each case, whose tensors are made
anew: where they happen to lie can matter by several percent. All cases have their first round before any has
its second, so that none has all of them in one bad minute.

Run as a script this file is such a process, whose fastsae is the library under test: hence no import of it at
module level.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["COLUMNS", "CPU_SHAPES", "GPU_SHAPES", "OPS", "judge", "run_compare"]

ROOT = Path(__file__).resolve().parents[1]
OPS = ("encode", "decode", "step")
CPU_SHAPES = ((1024, 384, 16_384, 32), (1024, 384, 65_536, 32))
GPU_SHAPES = ((8192, 768, 24_576, 32), (8192, 2304, 65_536, 64))
"""N, D, M, k: tokens, width, latents, active latents per token."""
COLUMNS = (
    "op", "N", "D", "M", "k", "base_ms", "this_ms", "ratio", "ratio_p20", "ratio_p80", "verdict", "base_mib",
    "this_mib", "note",
)  # fmt: skip
LEAST_CHANGE = 0.03
DOUBT = 0.01
"""What it takes for a verdict other than "same": so much change, and no more than this chance that there is
none. Small, as a run has several cases."""
REQUEST_MS = 100.0
LEAST_CALLS, MOST_CALLS = 3, 100
"""A side that is asked for a time works so long, within these numbers of calls."""
TOKENS = 8
"""Tokens whose results are checked in fp64."""
BLOCK = 2**26
"""Weights upcast at a time."""
LR = 1e-4
SETTINGS = {
    "OMP_WAIT_POLICY": "passive",
    "KMP_BLOCKTIME": "0",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**26),
}
"""Of both sides' environment. Threads that spin for more work would take a core from the other side. glibc
moves its thresholds by what was freed before, up to these: without them equal code differed by 20 % at times
(2,048 latents, AMD EPYC Zen 5, 2026-11)."""


def run_compare(
    base: str,
    *,
    root: Path = ROOT,
    rounds: int = 9,
    shapes: Iterable[Sequence[int]] | None = None,
    device: str | None = None,
    say: Callable[[str], Any] = print,
) -> list[dict[str, Any]]:
    """Rows of time ratios, working tree over ``base``, one for each shape and operator.

    A side that fails, or is off what fp64 gives, leaves its row without figures and with a note. The verdict
    is :func:`judge`'s. base_mib and this_mib are the peak of a process during steps, imports included; on a
    GPU, of its allocator.

    Args:
        base: any git revision of the repository.
        root: the top of its checkout.
        rounds: ratios of a case, at least 8.
        shapes: (N, D, M, k) each; None is CPU_SHAPES or GPU_SHAPES.
        device: "cpu" or "cuda"; None is a GPU where there is one.
        say: gets a line of progress for each round.

    Raises:
        ValueError: no such revision, no checkout, too few rounds, or a library that can't be imported.
    """
    from fastsae.checks import check_number, reject

    check_number("rounds", rounds, integer=True, low=8)
    if Path(_git(root, "rev-parse", "--show-toplevel") or "-").resolve() != Path(root).resolve():
        reject("root", root, "the top of a git checkout of fastsae, whose commits can be compared")
    if not (commit := _git(root, "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}")):
        reject("BASE", repr(base), "a commit, branch or tag of this repository")
    this = _git(root, "rev-parse", "--short", "HEAD") + (
        "-dirty" if _git(root, "status", "--porcelain") else ""
    )
    short = {"base": _git(root, "rev-parse", "--short", commit), "this": this}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shapes = shapes or (GPU_SHAPES if device == "cuda" else CPU_SHAPES)
    cases = [_Case(op, tuple(shape)) for shape in shapes for op in OPS]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastsae-compare-")))
        _git(root, "archive", "--format=zip", "-o", str(folder / "base.zip"), commit)
        with zipfile.ZipFile(folder / "base.zip") as archive:
            archive.extractall(folder / "tree")
        sides = []
        for name, tree in (("base", folder / "tree"), ("this", Path(root))):
            if not (tree / "fastsae").exists():
                reject(name, short[name], "a tree with the package fastsae in it")
            sides.append(stack.enter_context(_Side(name, _lay_out(tree, folder / name))))
        try:
            for side in sides:
                side.ask("load", str(folder / side.name), device)
        except _SideError as error:
            reject("BASE", repr(base), f"a commit with the public names that are timed; {error}")
        for i in range(rounds):
            say(f"round {i + 1} of {rounds}")
            for case in [case for case in cases if not case.fault]:
                try:
                    case.measure(*sides)
                except _SideError as error:
                    case.fault = str(error)
    return [case.row(backend=_backend(device), dtype="float32", **short) for case in cases]


def judge(ratios: Sequence[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile of the rounds' ratios, and a verdict on the median.

    "slower" or "faster" where it is off 1 by more than 3 % and the 99 % interval of the sign test leaves 1
    out; else "same". That interval lies between two of the sorted ratios, whatever their distribution; of 8
    to 11 rounds, between the first and the last.
    """
    ordered, n = sorted(ratios), len(ratios)
    outside = max(i for i in range(n) if 2 * sum(math.comb(n, j) for j in range(i + 1)) <= DOUBT * 2**n)
    low, high, middle = ordered[outside], ordered[n - 1 - outside], median(ordered)
    verdict = "same"
    if low > 1 and middle > 1 + LEAST_CHANGE:
        verdict = "slower"
    elif high < 1 and middle < 1 / (1 + LEAST_CHANGE):
        verdict = "faster"
    spread = {f"ratio_p{q}": ordered[round(q / 100 * (n - 1))] for q in (20, 80)}
    return {"ratio": middle, **spread, "verdict": verdict}


class _SideError(Exception):
    """What a side answered in place of a result."""


class _Side:
    """A process with a library of its own, idle but while it is asked."""

    def __init__(self, name: str, site: Path) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],  # -P: the modules beside this file hide none of Python's
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=site,
            env={**os.environ, **SETTINGS},
            start_new_session=True,
        )

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, *request: Any) -> Any:
        """The answer to (method of _Worker, arguments)."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        reply = json.loads(line or "{}")
        if "value" in reply:
            return reply["value"]
        end = reply.get("error") or f"its process ended with exit code {self.process.wait()}"
        raise _SideError(f"{self.name}: {end}")


@dataclass
class _Case:
    op: str
    shape: tuple[int, ...]
    calls: int = 0
    ms: dict[str, list[float]] = field(default_factory=lambda: {"base": [], "this": []})
    mib: dict[str, float | None] = field(default_factory=dict)
    fault: str = ""

    def measure(self, base: _Side, this: _Side) -> None:
        """One round; the first also checks results and finds out how many calls fit into a request."""
        first, second = (base, this) if len(self.ms["base"]) % 4 == 0 else (this, base)
        for side in (first, second):
            side.ask("prepare", self.op, self.shape, not self.calls)
        if not self.calls:
            slower = max(side.ask("time", 2) for side in (base, this))
            self.calls = round(min(max(REQUEST_MS / slower, LEAST_CALLS), MOST_CALLS))
        for side in (first, second, second, first):
            self.ms[side.name].append(side.ask("time", self.calls))
            self.mib[f"{side.name}_mib"] = side.ask("peak") if self.op == "step" else None

    def row(self, **about: str) -> dict[str, Any]:
        names = "base_ms", "this_ms", "ratio", "ratio_p20", "ratio_p80", "verdict", "base_mib", "this_mib"
        figures: dict[str, Any] = dict.fromkeys(names)
        if not self.fault:
            (b1, b2), (t1, t2) = ((ms[::2], ms[1::2]) for ms in self.ms.values())
            ratios = [math.sqrt(p * q / r / s) for p, q, r, s in zip(t1, t2, b1, b2, strict=True)]
            figures |= {f"{name}_ms": median(ms) for name, ms in self.ms.items()} | judge(ratios) | self.mib
        note = f"no figures: {self.fault}" if self.fault else ""
        shape = dict(zip("NDMk", self.shape, strict=True))
        return {"op": self.op, **shape, **about, **figures, "note": note, "failed": bool(self.fault)}


def _git(root: Path, *arguments: str) -> str:
    """What git prints; nothing where it fails or isn't there."""
    try:
        result = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def _lay_out(tree: Path, site: Path) -> Path:
    """Copy the package of a checkout to where it can be imported, with the kernels where they are mapped."""
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(tree / "fastsae", site / "fastsae", ignore=skip)
    if (tree / "kernels" / "triton").exists():
        shutil.copytree(tree / "kernels" / "triton", site / "fastsae" / "kernels", ignore=skip)
    return site


def _backend(device: str) -> str:
    return "triton" if device == "cuda" else "torch"


class _Worker:
    """A side's own process: its library, public names only, and the case prepared last."""

    def load(self, site: str, device: str) -> None:
        """Import the library under ``site`` and no other."""
        # an editable install answers for modules that the library under test lacks
        editable = "__editable___fastsae"
        sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith(editable)]
        sys.path.insert(0, site)
        from fastsae import SAE, SAEConfig, TopK
        from fastsae.optim import RowAdam
        from fastsae.training import train_step

        for name in [name for name in sys.modules if name.partition(".")[0] == "fastsae"]:
            if not Path(file := sys.modules[name].__file__ or "").is_relative_to(site):
                raise ImportError(f"{name} came from {file}, not from the library under test")
        self.device, self.names = device, (SAE, SAEConfig, TopK, RowAdam, train_step)

    @torch.no_grad()
    def prepare(self, op: str, shape: list[int], check: bool) -> None:
        """Make the case and call it once; on request first compare a few tokens' results with fp64."""
        self.call: Callable[[], Any] = lambda: None  # lets the last case go
        SAE, SAEConfig, TopK, RowAdam, train_step = self.names
        n, d, m, k = shape
        rng = torch.Generator().manual_seed(0)
        draw = lambda *size: torch.randn(size, generator=rng).to(self.device)  # noqa: E731
        batches = [draw(n, d) for _ in range(4)]
        sae = SAE(SAEConfig(d, m, TopK(k)), backend=_backend(self.device)).to(self.device)
        for parameter, value in ((sae.W_enc, draw(m, d)), (sae.W_dec, draw(m, d)), (sae.b_enc, draw(m))):
            parameter.copy_(normalize(value, dim=-1))
        code, x, turns = sae.encode_sparse(batches[0]), batches[0][:TOKENS], cycle(batches)
        opt: Any = RowAdam(sae, lr=LR) if op == "step" else None
        if check and op == "encode":
            _check_encode(sae, x, code)
        elif check and op == "decode":
            _check_decode(sae, sae.decode(code), code)
        elif check:
            _check_step(sae, x, lambda: train_step(sae, opt, x))
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif (counters := Path("/proc/self/clear_refs")).exists():
            counters.write_text("5")
        self.call = {
            "encode": lambda: sae.encode_sparse(batches[0]),
            "decode": lambda: sae.decode(code),
            "step": lambda: train_step(sae, opt, next(turns)),
        }[op]
        self.call()

    @torch.no_grad()
    def time(self, calls: int) -> float:
        """The median milliseconds of some calls."""
        return median(self.milliseconds() for _ in range(calls))

    def milliseconds(self) -> float:
        if self.device != "cuda":
            start = time.perf_counter()
            self.call()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def peak(self) -> float | None:
        """MiB held at most since ``prepare`` checked."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status")
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.exists() else None


def _check_encode(sae: Any, x: Tensor, code: Any) -> None:
    values, indices = (part[: len(x)] for part in code.topk())
    blocks = sae.W_enc.split(max(1, BLOCK // x.shape[1]))
    scores = torch.cat([x.double() @ W.double().T for W in blocks], 1) + sae.b_enc.double()
    best = scores.topk(values.shape[1]).values.relu()
    _require(values, scores.gather(1, indices.long()).relu(), scores)
    _require(values.sort(1, descending=True).values, best, scores)


def _check_decode(sae: Any, x_hat: Tensor, code: Any) -> None:
    values, indices = (part[:TOKENS] for part in code.topk())
    exact = (values.double()[..., None] * sae.W_dec[indices.long()].double()).sum(1) + sae.b_dec.double()
    _require(x_hat[:TOKENS], exact, exact)


def _check_step(sae: Any, x: Tensor, step: Callable[[], Any]) -> None:
    """Adam's first step moves a weight by lr against the sign of its gradient, whatever the loss's scale.

    The gradient is that of the squared error in fp64, by the rows that are active in the tokens; decoder rows
    stay at unit length.
    """
    code = sae.encode_sparse(x)
    _check_encode(sae, x, code)
    rows, slots = code.topk()[1].long().unique(return_inverse=True)
    enc, dec = (W[rows].detach().double().requires_grad_() for W in (sae.W_enc, sae.W_dec))
    with torch.enable_grad():
        scores = torch.einsum("nd,nkd->nk", x.double(), enc[slots]) + sae.b_enc[rows].double()[slots]
        x_hat = torch.einsum("nk,nkd->nd", scores.relu(), dec[slots]) + sae.b_dec.double()
        grad_enc, grad_dec = torch.autograd.grad((x_hat - x).square().sum(), (enc, dec))
    grad_dec = grad_dec - (grad_dec * dec).sum(1, keepdim=True) * dec
    step()
    wanted = enc - LR * grad_enc.sign(), normalize(dec - LR * grad_dec.sign())
    for W, want in zip((sae.W_enc, sae.W_dec), wanted, strict=True):
        # Adam's eps and rounding decide where a gradient is next to nothing
        off = (W[rows] - want).abs().flatten().kthvalue(math.ceil(0.99 * want.numel())).values.item()
        if not off <= LR / 20:
            raise AssertionError(f"its step is off by {off:.2g}, with a learning rate of {LR:g}")


def _require(got: Tensor, want: Tensor, terms: Tensor) -> None:
    """Raise where a result is off by more than fp32 sums of thousands of terms are."""
    error, allowed = (got - want).abs().max().item(), 8e-6 * terms.abs().max().item()
    if not error <= allowed:  # NaN fails too
        raise AssertionError(f"its result is off by {error:.2g}, allowed {allowed:.2g}")


def _serve() -> None:
    """Answer requests, a line of JSON each, until there are no more."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    worker = _Worker()
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        try:
            reply = {"value": getattr(worker, method)(*arguments)}
        except Exception as error:  # whatever a library raises is its side's answer
            reply = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
