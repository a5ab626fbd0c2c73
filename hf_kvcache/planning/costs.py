"""`measure_costs`: what every choice for every layer and head costs, in nats a token, on windows of real text.

A window's context is read once, with everything kept, and so is what is asked of it; gradients of the predictions by
the output of every attention come from a few backward passes (`gradients.py`). Then each layer alone is encoded and
evicted in every way there is to choose from, the recorded queries attend to the result, and the change of the output
is priced by the gradients. Nothing has to be run again through the model, so many choices cost little more than a few.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_kvcache.api import patch_model, unpatch_model
from hf_kvcache.attention import AttentionCall
from hf_kvcache.cache import KVCache
from hf_kvcache.codecs import TurboQuantCodec
from hf_kvcache.eviction.roles import top_mask
from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.kernels.merge_states import merge_states
from hf_kvcache.layers import KVCacheLayer
from hf_kvcache.patches.adapters import find_adapter
from hf_kvcache.planning.gradients import output_gradients, output_projections
from hf_kvcache.planning.record import record
from hf_kvcache.planning.windows import Question, Window
from hf_kvcache.report import storage_bytes
from hf_kvcache.segment import Segment

Widths = tuple[int, int]
WIDTHS: tuple[Widths, ...] = ((8, 8), (8, 4), (4, 4), (4, 3), (4, 2), (3, 3), (3, 2), (2, 2))
KEPT = (1.0, 0.8, 0.62, 0.48, 0.36, 0.27, 0.2, 0.14, 0.09, 0.05)
# of the column of an entry, held where some were dropped
POSITION_BYTES = 4


@dataclass(frozen=True)
class Costs:
    """What was measured.

    Args:
        kept, widths: the choices: shares kept, descending, and pairs of bits for keys and values.
        loss: nats a token, `[layers, widths, kept, H_kv]`, on the CPU as all of it; never rising with the share kept.
        entry_bytes: bytes of one key and value, `[layers, widths]`, without the column of an entry.
        full_bytes: of one key and value in 16 bits, `[layers]`.
        layers: of the model that the rows stand for: those that keep all tokens otherwise.
        scorer: that chose what is kept.
        num_layers: of the model.
    """

    kept: tuple[float, ...]
    widths: tuple[Widths, ...]
    loss: Tensor
    entry_bytes: Tensor
    full_bytes: Tensor
    layers: tuple[int, ...]
    scorer: str
    num_layers: int


def measure_costs(
    model: Any,
    tokenizer: Any,
    windows: Sequence[Window],
    scorer: str = "kvzip",
    draws: int = 12,
    kept: Sequence[float] = KEPT,
    widths: Sequence[Widths] = WIDTHS,
    done: Callable[[], None] = lambda: None,
) -> Costs:
    """Prices every choice.

    Args:
        model: unpatched, in float32 for figures that mean something.
        tokenizer: for scorers that talk to the model.
        windows: of real text.
        scorer: name of a scoring method.
        draws: samples of the gradient a question.
        kept, widths: the choices.
        done: called after every window.
    """
    kept = tuple(sorted(kept, reverse=True))
    total, measured = torch.zeros(0), None
    for index, window in enumerate(windows):
        measured = _Window(model, tokenizer, window, scorer, kept, tuple(widths))
        losses = [measured.price(question, draws, seed=index) for question in window.questions]
        loss = torch.stack(losses).sum(0)
        total = loss if not len(total) else total + loss
        done()
    assert measured is not None
    # a larger share may not cost more, but for the noise of the draws
    loss = (total / len(windows)).cummax(2).values
    entry = torch.tensor([[measured.entry_bytes(layer, pair) for pair in widths] for layer in measured.layers])
    full = torch.tensor([measured.full_bytes(layer) for layer in measured.layers])
    return Costs(kept, tuple(widths), loss, entry, full, tuple(measured.layers), scorer, len(measured.cache.layers))


class _Window:
    """One context, read."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        window: Window,
        scorer: str,
        kept: tuple[float, ...],
        widths: tuple[Widths, ...],
    ) -> None:
        self.model, self.window, self.kept, self.widths = model, window, kept, widths
        self.cache, scores = record(model, tokenizer, scorer, window.context)
        self.layers = list(self.cache.spec.evicting)
        if not self.layers:
            raise ValueError("every layer of this model has a sliding window and holds little: nothing to plan")
        adapter = find_adapter(model)
        self.projections = output_projections(model, adapter)
        with torch.no_grad():
            adapter.find_decoder(model)  # raises early for what is not supported
            self.native = model(input_ids=window.context, use_cache=True, logits_to_keep=1).past_key_values
        self.segments = {layer: self._choices(layer, score) for layer, score in zip(self.layers, scores, strict=True)}

    def _choices(self, layer: int, score: Tensor) -> list[list[Segment]]:
        """The layer's context in every way to store it, `[widths][kept]`."""
        full = self.cache.layers[layer].segments[0]
        key, value, _, _ = full.padded()
        tokens = key.shape[2]
        masks = []
        for share in self.kept:
            counts = torch.full(score.shape[:2], max(int(share * tokens), 1), device=score.device)
            masks.append(top_mask(score, counts).flatten())
        found = []
        for key_bits, value_bits in self.widths:
            whole = Segment.seal(TurboQuantCodec(key_bits, value_bits), full.store, key, value)
            found.append([whole if bool(mask.all()) else Segment.join([whole], mask) for mask in masks])
        return found

    def price(self, question: Question, draws: int, seed: int) -> Tensor:
        """Nats a token of every choice, `[layers, widths, kept, H_kv]`."""
        position, ids = self.window.context.shape[1], question.ids
        gradients = output_gradients(
            self.model, self.projections, copy.deepcopy(self.native), ids, position, question.first, draws, seed
        )
        scored = ids.shape[1] - 1 - question.first
        found: dict[int, Tensor] = {}

        def watch(owner: int, layer: KVCacheLayer, call: AttentionCall) -> None:
            gradient = gradients[call.layer].unflatten(-1, (call.query.shape[1], -1))
            changes = self._priced(layer, call, gradient.transpose(1, 2), self.segments[owner])
            # layers may lie on several devices, and what is solved with these is small
            loss = (changes.square().mean(2) / (2 * scored)).cpu()
            # where the architecture itself shares, a layer answers for all that read it
            found[owner] = found[owner] + loss if owner in found else loss

        self._continue(ids, position, watch)
        return torch.stack([found[layer] for layer in self.layers])

    @torch.no_grad()
    def _continue(self, ids: Tensor, position: int, watch: Callable[[int, KVCacheLayer, AttentionCall], None]) -> None:
        """Runs what follows the context on a copy of the full cache; `watch` sees every layer that can evict attend."""
        cache: KVCache = copy.deepcopy(self.cache)
        for index in self.layers:
            _watch_layer(cache.layers[index], partial(watch, index))
        positions = torch.arange(position, position + ids.shape[1] - 1, device=ids.device)[None]
        patch_model(self.model)
        try:
            # with all logits: a model that exits early would run its upper layers for the positions asked for only
            self.model(input_ids=ids[:, :-1], past_key_values=cache, position_ids=positions)
        finally:
            unpatch_model(self.model)

    def _priced(
        self, layer: KVCacheLayer, call: AttentionCall, gradient: Tensor, choices: list[list[Segment]]
    ) -> Tensor:
        """What each choice changes along the gradients `[S, H_q, L, D]`: `[widths, kept, S, H_kv]`."""
        key, value = layer.tail.key, layer.tail.value
        heads = key.shape[1]
        query = call.folded_query(heads)
        mask = call.folded_mask(query.shape[2] // call.length, layer.tail.length)
        tail = decode_attention(query, key, value, mask, scale=call.scale, softcap=call.softcap)

        def joined(segment: Segment) -> Tensor:
            return merge_states(*segment.attend(query, call.scale, call.softcap), *tail)[0][0].float()

        exact = joined(layer.segments[0])
        gradient = gradient.reshape(len(gradient), heads, -1, gradient.shape[-1])
        return torch.stack(
            [
                torch.stack([torch.einsum("shmd,hmd->sh", gradient, joined(segment) - exact) for segment in row])
                for row in choices
            ]
        )

    def entry_bytes(self, layer: int, pair: Widths) -> float:
        """Bytes of one key and value of a head in these widths."""
        segment = self.segments[layer][self.widths.index(pair)][0]
        return storage_bytes(segment.tensors()) / segment.layout.entries

    def full_bytes(self, layer: int) -> float:
        """Bytes of one key and value of a head in 16 bits."""
        key, value, _, _ = self.cache.layers[layer].segments[0].padded()
        return 2.0 * (key.shape[-1] + value.shape[-1])


def _watch_layer(layer: Any, watch: Callable[[KVCacheLayer, AttentionCall], None]) -> None:
    """Makes `watch` see every call of a layer's attention, after it was answered."""
    attend = layer.attend

    def watched(call: AttentionCall) -> Tensor:
        out = attend(call)
        watch(layer, call)
        return out

    layer.attend = watched
