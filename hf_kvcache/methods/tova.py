"""TOVA, token omission via attention (arXiv 2401.06104): what the last query attends to least goes.

    s_i = attention of the last query to token i, averaged over all query heads of the layer

and all heads of a layer keep the same tokens. The paper applies it at every step, which is `every=1`; a larger `every`
does the same for a block of tokens at a time, by the last query of the block. Nothing is protected but by its score:
the paper keeps no window and no sinks.

Where the heads hold different tokens, because an allocator or CriticalKV is on top, a head adds nothing to the average
of a token that it does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_kvcache.eviction import Observation
from hf_kvcache.methods.eviction_method import ScoringMethod


@dataclass(frozen=True)
class TOVA(ScoringMethod):
    """Scores by the attention of the last query, the same for all heads of a layer."""

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "arXiv 2401.06104"
    while_decoding: ClassVar[bool] = True
    across_heads: ClassVar[bool] = True

    @property
    def queries(self) -> int:
        return 1

    def score(self, observation: Observation) -> Tensor:
        weights = observation.attention(last=1)[..., 0, :].mean(dim=2)
        heads = weights.shape[1]
        if observation.valid is None and observation.positions is None:
            return weights.mean(dim=1, keepdim=True).expand(-1, heads, -1)
        # one column may hold different tokens of different heads, so tokens are brought together by position
        place = observation.places.unique(return_inverse=True)[1].flatten(1)
        total = weights.new_zeros(len(weights), int(place.max()) + 1).scatter_add_(1, place, weights.flatten(1))
        return total.gather(1, place).view(weights.shape) / heads
