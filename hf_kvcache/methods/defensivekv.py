"""DefensiveKV (arXiv 2510.13334), the CriticalKV authors' follow-up: guard against the worst case, not the average.

What matters varies from query to query, so an average over the observation window takes a fragile guess at the
future. Defensive aggregation, for every KV head, in its order:

    1. attention weights A of the last `window` queries over all tokens
    2. worst case: maximum over the queries of the window and over the query heads of the group
    3. prior risk: no token counts less than the mean of that over the tokens
    4. average pooling along the sequence; the window is always kept

This file is the score. The rest of the published method is composed: `adakv` splits the budget over the heads, and
`criticalkv` multiplies by the norm of the projected value in its second stage: `"defensivekv+adakv+criticalkv"`. The
authors' selector differs from CriticalKV's in that stage 1 ends when it holds 0.9 of the attention, not at a share of
the budget; layer budgets (Layer-DefensiveKV) need all layers' scores at once and are not here.

Defaults as in the authors' code: window 32, average pooling of 5. The mean of step 3 is over the tokens outside the
window, which compete, and tokens below it keep their order by a thousandth, where the published floor makes them equal
and leaves the choice among them to chance. In which order the authors pool and correct is not confirmed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_kvcache.eviction import Observation
from hf_kvcache.methods.snapkv import SnapKV, pool

ORDER_BELOW_FLOOR = 1e-3


@dataclass(frozen=True)
class DefensiveKV(SnapKV):
    """Scores by the largest attention that an observation window pays, with a floor.

    Args:
        window: number of last queries that observe; always kept.
        kernel_size: of the pooling, odd.
        pooling: `"avg"`, `"max"` or `"none"`.
    """

    name: ClassVar[str] = "defensivekv"
    paper: ClassVar[str] = "arXiv 2510.13334"

    window: int = 32

    def score(self, observation: Observation) -> Tensor:
        worst = observation.attention(last=self.window).amax(dim=(2, 3))
        free = worst[..., : max(worst.shape[-1] - self.window, 1)]
        if observation.valid is None:
            prior = free.mean(dim=-1, keepdim=True)
        else:
            there = observation.valid[..., : free.shape[-1]]
            prior = (free * there).sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp_min(1)
            # a place without a token must not lend its floor to its neighbours in the pooling
            prior = prior * observation.valid
        floor = prior + worst * ORDER_BELOW_FLOOR
        return pool(worst.maximum(floor), self.kernel_size, self.pooling, self.window)
