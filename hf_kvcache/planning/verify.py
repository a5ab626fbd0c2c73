"""`verify`: what a patched model really loses on windows of text, and what its caches really hold."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_kvcache.api import compress, patch_model, unpatch_model
from hf_kvcache.cache import KVCache
from hf_kvcache.layers import StateLayer
from hf_kvcache.measure import Continuation, continued, kl_divergence
from hf_kvcache.patches.adapters import find_adapter
from hf_kvcache.planning.windows import Question, Window
from hf_kvcache.report import report, storage_bytes


@dataclass(frozen=True)
class Verified:
    """Means over the windows.

    Args:
        continuation: KL(full || compressed) on how the text goes on, nats a token.
        quotation: the same on a passage of the context repeated word for word.
        ratio: bytes of a full 16-bit cache divided by the bytes held, both as in a model in 16 bits.
    """

    continuation: float
    quotation: float
    ratio: float

    @property
    def loss(self) -> float:
        """What a plan is judged by: the sum of both."""
        return self.continuation + self.quotation


def references(model: Any, windows: Sequence[Window]) -> list[list[Continuation]]:
    """What the unpatched model predicts, for every window and question."""
    found = []
    for window in windows:
        with torch.no_grad():
            cache = model(input_ids=window.context, use_cache=True, logits_to_keep=1).past_key_values
        found.append([predictions(model, cache, window, question) for question in window.questions])
    return found


def verify(
    model: Any,
    tokenizer: Any,
    windows: Sequence[Window],
    full: Sequence[Sequence[Continuation]],
    method: Any = None,
    **options: Any,
) -> Verified:
    """Patches the model, measures, and unpatches it.

    Args:
        model: unpatched.
        tokenizer: for methods that need one.
        windows: to measure on; not those that the plan was made with.
        full: `references` of the same windows.
        method, options: as for `patch_model`.
    """
    patch_model(model, method, tokenizer=tokenizer, **options)
    try:
        divergences, held, whole = [], 0.0, 0.0
        for window, expected in zip(windows, full, strict=True):
            cache = compress(model, window.context)
            sizes = bytes_in_16_bits(cache, model)
            held, whole = held + sizes[0], whole + sizes[1]
            divergences.append(
                [
                    kl_divergence(reference, predictions(model, cache, window, question))
                    for reference, question in zip(expected, window.questions, strict=True)
                ]
            )
        continuation, quotation = torch.tensor(divergences).mean(0).tolist()
        return Verified(continuation, quotation, whole / held)
    finally:
        unpatch_model(model)


def predictions(model: Any, cache: Any, window: Window, question: Question) -> Continuation:
    """The predictions that count of one question, on a copy of the cache."""
    found = continued(model, copy.deepcopy(cache), question.ids, window.context.shape[1])
    return Continuation(found.log_probs[question.first :], found.targets[question.first :], found.kv_bytes)


def bytes_in_16_bits(cache: KVCache, model: Any) -> tuple[float, float]:
    """Bytes that a cache holds and that a full one would, if what is in the dtype of the model were in 16 bits.

    Plans are measured in float32 and used in 16 bits, where what stays dense takes half as much.
    """
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    own = find_adapter(model).own_sharing(model)
    held = whole = 0.0
    for layer, found in zip(cache.layers, report(cache).layers, strict=True):
        # a state is in float32 whatever the model computes in
        share = 1.0 if isinstance(layer, StateLayer) else 2 / dtype.itemsize
        dense = storage_bytes(tensor for tensor in layer.tensors() if tensor.dtype == dtype)
        held += found.bytes - dense * (1 - share)
        # what the architecture itself shares no cache holds twice
        if own is None or found.layer not in own.consumers:
            whole += found.full_bytes * share
    return held, whole
