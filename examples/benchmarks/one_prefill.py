"""Many eviction methods on one prefill: what each would keep of the same keys, values and queries.

Eviction does not change the prefill that it follows, so a benchmark need not repeat it for every method: the prompt is
read once by a model patched with `Recorder`, which keeps what the layers showed, and every policy then decides about
that. `check` compares the result with a real run of the method.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_kvcache import KVCache, ScoringMethod, compress, patch_model, unpatch_model
from hf_kvcache.eviction import Observation
from hf_kvcache.segment import Segment
from hf_kvcache.spec import CacheSpec


@dataclass(frozen=True)
class Recorder(ScoringMethod):
    """Evicts next to nothing and remembers the observation of every layer."""

    name: ClassVar[str] = "recorder"
    paper: ClassVar[str] = "-"
    budget: int | float | None = field(default=0.999999, kw_only=True)
    seen: list[Observation] = field(default_factory=list)
    last_queries: int | None = 64

    @property
    def queries(self) -> int | None:
        return self.last_queries

    def score(self, observation: Observation) -> Tensor:
        self.seen.append(observation)
        return torch.zeros(observation.key.shape[:-1])


def record(model: Any, ids: Tensor, queries: int | None = 64) -> list[Observation]:
    """Reads `ids` `[1, T]` and returns what every layer showed."""
    recorder = Recorder(last_queries=queries)
    patch_model(model, recorder)
    compress(model, ids)
    unpatch_model(model)
    return recorder.seen


def spec_of(model: Any, tokenizer: Any, method: str | None, **options: Any) -> CacheSpec:
    """The spec that a method makes of a model."""
    patch_model(model, method, tokenizer=tokenizer, **options)
    spec = compress(model, torch.ones(1, 1, dtype=torch.long)).spec
    unpatch_model(model)
    return spec


def evicted(spec: CacheSpec, observations: list[Observation]) -> KVCache:
    """The cache that a spec makes of a recorded prefill, for a model that is patched in any way that shares alike.

    Args:
        spec: of the method.
        observations: of a model whose layers all have full attention.
    """
    cache, policy = KVCache(spec), spec.eviction
    for index, (layer, observation) in enumerate(zip(cache.layers, observations, strict=True)):
        decided = None if policy is None else policy.keep(observation)
        keep = None if decided is None else decided[0]
        layer.segments = [Segment.seal(spec.codecs[index], spec.store, observation.key, observation.value, keep)]
        layer.seen, layer.is_initialized = observation.num_tokens, True
        layer.entry = (observation.key.shape[1], observation.key.shape[3], observation.key.element_size())
    return cache


def check(model: Any, tokenizer: Any, ids: Tensor, observations: list[Observation], method: str, **options) -> None:
    """Raises unless a method keeps of the recorded prefill exactly what it keeps in a real run."""
    mine = evicted(spec_of(model, tokenizer, method, **options), observations)
    patch_model(model, method, tokenizer=tokenizer, **options)
    real = compress(model, ids)
    unpatch_model(model)
    for one, other in zip(mine.layers, real.layers, strict=True):
        if not torch.equal(one.segments[0].positions(), other.segments[0].positions()):
            raise AssertionError(f"{method} keeps other tokens of a recorded prefill than of its own")
