"""Fixtures that every test file may ask for; none is automatic."""

import pytest
import torch

import fastsae.backends.torch as portable
from fastsae import backends
from fastsae.optim import row_adam

SMALL = "torch in small blocks"
FAST = [name for name, reason in backends.available().items() if reason is None and name != "reference"] + [
    SMALL
]


@pytest.fixture(params=FAST)
def backend(request):
    """Each usable backend but the oracle, the portable one in small blocks too."""
    return _prepare(request)


@pytest.fixture(params=["reference", *FAST])
def any_backend(request):
    """Each usable backend."""
    return _prepare(request)


def _prepare(request):
    if request.param == SMALL:
        request.getfixturevalue("small_blocks")
    return request.param.split()[0]


@pytest.fixture
def small_blocks(monkeypatch):
    """Cut the portable code's blocks so small that the tests' shapes take several, the last one padded."""
    monkeypatch.setattr(portable, "BLOCK_SCORES", 256)
    monkeypatch.setattr(portable, "MAX_TOKENS", 8)
    monkeypatch.setattr(portable, "GROUP", 8)
    monkeypatch.setattr(portable, "BLOCK_ELEMENTS", 64)
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
