"""Eviction that needs the whole prompt of all layers before anything is dropped (KVzip, budgets over all layers).

The prompt then rests dense in the tails until its last forward is done. If the scorer asks for it, the model reads the
prompt again. Then all layers decide together, and each is sealed in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy

import torch
from torch import Tensor

from hf_kvcache.autocast import without_autocast
from hf_kvcache.cache import KVCache
from hf_kvcache.layers import KVCacheLayer, SlidingLayer, StateLayer
from hf_kvcache.tail import Tail

# token ids [B, L], mask [B, seen + L] or None, positions [B, L] -> runs the decoder on the cache
RunDecoder = Callable[[Tensor, "Tensor | None", Tensor], None]


def settle(cache: KVCache, mask: Tensor | None, run: RunDecoder) -> None:
    """Evicts from a cache that is pending, and seals it.

    Args:
        cache: whose prompt is complete and held dense.
        mask: `[B, seen]`, 0 for padding; None when there is none.
        run: the decoder.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, KVCacheLayer)]
    prompt, copies = layers[0].prompt, layers[0].copies
    rows = list(range(0, len(layers[0].tail.key), copies))
    valid = None if mask is None else mask[rows, :prompt].bool()
    if valid is None or bool(valid.all()):
        groups = [(rows, torch.arange(prompt))]
    else:
        # rows of different lengths are judged one by one, as if each had come alone
        groups = [([row], valid[index].nonzero()[:, 0].cpu()) for index, row in enumerate(rows)]
    kept = [torch.zeros(len(rows), layer.tail.key.shape[1], prompt, dtype=torch.bool) for layer in layers]
    for group, columns in groups:
        if not len(columns):
            continue
        decided = _decide(cache, layers, group, columns, mask, run)
        for index, layer_kept in enumerate(kept):
            place = [rows.index(row) for row in group]
            chosen = torch.ones(len(group), layer_kept.shape[1], len(columns), dtype=torch.bool)
            if decided is not None:
                chosen = decided[index].cpu()
            layer_kept[torch.tensor(place)[:, None], :, columns[None]] = chosen.transpose(1, 2)
    for layer, layer_kept in zip(layers, kept, strict=True):
        device = layer.tail.key.device
        with without_autocast(device):
            layer.seal_pending(layer_kept.to(device), [len(columns) for _, columns in groups])


def _decide(
    cache: KVCache,
    layers: list[KVCacheLayer],
    rows: list[int],
    columns: Tensor,
    mask: Tensor | None,
    run: RunDecoder,
) -> list[Tensor] | None:
    """What to keep of some rows, `[rows, H_kv, columns]` for every layer; None for everything."""
    policy = cache.spec.eviction
    assert policy is not None and cache.prompt_ids is not None and cache.prompt_positions is not None
    if policy.limits(len(columns)).budget >= len(columns):
        return None
    for layer in layers:
        layer.observe_pending(rows, columns, policy.scorer.replays)
    try:
        if policy.scorer.replays:
            ids = cache.prompt_ids[rows][:, columns.to(cache.prompt_ids.device)]
            # where the last token stands: a forward that is not told counts the padding before it
            last = cache.prompt_positions[rows, int(columns[-1])][:, None]
            for start, end, tokens in policy.scorer.passes(ids):
                with _replaying(cache, layers, rows, start, end):
                    positions = last + torch.arange(1, tokens.shape[1] + 1, device=last.device)
                    seen = None if mask is None else torch.cat([mask[rows], mask.new_ones(tokens.shape)], dim=1)
                    run(tokens, seen, positions)
        with without_autocast(layers[0].tail.key.device):
            return policy.keep_layers([layer.observation() for layer in layers])
    finally:
        for layer in layers:
            layer.forget_observation()


@contextmanager
def _replaying(cache: KVCache, layers: list[KVCacheLayer], rows: list[int], start: int, end: int) -> Iterator[None]:
    """The cache while a part of the prompt is read again: everything is as before when it ends."""
    others = [layer for layer in cache.layers if isinstance(layer, (SlidingLayer, StateLayer))]
    before = [_contents(layer) for layer in others]
    for layer in others:
        layer.select_rows(rows)
    for full in layers:
        full.begin_replay(start, end)
    cache.replaying = True
    try:
        yield
    finally:
        cache.replaying = False
        for layer, contents in zip(others, before, strict=True):
            layer.__dict__.clear()
            layer.__dict__.update(contents)
        for full in layers:
            full.end_replay()


def _contents(layer: SlidingLayer | StateLayer) -> dict[str, object]:
    """The attributes of a layer, and copies of its dictionaries and its tail; what comes is written behind those."""
    return {name: copy(value) if isinstance(value, (dict, Tail)) else value for name, value in layer.__dict__.items()}
