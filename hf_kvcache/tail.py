"""`Tail`: the recent tokens of a layer, dense, in pre-allocated memory that new tokens are written into.

Appending moves no old data (transformers' `DynamicCache` copies the whole layer for every token). When the memory is
full it grows by a quarter, so that a token is moved a bounded number of times however long the generation.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_GROWTH = 32


class Tail:
    """Keys and values `[B, H_kv, length, D]` at the front of buffers `[B, H_kv, capacity, D]`."""

    def __init__(self) -> None:
        self.length = 0
        self._key: Tensor | None = None
        self._value: Tensor | None = None
        self._reserved = 0

    @property
    def key(self) -> Tensor:
        assert self._key is not None
        return self._key[:, :, : self.length]

    @property
    def value(self) -> Tensor:
        assert self._value is not None
        return self._value[:, :, : self.length]

    @property
    def capacity(self) -> int:
        return 0 if self._key is None else self._key.shape[2]

    def reserve(self, tokens: int) -> None:
        """Makes the next allocation at least this large, for a prompt that will come in chunks."""
        self._reserved = tokens

    def append(self, key: Tensor, value: Tensor) -> None:
        """Writes key and value `[B, H_kv, n, D]` behind the tokens held."""
        end = self.length + key.shape[2]
        if end > self.capacity:
            self._grow(end, key, value)
        self._key[:, :, self.length : end] = key
        self._value[:, :, self.length : end] = value
        self.length = end

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens` tokens; their memory is written over by the next ones."""
        self.length -= tokens

    def select_rows(self, rows: list[int]) -> None:
        """Makes batch row i a copy of the present row `rows[i]`."""
        if self._key is None or rows == list(range(self._key.shape[0])):
            return
        index = torch.tensor(rows, device=self._key.device)
        self._key, self._value = self._key.index_select(0, index), self._value.index_select(0, index)

    def clear(self) -> None:
        """Forgets all tokens and gives their memory back."""
        self.length, self._key, self._value, self._reserved = 0, None, None, 0

    def tensors(self) -> list[Tensor]:
        """The buffers, unused room included."""
        return [] if self._key is None else [self._key, self._value]

    def _grow(self, needed: int, key: Tensor, value: Tensor) -> None:
        roomy = needed + max(MIN_GROWTH, needed // 4)
        capacity = self._reserved if self._reserved >= needed else roomy
        self._key, self._value = (
            self._moved(old, new, capacity) for old, new in ((self._key, key), (self._value, value))
        )

    def _moved(self, old: Tensor | None, like: Tensor, capacity: int) -> Tensor:
        batch, heads, _, dim = like.shape
        buffer = like.new_empty(batch, heads, capacity, dim)
        if old is not None:
            buffer[:, :, : self.length] = old[:, :, : self.length]
        return buffer
