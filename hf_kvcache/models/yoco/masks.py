"""The masks of YOCO: which tokens a query reads, and which enter the state of retention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices
from transformers.utils.import_utils import is_tracing

from hf_kvcache.models.yoco.configuration_yoco import YocoConfig


def cross_mask(
    config: YocoConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    position_ids: Tensor,
    sequences: Tensor | None,
    rows: int,
) -> Tensor | None:
    """The cross-decoder's mask for the last `rows` queries, in the form that the attention implementation takes.

    A mask of all queries would be quadratic in the prompt. It is made only where it says more than which tokens are
    padding: the caller gave such a mask, or several `sequences` in one row.
    """
    length = inputs_embeds.shape[1]
    arguments: dict[str, Any] = {"config": config, "attention_mask": attention_mask}
    given = attention_mask is not None and attention_mask.dim() != 2
    if rows == length or given or sequences is not None:
        mask = create_causal_mask(
            inputs_embeds=inputs_embeds, past_key_values=cache, position_ids=position_ids, **arguments
        )
        return mask[:, :, -rows:] if mask is not None and mask.dim() == 4 else mask
    if cache is not None:
        seen, sizes = cache.get_seq_length(), cache.get_mask_sizes(length, config.num_self_decoder_layers)
    else:
        seen, sizes = 0, (length if attention_mask is None else attention_mask.shape[1], 0)
    behind: Any = _Behind(seen + length - rows, sizes, getattr(cache, "is_compileable", False))
    return create_causal_mask(inputs_embeds=inputs_embeds[:, -rows:], past_key_values=behind, **arguments)


@dataclass(frozen=True)
class _Behind:
    """What `create_causal_mask` asks of a cache, as if all but the last queries had been read before.

    Args:
        offset: the place of the first of these queries.
        sizes: number and place of the first of the keys, the new ones included.
        is_compileable: whether there may be empty places among the keys, which one query too needs a mask for.
    """

    offset: int
    sizes: tuple[int, int]
    is_compileable: bool

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.offset

    # what newer versions of transformers ask instead
    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.sizes


def sequences_of(position_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor | None:
    """Which sequence of its row a token belongs to, `[B, T]`, where rows hold several; None where all hold one.

    As in transformers: where positions do not count on, the next sequence begins, but not in a batch with padding.
    """
    if attention_mask is not None or position_ids.shape[1] == 1:
        return None
    found = find_packed_sequence_indices(position_ids)
    if found is None or cache is None:
        return found
    if is_tracing(found):
        # it may well be one sequence only: there are no numbers to see it by
        return None
    token = int((found != 0).any(0).nonzero()[0])
    raise ValueError(
        f"expected one sequence in every row where there is a cache, got position_ids that begin again at token "
        f"{token}, so that later steps would read all of them; pass use_cache=False, or give every sequence a row of "
        "its own and an attention_mask for the padding"
    )


def expect_bounds(config: YocoConfig, sequences: Tensor, **kwargs: Any) -> None:
    """Refuses several sequences in a row of an attention without a mask that was not told where they end either."""
    if "cu_seq_lens_q" not in kwargs and not is_tracing(sequences):
        raise ValueError(
            "expected one sequence in every row, got position_ids that begin again, and the attention implementation "
            f"{config._attn_implementation!r} takes no mask that would keep them apart; use 'sdpa' or 'eager', or pass "
            "cu_seq_lens_q and the rest that DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes"
        )


def restarts_of(sequences: Tensor | None) -> dict[int, Tensor]:
    """The tokens at which sequences after the first begin, and for each in which rows, `[B, 1, 1, 1]`."""
    if sequences is None:
        return {}
    begins = sequences.diff(dim=-1, prepend=sequences[:, :1]) != 0
    return {token: begins[:, token, None, None, None] for token in begins.any(0).nonzero().flatten().tolist()}


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
