"""PyramidKV (arXiv 2406.02069): lower layers attend widely and upper ones narrowly, so budgets fall with depth.

For L layers and a budget of b tokens a head, of which w are always kept, the budgets are linear in the layer l:

    min = (b - w) / beta        max = 2 (b - w) - min        b_l = w + max - l (max - min) / (L - 1)

so that their mean is b. Every head of a layer keeps b_l. Where max exceeds the n - w tokens that there are, the line
is drawn anew with the same mean, as in the authors' code: max = n - w, min = 2 (b - w) - max. The budgets of all layers
sum to L x b exactly; the authors' code rounds each.

Default as in the authors' code: beta 20. kvpress falls back to equal budgets, without a word, where the smallest is
less than the window. Here no share can be less than what is always kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.eviction import Observation
from hf_kvcache.eviction.roles import largest_remainder
from hf_kvcache.methods.eviction_method import EvictionMethod


@dataclass(frozen=True)
class PyramidKV(EvictionMethod):
    """Gives lower layers more of the budget than upper ones.

    Args:
        beta: how many times the mean is the least share; at least 1, which is the same for all layers.
    """

    name: ClassVar[str] = "pyramidkv"
    slot: ClassVar[str] = "allocator"
    paper: ClassVar[str] = "arXiv 2406.02069"

    beta: float = 20.0

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.beta, bool) or not isinstance(self.beta, (int, float)) or not self.beta >= 1:
            raise ValueError(f"beta must be a number of at least 1, got {self.beta!r}")

    def allocate(self, score: Tensor, budget: int, limit: Tensor, protected: int, observation: Observation) -> Tensor:
        layers, free = observation.num_layers, budget - protected
        # of what was seen, not of what is held: every layer must come to the same budgets
        room = observation.seen - protected
        most = min(2 * free - free / self.beta, room)
        share = torch.linspace(most, 2 * free - most, layers, dtype=torch.float64)
        layer = int(largest_remainder(share, free * layers, torch.full((layers,), room))[observation.layer])
        return limit.clamp(max=protected + layer)
