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


class FixedTail:
    """All memory of a tail, which must be there already.

    Args:
        tail: of the layer.
        mask: `[B, length]` of the tokens that the tail holds, 0 for padding; None when there is none.
        place: int64 `[1]`, where the next token goes.
        alive: boolean `[B]`, False for a row whose next token is padding.
    """

    def __init__(self, tail: Tail, mask: Tensor | None, place: Tensor, alive: Tensor) -> None:
        self.key, self.value = tail.tensors()
        for buffer in (self.key, self.value):
            # nothing times a weight of zero is nothing, but for what is not finite
            buffer[:, :, tail.length :] = 0
        self.place, self.alive = place, alive
        self.valid = torch.zeros(len(self.key), self.key.shape[2], dtype=torch.bool, device=self.key.device)
        self.valid[:, : tail.length] = True if mask is None else mask.to(self.key.device).bool()

    def take(self, key: Tensor, value: Tensor) -> None:
        """Writes key and value `[B, H_kv, 1, D]` of the new token."""
        self.key.index_copy_(2, self.place, key.to(self.key.dtype))
        self.value.index_copy_(2, self.place, value.to(self.value.dtype))
        self.valid.index_copy_(1, self.place, self.alive[:, None])

    def attend(self, call: AttentionCall, segments: Sequence[Segment]) -> Tensor:
        """Attention over the tail and what was sealed before it; returns `[B, 1, H_q, D]`."""
        query = call.folded_query(self.key.shape[1])
        mask = self.valid[:, None, None]
        state = decode_attention(query, self.key, self.value, mask, scale=call.scale, softcap=call.softcap)
        for segment in segments:
            state = segment.attend(query, call.scale, call.softcap, state)
        return call.unfolded(state[0])
