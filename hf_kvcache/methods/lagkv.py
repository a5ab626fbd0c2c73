"""LagKV (arXiv 2504.04704): tokens that stand out from those that follow. No attention weight is needed.

After the sinks the sequence is cut into partitions of `lag` tokens. In its order, for keys and values x of every KV
head and partition p:

    1. x^ = (x - min) / (max - min), by channel, with minimum and maximum over partition p + 1, the lag reference
    2. standard deviation of x^ over the channels, softmax over the tokens of p
    3. mean of the key's and the value's score
    4. s_i = rank of token i inside its partition, divided by lag: every partition gives up the same share

The last full partition has no reference and stays before all others, and so do the tokens after it, the most recent
ones first where the budget does not reach for them. A prompt shorter than sinks + 2 x lag has nothing to compare and
keeps its most recent tokens. Equal ranks of different partitions go to the later one.

Defaults as in the paper's experiments and kvpress: lag 128, 4 sinks. Different from the authors' code: that evicts
while it reads, partition by partition; here the ranks of all partitions are taken at the end of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.eviction import Observation
from hf_kvcache.methods.eviction_method import ScoringMethod, check_count

# a channel that is constant over the reference would divide by zero
LEAST_RANGE = 1e-6


@dataclass(frozen=True)
class LagKV(ScoringMethod):
    """Scores every partition of the sequence against the next one.

    Args:
        sinks: number of first tokens that are always kept.
        lag: tokens of a partition.
    """

    name: ClassVar[str] = "lagkv"
    paper: ClassVar[str] = "arXiv 2504.04704"

    sinks: int = 4
    lag: int = 128

    def __post_init__(self):
        super().__post_init__()
        check_count("lag", self.lag, least=2)

    def score(self, observation: Observation) -> Tensor:
        batch, heads, tokens, _ = observation.key.shape
        recency = torch.arange(tokens, device=observation.key.device, dtype=torch.float32) / tokens
        score = (1 + recency).expand(batch, heads, tokens).clone()
        partitions = (tokens - self.sinks) // self.lag
        if partitions < 2:
            return score
        end = self.sinks + partitions * self.lag
        parts = [
            spread(tensor[:, :, self.sinks : end].float().unflatten(2, (partitions, self.lag)))
            for tensor in (observation.key, observation.value)
        ]
        rank = ((parts[0] + parts[1]) / 2).argsort(dim=-1).argsort(dim=-1).flatten(2)
        judged = slice(self.sinks, end - self.lag)
        # recency is below one step of the ranks, so it only decides between equal ones
        score[:, :, judged] = (rank + recency[judged]) / self.lag
        return score


def spread(states: Tensor) -> Tensor:
    """Steps 1 and 2 for keys or values `[B, H_kv, P, lag, D]`; returns `[B, H_kv, P - 1, lag]`."""
    reference, judged = states[:, :, 1:], states[:, :, :-1]
    low, high = reference.amin(dim=3, keepdim=True), reference.amax(dim=3, keepdim=True)
    return ((judged - low) / (high - low).clamp_min(LEAST_RANGE)).std(dim=-1).softmax(dim=-1)
