"""Shapes named by the models people use, and the work that no way of computing them can do without."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MODELS", "Shape", "Work", "encode_work", "model_shape", "step_work"]

MODELS = {"MiniLM": 384, "GPT-2": 768, "Gemma-2-2B": 2304, "Llama-3-8B": 4096}
"""Widths of residual streams."""


class Shape(NamedTuple):
    """Tokens, input width, latents, active latents per token."""

    N: int
    D: int
    M: int
    k: int

    @property
    def model(self) -> str:
        """The model of MODELS that is as wide; else nothing."""
        return next((name for name, width in MODELS.items() if width == self.D), "")


class Work(NamedTuple):
    """Floating-point operations, and bytes to and from memory."""

    flops: float
    bytes: float


def model_shape(model: str, M: int, k: int, N: int) -> Shape:
    """The shape of a dictionary on a model's residual stream."""
    return Shape(N, MODELS[model], M, k)


def encode_work(s: Shape, size: int) -> Work:
    """Encode, in numbers of ``size`` bytes: the scores' GEMM; W_enc and x read once."""
    return Work(2 * s.N * s.M * s.D, (s.M + s.N) * s.D * size)


def step_work(s: Shape, size: int) -> Work:
    """A training step of TopK with Adam in fp32 moments: the encode; decode and its two gradients, and the
    encoder's, over the pairs alone; weights and moments of the expected active rows read and written."""
    flops, read = encode_work(s, size)
    active = s.M * (1 - (1 - s.k / s.M) ** s.N)
    return Work(flops + 8 * s.N * s.k * s.D, read + 2 * 2 * active * s.D * (size + 8))
