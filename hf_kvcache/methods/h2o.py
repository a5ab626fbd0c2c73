"""H2O, heavy-hitter oracle (arXiv 2306.14048, NeurIPS 2023): a few tokens receive most of all attention.

The score of a token is the attention that it has received so far, from all queries of the prompt and, while decoding,
from every query since:

    s_i = sum over all queries q so far of A_qi

and a budget b is split in two: `window` x b for the most recent tokens, the rest for the tokens of the highest s_i, the
heavy hitters. With `every=N` the sums travel with the tokens that stay. The paper evicts one token a step, which is
`every=1`.

Default: half of the budget recent, half heavy hitters, as in the authors' examples (heavy_ratio = recent_ratio). In a
sum early tokens have more queries to collect from than late ones; the recent half makes up for it, and the sum is left
as published (kvpress divides it by the number of queries that could see the token). Different from the authors' code:
the query heads of a KV head share one score, the mean of theirs; the paper's models have one query head each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.eviction import Observation
from hf_kvcache.methods.eviction_method import ScoringMethod

RECEIVED = "attention_received"


@dataclass(frozen=True)
class H2O(ScoringMethod):
    """Keeps recent tokens and those that have received the most attention.

    Args:
        window: how much is kept for being recent: a float is a share of the budget, an int a number of tokens.
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "arXiv 2306.14048"
    carried: ClassVar[tuple[str, ...]] = (RECEIVED,)
    while_decoding: ClassVar[bool] = True

    window: int | float = 0.5

    def check_window(self) -> None:
        if not isinstance(self.window, float):
            super().check_window()
        elif not 0 <= self.window < 1:
            raise ValueError(
                f"a float window is a share of the budget, in [0, 1), got {self.window}; for tokens pass an int"
            )

    @property
    def queries(self) -> None:
        return None

    def score(self, observation: Observation) -> Tensor:
        received = torch.zeros(observation.key.shape[:3], device=observation.key.device)
        for weights in observation.attention_chunks():
            received += weights.sum(dim=3).mean(dim=2)
        if observation.carried is not None and RECEIVED in observation.carried:
            received += observation.carried[RECEIVED]
        return received

    def remember(self, observation: Observation, score: Tensor) -> dict[str, Tensor]:
        return {RECEIVED: score}
