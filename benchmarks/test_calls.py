"""``pytest benchmarks/ --benchmark-only``: what a call costs on the host, at sizes where the arithmetic is
nothing, and the same calls at the demo's size."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as nnf

from fastsae import SAE, AuxK, SAEConfig, TopK
from fastsae.benchmarks.cases import Shape, model_shape
from fastsae.optim import RowAdam
from fastsae.training import train_step

TINY, DEMO = Shape(N=8, D=16, M=64, k=4), model_shape("MiniLM", 16_384, k=32, N=1024)


@pytest.fixture(params=[TINY, DEMO], ids=["tiny", "demo"])
def shape(request):
    return request.param


@pytest.fixture
def x(shape):
    torch.manual_seed(0)
    return torch.randn(shape.N, shape.D)


@pytest.fixture
def sae(shape, x):
    sae = SAE(SAEConfig(shape.D, shape.M, TopK(shape.k), losses=(AuxK(),), normalization="scalar"))
    sae.calibrate_(x)
    return sae


def test_linear(benchmark, sae, x):
    """What a bare torch call of the encoder's size costs."""
    with torch.no_grad():
        out = benchmark(nnf.linear, x, sae.W_enc, sae.b_enc)
    assert out.shape == (len(x), sae.config.n_latents)


def test_encode(benchmark, sae, x):
    with torch.no_grad():
        code = benchmark(sae.encode_sparse, x)
    assert code.shape == (len(x), sae.config.n_latents)


def test_decode(benchmark, sae, x):
    with torch.no_grad():
        code = sae.encode_sparse(x)
        out = benchmark(sae.decode, code)
    assert out.shape == x.shape


def test_step(benchmark, sae, x):
    optimizer = RowAdam(sae, lr=1e-4)
    metrics = benchmark(train_step, sae, optimizer, x)
    assert metrics["skipped"] == 0


def test_ordinary_loop(benchmark, sae, x):
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)

    def step():
        loss = sae(x, return_loss=True).loss
        loss.backward()
        sae.constrain_gradients_()
        optimizer.step()
        optimizer.zero_grad()
        sae.constrain_weights_()
        return loss

    assert benchmark(step).isfinite()
