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

from typing import Literal

from fastsae.checks import check_choice, reject
from fastsae.ops import BACKENDS

__all__ = ["Backend", "available", "resolve"]

Backend = Literal["auto", "reference", "torch", "triton", "cuda"]
_PLANNED = {"triton": "this version holds no Triton kernels yet", "cuda": "this version holds no CUDA kernels yet"}


def available() -> dict[str, str | None]:
    """Each backend's name with None where it can be used, else the reason why not."""
    return {name: None for name in BACKENDS} | _PLANNED


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
