"""Expected Attention (arXiv 2510.00636): how much attention future queries can be expected to pay.

Queries before RoPE are roughly normally distributed, so the mean of exp(q^T k / sqrt(d)) over future queries has a
closed form. In its order, for every query head:

    1. mean mu and covariance S of the queries of the prompt before RoPE, without those of the first tokens
    2. R: mean of the rotations of the next `horizon` positions; mu <- R mu, S <- R S R^T
    3. z_i = exp(mu^T k_i / sqrt(d) + k_i^T S k_i / (2 d)), with k_i after RoPE, as cached
    4. a = z / sum of z over all but the first tokens, mean over the query heads of the group
    5. s_i = (a_i + epsilon) ||v_i||_2

Defaults as in kvpress, by the paper's authors: horizon 512; 4 sinks, which are always kept, whose queries step 1 leaves
out and whose keys step 4: they would take most of the attention, and epsilon drown what is left; and epsilon 1e-2, that
of their leaderboard entry (which also splits the budget with AdaKV). The paper has ||W_O v_i|| in step 5; for that
compose with CriticalKV, beside which step 5 is left out: its second stage does that. A soft cap on attention scores
(Gemma 2) has no place in the closed form and is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.eviction import Observation, Reading, Scorer, Selector
from hf_kvcache.methods.eviction_method import ScoringMethod, check_count


@dataclass(frozen=True)
class ExpectedAttention(ScoringMethod):
    """Scores by the attention that future queries are expected to pay.

    Args:
        sinks: number of first tokens that are always kept, and whose queries and keys do not count.
        horizon: number of future positions.
        covariance: use S; without it the expectation is that of the mean query.
        value_norm: multiply by the norm of the value; None to do so unless the selector does (criticalkv).
        epsilon: added to the expected attention before that.
    """

    name: ClassVar[str] = "expected_attention"
    paper: ClassVar[str] = "arXiv 2510.00636"
    rotates: ClassVar[bool] = True

    sinks: int = 4
    horizon: int = 512
    covariance: bool = True
    value_norm: bool | None = None
    epsilon: float = 1e-2

    def __post_init__(self):
        super().__post_init__()
        check_count("horizon", self.horizon, least=1)
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must be at least 0, got {self.epsilon!r}")

    @property
    def queries(self) -> None:
        return None

    @property
    def weighs_values(self) -> bool:
        return self.value_norm is not False

    def beside(self, selector: Selector) -> Scorer:
        return replace(self, value_norm=not selector.weighs_values) if self.value_norm is None else self

    def score(self, observation: Observation) -> Tensor:
        logits = torch.cat([self.expected_logits(observation, reading) for reading in observation.readings], dim=2)
        logits[..., : self.sinks] = torch.finfo(logits.dtype).min
        score = logits.softmax(dim=-1).mean(dim=2)
        if self.weighs_values:
            score = (score + self.epsilon) * torch.linalg.vector_norm(observation.value.float(), dim=-1)
        return score

    def expected_logits(self, observation: Observation, reading: Reading) -> Tensor:
        """log z of the query heads of one reading layer, `[B, H_kv, G, T]`."""
        if reading.query is None or reading.rotate is None:
            raise ValueError(
                "expected_attention needs all queries and the rotary embedding of the model, which were not recorded; "
                "run the patched model itself, not its layers one by one"
            )
        key, tokens, scale = observation.key.float(), observation.num_tokens, observation.scale
        first = tokens - reading.query.shape[2]
        positions = torch.arange(first, tokens, device=key.device)
        query = reading.rotate(reading.query, positions, inverse=True)
        query = query[:, :, min(max(self.sinks - first, 0), query.shape[2] - 1) :].unflatten(1, (key.shape[1], -1))
        mean = query.mean(dim=3, keepdim=True)
        rotation = reading.rotate.mean(torch.arange(tokens, tokens + self.horizon, device=key.device))
        logits = torch.matmul((mean @ rotation).squeeze(3), key.transpose(-1, -2)) * scale
        if not self.covariance:
            return logits
        # one query head at a time: k^T S k of all heads at once would be as large as all their queries
        for member in range(query.shape[2]):
            centred = (query[:, :, member] - mean[:, :, member]) @ rotation
            spread = centred.transpose(-1, -2) @ centred / centred.shape[2]
            logits[:, :, member] += ((key @ spread) * key).sum(-1) * scale**2 / 2
        return logits
