"""R-KV (arXiv 2505.24133): while a model reasons at length, keep what is important and not said twice.

Every `every` generated tokens the cache is cut down to the budget. In its order, for every KV head:

    1. importance I: logits of the last `window` queries, their maximum over the query heads of the group, softmax over
       the tokens before the window, mean over the queries, max-pooling of `kernel_size`
    2. redundancy R: cosine similarities of all pairs of keys without those of a key to itself; for every key i the
       similarity to the *last* key j with more than `threshold` is set to zero, so that the latest of a group of
       similar keys is spared; mean over i; softmax over j
    3. Z = lambda I - (1 - lambda) R, and the window is always kept

Defaults: lambda 0.1, the README's (the authors' code has 0.07), window 8, kernel 7, threshold 0.5, every 128. Different
from the authors' code: the similarities are of every row's own keys (theirs are those of the first row of the batch),
and a key without a similar one spares none (theirs spares the first token of the sequence). The prompt is cut down too
where it exceeds the budget, as theirs is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from hf_kvcache.eviction import Observation
from hf_kvcache.eviction.observation import rows_at_once
from hf_kvcache.methods.eviction_method import ScoringMethod, check_count
from hf_kvcache.methods.snapkv import check_pooling, pool


@dataclass(frozen=True)
class RKV(ScoringMethod):
    """Scores by importance less redundancy.

    Args:
        window: number of last queries that judge; always kept.
        kernel_size: of the max-pooling, odd.
        mix: lambda, the share of importance, in [0, 1].
        threshold: the cosine similarity above which two keys say the same.
        every: evict again whenever so many tokens were generated.
    """

    name: ClassVar[str] = "rkv"
    paper: ClassVar[str] = "arXiv 2505.24133"
    while_decoding: ClassVar[bool] = True

    window: int = 8
    kernel_size: int = 7
    mix: float = 0.1
    threshold: float = 0.5
    every: int | None = field(default=128, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        check_pooling(self.kernel_size, "max")
        check_count("window", self.window, least=1)
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix is a share, in [0, 1], got {self.mix!r}")
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold is a cosine similarity, in [-1, 1], got {self.threshold!r}")

    @property
    def queries(self) -> int:
        return self.window

    def score(self, observation: Observation) -> Tensor:
        logits = observation.logits(last=self.window).amax(dim=2)
        logits[..., max(logits.shape[-1] - self.window, 1) :] = torch.finfo(logits.dtype).min
        importance = pool(logits.softmax(-1).mean(dim=2), self.kernel_size, "max", self.window)
        return self.mix * importance - (1 - self.mix) * redundancy(observation.key, observation.valid, self.threshold)


def redundancy(key: Tensor, valid: Tensor | None, threshold: float) -> Tensor:
    """Step 2 for keys `[B, H_kv, T, D]`, of which `valid` `[B, H_kv, T]` are there; returns R `[B, H_kv, T]`."""
    batch, heads, tokens, _ = key.shape
    key = functional.normalize(key.float(), dim=-1)
    if valid is not None:
        key = key * valid.unsqueeze(-1)
    column = torch.arange(tokens, device=key.device)
    total = torch.zeros(batch, heads, tokens, device=key.device)
    step = rows_at_once(key.device, batch * heads * tokens)
    for start in range(0, tokens, step):
        row = column[start : start + step]
        similarity = torch.matmul(key[:, :, row], key.transpose(-1, -2))
        similarity.masked_fill_(row[:, None] == column, 0.0)
        last = torch.where(similarity > threshold, column, -1).amax(dim=-1, keepdim=True)
        total += similarity.masked_fill_(column == last, 0.0).sum(dim=2)
    count = tokens if valid is None else valid.sum(-1, keepdim=True).clamp_min(1)
    mean = total / count
    return (mean if valid is None else mean.masked_fill(~valid, torch.finfo(mean.dtype).min)).softmax(dim=-1)
