"""`FixedTail`: the tail of a layer in a step whose shapes and addresses stay the same from token to token.

A step that is recorded once and replayed (a CUDA graph) can neither grow a tensor nor read a length that Python keeps.
So the new token goes to a place that a tensor names, and all memory of the tail is attended, through a mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_kvcache.attention import AttentionCall
from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.segment import Segment
from hf_kvcache.tail import Tail


class Places:
    """Which places of a tail hold a token: the same in every layer whose tail is as long.

    Args:
        tail: of one of these layers.
        mask: `[B, length]` of the tokens that it holds, 0 for padding; None when there is none.

    Attributes:
        next: int64 `[1]`, where the next token goes.
        valid: boolean `[B, capacity]`.
    """

    def __init__(self, tail: Tail, mask: Tensor | None) -> None:
        key, _ = tail.tensors()
        self.next = torch.zeros(1, dtype=torch.int64, device=key.device)
        self.valid = torch.zeros(len(key), tail.capacity, dtype=torch.bool, device=key.device)
        self.valid[:, : tail.length] = True if mask is None else mask.to(key.device).bool()

    def take(self, alive: Tensor) -> None:
        """Counts the next token in, for the rows `[B]` where it is none of padding."""
        self.valid.index_copy_(1, self.next, alive[:, None])


class FixedTail:
    """All memory of a tail, which must be there already; `places` says what of it holds a token."""

    def __init__(self, tail: Tail, places: Places) -> None:
        self.key, self.value = tail.tensors()
        for buffer in (self.key, self.value):
            # nothing times a weight of zero is nothing, but for what is not finite
            buffer[:, :, tail.length :] = 0
        self.places = places

    def take(self, key: Tensor, value: Tensor) -> None:
        """Writes key and value `[B, H_kv, 1, D]` of the new token."""
        self.key.index_copy_(2, self.places.next, key.to(self.key.dtype))
        self.value.index_copy_(2, self.places.next, value.to(self.value.dtype))

    def attend(self, call: AttentionCall, segments: Sequence[Segment]) -> Tensor:
        """Attention over the tail and what was sealed before it; returns `[B, 1, H_q, D]`."""
        query = call.folded_query(self.key.shape[1])
        mask = self.places.valid[:, None, None]
        state = decode_attention(query, self.key, self.value, mask, scale=call.scale, softcap=call.softcap)
        for segment in segments:
            state = segment.attend(query, call.scale, call.softcap, state)
        return call.unfolded(state[0])
