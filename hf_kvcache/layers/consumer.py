"""`ConsumerLayer`: a layer that holds nothing and reads the KV of its producer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hf_kvcache.layers.full import KVCacheLayer
from hf_kvcache.layers.sliding import SlidingLayer


class ConsumerLayer(CacheLayerMixin):
    """A layer that stores nothing and reads the KV of its producer."""

    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, source: KVCacheLayer | SlidingLayer) -> None:
        super().__init__()
        self.source = source
        self.is_sliding = source.is_sliding
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Ignores what it is given and returns the producer, which has the new tokens already."""
        return self.source, self.source

    @property
    def seen(self) -> int:
        return self.source.seen

    def get_seq_length(self) -> int:
        return self.source.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.source.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return self.source.get_max_length()

    def tensors(self) -> list[Tensor]:
        return []

    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {}

    def _nothing(self, *args, **kwargs) -> None:
        """The producer does it."""

    expect = crop = select_rows = reset = restore = offload = prefetch = lazy_initialization = _nothing
