"""CriticalKV (arXiv 2502.03805, ICML 2026): choose tokens by how much the *output* of attention would change.

Evicting tokens perturbs the output by at most theta (see `hf_kvcache.eviction.perturbation`), which depends on the
attention weights A and on the norms of the projected values V W_O. Given a first stage that already holds more than
half of the attention, the bound is least for the tokens with the largest A_i ||V_i W_O||_1 among the rest. Algorithm 1,
for a head with budget b, in its order:

    1. stage 1: the b' = first_stage x b tokens of the largest A
    2. stage 2: the b'' = b - b' tokens of the largest (A + 1e-4) ||V W_O||_1 among the others

It replaces only the top-k step of its host: any scorer gives A (for SnapKV the pooled attention of the window), any
allocator gives b. As in the authors' code, b counts the window, which is always in stage 1; the norm is the mean over
the query heads that read a KV head. The printed pseudocode differs from text, code and ablation in two ways that are
not followed: its header has first_stage 0.25, and it uses the product in both stages. Hosts whose score is no attention
weight (Knorm, KeyDiff, R-KV) are not in the paper; where their scores are negative, the least of a head counts as zero.

Both stages are about A alone: stage 1 is to hold most of the attention, and theorem 3.5 multiplies that by the norm
once. A host whose score has a norm of the values in it would count norms twice, so Expected Attention leaves its own
out here unless `value_norm=True` insists, of which `patch_model` warns.

`norm="l2"` takes ||V_i W_O||_2 through the Gram matrix W_O W_O^T of every head, `D x D`, which is about hidden/D times
cheaper and, by the paper, about as good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.eviction import Observation
from hf_kvcache.eviction.roles import top_mask
from hf_kvcache.kernels.value_norm import value_norm
from hf_kvcache.methods.eviction_method import EvictionMethod

EPSILON = 1e-4
NORMS = ("l1", "l2")


@dataclass(frozen=True)
class CriticalKV(EvictionMethod):
    """Selects in two stages, by score and by score times projected value norm.

    Args:
        first_stage: alpha, the share of each head's budget that goes by score alone; 1 is the host's top-k.
        norm: `"l1"`, as published, or `"l2"`.
    """

    name: ClassVar[str] = "criticalkv"
    slot: ClassVar[str] = "selector"
    paper: ClassVar[str] = "arXiv 2502.03805"
    across_heads: ClassVar[bool] = True

    first_stage: float = 0.5
    norm: str = "l1"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.first_stage <= 1:
            raise ValueError(f"first_stage is a share of the budget, in [0, 1], got {self.first_stage}")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")

    @property
    def weighs_values(self) -> bool:
        return self.first_stage < 1

    def select(self, score: Tensor, counts: Tensor, observation: Observation) -> Tensor:
        protected = (score == torch.inf).sum(-1)
        first = torch.maximum((self.first_stage * counts).long(), torch.minimum(protected, counts))
        stage_1 = top_mask(score, first)
        norm = projected_norm(observation.value, observation.output, self.norm)
        # a score that is no attention weight may be negative, and a large norm would then count against its token
        lowest = score.masked_fill(score.isinf(), torch.inf).amin(-1, keepdim=True).clamp(max=0)
        critical = ((score - lowest + EPSILON) * norm).masked_fill(score == -torch.inf, -torch.inf)
        stage_2 = top_mask(critical.masked_fill(stage_1, -torch.inf), counts - first)
        return stage_1 | stage_2


def projected_norm(value: Tensor, output: Tensor, norm: str) -> Tensor:
    """||V W_O^h|| of every token, the mean over the query heads h of a group.

    Args:
        value: `[B, H_kv, T, D]`.
        output: `[H_kv, G, D, hidden]`.
        norm: `"l1"` or `"l2"`.

    Returns:
        `[B, H_kv, T]`, float32.
    """
    gram = norm == "l2"
    return value_norm(value, output @ output.transpose(-1, -2) if gram else output, gram)
