"""Phi-3: queries, keys and values come from one fused projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from hf_kvcache.patches.adapter import Substitute, out_features


@dataclass(frozen=True)
class FusedQKV:
    """Families with one projection whose output is queries, then keys, then values."""

    fused: str = "qkv_proj"

    def skip(self, attention: nn.Module) -> dict[str, nn.Module]:
        query_width = attention.config.num_attention_heads * attention.head_dim
        return {self.fused: OnlyQuery(getattr(attention, self.fused), query_width)}

    def idle(self, attention: nn.Module) -> list[nn.Parameter]:
        return []


class OnlyQuery(Substitute):
    """Computes the query rows of a fused projection and returns zeros for keys and values."""

    def __init__(self, original: nn.Module, query_width: int) -> None:
        super().__init__(original)
        self.query_width, self.width = query_width, out_features(original)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        bias = None if self.original.bias is None else self.original.bias[: self.query_width]
        query = functional.linear(hidden_states, self.original.weight[: self.query_width], bias)
        return functional.pad(query, (0, self.width - self.query_width))
