"""Training: the fused step, the trainer, and whole runs from text or activations to a report."""

from fastsae.training.recipes import RECIPES, recipe_options
from fastsae.training.starts import resample_
from fastsae.training.step import drop_batches, train_step
from fastsae.training.together import fit_together
from fastsae.training.trainer import NotFinite, TrainConfig, Trainer

__all__ = [
    "RECIPES",
    "NotFinite",
    "TrainConfig",
    "Trainer",
    "drop_batches",
    "fit_together",
    "recipe_options",
    "resample_",
    "train_step",
]
