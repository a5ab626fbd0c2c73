"""HeadKV (arXiv 2410.19258, ICLR 2025): heads that retrieve keep more, in whatever layer they are.

The importance S_h of a head is measured once a model (`hf_kvcache.calibration.retrieval_heads`): how much of its
attention goes to the evidence when the model answers a question about a long text rightly. With S summing to 1 over all
H heads of all L layers, and b the budget without the tokens that are always kept:

    b_h = S_h floor(b / beta) L H  +  (b - floor(b / beta))

so every head has a fixed part, and a pool is shared by importance. Which tokens a head keeps is its host's business
(the paper: SnapKV with window 32 and max-pooling of 7).

Different from the authors' code: it keeps a cache for every query head; here the query heads that read one KV head
share it, and its importance is the mean of theirs, over all layers that read it where layers share. Budgets sum
exactly, where theirs are rounded one by one, and what a head cannot take goes to the others by importance. beta is
tuned by the authors between 1.005 and 10, a task and budget at a time; 1.2 here is in that range and not tuned.

No measurement ships with this package. Without `importance` the model is measured when it is patched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.eviction import Observation
from hf_kvcache.eviction.importance import HeadImportance
from hf_kvcache.eviction.roles import largest_remainder
from hf_kvcache.fingerprint import matches
from hf_kvcache.methods.eviction_method import EvictionMethod
from hf_kvcache.methods.method import CalibrationModel
from hf_kvcache.spec import CacheSpec

SAMPLES, LENGTH = 24, 512


@dataclass(frozen=True)
class HeadKV(EvictionMethod):
    """Splits the budget of all layers over all heads by measured importance.

    Args:
        importance: a `HeadImportance`, the path of a saved one, or None to measure the model when it is patched.
        beta: 1 / beta of the budget is shared by importance, the rest is the same for all heads; at least 1.
    """

    name: ClassVar[str] = "headkv"
    slot: ClassVar[str] = "allocator"
    paper: ClassVar[str] = "arXiv 2410.19258"
    across_heads: ClassVar[bool] = True

    importance: HeadImportance | str | Path | None = None
    beta: float = 1.2

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.beta, bool) or not isinstance(self.beta, (int, float)) or not self.beta >= 1:
            raise ValueError(f"beta must be a number of at least 1, got {self.beta!r}")
        if not (self.importance is None or isinstance(self.importance, (HeadImportance, str, Path))):
            raise TypeError(
                f"importance must be a HeadImportance or the path of one, got {type(self.importance).__name__}; "
                "wrap a tensor [layers, query heads] as HeadImportance(values)"
            )

    def apply(self, spec: CacheSpec, model: CalibrationModel) -> CacheSpec:
        found = self.importance
        if found is None:
            found = model.head_importance(SAMPLES, LENGTH)
        elif not isinstance(found, HeadImportance):
            found = HeadImportance.load(found)
        if not matches(found.fingerprint, spec.fingerprint) or len(found.values) != spec.num_layers:
            raise ValueError(
                f"the head importance is of the model {found.fingerprint or '(unnamed)'} with {len(found.values)} "
                f"layers, this one is {spec.fingerprint} with {spec.num_layers}; measure this model with "
                "`hf-kvcache calibrate headkv MODEL -o FILE`"
            )
        resolved = replace(self, importance=found)
        return spec.fill(self.slot, resolved, by=self.name).limit(self.budget, self.every, by=self.name)

    def allocate(self, score: Tensor, budget: int, limit: Tensor, protected: int, observation: Observation) -> Tensor:
        if not isinstance(self.importance, HeadImportance):
            raise ValueError("the head importance is not there yet; apply the method with patch_model")
        heads, free = score.shape[1], budget - protected
        # which layers share is known only now: another method may have said so after this one
        share = self.importance.of_kv_heads(observation.readers, heads)
        pool = int(free / self.beta)
        wanted = share.flatten() * (pool * share.numel()) + (free - pool)
        room = torch.full((share.numel(),), observation.seen - protected)
        given = largest_remainder(wanted, free * share.numel(), room).view(share.shape)[observation.layer]
        return torch.minimum(limit, protected + given.to(limit.device))
