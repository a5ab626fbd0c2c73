"""`KVResidual`: the trainable weights with which a layer adds the KV of the bottom layer to its own (YOCO++)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# the name of the module in an attention module, and so in the state dict
ATTRIBUTE = "kv_residual"


class KVResidual(nn.Module):
    """K' = lambda (a K_bottom + b K), V' = lambda (c V_bottom + d V); starts as K' = K and V' = V.

    Args:
        scale: lambda, fixed. An optimiser with steps of a fixed size moves the effective weights lambda times as far.
        device: of the layer.
    """

    def __init__(self, scale: float, device: torch.device) -> None:
        super().__init__()
        self.scale = scale
        self.key_weight, self.value_weight = (
            nn.Parameter(torch.tensor([0.0, 1 / scale], dtype=torch.float32, device=device)) for _ in range(2)
        )

    def forward(self, bottom: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Mixes two pairs of key, after RoPE, and value `[B, H_kv, T, D]`."""
        mixed = []
        for weight, below, tensor in zip((self.key_weight, self.value_weight), bottom, own, strict=True):
            # both factors first: 35 * (1/35) is 1, so that nothing changes at the start, bit for bit
            first, second = (self.scale * weight.float()).to(tensor.dtype)
            mixed.append(first * below.to(tensor.device) + second * tensor)
        return mixed[0], mixed[1]


def residual_of(attention: nn.Module) -> KVResidual:
    """The weights of an attention module."""
    return getattr(attention, ATTRIBUTE)
