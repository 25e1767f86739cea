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
_PLANNED = {
    "triton": "this version holds no Triton kernels yet",
    "cuda": "this version holds no CUDA kernels yet",
}


def available() -> dict[str, str | None]:
    """Each backend's name with None where it can be used, else the reason why not."""
    return dict.fromkeys(BACKENDS) | _PLANNED


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
    return report | {f"backend {name}": reason or "ok" for name, reason in available().items()}


def _extension() -> str:
    try:
        import fastsae._cuda as extension
    except ImportError:
        return "not built (no nvcc at installation, or FASTSAE_BUILD_CUDA=0)"
    try:
        return f"built; runtime {extension.runtime_version()}, driver {extension.driver_version()}"
    except RuntimeError as error:
        return f"built; {error}"


def resolve(backend: str) -> str:
    """The backend that will run: ``auto`` becomes the best one here.

    Raises:
        ValueError: an unknown name, or a backend that can't be used, with the reason.
    """
    if backend == "auto":
        return "torch"
    names = available()
    check_choice("backend", backend, ("auto", *names))
    if reason := names[backend]:
        usable = ", ".join(name for name, why in names.items() if why is None)
        reject("backend", repr(backend), f"a usable one ({usable}, or auto): {reason}")
    return backend
