"""fastsae: sparse autoencoders of any width, trained and run on sparse operators.

The module is :class:`SAE`, its description :class:`SAEConfig`; :mod:`fastsae.functional` holds the operators,
:mod:`fastsae.optim` the row optimizer, :mod:`fastsae.training` the fused step and the trainer,
:mod:`fastsae.data` activations of a transformers model, :mod:`fastsae.evaluate` metrics and the report.
"""

from fastsae import backends, functional
from fastsae.checks import FastSAEError
from fastsae.code import SparseCode
from fastsae.config import SAEConfig
from fastsae.policies import (
    L0,
    L1,
    AuxK,
    BatchTopK,
    DecoderNormL1,
    Gated,
    GroupMax,
    HierarchicalTopK,
    JumpReLU,
    Matryoshka,
    MultiTopK,
    PreActivation,
    ReLU,
    Tanh,
    TargetL0,
    TopK,
)
from fastsae.sae import SAE, TrainingOutput, load

__version__ = "0.1.0"

__all__ = [
    "L0",
    "L1",
    "SAE",
    "AuxK",
    "BatchTopK",
    "DecoderNormL1",
    "FastSAEError",
    "Gated",
    "GroupMax",
    "HierarchicalTopK",
    "JumpReLU",
    "Matryoshka",
    "MultiTopK",
    "PreActivation",
    "ReLU",
    "SAEConfig",
    "SparseCode",
    "Tanh",
    "TargetL0",
    "TopK",
    "TrainingOutput",
    "backends",
    "functional",
    "load",
]
