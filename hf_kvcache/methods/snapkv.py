"""SnapKV (arXiv 2404.14469): what the last tokens of the prompt attend to is what the answer will need.

The attention weights of the last `window` queries over all tokens (causal within the window) are averaged over the
window, smoothed along the sequence by a pooling, so that neighbours of an important token stay too, and averaged over
the query heads of each KV head. The window itself is always kept.

Defaults as in the authors' class and in kvpress: window 64, average pooling of 5. The authors' LongBench configuration
is `window=32, kernel_size=7, pooling="max"`. Different from the authors' code: it scores and stores every query head,
which takes the group size times the memory; here, as in AdaKV and kvpress, the group shares one score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from hf_kvcache.eviction import Observation
from hf_kvcache.methods.eviction_method import ScoringMethod, check_count

POOLINGS = ("avg", "max", "none")


@dataclass(frozen=True)
class SnapKV(ScoringMethod):
    """Scores by the attention of an observation window.

    Args:
        window: number of last queries that observe; always kept.
        kernel_size: of the pooling, odd.
        pooling: `"avg"`, `"max"` or `"none"`.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "arXiv 2404.14469"
    while_decoding: ClassVar[bool] = True

    window: int = 64
    kernel_size: int = 5
    pooling: str = "avg"

    def __post_init__(self):
        super().__post_init__()
        check_count("window", self.window, least=1)
        check_pooling(self.kernel_size, self.pooling)

    @property
    def queries(self) -> int:
        return self.window

    def score(self, observation: Observation) -> Tensor:
        weights = observation.window_scores(self.window)
        return pool(weights, self.kernel_size, self.pooling, self.window).mean(dim=2)


def pool(score: Tensor, kernel_size: int, pooling: str, window: int) -> Tensor:
    """Smooths scores `[..., T]` along the sequence; the last `window` stay out of it and as they are."""
    free = score.shape[-1] - window
    if pooling == "none" or free < 1:
        return score
    function = functional.avg_pool1d if pooling == "avg" else functional.max_pool1d
    flat = score[..., :free].reshape(-1, 1, free)
    smooth = function(flat, kernel_size, stride=1, padding=kernel_size // 2)
    return torch.cat([smooth.view(*score.shape[:-1], free), score[..., free:]], dim=-1)


def check_pooling(kernel_size: int, pooling: str) -> None:
    """Raises for a pooling that there is not."""
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be an odd number of tokens, at least 1, got {kernel_size!r}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
