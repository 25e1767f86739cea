"""Training: the fused step, the trainer, and whole runs from text or activations to a report."""

from fastsae.training.step import drop_batches, train_step
from fastsae.training.together import fit_together
from fastsae.training.trainer import NotFinite, TrainConfig, Trainer

__all__ = ["NotFinite", "TrainConfig", "Trainer", "drop_batches", "fit_together", "train_step"]
