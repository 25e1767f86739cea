"""Fixtures that every test file may ask for; none is automatic."""

import os
import sys
from importlib.util import find_spec

import pytest
import torch

INTERPRETING = not torch.cuda.is_available() and find_spec("triton") is not None
if INTERPRETING:
    # Triton reads it when it is imported, and makes kernels run on CPU tensors; processes that tests start
    # don't inherit it
    os.environ["TRITON_INTERPRET"] = "1"
    from triton import knobs

    knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]

import fastsae.backends.torch as portable  # noqa: E402
from fastsae.optim import row_adam  # noqa: E402

SMALL = "torch in small blocks"
# on a GPU kernels take only its tensors: tests/test_gpu.py
FAST = ["torch", SMALL, *(["triton"] if INTERPRETING else [])]


@pytest.fixture(params=FAST)
def backend(request):
    """Each usable backend but the oracle, the portable one in small blocks too."""
    return _prepare(request)


@pytest.fixture(params=["reference", *FAST])
def any_backend(request):
    """Each usable backend."""
    return _prepare(request)


@pytest.fixture(params=[name for name in ["reference", *FAST] if name != "triton"])
def exact_backend(request):
    """Each usable backend that computes in fp64."""
    return _prepare(request)


@pytest.fixture
def few():
    """few(n, backend): as many tokens as Triton's interpreter manages, which takes milliseconds for each."""
    return lambda n, backend: min(n, 3) if backend == "triton" else n


def _prepare(request):
    if request.param == SMALL:
        request.getfixturevalue("small_blocks")
    return request.param.split()[0]


@pytest.fixture
def small_blocks(monkeypatch):
    """Cut the portable code's blocks so small that the tests' shapes take several, the last one padded."""
    monkeypatch.setattr(portable, "BLOCK_SCORES", 256)
    monkeypatch.setattr(portable, "FEW_SCORES", 0)
    monkeypatch.setattr(portable, "MAX_TOKENS", 8)
    monkeypatch.setattr(portable, "GROUP", 8)
    monkeypatch.setattr(portable, "BLOCK_ELEMENTS", 64)
    monkeypatch.setattr(portable, "LONGEST_SUM", 4)
    monkeypatch.setattr(portable, "MIN_COLUMNS", 32)
    monkeypatch.setattr(row_adam, "BLOCK_ELEMENTS", 16)


def _threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """For small tensors: several threads spend most of the time waiting for each other."""
    yield from _threads(1)


@pytest.fixture
def two_threads(one_thread):
    """Where the order of sums might depend on threads."""
    yield from _threads(2)


@pytest.fixture
def fastsae(monkeypatch, capsys):
    """Call the command; returns (exit code, stdout, stderr)."""

    from fastsae import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastsae", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def _hasten_interpreter():
    """Triton's interpreter patches triton.language again at each call of a device function: half its time."""
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        if self.fn not in patched:
            patched.add(self.fn)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if INTERPRETING:
    _hasten_interpreter()
