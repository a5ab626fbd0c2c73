"""`report`: the bytes that a cache really holds, per layer, against what a full cache would hold; and which tokens.

Bytes are those of live storages, each counted once and with everything in it: a view does not hide what it keeps alive,
and unused room counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from hf_kvcache import persistence, safefile
from hf_kvcache.cache import KVCache
from hf_kvcache.layers import ConsumerLayer, KVCacheLayer, SlidingLayer, StateLayer
from hf_kvcache.sharing import SharingPlan
from hf_kvcache.spec import CacheSpec


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
    """What a cache holds. Printing it gives a table.

    Args:
        layers: one after the other.
        cache: that was measured, for `plot`; it lives as long as the report does.
    """

    layers: tuple[LayerReport, ...]
    cache: KVCache = field(repr=False, compare=False)

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

    def plot(self, path: str | Path, tokens: Sequence[str] | None = None, row: int = 0) -> None:
        """Writes a picture of the budgets of all heads and of the tokens kept, as the cache is now.

        Args:
            path: of the picture; its ending says which format.
            tokens: the text of every token; with them the pieces kept most and least are quoted.
            row: of the batch.
        """
        from hf_kvcache.plots import save_plot

        save_plot(self.cache, path, tokens, row)

    def __str__(self) -> str:
        lines = ["layer  reads   seen  kept/head         bytes    full bytes"]
        for layer in self.layers:
            kept = f"{sum(layer.stored) / len(layer.stored):.0f}" if layer.stored else "-"
            lines.append(
                f"{layer.layer:5d}  {layer.source:5d}  {layer.seen:5d}  {kept:>9}  {layer.bytes:12,d}  "
                f"{layer.full_bytes:12,d}"
            )
        half = f", {self.ratio / 2:.2f} against 16 bits a number" if self._widths == {4} else ""
        lines.append(f"{self.bytes:,d} bytes held, {self.full_bytes:,d} in a full cache: ratio {self.ratio:.2f}{half}")
        return "\n".join(lines)

    @property
    def _widths(self) -> set[int]:
        """Bytes of a number of the model."""
        entries = (getattr(layer, "entry", None) for layer in self.cache.producers.values())
        return {entry[2] for entry in entries if entry is not None}


def report(cache: KVCache) -> CacheReport:
    """Measures a cache.

    Args:
        cache: the cache of a patched model, for example `outputs.past_key_values`.

    Example:
        >>> out = model.generate(**inputs, return_dict_in_generate=True)
        >>> print(report(out.past_key_values).ratio)
        1.33
    """
    check_is_ours(cache, "report")
    batch = max(cache.batch_size, 0)
    layers = []
    for index, (layer, source) in enumerate(zip(cache.layers, cache.spec.sharing.source_layers, strict=True)):
        layers.append(
            LayerReport(
                index, source, layer.seen, _stored(layer), storage_bytes(layer.tensors()), _full_bytes(layer, batch)
            )
        )
    return CacheReport(tuple(layers), cache)


def kept_positions(cache: KVCache, row: int = 0) -> list[tuple[Tensor, ...]]:
    """Which tokens a cache holds.

    Args:
        cache: the cache of a patched model.
        row: of the batch.

    Returns:
        For every layer, and in it for every KV head, the columns `[n]` of the tokens held, ascending. A layer that
        reads another one's KV holds none and has no heads here, and so has one that has seen nothing. Columns count
        padding, as the attention mask does; padding of the prompt itself is not held, save by sliding-window layers.

    Example:
        >>> [len(head) for head in kept_positions(cache)[0]]
        [312, 201]
    """
    check_is_ours(cache, "kept_positions")
    if not 0 <= row < max(cache.batch_size, 1):
        raise ValueError(f"row must be one of the {cache.batch_size} rows of the batch, counted from 0, got {row}")
    return [_positions(layer, row) for layer in cache.layers]


def cache_of_file(path: str | Path) -> KVCache:
    """The cache in a file that `KVCache.save` wrote, for reports: without its model, and so not to go on with."""
    description, _ = safefile.read(path, persistence.FORMAT, "make one with KVCache.save")
    plan = SharingPlan(tuple(description["source_layers"]))
    spec = CacheSpec.full(tuple(description["sliding_windows"]), description["fingerprint"])
    cache = KVCache(replace(spec, sharing=plan))
    dtype = getattr(torch, description["dtype"].removeprefix("torch."), torch.float32)
    return persistence.restore_cache(cache, path, [torch.device("cpu")] * plan.num_layers, dtype)


def check_is_ours(cache: KVCache, function: str) -> None:
    """Raises for a cache of another library, in the name of a function."""
    if not isinstance(cache, KVCache):
        raise TypeError(f"{function} takes the KVCache of a patched model, got a {type(cache).__name__}")


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _stored(layer: KVCacheLayer | SlidingLayer | StateLayer | ConsumerLayer) -> tuple[float, ...]:
    if isinstance(layer, (ConsumerLayer, StateLayer)) or layer.entry is None:
        return ()
    heads = layer.entry[0]
    if isinstance(layer, SlidingLayer):
        return (float(layer.tail.length),) * heads
    kept = [float(layer.tail.length)] * heads
    for segment in layer.segments:
        for head in range(heads):
            kept[head] += sum(row[head] for row in segment.lengths) / len(segment.lengths)
    return tuple(kept)


def _positions(layer: KVCacheLayer | SlidingLayer | StateLayer | ConsumerLayer, row: int) -> tuple[Tensor, ...]:
    if isinstance(layer, (ConsumerLayer, StateLayer)) or layer.entry is None:
        return ()
    heads = layer.entry[0]
    if isinstance(layer, SlidingLayer):
        return (torch.arange(layer.seen - layer.tail.length, layer.seen),) * heads
    # what no segment covers is dense
    dense = torch.arange(sum(segment.seen for segment in layer.segments), layer.seen)
    found: list[list[Tensor]] = [[] for _ in range(heads)]
    for segment in layer.segments:
        positions, owners = segment.positions().cpu(), segment.layout.owners
        for head in range(heads):
            run = segment.rows[row] * heads + head
            found[head].append(positions[owners == run].sort().values)
    return tuple(torch.cat([*parts, dense]) for parts in found)


def _full_bytes(layer: KVCacheLayer | SlidingLayer | StateLayer | ConsumerLayer, batch: int) -> int:
    if isinstance(layer, StateLayer):
        return storage_bytes(layer.tensors())
    owner = layer.source if isinstance(layer, ConsumerLayer) else layer
    if owner.entry is None:
        return 0
    heads, head_dim, itemsize = owner.entry
    tokens = min(owner.seen, owner.sliding_window - 1) if isinstance(owner, SlidingLayer) else owner.seen
    return 2 * batch * heads * tokens * head_dim * itemsize
