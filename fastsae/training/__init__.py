"""Training: the fused step and the trainer."""

from fastsae.training.step import train_step

__all__ = ["train_step"]
