"""Ada-KV (arXiv 2407.11550, NeurIPS 2025): the heads of a layer share one budget.

For heads i of a layer with scores A_i, the split that minimises the paper's bound on the eviction loss is: take the
highest B scores of all heads together; B_i is how many of them are in head i (theorem 3.3). A safeguard keeps a head
whose attention is flat from losing everything. Two published forms of it:

- `safeguard="mix"`, the authors' repository: B_i = (1 - a) f_i + a b, where f_i are the hits and b the uniform share;
- `safeguard="floor"`, kvpress: the best a b of every head are in, then the rest of the budget goes to the highest
  scores of all heads.

Here the budgets sum to the layer's budget exactly; the authors' code may miss it by a rounding. The window and the
sinks of the scorer are kept on top in every head, and b counts without them, as in the authors' code; kvpress counts a
with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.eviction import Observation
from hf_kvcache.eviction.roles import largest_remainder, top_mask
from hf_kvcache.methods.eviction_method import EvictionMethod

SAFEGUARDS = ("mix", "floor")


@dataclass(frozen=True)
class AdaKV(EvictionMethod):
    """Splits a layer's budget over its heads by where the highest scores are.

    Args:
        alpha: a, the share of the budget that is safe.
        safeguard: `"mix"` or `"floor"`, see above.
    """

    name: ClassVar[str] = "adakv"
    slot: ClassVar[str] = "allocator"
    paper: ClassVar[str] = "arXiv 2407.11550"
    across_heads: ClassVar[bool] = True

    alpha: float = 0.2
    safeguard: str = "mix"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is a share of the budget, in [0, 1], got {self.alpha}")
        if self.safeguard not in SAFEGUARDS:
            raise ValueError(f"safeguard must be one of {', '.join(SAFEGUARDS)}, got {self.safeguard!r}")

    def allocate(self, score: Tensor, budget: int, limit: Tensor, protected: int, observation: Observation) -> Tensor:
        batch, heads, _ = score.shape
        free = budget - protected
        open_ = torch.isfinite(score)
        room = open_.sum(-1)
        total = room.sum(-1).min().clamp(max=free * heads)
        safe = torch.zeros_like(open_)
        if self.safeguard == "floor":
            wanted = room.clamp(max=int(self.alpha * free))
            safe = top_mask(score.masked_fill(~open_, -torch.inf), wanted) & open_
        candidates = score.masked_fill(~open_, -torch.inf).masked_fill(safe, torch.finfo(score.dtype).max)
        best = top_mask(candidates.flatten(1), total.expand(batch))
        hits = best.view(score.shape).sum(-1)
        if self.safeguard == "floor":
            return protected_counts(limit, room) + hits
        share = (1 - self.alpha) * hits + self.alpha * free
        return protected_counts(limit, room) + largest_remainder(share, free * heads, room)


def protected_counts(limit: Tensor, room: Tensor) -> Tensor:
    """How many tokens of every head are kept anyway."""
    return limit - room
