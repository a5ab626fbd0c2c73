"""Random eviction: the control that every other score has to beat.

Every token of every KV head draws one number from `seed`, its layer, its head and its place in the sequence, and keeps
it: evicting again while decoding therefore leaves an even sample of all tokens so far. The draw is its own generator's,
the global one is not touched, and a row draws the same alone as in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.eviction import Observation
from hf_kvcache.methods.eviction_method import ScoringMethod

# apart from one seed to the next by more than any model has layers
LAYERS = 1 << 16


@dataclass(frozen=True)
class Random(ScoringMethod):
    """Scores at random.

    Args:
        seed: of the draw; a number of at least 0.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "-"
    while_decoding: ClassVar[bool] = True

    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an int of at least 0, got {self.seed!r}")

    def score(self, observation: Observation) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * LAYERS + observation.layer)
        places = observation.places.clamp_min(0)
        # by token, then head, so that a longer sequence begins with the same numbers
        draws = torch.rand(int(places.max()) + 1, places.shape[1], generator=generator).to(places.device)
        return draws.T.expand(len(places), -1, -1).gather(2, places)
