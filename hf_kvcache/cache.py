"""`KVCache`: the cache object of a patched model. All state of a run is in it, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from hf_kvcache.attention import ResidualContext
from hf_kvcache.autocast import lowered
from hf_kvcache.layers import ConsumerLayer, KVCacheLayer, LayerSettings, SlidingLayer, StateLayer
from hf_kvcache.persistence import save_cache
from hf_kvcache.spec import STATE, CacheSpec

if TYPE_CHECKING:
    from hf_kvcache.sequential.session import PromptSession


class KVCache(Cache):
    """A transformers `Cache` built from a `CacheSpec`.

    Works wherever a `DynamicCache` does: `generate`, a plain forward, beam search, assisted decoding, several turns.
    Copies are cheap: `copy.deepcopy` shares the sealed segments.

    Args:
        spec: what the cache is made of.

    Example:
        >>> cache = new_cache(patch_model(model, method=None))
        >>> model(input_ids, past_key_values=cache)
        >>> cache.get_seq_length() == input_ids.shape[1]
        True
    """

    def __init__(self, spec: CacheSpec) -> None:
        self.spec = spec
        last_reader, policy, evicting, readers = spec.sharing.last_reader, spec.eviction, spec.evicting, spec.readers
        layers: list[KVCacheLayer | SlidingLayer | StateLayer | ConsumerLayer] = []
        for layer, (source, window) in enumerate(zip(spec.sharing.source_layers, spec.sliding_windows, strict=True)):
            if source != layer:
                layers.append(ConsumerLayer(layers[source]))
            elif window == STATE:
                layers.append(StateLayer())
            elif window is not None:
                layers.append(SlidingLayer(window, last_reader[layer]))
            else:
                settings = LayerSettings(
                    spec.codecs[layer],
                    spec.store,
                    last_reader[layer],
                    policy,
                    evicting.index(layer),
                    readers,
                    spec.output,
                )
                layers.append(KVCacheLayer(settings))
        super().__init__(layers=layers)
        # of a prompt that all layers will evict from together, which may need to be read again, and where they stand
        self.prompt_ids: Tensor | None = None
        self.prompt_positions: Tensor | None = None
        self.replaying = False
        # of the present forward only, where layers add the KV of lower ones
        self.residual: ResidualContext | None = None
        # takes a prompt from a store, and gives it to one
        self.prompts: PromptSession | None = None

    def expect(self, prompt_length: int, copies: int = 1) -> None:
        """Announces the prompt before it comes; `generate` of a patched model does it.

        Args:
            prompt_length: tokens of the prompt, padding included. Exactly these are sealed, however many forwards
                bring them and whatever follows them in the last one.
            copies: how many consecutive rows of the batch are copies of one prompt (beams, returned sequences).
        """
        for layer in self.layers:
            layer.expect(prompt_length, copies)
        if self.spec.prefix is not None:
            self.prompts = self.spec.prefix.session(self.spec, prompt_length)
            for index, layer in self.producers.items():
                layer.witness = partial(self.prompts.take, index)

    @property
    def producers(self) -> dict[int, KVCacheLayer | SlidingLayer]:
        """The layers that store, by their index."""
        return {index: layer for index, layer in enumerate(self.layers) if not isinstance(layer, ConsumerLayer)}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Gives key and value `[B, H_kv, L, D]` of the new tokens to a layer, and returns that layer, twice."""
        residual = self.residual
        if residual is not None:
            key_states, value_states = residual.mix(layer_idx, key_states, value_states)
            if layer_idx >= residual.plan.mixing[-1]:
                self.residual = None
        return super().update(*lowered(key_states, value_states), layer_idx, *args, **kwargs)

    @property
    def pending(self) -> bool:
        """Whether a prompt is complete and waits, dense, to be evicted from in all layers together."""
        return any(isinstance(layer, KVCacheLayer) and layer.pending for layer in self.layers)

    def remember_prompt(self, ids: Tensor, positions: Tensor | None) -> None:
        """Takes the token ids `[B, L]` of a forward that brings a prompt or a part of it.

        Args:
            ids: of the tokens, padding included.
            positions: `[B or 1, L]`, what the model is told of where they stand; None for nothing, and it counts them.
        """
        policy = self.spec.eviction
        if policy is None or not policy.deferred or not self.spec.evicting or self.replaying or self._sealed:
            return
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device) + self.get_seq_length()
        positions = positions.to(ids.device).expand(ids.shape)
        before = self.prompt_so_far()
        if before is None and self.get_seq_length():
            # an earlier part of the prompt came as embeddings
            self.forget_prompt()
            return
        if before is not None:
            ids = torch.cat([before[0].to(ids.device), ids], dim=1)
            positions = torch.cat([before[1].to(ids.device), positions], dim=1)
        self.prompt_ids, self.prompt_positions = ids, positions

    def prompt_so_far(self) -> tuple[Tensor, Tensor] | None:
        """Token ids and positions `[B, seen]` of a prompt that goes on, None when there is none or they are not known.

        What `remember_prompt` took may be more: tokens were cropped since, or their forward failed.
        """
        seen = self.get_seq_length()
        if self.prompt_ids is None or self.prompt_positions is None or not 0 < seen <= self.prompt_ids.shape[1]:
            return None
        return self.prompt_ids[:, :seen], self.prompt_positions[:, :seen]

    def forget_prompt(self) -> None:
        """Lets go of what `remember_prompt` took."""
        self.prompt_ids = self.prompt_positions = None

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.forget_prompt()
        self.prompts = None

    @property
    def _sealed(self) -> bool:
        return any(isinstance(layer, KVCacheLayer) and layer.segments for layer in self.layers)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Makes batch row i what row `beam_idx[i]` is now."""
        self._select_rows(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps only these rows of the batch, in this order."""
        self._select_rows(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch; sealed segments are shared by the repetitions, not copied."""
        batch = self.batch_size
        if batch > 0:
            self._select_rows([row for row in range(batch) for _ in range(repeats)])

    def save(self, path: str | Path) -> None:
        """Writes the cache as one safetensors file; `load_cache` reads it for a model patched in the same way."""
        save_cache(self, path)

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 while the cache is empty."""
        for layer in self.layers:
            if isinstance(layer, KVCacheLayer) and layer.segments:
                return len(layer.segments[0].rows)
            tensors = layer.tensors()
            if tensors:
                return tensors[0].shape[0]
        return -1

    def _select_rows(self, rows: Iterable[int]) -> None:
        rows = list(rows)
        prompt = self.prompt_so_far()
        if prompt is not None:
            self.prompt_ids, self.prompt_positions = prompt[0][rows], prompt[1][rows]
        for layer in self.layers:
            layer.select_rows(rows)
