"""The attention functions that a patched model calls, and the record of one such call.

transformers hands the result of `Cache.update` untouched to the attention function. Our cache layers return themselves
there, so the function finds the layer, the post-RoPE query and the mask in one place, and the layer decides how to
attend. In a forward without a cache (perplexity, training) key and value are ordinary tensors, and the model's own
attention runs on them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_kvcache.autocast import lowered, without_autocast
from hf_kvcache.eviction import Rotation
from hf_kvcache.sharing import ResidualPlan, SharingPlan

KV = tuple[Tensor, Tensor]

# name of our function by the attention that the model had; no name holds "flash", which transformers looks for
NAMES = {
    "sdpa": "hf_kvcache",
    "eager": "hf_kvcache_eager",
    "flash_attention_2": "hf_kvcache_fa2",
    "flash_attention_3": "hf_kvcache_fa3",
}


def register(base: str) -> str:
    """Registers our attention and mask function for models that had the attention `base`; returns their name."""
    if base not in NAMES:
        raise NotImplementedError(
            f"attention implementation {base!r} is not supported, expected one of {', '.join(NAMES)}; "
            "load the model with attn_implementation='sdpa'"
        )
    AttentionInterface.register(NAMES[base], partial(attention, base=base))
    # the boolean mask of sdpa for all of them: None when plainly causal, which Flash needs, and eager can be given one
    AttentionMaskInterface.register(NAMES[base], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return NAMES[base]


class AttendingLayer(Protocol):
    """A cache layer in the place of key and value."""

    def attend(self, call: AttentionCall) -> Tensor: ...


class ResidualContext:
    """Carries the KV of bottom layers through one forward to the layers that add it to their own (YOCO++).

    Args:
        plan: which layers do.
        mixers: for each of them what makes its KV of both, from pairs of key, after RoPE, and value.
    """

    def __init__(self, plan: ResidualPlan, mixers: Mapping[int, Callable[[KV, KV], KV]]) -> None:
        self.plan, self.mixers = plan, mixers
        self.bottom: dict[int, KV] = {}

    def mix(self, layer: int, key: Tensor, value: Tensor) -> KV:
        """The KV that `layer`, whose own is given, stores and reads."""
        source = self.plan.sources[layer]
        if source != layer:
            return self.mixers[layer](self.bottom[source], (key, value))
        if source in self.plan.sources[layer + 1 :]:
            self.bottom[layer] = key, value
        return key, value


class SharingContext:
    """Carries producers' KV to their consumers through one forward without a cache.

    A plain object, since wrappers that rebuild dictionaries and lists would lose what is written into it.
    """

    def __init__(self, plan: SharingPlan, residual: ResidualContext | None = None) -> None:
        self.plan, self.residual = plan, residual
        self.kv: dict[int, KV] = {}

    def resolve(self, call: AttentionCall, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that the calling layer is to read."""
        source = self.plan.source_layers[call.layer]
        if source != call.layer:
            return self.kv[source]
        if self.residual is not None:
            key, value = self.residual.mix(call.layer, key, value)
        self.kv[call.layer] = key, value
        return key, value


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention module.

    Args:
        module: the attention module.
        query: `[B, H_q, L, D]`, after RoPE.
        mask: boolean `[B, 1, L, seen]` (True = attend), or None when plainly causal and unpadded.
        scale: factor of the scores.
        base: the attention implementation that the model had.
        dropout: of the attention weights.
        rotation: gives the rotary embedding of an attention module; None where nobody asked for it.
        extra: the remaining keyword arguments of the model.
    """

    module: torch.nn.Module
    query: Tensor
    mask: Tensor | None
    scale: float
    base: str
    dropout: float = 0.0
    rotation: Callable[[torch.nn.Module], Rotation] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def layer(self) -> int:
        return self.module.layer_idx

    @property
    def length(self) -> int:
        """New tokens in this forward."""
        return self.query.shape[2]

    @property
    def softcap(self) -> float:
        return self.extra.get("softcap") or 0.0

    def to(self, device: torch.device) -> AttentionCall:
        """The call with its query on `device`: in decoding it is far smaller than the keys it would meet there."""
        if self.query.device == device:
            return self
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, query=self.query.to(device), mask=mask)

    def part(self, start: int, end: int, seen: int = 0) -> AttentionCall:
        """The call with only the queries `start` to `end`, and the mask of the first `seen` tokens; 0 for no mask."""
        mask = None if self.mask is None or not seen else self.mask[:, :, start:end, :seen]
        return replace(self, query=self.query[:, :, start:end], mask=mask)

    def dense(self, key: Tensor, value: Tensor) -> Tensor:
        """The model's own attention over key and value `[B, H_kv, T, D]`; returns `[B, L, H_q, D]`."""
        # a cache that was filled under another autocast holds another dtype
        key, value = key.to(self.query.dtype), value.to(self.query.dtype)
        function, mask = _base_function(self.base, self.module, self.mask, self.query, key, self.softcap)
        return function(
            self.module, self.query, key, value, mask, scaling=self.scale, dropout=self.dropout, **self.extra
        )[0]

    def folded_query(self, num_kv_heads: int) -> Tensor:
        """The query as `[B, H_kv, M, D]`: the query heads of a group become rows, M = group size x L."""
        batch, _, _, dim = self.query.shape
        return self.query.reshape(batch, num_kv_heads, -1, dim)

    def unfolded(self, out: Tensor) -> Tensor:
        """`[B, H_kv, M, D]` back to `[B, L, H_q, D]`."""
        batch, heads, length, _ = self.query.shape
        return out.reshape(batch, heads, length, -1).transpose(1, 2).contiguous()

    def folded_mask(self, group: int, tokens: int) -> Tensor | None:
        """The mask of the last `tokens` tokens for a folded query: `[B, 1, M, tokens]`, None when all are attended."""
        mask = self.mask
        if mask is None:
            if self.length == 1:
                return None
            mask = causal_mask(self.length, tokens, self.query.device)
        return mask[..., -tokens:].repeat(1, 1, group, 1)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | AttendingLayer,
    value: Tensor | AttendingLayer,
    attention_mask: Tensor | None,
    *,
    base: str,
    scaling: float | None = None,
    dropout: float = 0.0,
    kv_sharing: SharingContext | None = None,
    kv_rotation: Callable[[torch.nn.Module], Rotation] | None = None,
    positions_to_keep: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function; `key` is a cache layer, or a tensor in a forward without a cache.

    `positions_to_keep` is for the layers above (early exit) and is not handed on.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query = lowered(query)[0]
    call = AttentionCall(module, query, attention_mask, scale, base, dropout, kv_rotation, kwargs)
    if not isinstance(key, Tensor):
        with without_autocast(query.device):
            return key.attend(call).to(query.device), None
    if kv_sharing is not None:
        key, value = (tensor.to(query.device) for tensor in kv_sharing.resolve(call, key, value))
    return call.dense(*lowered(key, value)), None


