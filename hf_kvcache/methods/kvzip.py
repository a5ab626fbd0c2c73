"""KVzip (arXiv 2505.23416): keep what the model looks at when it repeats the context from its cache.

A context that can be repeated from memory can serve any later question. So the model is made to repeat it, and a token
matters as much as the highest attention it gets meanwhile:

1. prefill the context;
2. in parts of `chunk` tokens, run the model on "Repeat the previous context exactly." and the part itself (teacher
   forcing, no decoding), as a continuation of the full cache;
3. the score of a token is the maximum, over the queries of that run and the query heads of its KV head, of the
   attention it gets;
4. keep the highest scores of all layers and heads together (non-uniform budgets); the first 4 tokens always.

Different from the authors' code: the attention weight is the model's own, over the whole context and the repetition
(theirs is a softmax over the part and the repetition alone; the same when the context is one part); the run that scores
is the model's ordinary forward; and the bytes of what is dropped are freed. Any allocator may take the place of step
4's, and any selector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.eviction import Allocator, Global, Observation
from hf_kvcache.methods.eviction_method import ScoringMethod
from hf_kvcache.methods.method import CalibrationModel
from hf_kvcache.spec import CacheSpec

FIRST = "\n\nRepeat the previous context exactly.\n"
LATER = "\n\nRepeat the part of the previous context exactly, starting with "
# so many tokens before a later part tell the model where to go on
LEAD = 8


@dataclass(frozen=True)
class KVzip(ScoringMethod):
    """Scores by the attention that tokens get while the context is repeated. Costs about two more prefills.

    Args:
        chunk: tokens repeated in one forward.
        instructions: token ids of the instruction for the first and for later parts; None to tokenise the published
            ones with the model's tokenizer.
    """

    name: ClassVar[str] = "kvzip"
    paper: ClassVar[str] = "arXiv 2505.23416"
    replays: ClassVar[bool] = True

    sinks: int = 4
    chunk: int = 2048
    instructions: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.chunk < 1:
            raise ValueError(f"chunk is a number of tokens, at least 1, got {self.chunk}")

    def apply(self, spec: CacheSpec, model: CalibrationModel) -> CacheSpec:
        instructions = self.instructions or (model.encode(FIRST), model.encode(LATER))
        return ScoringMethod.apply(replace(self, instructions=instructions), spec, model)

    @property
    def host(self) -> Allocator:
        return Global()

    def passes(self, ids: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        assert self.instructions is not None
        for start in range(0, ids.shape[1], self.chunk):
            end = min(start + self.chunk, ids.shape[1])
            words = torch.tensor(self.instructions[start > 0], dtype=ids.dtype, device=ids.device)
            lead = ids[:, max(start - LEAD, 0) : start]
            yield start, end, torch.cat([words.expand(len(ids), -1), lead, ids[:, start:end]], dim=1)

    def score(self, observation: Observation) -> Tensor:
        if observation.replayed is None:
            raise RuntimeError("kvzip scores a context that was read again; this one was not")
        return observation.replayed.float()
