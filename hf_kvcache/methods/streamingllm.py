"""StreamingLLM (arXiv 2309.17453): the first tokens and the most recent ones.

A softmax has to put its weight somewhere, and models learn to put what they do not need on the first tokens: these
"attention sinks" must stay, or the model falls apart once they leave a sliding window. For a budget b:

    keep the first `sinks` tokens and the last b - sinks

Default as in the paper: 4 sinks. Different from the authors' code: positions are not counted anew inside the cache.
Queries keep the positions of the whole text, as with every other method here, so the gap after the sinks grows; within
the lengths that a model was trained on that makes no difference worth having, beyond them it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.eviction import Observation
from hf_kvcache.methods.eviction_method import ScoringMethod


@dataclass(frozen=True)
class StreamingLLM(ScoringMethod):
    """Keeps attention sinks and the most recent tokens.

    Args:
        sinks: number of first tokens that are always kept.
    """

    name: ClassVar[str] = "streamingllm"
    paper: ClassVar[str] = "arXiv 2309.17453"
    while_decoding: ClassVar[bool] = True

    sinks: int = 4

    def score(self, observation: Observation) -> Tensor:
        # of the sequence, not of the rectangle: a row must score alike in any batch, since criticalkv multiplies scores
        return observation.places.to(torch.float32)
