"""Recipes by name: options of a run as published, each with its source and what the source leaves open."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastsae.checks import check_choice

__all__ = ["RECIPES", "Recipe", "recipe_options"]


@dataclass(frozen=True)
class Recipe:
    """options: values of :class:`fastsae.training.options.RunOptions` by name.

    source: where the numbers are from.  note: what differs from the source, or isn't said there.
    """

    source: str
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""


_APRIL = {
    "activation": "relu",
    "penalty": "decoder_norm_l1",
    "sparsity": 5.0,
    "lr": 5e-5,
    "beta1": 0.9,
    "beta2": 0.999,
    "warmup": 0.0,
    "decay": 0.2,
    "sparsity_warmup": 0.05,
    "clip": 1.0,
    "batch_size": 4096,
}
_BUSSMANN = {
    "k": 32,
    "auxk": 1 / 32,
    "k_aux": 512,
    "dead_after": 5 * 4096,
    "lr": 3e-4,
    "beta1": 0.9,
    "beta2": 0.99,
    "warmup": 0.0,
    "decay": 0.0,
    "batch_size": 4096,
}

RECIPES: dict[str, Recipe] = {
    "scaling-monosemanticity": Recipe(
        'Templeton et al. 2024, "Scaling Monosemanticity": loss and normalisation; training as in "Circuits'
        ' Updates - April 2024"',
        _APRIL | {"normalization": "scalar"},
        "The paper chose its learning rates by scaling laws and doesn't name them: April's 5e-5 stands here.",
    ),
    "anthropic-april-2024": Recipe(
        'Conerly et al. 2024, "Circuits Updates - April 2024"',
        _APRIL | {"normalization": "mean_norm"},
        "Decoder rows start at length 0.1, of the 0.05 to 1 that the source allows. Its batches are of 2048"
        " to 4096 tokens.",
    ),
    "anthropic-january-2025": Recipe(
        'Conerly et al. 2025, "Circuits Updates - January 2025"',
        {
            "activation": "jumprelu",
            "threshold": 0.1,
            "bandwidth": 2.0,
            "penalty": "tanh",
            "sparsity": 10.0,
            "pre_activation": 3e-6,
            "normalization": "mean_norm",
            "initial": "uniform",
            "lr": 2e-4,
            "warmup": 0.0,
            "decay": 0.2,
            "sparsity_warmup": 1.0,
            "batch_size": 32_768,
        },
        "The tanh's scale is its default, 4. Sparsity is about 10 to 20 in the source. Thresholds get the"
        " gradient of their logarithm by the chain rule, theta times what the source writes, to which Adam is"
        " nearly blind. Normalisation as in April 2024.",
    ),
    "openai-topk": Recipe(
        "Gao et al. 2024, arXiv 2406.04093, appendix A",
        {
            "activation": "topk",
            "k": 32,
            "auxk": 1 / 32,
            "dead_after": 10_000_000,
            "normalization": "layer_norm",
            "eps": 6.25e-10,
            "warmup": 0.0,
            "decay": 0.0,
            "batch_size": 131_072,
        },
        "The learning rate is 2e-4 / sqrt(latents / 2^14), the library's default. Without the source's"
        " running average of weights. For short runs give a smaller batch size and dead_after.",
    ),
    "gemma-scope-jumprelu": Recipe(
        "Lieberum et al. 2024, arXiv 2408.05147, section 3.2; Rajamanoharan et al. 2024, arXiv 2407.14435",
        {
            "activation": "jumprelu",
            "threshold": 0.001,
            "bandwidth": 0.001,
            "penalty": "l0",
            "sparsity": 6e-4,
            "normalization": "unit_scalar",
            "unit_norm_decoder": True,
            "lr": 7e-5,
            "beta1": 0.0,
            "beta2": 0.999,
            "eps": 1e-8,
            "warmup": 1000.0,
            "decay": 0.0,
            "sparsity_warmup": 10_000.0,
            "batch_size": 4096,
        },
        "Warm-up is linear from 0, in the source a cosine from a tenth of the rate. The source swept the"
        " sparsity coefficient.",
    ),
    "batchtopk": Recipe(
        "Bussmann et al. 2024, arXiv 2412.06410, and the settings of its repository (bartbussmann/BatchTopK)",
        _BUSSMANN | {"activation": "batchtopk", "normalization": "layer_norm"},
        "Dead after five batches of 4096 tokens.",
    ),
    "matryoshka": Recipe(
        "Bussmann et al. 2025, arXiv 2503.17547, and the settings of its repository"
        " (bartbussmann/matryoshka_sae)",
        _BUSSMANN | {"activation": "matryoshka", "normalization": "none"},
        "Over BatchTopK; widths 1, 3, 7, 15 and 32 parts in 32 of the latents.",
    ),
}
"""By the name that ``fastsae train --recipe`` takes."""


def recipe_options(name: str) -> dict[str, Any]:
    """The options of a recipe, with its name: ``RunOptions(**recipe_options("batchtopk") | {...})``."""
    check_choice("recipe", name, RECIPES)
    return {"recipe": name, **RECIPES[name].options}
