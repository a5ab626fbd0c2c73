"""How scales are stored: in two bytes each, or in four where float16 cannot hold one of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float16).max


def as_stored(scale: Tensor) -> Tensor:
    """The scales rounded to float16; those of a tensor that float16 cannot hold stay as they are."""
    return scale if bool((scale.abs() > LARGEST).any()) else scale.to(torch.float16).to(torch.float32)


def all_stored(*scales: Tensor) -> tuple[list[Tensor], bool]:
    """`stored` of several tensors, and whether all that they hold is finite; waits for a GPU once."""
    peaks = torch.stack([scale.abs().amax() if scale.numel() else scale.new_zeros(()) for scale in scales]).tolist()
    kept = [scale.to(torch.float16) if peak <= LARGEST else scale for scale, peak in zip(scales, peaks, strict=True)]
    return kept, all(map(math.isfinite, peaks))


def stored(scale: Tensor) -> Tensor:
    """The scales in two bytes each, or in four where one of them is too large for float16."""
    return scale if bool((scale.abs() > LARGEST).any()) else scale.to(torch.float16)
