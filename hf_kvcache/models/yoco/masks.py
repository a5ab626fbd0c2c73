"""The masks of YOCO: which tokens a query reads, and which enter the state of retention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices

from hf_kvcache.models.yoco.configuration_yoco import YocoConfig


def cross_mask(
    config: YocoConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    position_ids: Tensor,
    rows: int,
) -> Tensor | None:
    """The cross-decoder's mask for the last `rows` queries, in the form that the attention implementation takes.

    A mask of all queries would be quadratic in the prompt. It is made only where it says more than which tokens are
    padding: the caller gave such a mask, or several sequences in one row.
    """
    length = inputs_embeds.shape[1]
    arguments: dict[str, Any] = {"config": config, "attention_mask": attention_mask}
    given = attention_mask is not None and attention_mask.dim() != 2
    alone = attention_mask is None and cache is None
    if rows == length or given or (alone and find_packed_sequence_indices(position_ids) is not None):
        mask = create_causal_mask(
            inputs_embeds=inputs_embeds, past_key_values=cache, position_ids=position_ids, **arguments
        )
        return mask[:, :, -rows:] if mask is not None and mask.dim() == 4 else mask
    if cache is not None:
        seen, sizes = cache.get_seq_length(), cache.get_mask_sizes(length, config.num_self_decoder_layers)
    else:
        seen, sizes = 0, (length if attention_mask is None else attention_mask.shape[1], 0)
    behind: Any = _Behind(seen + length - rows, sizes)
    return create_causal_mask(inputs_embeds=inputs_embeds[:, -rows:], past_key_values=behind, **arguments)


@dataclass(frozen=True)
class _Behind:
    """What `create_causal_mask` asks of a cache, as if all but the last queries had been read before.

    Args:
        offset: the place of the first of these queries.
        sizes: number and place of the first of the keys, the new ones included.
    """

    offset: int
    sizes: tuple[int, int]
    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.offset

    # what newer versions of transformers ask instead
    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.sizes


def token_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """`[B, length]`, 0 for padding among the new tokens; None where there is none."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise NotImplementedError(
            f"gated retention takes a mask of padding [B, T], got one of shape {tuple(attention_mask.shape)}; "
            "pass a 2-D mask, or use self_decoder='window'"
        )
    new = attention_mask[:, -length:]
    return None if bool(new.all()) else new


def by_blocks(config: YocoConfig, mask: Tensor | None, length: int, window: int | None) -> bool:
    """Whether a window is short enough to be attended block by block, without a mask of the whole length.

    Padding needs that mask, eager attention takes another kind, and Flash has windows of its own.
    """
    if window is None or length <= window or not (mask is None or (mask.dim() == 2 and bool(mask.all()))):
        return False
    return config._attn_implementation in ("sdpa", "hf_kvcache")
