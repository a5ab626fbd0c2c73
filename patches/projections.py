"""What takes the place of projections: of those that consumers do not need, and of those with healed weights."""

from __future__ import annotations

import torch
from torch import nn

from hf_kvcache.patches.adapter import Adapter, Substitute, replaceable
from hf_kvcache.spec import CacheSpec


class HealedProjection(Substitute):
    """A projection with another weight. The state dict keeps the original one."""

    def __init__(self, original: nn.Module, weight: torch.Tensor) -> None:
        super().__init__(original)
        self._buffers = {}
        like = original.weight
        self.register_buffer("healed", weight.to(like.device, like.dtype), persistent=False)

    def idle(self) -> list[nn.Parameter]:
        # the bias is still in use
        return [self.original.weight]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.healed, self.original.bias)


def skip_projections(model: nn.Module, adapter: Adapter, spec: CacheSpec) -> list[tuple[nn.Module, str, Substitute]]:
    """Substitutes for the key and value projections of all consumers, as (parent, attribute, substitute)."""
    return [
        (attention, attribute, substitute)
        for layer in spec.sharing.consumers
        for attention in [adapter.find_attention(model, layer)]
        for attribute, substitute in adapter.kv.skip(attention).items()
    ]


def heal_projections(decoder: nn.Module, spec: CacheSpec) -> list[tuple[nn.Module, str, Substitute]]:
    """Substitutes for the projections that the sharing plan has healed weights for."""
    result: list[tuple[nn.Module, str, Substitute]] = []
    for path, weight in spec.sharing.healed.items():
        parent_path, _, attribute = path.rpartition(".")
        parent = decoder.get_submodule(parent_path)
        original = getattr(parent, attribute)
        if not replaceable(original):
            raise NotImplementedError(
                f"the plan heals {path}, but that is a {type(original).__name__} on {original.weight.device}, and only "
                "a plain Linear in memory can be healed; use heal=False"
            )
        if original.weight.shape != weight.shape:
            raise ValueError(
                f"the plan's weight for {path} has shape {tuple(weight.shape)}, the model's "
                f"{tuple(original.weight.shape)}; calibrate a plan for this model"
            )
        result.append((parent, attribute, HealedProjection(original, weight)))
    return result
