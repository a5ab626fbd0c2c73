"""Reading a context once under a scorer: all keys and values, and what the scorer thinks of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_kvcache.api import compress, patch_model, unpatch_model
from hf_kvcache.cache import KVCache
from hf_kvcache.eviction import Observation
from hf_kvcache.methods import METHODS, EvictionMethod

# less than any scorer protects, so that it is asked for its scores
SCARCE = 1e-6


@dataclass(frozen=True)
class Recorder(EvictionMethod):
    """A selector that keeps everything and remembers the scores, layer after layer."""

    name: ClassVar[str] = "recorder"
    slot: ClassVar[str] = "selector"
    paper: ClassVar[str] = "-"

    scores: list[Tensor] = field(default_factory=list)

    def select(self, score: Tensor, counts: Tensor, observation: Observation) -> Tensor:
        self.scores.append(score)
        return torch.ones_like(score, dtype=torch.bool)


@torch.no_grad()
def record(model: Any, tokenizer: Any, scorer: str, context: Tensor) -> tuple[KVCache, list[Tensor]]:
    """Fills a cache with everything.

    Returns:
        The cache, sealed and dense, and for every layer that can evict its scores `[1, H_kv, P]`.
    """
    recorder = Recorder()
    patch_model(model, [METHODS[scorer](budget=SCARCE), recorder], tokenizer=tokenizer)  # type: ignore[call-arg]
    try:
        return compress(model, context), recorder.scores
    finally:
        unpatch_model(model)
