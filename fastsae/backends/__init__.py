"""Four ways to run each operator, and the choice between them.

==============  ==================================================================================
``reference``   dense and readable, any floating dtype: the oracle that the others are tested against
``torch``       portable PyTorch, memory-bounded: never holds the [N, M] pre-activations; the default
``triton``      custom Triton kernels
``cuda``        custom CUDA kernels
``auto``        chooses for the given tensors; a backend asked for by name never falls back to another
==============  ==================================================================================
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch as pytorch  # `torch` is a module of this package

from fastsae.checks import check_choice, reject
from fastsae.ops import BACKENDS

__all__ = ["Backend", "available", "diagnose", "resolve"]

Backend = str
"""One of "auto", "reference", "torch", "triton", "cuda"."""
MEASURED: dict[int, str] = {}
"""Where ``auto`` takes Triton: 10 * major + minor, and the file in benchmarks/results that shows why."""


def available() -> dict[str, str | None]:
    """Each backend's name with None where it can be used, else the reason why not."""
    return dict.fromkeys(BACKENDS) | {
        "triton": _no_triton(),
        "cuda": "this version holds no CUDA kernels yet",
    }


def _no_triton() -> str | None:
    try:
        from triton import knobs
    except ImportError:
        return "triton is not installed (pip install triton; Linux only)"
    if pytorch.cuda.is_available() or knobs.runtime.interpret:
        return None
    return "there is no CUDA device (TRITON_INTERPRET=1 runs its kernels on a CPU, slowly, for tests)"


def _auto(like: pytorch.Tensor | None) -> str:
    if like is None or like.device.type != "cuda" or _no_triton() or _unfit("triton", like):
        return "torch"
    major, minor = pytorch.cuda.get_device_capability(like.device)
    return "triton" if 10 * major + minor in MEASURED else "torch"


def _unfit(backend: str, like: pytorch.Tensor) -> str | None:
    """Why ``backend``, though it is usable, can't work on a tensor such as ``like``."""
    if backend != "triton":
        return None
    if like.dtype == pytorch.float64:
        return "float64, which only reference and torch compute in"
    from triton import knobs

    from fastsae.kernels.row_update import WIDEST

    if like.ndim and like.shape[-1] > WIDEST:
        return f"rows of {like.shape[-1]}: its kernels hold at most {WIDEST} in registers"
    on_gpu = like.device.type in ("cuda", "meta")
    return None if on_gpu or knobs.runtime.interpret else f"a tensor on {like.device}: its kernels need CUDA"


def diagnose() -> dict[str, str]:
    """Versions, devices, the CUDA extension, and for each backend "ok" or the reason why not."""
    report = {"python": platform.python_version()}
    for name in ("fastsae", "torch", "triton", "transformers", "numpy", "safetensors"):
        try:
            report[name] = version(name)
        except PackageNotFoundError:
            report[name] = "not installed"
    report["cpu"] = f"{pytorch.get_num_threads()} threads, {pytorch.backends.cpu.get_cpu_capability()}"
    for i in range(pytorch.cuda.device_count()):
        gpu = pytorch.cuda.get_device_properties(i)
        report[f"cuda:{i}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
    if not pytorch.cuda.is_available():
        report["cuda"] = "no CUDA device" if pytorch.version.cuda else "this torch is built without CUDA"
    report["cuda extension"] = _extension()
    report |= {f"backend {name}": reason or "ok" for name, reason in available().items()}
    where = ", ".join(f"sm_{arch} ({file})" for arch, file in MEASURED.items())
    on_gpu = f"triton for CUDA tensors on {where}" if where else "triton is not yet measured on any GPU"
    return report | {"backend auto": f"torch; {on_gpu}"}


def _extension() -> str:
    try:
        import fastsae._cuda as extension
    except ImportError:
        return "not built (no nvcc at installation, or FASTSAE_BUILD_CUDA=0)"
    try:
        return f"built; runtime {extension.runtime_version()}, driver {extension.driver_version()}"
    except RuntimeError as error:
        return f"built; {error}"


def resolve(backend: str, like: pytorch.Tensor | None = None) -> str:
    """The backend that will run on tensors such as ``like``: ``auto`` becomes the best one here.

    Raises:
        ValueError: an unknown name, or a backend that can't be used (for such tensors), with the reason.
    """
    if backend == "auto":
        return _auto(like)
    names = available()
    check_choice("backend", backend, ("auto", *names))
    if reason := names[backend]:
        usable = ", ".join(name for name, why in names.items() if why is None)
        reject("backend", repr(backend), f"a usable one ({usable}, or auto): {reason}")
    if like is not None and (reason := _unfit(backend, like)):
        reject("backend", f"{backend!r} for {reason}", "one that works there (auto chooses)")
    return backend
