"""Attention over encoded entries in plain PyTorch: decode a few thousand entries, attend, forget them, merge.

For codecs without a kernel of their own. No dense copy of more than `ENTRIES` entries exists at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.kernels.merge_states import merge_states

ENTRIES = 4096

Decode = Callable[[int, int], tuple[Tensor, Tensor]]


def attend_in_chunks(
    decode: Decode,
    start: int,
    shape: tuple[int, int, int],
    query: Tensor,
    scale: float,
    softcap: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`Codec.attend` for a codec that can decode any range of entries.

    Args:
        decode: from the first entry and the one after the last to key and value `[n, D]`.
        start, shape, query, scale, softcap, mask: as for `Codec.attend`.
    """
    rows, heads, tokens = shape
    blocks = rows * heads
    if mask is not None:
        mask = mask.expand(*query.shape[:3], tokens).flatten(0, 1).unsqueeze(1)
    folded = query.reshape(blocks, 1, *query.shape[2:])
    together = max(1, ENTRIES // max(1, tokens))
    outs, lses = [], []
    for block in range(0, blocks, together):
        some = slice(block, min(block + together, blocks))
        count = some.stop - block
        part = folded[some]
        out, lse = torch.zeros_like(part), part.new_full(part.shape[:3], -torch.inf, dtype=torch.float32)
        for token in range(0, tokens, ENTRIES):
            size = min(ENTRIES, tokens - token)
            first = start + block * tokens + token
            key, value = (
                decoded.to(query.dtype).view(count, 1, size, -1) for decoded in decode(first, first + count * size)
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
