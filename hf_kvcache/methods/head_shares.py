"""The counts of a plan: every head keeps its own share of the tokens, whatever the other heads keep.

No paper's method and not in METHODS: a plan's shares are priced one by one, each as all that a head keeps, and have to
be applied as such. HeadKV would give every head what is always kept and divide only the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.eviction import Observation
from hf_kvcache.methods.eviction_method import EvictionMethod


@dataclass(frozen=True, eq=False)
class HeadShares(EvictionMethod):
    """A share of the tokens for every head of every layer, always-kept ones included.

    Args:
        kept: shares `[layers, H_kv]`, each in (0, 1]. Of layers that share, the row of the one that stores is taken.
    """

    name: ClassVar[str] = "planned"
    slot: ClassVar[str] = "allocator"
    paper: ClassVar[str] = "-"
    # none is compared, but a process that has a part of the heads does not know which rows are theirs
    across_heads: ClassVar[bool] = True

    kept: Tensor

    def allocate(self, score: Tensor, budget: int, limit: Tensor, protected: int, observation: Observation) -> Tensor:
        share = self.kept[observation.readers[observation.layer][0]]
        # of what was seen: of a set that was evicted from before, as much is kept as of one that was not
        wanted = (share.double() * observation.seen).round().long().clamp_min(max(protected, 1))
        return torch.minimum(limit, wanted.to(limit.device))
