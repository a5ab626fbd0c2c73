"""KeyDiff (arXiv 2504.15364): keys unlike the others are the ones that matter.

In its order, for every KV head:

    1. anchor: mean of the normalised keys, mean_j k_j / ||k_j||
    2. s_i = - cos(k_i, anchor)

No query and no attention weight is needed. The paper works in blocks, so that a prompt is cut down while it is read;
here the prompt is judged at once, and `every=N` does the same in blocks while decoding, over what is still held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from hf_kvcache.eviction import Observation
from hf_kvcache.methods.eviction_method import ScoringMethod


@dataclass(frozen=True)
class KeyDiff(ScoringMethod):
    """Keeps the keys least similar to the mean key."""

    name: ClassVar[str] = "keydiff"
    paper: ClassVar[str] = "arXiv 2504.15364"
    while_decoding: ClassVar[bool] = True

    def score(self, observation: Observation) -> Tensor:
        key = functional.normalize(observation.key.float(), dim=-1)
        held = key if observation.valid is None else key * observation.valid.unsqueeze(-1)
        # the mean up to a factor, to which the cosine is blind
        anchor = functional.normalize(held.sum(dim=2, keepdim=True), dim=-1)
        return -torch.matmul(key, anchor.transpose(-1, -2)).squeeze(-1)
