"""`ChunkedCodec`: attention over encoded entries in plain PyTorch, for codecs without a kernel of their own.

A few thousand entries are decoded, attended and forgotten at a time, and the partial results merged: no dense copy of
more than that exists.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.codecs.codec import Payload, join_entries, one_reader, select_entries
from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.kernels.library import at_once
from hf_kvcache.kernels.merge_states import merge_states

ENTRIES = 4096
# the same on a GPU, which a launch of so few would leave idle
GPU_ENTRIES = 1 << 18


class ChunkedCodec(ABC):
    """A `Codec` that can decode any range of its entries.

    Attributes:
        shared: names in the payload that do not count entries. `like` has the dtype of what was encoded.
        of_owners: names of those that count owners.
    """

    shared: ClassVar[tuple[str, ...]] = ("like",)
    of_owners: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def decode_range(self, payload: Payload, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Key and value `[last - first, D]` of the entries from `first` to before `last`."""

    def decode(self, payload: Payload, owners: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.decode_range(payload, 0, next(len(payload[name]) for name in payload if name not in self._constant))

    def attend(
        self,
        payload: Payload,
        start: int,
        shape: tuple[int, int, int],
        query: Tensor,
        scale: float,
        softcap: float,
        mask: Tensor | None = None,
        owners: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        rows, heads, tokens = shape
        folded, mask = one_reader(query, heads, tokens, mask)
        blocks = rows * heads
        folded = folded.reshape(blocks, 1, *folded.shape[2:])
        if mask is not None:
            mask = (mask if mask.dtype == torch.bool else mask == 0).flatten(0, 1).unsqueeze(1)
        most = at_once(query.device, ENTRIES, GPU_ENTRIES)
        together = max(1, most // max(1, tokens))
        outs, lses = [], []
        for block in range(0, blocks, together):
            some = slice(block, min(block + together, blocks))
            count = some.stop - block
            part = folded[some]
            out, lse = torch.zeros_like(part), part.new_full(part.shape[:3], -torch.inf, dtype=torch.float32)
            for token in range(0, tokens, most):
                size = min(most, tokens - token)
                first = start + block * tokens + token
                key, value = (
                    decoded.to(query.dtype).view(count, 1, size, -1)
                    for decoded in self.decode_range(payload, first, first + count * size)
                )
                seen = None if mask is None else mask[some, ..., token : token + size]
                new_out, new_lse = decode_attention(part, key, value, seen, scale=scale, softcap=softcap)
                if seen is not None:
                    # a row that may attend to nothing here: the kernel averages over what is masked
                    blind = ~seen.any(-1)
                    new_out, new_lse = new_out.masked_fill(blind[..., None], 0), new_lse.masked_fill(blind, -torch.inf)
                out, lse = merge_states(out, lse.to(new_lse.dtype), new_out, new_lse)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs).view(query.shape), torch.cat(lses).view(query.shape[:3])

    def select(self, payload: Payload, index: Tensor, owners: Tensor | None = None) -> Payload:
        return select_entries(payload, index, owners, self.shared, self.of_owners)

    def join(self, payloads: Sequence[Payload], runs: int = 1) -> Payload:
        return join_entries(payloads, shared=self._constant, runs=runs)

    @property
    def _constant(self) -> tuple[str, ...]:
        """Names of what does not count entries."""
        return (*self.shared, *self.of_owners)