def causal_mask(length: int, tokens: int, device: torch.device) -> Tensor:
    """Boolean `[1, 1, length, tokens]` for queries that are the last `length` of `tokens` tokens."""
    ones = torch.ones(length, tokens, dtype=torch.bool, device=device)
    return ones.tril(tokens - length)[None, None]


def attend_windows(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor, window: int
) -> Tensor:
    """Sliding-window attention in time and memory linear in the length: block by block of queries, each over its keys.

    Args:
        attend: attention of a block of queries over some keys and values, with a boolean mask; returns `[B, L, H, D]`.
        query: `[B, H_q, L, D]`, the last L of the tokens of key and value `[B, H_kv, T, D]`. No padding.
        window: tokens that a query sees, itself included.
    """
    length, tokens = query.shape[2], key.shape[2]
    parts = []
    for start in range(0, length, window):
        end = min(start + window, length)
        first, last = max(tokens - length + start - window + 1, 0), tokens - length + end
        ones = torch.ones(end - start, last - first, dtype=torch.bool, device=query.device)
        distance = last - first - (end - start)
        mask = ones.tril(distance).triu(distance - window + 1)[None, None]
        parts.append(attend(query[:, :, start:end], key[:, :, first:last], value[:, :, first:last], mask))
    return torch.cat(parts, dim=1)


def _base_function(base: str, module, mask: Tensor | None, query: Tensor, key: Tensor, softcap: float):
    """The attention to run for `base`, and the mask in the form that it takes."""
    length, tokens = query.shape[2], key.shape[2]
    if mask is None and 1 < length < tokens:
        # the last positions only, after an early exit: sdpa would take them for the first ones
        mask = causal_mask(length, tokens, query.device)
    if base == "eager" or softcap:
        if mask is None and length > 1:
            mask = causal_mask(length, tokens, query.device)
        if mask is not None and mask.dtype == torch.bool:
            zeros = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device)
            mask = zeros.masked_fill_(~mask, torch.finfo(query.dtype).min)
        return sys.modules[type(module).__module__].eager_attention_forward, mask
    if mask is None:
        return ALL_ATTENTION_FUNCTIONS[base], None
    return ALL_ATTENTION_FUNCTIONS["sdpa"], mask
