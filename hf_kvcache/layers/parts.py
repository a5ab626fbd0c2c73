"""Attention over what a layer holds: its tail, then the segments that were sealed before it, joined one by one.

Many queries attend in turns, each over the columns that its last query sees. The query heads of a group are rows of one
query here, and the mask is repeated for each of them: of a long second turn at once it would be larger than the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_kvcache.attention import AttentionCall
from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.layers.replay import QUERIES_AT_ONCE
from hf_kvcache.segment import Segment
from hf_kvcache.tail import Tail


def attend_parts(call: AttentionCall, tail: Tail, segments: Sequence[Segment]) -> Tensor:
    """Attention of queries whose own tokens are the last ones of the tail; returns `[B, L, H_q, D]`."""
    outs = []
    for start in range(0, call.length, QUERIES_AT_ONCE):
        end = min(start + QUERIES_AT_ONCE, call.length)
        later = call.length - end
        part = call.part(start, end, 0 if call.mask is None else call.mask.shape[-1] - later)
        outs.append(_attend(part, tail, tail.length - later, segments))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _attend(call: AttentionCall, tail: Tail, tokens: int, segments: Sequence[Segment]) -> Tensor:
    """Attention over the first `tokens` tokens of the tail and all segments."""
    key, value = tail.key[:, :, :tokens], tail.value[:, :, :tokens]
    query = call.folded_query(key.shape[1])
    mask = call.folded_mask(query.shape[2] // call.length, tokens)
    state = decode_attention(query, key, value, mask, scale=call.scale, softcap=call.softcap)
    for segment in segments:
        state = segment.attend(query, call.scale, call.softcap, state)
    return call.unfolded(state[0])
