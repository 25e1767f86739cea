"""Optimizers that touch only the rows a batch used."""

from fastsae.optim.row_adam import RowAdam

__all__ = ["RowAdam"]
