"""`report`: the bytes that a cache really holds, per layer, against what a full cache would hold.

Bytes are those of live storages, each counted once and with everything in it: a view does not hide what it keeps alive,
and unused room counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from hf_kvcache.cache import KVCache
from hf_kvcache.layers import ConsumerLayer, KVCacheLayer, SlidingLayer


@dataclass(frozen=True)
class LayerReport:
    """One layer of a cache.

    Args:
        layer: its index.
        source: the layer whose KV it reads.
        seen: tokens processed.
        stored: tokens held per KV head, `[H_kv]`, the mean over the rows held; empty for a consumer.
        bytes: of all storages that the layer keeps alive.
        full_bytes: what transformers' dynamic cache would hold for this layer.
    """

    layer: int
    source: int
    seen: int
    stored: tuple[float, ...]
    bytes: int
    full_bytes: int


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds. Printing it gives a table."""

    layers: tuple[LayerReport, ...]

    @property
    def bytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def full_bytes(self) -> int:
        """Bytes that transformers' dynamic cache would hold."""
        return sum(layer.full_bytes for layer in self.layers)

    @property
    def ratio(self) -> float:
        """Full bytes divided by bytes held: 4.0 means a quarter of the memory."""
        return self.full_bytes / self.bytes if self.bytes else 1.0

    def __str__(self) -> str:
        lines = ["layer  reads   seen  kept/head         bytes    full bytes"]
        for layer in self.layers:
            kept = f"{sum(layer.stored) / len(layer.stored):.0f}" if layer.stored else "-"
            lines.append(
                f"{layer.layer:5d}  {layer.source:5d}  {layer.seen:5d}  {kept:>9}  {layer.bytes:12,d}  "
                f"{layer.full_bytes:12,d}"
            )
        lines.append(f"{self.bytes:,d} bytes held, {self.full_bytes:,d} in a full cache: ratio {self.ratio:.2f}")
        return "\n".join(lines)


def report(cache: KVCache) -> CacheReport:
    """Measures a cache.

    Args:
        cache: the cache of a patched model, for example `outputs.past_key_values`.

    Example:
        >>> out = model.generate(**inputs, return_dict_in_generate=True)
        >>> print(report(out.past_key_values).ratio)
        1.33
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"report takes the KVCache of a patched model, got a {type(cache).__name__}")
    batch = max(cache.batch_size, 0)
    layers = []
    for index, (layer, source) in enumerate(zip(cache.layers, cache.spec.sharing.source_layers, strict=True)):
        layers.append(
            LayerReport(
                index, source, layer.seen, _stored(layer), storage_bytes(layer.tensors()), _full_bytes(layer, batch)
            )
        )
    return CacheReport(tuple(layers))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _stored(layer: KVCacheLayer | SlidingLayer | ConsumerLayer) -> tuple[float, ...]:
    if isinstance(layer, ConsumerLayer) or layer.entry is None:
        return ()
    heads = layer.entry[0]
    if isinstance(layer, SlidingLayer):
        return (float(layer.keys.shape[2]),) * heads
    kept = [float(layer.tail.length)] * heads
    for segment in layer.segments:
        for head in range(heads):
            kept[head] += sum(row[head] for row in segment.lengths) / len(segment.lengths)
    return tuple(kept)


def _full_bytes(layer: KVCacheLayer | SlidingLayer | ConsumerLayer, batch: int) -> int:
    owner = layer.source if isinstance(layer, ConsumerLayer) else layer
    if owner.entry is None:
        return 0
    heads, head_dim, itemsize = owner.entry
    tokens = min(owner.seen, owner.sliding_window - 1) if isinstance(owner, SlidingLayer) else owner.seen
    return 2 * batch * heads * tokens * head_dim * itemsize
