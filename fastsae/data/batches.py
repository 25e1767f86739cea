"""Shuffled batches from an array of activations, in an order that a few integers describe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fastsae.checks import check_number, check_type, reject
from fastsae.data.store import ActivationStore, fetch_rows

__all__ = ["Batches", "split_rows"]

Rows = ActivationStore | np.ndarray | Tensor


class Batches:
    """Iterate over batches of rows, each pass in a new order.

    The stream is pass 0, pass 1, ... laid end to end; pass p visits every row once, in an order drawn from
    (seed, p). A batch may straddle two passes. Iterating again repeats the same batches, unless
    ``load_state_dict`` came before: the next iteration then starts at that place. Reads one batch of rows at
    a time; holds one permutation (8 bytes a row).

    Args:
        x: [n, d]: a store, or any numpy array or tensor of numbers; or several of them by name, all of n
            rows, of which each batch takes the same.
        batch_size: tokens in a batch.
        rows: [r] integers, the rows to use; None: all.
        seed: of the order.
        shuffle: False: the rows as they come, in each pass.
        n_tokens: length of the stream; None: one pass.
        drop_last: leave out the last batch if it isn't full.

    Yields:
        [batch_size, d] float32 tensors, on the CPU or where the tensor ``x`` is; for several a dict of them.

    Raises:
        ValueError: sizes that don't fit or differ, rows out of range, or nothing to yield.
    """

    def __init__(
        self,
        x: Rows | Mapping[str, Rows],
        batch_size: int,
        *,
        rows: Sequence[int] | np.ndarray | Tensor | None = None,
        seed: int = 0,
        shuffle: bool = True,
        n_tokens: int | None = None,
        drop_last: bool = True,
    ) -> None:
        n = _check_rows(x)
        check_number("batch_size", batch_size, integer=True, low=1)
        check_number("seed", seed, integer=True, low=0)
        self.x = dict(x) if isinstance(x, Mapping) else x
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.rows = None if rows is None else np.asarray(rows)
        if self.rows is not None:
            if self.rows.ndim != 1 or self.rows.dtype.kind not in "iu":
                reject("rows", f"{self.rows.dtype} {list(self.rows.shape)}", "integers [r]")
            if self.rows.size and not 0 <= self.rows.min() <= self.rows.max() < n:
                reject("rows", f"rows {self.rows.min()} to {self.rows.max()}", f"rows within 0 to {n - 1}")
        self.n_rows = n if self.rows is None else len(self.rows)
        if n_tokens is not None:
            check_number("n_tokens", n_tokens, integer=True, low=1)
        total = self.n_rows if n_tokens is None else n_tokens
        if not self.n_rows or (drop_last and total < batch_size):
            reject("batch_size", batch_size, f"at most the {total if self.n_rows else 0} tokens there are")
        self.n_tokens = total // batch_size * batch_size if drop_last else total
        self._position = self._start = 0
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """The number of batches in the whole stream."""
        return -(-self.n_tokens // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        self._position, self._start = self._start, 0
        while self._position < self.n_tokens:
            size = min(self.batch_size, self.n_tokens - self._position)
            rows = self._rows_at(self._position, size)
            self._position += size
            if isinstance(self.x, dict):
                yield {name: fetch_rows(x, rows) for name, x in self.x.items()}
            else:
                yield fetch_rows(self.x, rows)

    def _rows_at(self, position: int, size: int) -> np.ndarray:
        parts = []
        while size > 0:
            epoch, offset = divmod(position, self.n_rows)
            parts.append(self._pass(epoch)[offset : offset + size])
            position, size = position + len(parts[-1]), size - len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _pass(self, epoch: int) -> np.ndarray:
        """The rows in the order of pass ``epoch``."""
        if self._order is None or self._order[0] != epoch:
            if self.shuffle:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.n_rows)
            else:
                order = np.arange(self.n_rows)
            self._order = epoch, order if self.rows is None else self.rows[order]
        return self._order[1]

    def state_dict(self) -> dict[str, int]:
        """Return the place in the stream: integers only."""
        epoch, position = divmod(max(self._position, self._start), self.n_rows)
        return {"seed": self.seed, "n_rows": self.n_rows, "pass": epoch, "position": position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration start where ``state`` was taken, to the bit.

        Raises:
            ValueError: the state belongs to another seed or number of rows.
        """
        if (state["seed"], state["n_rows"]) != (self.seed, self.n_rows):
            got = f"seed {state['seed']} and {state['n_rows']} rows"
            reject("state", got, f"seed {self.seed} and {self.n_rows} rows, as in these batches")
        self._start = state["pass"] * self.n_rows + state["position"]
        self._position = 0


def _check_rows(x: Any) -> int:
    """The number of rows of ``x``, or of each entry where it is a mapping."""
    named = x if isinstance(x, Mapping) else {"": x}
    for one in named.values():
        kinds = (ActivationStore, np.ndarray, Tensor)
        check_type("x", one, kinds, "an ActivationStore, an array or a tensor, or several by name")
        if not isinstance(one, ActivationStore) and one.ndim != 2:
            reject("x", list(one.shape), "[n, d]")
    lengths = {name: len(one) for name, one in named.items()}
    if len(set(lengths.values())) != 1:
        got = ", ".join(f"{n} rows for {name!r}" for name, n in lengths.items()) or "an empty mapping"
        reject("x", got, "as many rows for every name, and at least one name")
    return next(iter(lengths.values()))


def split_rows(n: int, held_out: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle the rows 0..n-1 by ``seed`` and hold out the last ``held_out`` of them.

    Returns:
        (train_rows [n - held_out], held_out_rows [held_out]), int64.
    """
    check_number("n", n, integer=True, low=1)
    check_number("held_out", held_out, integer=True, low=0, high=n - 1)
    check_number("seed", seed, integer=True, low=0)
    order = np.random.default_rng(seed).permutation(n)
    return order[: n - held_out], order[n - held_out :]
