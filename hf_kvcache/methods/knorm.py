"""Knorm (arXiv 2406.11430): keys of small norm attract attention.

    s_i = - ||k_i||_2

of every KV head, on the cached key; RoPE does not change its norm. No query is needed. Different from the authors'
code: that leaves the first two layers alone, here the budget holds in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.eviction import Observation
from hf_kvcache.methods.eviction_method import ScoringMethod


@dataclass(frozen=True)
class Knorm(ScoringMethod):
    """Keeps the keys of the smallest L2 norm."""

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "arXiv 2406.11430"
    while_decoding: ClassVar[bool] = True

    def score(self, observation: Observation) -> Tensor:
        return -torch.linalg.vector_norm(observation.key.float(), dim=-1)
