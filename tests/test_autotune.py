"""FASTSAE_AUTOTUNE=1: the fastest config, found once for a width and dtype."""

import pytest
import torch

from fastsae.testing import problem, random_code

support = pytest.importorskip("fastsae.backends.triton.support")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not support.interpreting(), reason="runs kernels on CPU tensors"),
]


@pytest.fixture
def timed(monkeypatch):
    """The calls that were timed; the one before the last is the fastest."""
    calls = []

    def milliseconds(call):
        call()
        calls.append(call)
        return -len(calls) % 3

    monkeypatch.setattr(support, "_milliseconds", milliseconds)
    monkeypatch.setattr(support, "_FASTEST", {})
    monkeypatch.setattr(support, "interpreting", lambda: False)
    return calls


def decode(dtype=torch.float32, d=24):
    from fastsae.backends.triton import decode

    code, p = random_code(5, 50), problem(5, d, 50).to(dtype)
    return decode(code.values.to(dtype), code.indices, code.offsets, p.W_dec, p.b_dec)


def test_off_unless_asked_for(timed, monkeypatch):
    decode()
    monkeypatch.setenv("FASTSAE_AUTOTUNE", "0")
    decode()
    assert not timed


def test_each_width_and_dtype_is_timed_once(timed, monkeypatch):
    from fastsae.kernels.decode import TRIALS

    plain = decode()
    monkeypatch.setenv("FASTSAE_AUTOTUNE", "1")
    for dtype, d in ((torch.float32, 24), (torch.float16, 24), (torch.float32, 16)):
        before = len(timed)
        decode(dtype, d)
        assert len(timed) == before + 1 + len(TRIALS)
        decode(dtype, d)
        assert len(timed) == before + 1 + len(TRIALS)
    torch.testing.assert_close(decode(), plain)


def test_the_fastest_is_taken(monkeypatch):
    monkeypatch.setattr(support, "_FASTEST", {})
    monkeypatch.setattr(support, "interpreting", lambda: False)
    monkeypatch.setenv("FASTSAE_AUTOTUNE", "1")
    times = {"table": 3.0, "a": 1.0, "b": 2.0}
    monkeypatch.setattr(support, "_milliseconds", lambda call: times[call()])
    assert support.tuned({(80, 64): "table"}, ("a", "b"), torch.ones(1), 8, lambda config: config) == "a"


def test_the_interpreter_is_not_timed(monkeypatch):
    monkeypatch.setenv("FASTSAE_AUTOTUNE", "1")
    monkeypatch.setattr(support, "_milliseconds", lambda call: pytest.fail("timed"))
    decode()
