"""`Tail`: the recent tokens of a layer, dense, in pre-allocated memory that new tokens are written into.

Appending moves no old data (transformers' `DynamicCache` copies the whole layer for every token). When the memory is
full it grows by an eighth, so that a token is moved a bounded number of times however long the generation. Old tokens
can be forgotten, too (a sliding window), and move the others no more often: those stay where they are until the memory
is full.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_GROWTH = 16


class Tail:
    """Keys and values `[B, H_kv, length, D]` in buffers `[B, H_kv, capacity, D]`.

    They lie at the front of the buffers, or, where `keep_last` has forgotten some, further behind.
    """

    def __init__(self) -> None:
        self.length = self._first = 0
        self._buffers: list[Tensor] = []
        self._own = False
        self._reserved = 0

    @property
    def key(self) -> Tensor:
        return self._buffers[0].narrow(2, self._first, self.length)

    @property
    def value(self) -> Tensor:
        return self._buffers[1].narrow(2, self._first, self.length)

    @property
    def capacity(self) -> int:
        return self._buffers[0].shape[2] if self._buffers else 0

    def reserve(self, tokens: int) -> None:
        """Makes the next allocation at least this large, for a prompt that will come in chunks."""
        self._reserved = tokens

    def adopt(self, key: Tensor, value: Tensor) -> None:
        """Takes key and value `[B, H_kv, n, D]` as they are, in place of nothing: no copy is made."""
        self._buffers, self._own = [key, value], False
        self._first, self.length = 0, key.shape[2]

    def append(self, key: Tensor, value: Tensor) -> None:
        """Writes key and value `[B, H_kv, n, D]` behind the tokens held."""
        needed = self.length + key.shape[2]
        if self._first + needed > self.capacity or not self._writable or not self._holds(key, value):
            self._grow(needed, key, value)
        for buffer, new in zip(self._buffers, (key, value), strict=True):
            buffer[:, :, self._first + self.length : self._first + needed] = new
        self.length = needed

    def make_room(self, tokens: int) -> None:
        """Takes memory for as many more tokens, so that they move nothing; there must be some tokens already."""
        if self._first + self.length + tokens > self.capacity or not self._writable:
            self._grow(self.length + tokens, *self._buffers)

    def advance(self) -> None:
        """Counts a token that was written into the memory behind the others."""
        self.length += 1

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens` tokens; their memory is written over by the next ones."""
        self.length -= tokens

    def keep_last(self, tokens: int) -> None:
        """Forgets all but the last `tokens` tokens. They move only where they leave far more memory than they need."""
        forgotten = max(self.length - tokens, 0)
        self._first, self.length = self._first + forgotten, self.length - forgotten
        # room for a while was taken here on purpose; what was adopted has none, and stays only if all of it is needed
        places = self.length + (2 * _room(self.length) if self._own else 0)
        if any(buffer.untyped_storage().nbytes() > places * _token_bytes(buffer) for buffer in self._buffers):
            self._buffers = [held.clone(memory_format=torch.contiguous_format) for held in (self.key, self.value)]
            self._first, self._own = 0, True

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
    def _writable(self) -> bool:
        """Whether the memory was taken here, and not in an inference mode that is over."""
        return self._own and (torch.is_inference_mode_enabled() or not self._buffers[0].is_inference())

    def _holds(self, *new: Tensor) -> bool:
        """Whether the memory loses nothing of new tokens; autocast may have begun or ended since the first ones."""
        pairs = zip(self._buffers, new, strict=True)
        return all(buffer.dtype == torch.promote_types(buffer.dtype, tensor.dtype) for buffer, tensor in pairs)

    def _grow(self, needed: int, key: Tensor, value: Tensor) -> None:
        capacity = self._reserved if self._reserved >= needed else needed + _room(needed)
        held = self._buffers or [key, value]
        grown = [
            new.new_empty(*new.shape[:2], capacity, new.shape[3], dtype=torch.promote_types(new.dtype, old.dtype))
            for new, old in zip((key, value), held, strict=True)
        ]
        for buffer, old in zip(grown, self._buffers, strict=False):
            buffer[:, :, : self.length] = old.narrow(2, self._first, self.length)
        self._buffers, self._first, self._own = grown, 0, True


def _room(tokens: int) -> int:
    """How many more tokens there is memory for where some come to `tokens`."""
    return max(MIN_GROWTH, tokens // 8)


def _token_bytes(buffer: Tensor) -> int:
    batch, heads, _, dim = buffer.shape
    return batch * heads * dim * buffer.element_size()
