"""DefensiveKV (arXiv 2510.13334), the CriticalKV authors' follow-up: guard against the worst case, not the average.

What matters varies from query to query, so an average over the observation window takes a fragile guess at the
future. Defensive aggregation, for every KV head, in its order:

    1. attention weights A of the last `window` queries over all tokens, of which those outside the window compete
    2. average pooling along the sequence of the weights of every query, which keep their sum
    3. worst case: maximum over the queries of the window and over the query heads of the group
    4. prior risk: no token counts less than the mean of that over the tokens; the window is always kept

This file is the score. The rest of the published method is composed: `adakv` splits the budget over the heads, and
`criticalkv` multiplies by the norm of the projected value in its second stage: `"defensivekv+adakv+criticalkv"`. That
differs from the authors' selector in three ways. Their stage 1 ends when it holds 0.9 of the attention, not at a share
of the budget; they divide the norms of a token by their sum over the KV heads first; and they take the highest products
of all heads of a layer together, so that the budgets of the heads depend on the norms, where AdaKV's depend on the
score alone. Layer budgets (Layer-DefensiveKV) need all layers' scores at once and are not here.

Defaults as in the authors' code: window 32, average pooling of 5. Tokens below the mean of step 4 keep their order by a
thousandth, where the published floor makes them equal and leaves the choice among them to chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
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
        weights = observation.attention(last=self.window)
        free = max(weights.shape[-1] - self.window, 0)
        smooth = pool(weights, self.kernel_size, self.pooling, self.window)[..., :free]
        there = torch.ones_like(smooth[:, :, 0, 0])
        if observation.valid is not None:
            there = there * observation.valid[..., :free]
        # what pooling gives to a place without a token is lost, as is what it gives beyond the ends of the sequence
        total = torch.matmul(smooth, there[:, :, None, :, None]).clamp_min(torch.finfo(smooth.dtype).tiny)
        worst = (smooth * (weights[..., :free].sum(-1, keepdim=True) / total)).amax(dim=(2, 3)) * there
        prior = worst.sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp_min(1)
        corrected = worst.maximum(prior + worst * ORDER_BELOW_FLOOR)
        return torch.cat([corrected, weights[..., free:].amax(dim=(2, 3))], dim=-1)
