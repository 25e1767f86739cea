"""A shuffle buffer: tokens of many texts mixed, in bounded memory, resumable to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastsae.checks import check_number, check_type, reject
from fastsae.data.activations import Activations

__all__ = ["ShuffleBuffer"]

_X = "x"  # the key of the rows where chunks are plain tensors


class ShuffleBuffer:
    """Mix a stream of chunks of tokens and iterate over it in batches. Every token comes out exactly once.

    ``size`` tokens are held and mixed; when half of them are out, as many new ones come in and all are mixed
    again; at the end of the stream the rest comes out. Memory: ``size`` rows and one chunk.

    An iteration is one pass over ``source``. Each draws on from the same generator, so each has another
    order. After ``load_state_dict`` the next iteration goes on where the state was taken, to the bit. The
    source is then restored by its own ``load_state_dict`` if it has one; else as many of its chunks as had
    been read are skipped.

    Args:
        source: an iterable of [n, d] tensors, of :class:`Activations`, or of dicts of [n, d_i] tensors; n may
            vary.
        batch_size: tokens in a batch.
        size: tokens held, at least two batches. For good mixing 10^5 and more.
        seed: of the order.
        drop_last: leave out the last batch if it isn't full.

    Yields:
        [batch_size, d] tensors, or dicts of them, in the dtype and on the device of the chunks.

    Raises:
        ValueError: chunks that aren't [n, d], or whose width changes.
    """

    def __init__(
        self,
        source: Any,
        batch_size: int,
        *,
        size: int = 131_072,
        seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        check_number("batch_size", batch_size, integer=True, low=1)
        check_number("size", size, integer=True, low=2 * batch_size)
        check_number("seed", seed, integer=True, low=0)
        self.source, self.batch_size, self.size, self.drop_last = source, batch_size, size, drop_last
        self._generator = torch.Generator().manual_seed(seed)
        self._clear()
        self._resume = False

    def _clear(self) -> None:
        self._pool: dict[str, Tensor] = {}  # [size, d]: the rows held, at the slots that _order names
        self._order = torch.empty(0, dtype=torch.int64)  # slots, in the order in which they are to come out
        self._at = 0  # how many of them are out already
        self._pending: dict[str, Tensor] = {}  # what didn't fit of the last chunk
        self._chunks = 0  # read from the source
        self._dry = False  # the source has ended
        self._plain = True  # chunks are tensors, not dicts

    def __iter__(self) -> Iterator[Any]:
        resumed, self._resume = self._resume, False
        if not resumed:
            self._clear()
        chunks = iter(self.source)
        if resumed and not _has_state(self.source) and not self._dry:
            for _ in range(self._chunks):
                next(chunks, None)
        while True:
            if not self._dry and len(self._order) - self._at <= self.size // 2:
                self._refill(chunks)
            slots = self._order[self._at : self._at + self.batch_size]
            if not len(slots) or (self.drop_last and len(slots) < self.batch_size):
                return
            self._at += len(slots)
            batch = self._rows(slots)
            yield batch[_X] if self._plain else batch

    def _rows(self, slots: Tensor) -> dict[str, Tensor]:
        return {name: pool.index_select(0, slots.to(pool.device)) for name, pool in self._pool.items()}

    def _refill(self, chunks: Iterator[Any]) -> None:
        """Fill the free slots from the source, and mix all that is held."""
        kept = self._order[self._at :]
        used = torch.zeros(self.size, dtype=torch.bool)
        used[kept] = True
        free = (~used).nonzero().flatten()
        filled = 0
        while filled < len(free) and (self._pending or self._read(chunks)):
            n = len(next(iter(self._pending.values())))
            slots = free[filled : filled + n]
            self._put(slots, {name: rows[: len(slots)] for name, rows in self._pending.items()})
            rest = {name: rows[len(slots) :] for name, rows in self._pending.items()}
            self._pending = rest if len(slots) < n else {}
            filled += len(slots)
        # After a resume the slots differ, but not the rows: what is kept, in its order, then what came in.
        held = torch.cat([kept, free[:filled]])
        self._order, self._at = held[torch.randperm(len(held), generator=self._generator)], 0

    def _put(self, slots: Tensor, rows: dict[str, Tensor]) -> None:
        for name, x in rows.items():
            if name not in self._pool:
                self._pool[name] = x.new_empty(self.size, x.shape[1])
            self._pool[name][slots.to(x.device)] = x

    def _read(self, chunks: Iterator[Any]) -> bool:
        """Take the next chunk; False at the end of the source."""
        try:
            chunk = next(chunks)
        except StopIteration:
            self._dry = True
            return False
        self._chunks += 1
        x: Any = chunk.x if isinstance(chunk, Activations) else chunk
        self._plain = not isinstance(x, dict)
        self._pending = {_X: x} if self._plain else dict(x)
        for name, rows in self._pending.items():
            check_type("source", rows, Tensor, "chunks that are tensors or dicts of tensors")
            width = self._pool[name].shape[1] if name in self._pool else "d"
            if rows.ndim != 2 or width not in ("d", rows.shape[1]):
                reject("source", f"a chunk {list(rows.shape)}", f"[n, {width}]")
        names = self._pool.keys() or self._pending.keys()
        if self._pending.keys() != names or len(set(map(len, self._pending.values()))) != 1:
            got = {name: list(rows.shape) for name, rows in self._pending.items()}
            reject("source", f"a chunk {got}", f"the same number of tokens for each of {', '.join(names)}")
        return True

    def state_dict(self) -> dict[str, Tensor | int | str]:
        """Return what a bit-exact continuation needs: the rows held, the generator, the source's state."""
        state: dict[str, Tensor | int | str] = {"size": self.size, "batch_size": self.batch_size}
        state |= {"chunks": self._chunks, "dry": int(self._dry), "plain": int(self._plain)}
        state["generator"] = self._generator.get_state()
        state |= {f"held.{name}": rows for name, rows in self._rows(self._order[self._at :]).items()}
        state |= {f"pending.{name}": rows.clone() for name, rows in self._pending.items()}
        if _has_state(self.source):
            state |= {f"source.{name}": value for name, value in self.source.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on from ``state``.

        Raises:
            ValueError: the state is of a buffer of another size or batch size.
        """
        for name in ("size", "batch_size"):
            if state[name] != getattr(self, name):
                reject("state", f"{name} {state[name]}", f"{name} {getattr(self, name)}, as in this buffer")
        self._clear()
        self._resume = True
        self._chunks, self._dry, self._plain = state["chunks"], bool(state["dry"]), bool(state["plain"])
        self._generator.set_state(state["generator"].cpu())
        held = _part(state, "held.")
        self._pending = _part(state, "pending.")
        self._order = torch.arange(len(next(iter(held.values()))) if held else 0)
        self._put(self._order, held)
        if _has_state(self.source) and not self._dry:
            self.source.load_state_dict(_part(state, "source."))


def _has_state(source: Any) -> bool:
    return hasattr(source, "state_dict") and hasattr(source, "load_state_dict")


def _part(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
