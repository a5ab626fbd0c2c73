"""`Tail`: the recent tokens of a layer, dense, in pre-allocated memory that new tokens are written into.

Appending moves no old data (transformers' `DynamicCache` copies the whole layer for every token). When the memory is
full it grows by an eighth, so that a token is moved a bounded number of times however long the generation.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_GROWTH = 16


class Tail:
    """Keys and values `[B, H_kv, length, D]` at the front of buffers `[B, H_kv, capacity, D]`."""

    def __init__(self) -> None:
        self.length = 0
        self._buffers: list[Tensor] = []
        self._reserved = 0

    @property
    def key(self) -> Tensor:
        return self._buffers[0][:, :, : self.length]

    @property
    def value(self) -> Tensor:
        return self._buffers[1][:, :, : self.length]

    @property
    def capacity(self) -> int:
        return self._buffers[0].shape[2] if self._buffers else 0

    def reserve(self, tokens: int) -> None:
        """Makes the next allocation at least this large, for a prompt that will come in chunks."""
        self._reserved = tokens

    def adopt(self, key: Tensor, value: Tensor) -> None:
        """Takes key and value `[B, H_kv, n, D]` as they are, in place of nothing: no copy is made."""
        self._buffers, self.length = [key, value], key.shape[2]

    def append(self, key: Tensor, value: Tensor) -> None:
        """Writes key and value `[B, H_kv, n, D]` behind the tokens held."""
        end = self.length + key.shape[2]
        if end > self.capacity or self._frozen or not self._holds(key, value):
            self._grow(end, key, value)
        for buffer, new in zip(self._buffers, (key, value), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end

    def make_room(self, tokens: int) -> None:
        """Takes memory for as many more tokens, so that they move nothing; there must be some tokens already."""
        if self.length + tokens > self.capacity or self._frozen:
            self._grow(self.length + tokens, *self._buffers)

    def advance(self) -> None:
        """Counts a token that was written into the memory behind the others."""
        self.length += 1

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens` tokens; their memory is written over by the next ones."""
        self.length -= tokens

    def without_first(self, tokens: int) -> Tail:
        """A new tail of all but the first `tokens` tokens; it keeps no memory of this one alive."""
        rest = Tail()
        if tokens < self.length:
            rest.append(self.key[:, :, tokens:], self.value[:, :, tokens:])
        return rest

    def select_rows(self, rows: list[int]) -> None:
        """Makes batch row i a copy of the present row `rows[i]`."""
        if self._buffers and rows != list(range(self._buffers[0].shape[0])):
            index = torch.tensor(rows, device=self._buffers[0].device)
            self._buffers = [buffer.index_select(0, index) for buffer in self._buffers]

    def tensors(self) -> list[Tensor]:
        """The buffers, unused room included."""
        return list(self._buffers)

    @property
    def _frozen(self) -> bool:
        """Whether the memory was made in inference mode and cannot be written to any more."""
        return bool(self._buffers) and self._buffers[0].is_inference() and not torch.is_inference_mode_enabled()

    def _holds(self, *new: Tensor) -> bool:
        """Whether the memory loses nothing of new tokens; autocast may have begun or ended since the first ones."""
        pairs = zip(self._buffers, new, strict=True)
        return all(buffer.dtype == torch.promote_types(buffer.dtype, tensor.dtype) for buffer, tensor in pairs)

    def _grow(self, needed: int, key: Tensor, value: Tensor) -> None:
        roomy = needed + max(MIN_GROWTH, needed // 8)
        capacity = self._reserved if self._reserved >= needed else roomy
        held = self._buffers or [key, value]
        grown = [
            new.new_empty(*new.shape[:2], capacity, new.shape[3], dtype=torch.promote_types(new.dtype, old.dtype))
            for new, old in zip((key, value), held, strict=True)
        ]
        for buffer, old in zip(grown, self._buffers, strict=False):
            buffer[:, :, : self.length] = old[:, :, : self.length]
        self._buffers = grown
