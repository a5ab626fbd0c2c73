"""Measuring a model under a method: how faithful, how large, how fast.

Fidelity follows one protocol: prefill a prefix, then teacher-force the text that follows it through the cache, and
compare the next-token distributions with those of the untouched model by KL(full || method). The whole model must be
in float32: a bfloat16 model hides everything gentler than 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hf_kvcache.clock import now
from hf_kvcache.layers import ConsumerLayer, KVCacheLayer, SlidingLayer, StateLayer
from hf_kvcache.report import storage_bytes


@dataclass(frozen=True)
class Continuation:
    """What a model says about a text after a prefix.

    Args:
        log_probs: of the next token, `[T, vocabulary]`.
        targets: the tokens that came, `[T]`.
        kv_bytes: held by the cache right after the prefill.
    """

    log_probs: Tensor
    targets: Tensor
    kv_bytes: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the text, in nats a token."""
        return float(-self.log_probs.gather(-1, self.targets[:, None]).mean())


@torch.no_grad()
def continuation(model: Any, ids: Tensor, prefix: int) -> Continuation:
    """Prefills `ids[:, :prefix]` and scores the rest of `ids` `[1, T]` through the cache."""
    filled = model(input_ids=ids[:, :prefix], use_cache=True, logits_to_keep=1)
    return continued(model, filled.past_key_values, ids[:, prefix:], prefix)


@torch.no_grad()
def continued(model: Any, cache: Any, ids: Tensor, position: int) -> Continuation:
    """Scores `ids` `[1, T]` through a cache that is filled already, and fills it further.

    The first token is left out: the prefill predicts it, whatever the method.

    Args:
        model: that filled the cache.
        cache: ours, or any other that the model takes.
        ids: the text that follows.
        position: of its first token. It is said and not read off the cache, because a foreign cache that dropped tokens
            does not know it.
    """
    kv_bytes = cache_bytes(cache)
    positions = torch.arange(position, position + ids.shape[1] - 1, device=ids.device)[None]
    logits = model(input_ids=ids[:, :-1], past_key_values=cache, position_ids=positions).logits
    # a model that is spread over devices may predict on another one than it reads
    return Continuation(logits[0].float().log_softmax(-1), ids[0, 1:].to(logits.device), kv_bytes)


def kl_divergence(full: Continuation, other: Continuation) -> float:
    """Mean KL(full || other) in nats a token."""
    return float((full.log_probs.exp() * (full.log_probs - other.log_probs)).sum(-1).mean())


def top1_agreement(full: Continuation, other: Continuation) -> float:
    """Share of positions at which both find the same token most likely."""
    return float((full.log_probs.argmax(-1) == other.log_probs.argmax(-1)).float().mean())


@dataclass(frozen=True)
class Speed:
    """Seconds of one prefill and of the median decode step."""

    prefill: float
    decode: float


@torch.no_grad()
def speed(model: Any, ids: Tensor, steps: int) -> Speed:
    """Times one prefill of `ids` `[1, T]` and `steps` greedy decode steps after it."""
    devices = {parameter.device for parameter in model.parameters()}
    start = now(devices)
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prefill = now(devices) - start
    times = []
    for _ in range(steps):
        token = out.logits[:, -1:].argmax(-1)
        start = now(devices)
        out = model(input_ids=token, past_key_values=out.past_key_values, logits_to_keep=1)
        times.append(now(devices) - start)
    return Speed(prefill, median(times))


def cache_bytes(cache: Any) -> int:
    """Bytes of all storages that a cache, ours or transformers', keeps alive."""
    return storage_bytes(tensor for layer in cache.layers for tensor in _layer_tensors(layer))


def _layer_tensors(layer: Any) -> Iterable[Tensor]:
    if isinstance(layer, (KVCacheLayer, SlidingLayer, StateLayer, ConsumerLayer)):
        return layer.tensors()
    # a layer of transformers holds keys and values, or states, or both; which, only its attributes say
    states = [tensor for name in ("recurrent_states", "conv_states") for tensor in getattr(layer, name, {}).values()]
    held = [getattr(layer, "keys", None), getattr(layer, "values", None), *states]
    return [tensor for tensor in held if tensor is not None]
