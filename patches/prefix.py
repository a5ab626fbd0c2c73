"""Giving a prompt to the store of prefixes, and taking what it has of one: the part around the decoder's forward.

Before a forward that brings an announced prompt, the layers adopt what the store knows, and the decoder gets only the
tokens that are left. What cannot be looked up soundly is computed: embeddings in place of tokens, positions that are
not those of the tokens, weights or rotary embeddings that depend on more than the prefix, hooks that may do anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_kvcache.cache import KVCache
from hf_kvcache.fingerprint import model_digest
from hf_kvcache.patches.adapter import Adapter, home
from hf_kvcache.patches.rotary import length_dependent

if TYPE_CHECKING:
    from hf_kvcache.sequential.session import ModelFacts

# arguments of a decoder that have a column for every token of the forward
BY_TOKEN = ("input_ids", "position_ids", "cache_position")
# packages whose hooks record outputs or ask for gradients, and change nothing while generating
HARMLESS = {"hf_kvcache", "transformers"}


def adopt_prefix(decoder: nn.Module, cache: KVCache, kwargs: dict[str, Any], adapter: Adapter) -> None:
    """Has the layers of `cache` adopt what the store has of a forward, and takes those tokens out of its arguments."""
    session = cache.prompts
    if session is None or not session.active:
        return
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    positions = kwargs.get("position_ids")
    if ids is None or not _plain(decoder, ids.device) or not _in_order(positions, mask, cache, ids.shape[1]):
        session.stop()
        return
    if _hooked(decoder) or any(tensor.device.type == "meta" for tensor in decoder.parameters()):
        # what a hook does, and weights that are elsewhere, cannot be told from others
        session.stop()
        return
    facts = session.facts
    if facts is None or session.ends_with(ids.shape[1]):
        # it reads weights, so not for every chunk; again at the end, after which pages are written as the first one's
        facts = model_facts(decoder, cache, adapter, model_digest(decoder))
    producers = cache.producers
    adopted = session.before(ids, mask, facts, list(producers.values()))
    for name in BY_TOKEN:
        if adopted and isinstance(kwargs.get(name), Tensor):
            kwargs[name] = kwargs[name][..., adopted:]


def model_facts(decoder: nn.Module, cache: KVCache, adapter: Adapter, weights: str) -> ModelFacts:
    """What the layers of `cache` hold of a token, where, and how RoPE turns it."""
    # only users of a store pay for its modules
    from hf_kvcache.sequential.page import Geometry
    from hf_kvcache.sequential.session import ModelFacts

    attentions = [adapter.find_attention(decoder, layer) for layer in cache.producers]

    def rotate(place: int, vectors: Tensor, positions: Tensor, inverse: bool) -> Tensor:
        return adapter.rotary.of(decoder, attentions[place])(vectors, positions, inverse)

    geometry = Geometry(
        tuple(cache.producers),
        tuple(heads_of(attention) for attention in attentions),
        tuple(attention.head_dim for attention in attentions),
        decoder.dtype,
    )
    return ModelFacts(weights, geometry, [home(attention) or decoder.device for attention in attentions], rotate)


def store_prefix(decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """The hook after the decoder's forward: a prompt that is complete goes to the store."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, KVCache) and cache.prompts is not None and not cache.replaying:
        cache.prompts.after()


def heads_of(attention: nn.Module) -> int:
    """KV heads of an attention module; what it then computes is checked against this."""
    return getattr(attention, "num_key_value_heads", None) or attention.config.num_key_value_heads


def _plain(decoder: nn.Module, device: torch.device) -> bool:
    """Whether keys and values depend on the tokens and the weights alone."""
    return not (decoder.training or torch.is_autocast_enabled(device.type) or length_dependent(decoder.config))


def _hooked(decoder: nn.Module) -> bool:
    """Whether anybody may change what the decoder computes: steering vectors, adapters chosen row by row."""
    everywhere = nn.modules.module
    found = [everywhere._global_forward_pre_hooks, everywhere._global_forward_hooks]
    for module in decoder.modules():
        found += [module._forward_pre_hooks, module._forward_hooks]
    homes = {str(getattr(hook, "__module__", "")).partition(".")[0] for hooks in found for hook in hooks.values()}
    return not homes <= HARMLESS


def _in_order(positions: Tensor | None, mask: Tensor | None, cache: KVCache, new: int) -> bool:
    """Whether the tokens of a forward stand at the positions that they have in their rows."""
    seen = cache.get_seq_length()
    if mask is None:
        expected = torch.arange(seen, seen + new)[None]
    else:
        if mask.dim() != 2 or mask.shape[1] != seen + new:
            return False
        expected = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, seen:].cpu()
    if positions is None:
        return mask is None or bool(mask.bool().all())
    if positions.dim() != 2 or positions.shape[1] != new:
        return False
    real = torch.ones_like(expected, dtype=torch.bool) if mask is None else mask[:, seen:].bool().cpu()
    return bool(((positions.cpu() == expected) | ~real).all())
