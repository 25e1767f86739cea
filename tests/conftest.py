"""Fixtures that every test file may ask for; none is automatic."""

import pytest

from fastsae import backends
from fastsae.backends import torch as portable

FAST = [name for name, reason in backends.available().items() if reason is None and name != "reference"]


@pytest.fixture(params=FAST)
def backend(request):
    """Each usable backend but the oracle."""
    return request.param


@pytest.fixture(params=["reference", *FAST])
def any_backend(request):
    """Each usable backend."""
    return request.param


@pytest.fixture
def small_blocks(monkeypatch):
    """Cut the portable backend's blocks so small that the tests' shapes take several, the last one padded."""
    monkeypatch.setattr(portable, "BLOCK_SCORES", 256)
    monkeypatch.setattr(portable, "MAX_TOKENS", 8)
    monkeypatch.setattr(portable, "GROUP", 8)
    monkeypatch.setattr(portable, "BLOCK_ELEMENTS", 64)
    monkeypatch.setattr(portable, "_block_width", lambda n_tokens: max(32, 256 // max(n_tokens, 1) // 8 * 8))


@pytest.fixture(params=["blocks as set", "small blocks"])
def blocks(request):
    """Run a test with the blocks that ship and with small ones."""
    if request.param == "small blocks":
        request.getfixturevalue("small_blocks")
