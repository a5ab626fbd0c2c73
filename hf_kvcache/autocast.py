"""What `torch.autocast` means for a cache.

There attention gets queries, keys and values in the lower precision, whatever they come in: RoPE makes float32 of
queries and keys, while values stay as their projection made them. A cache takes them as attention would get them, so
that it holds one dtype and gives what the model's own attention gives. Its own sums choose their precision themselves
and are kept out of autocast, which would round every product.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, all of one device, in the dtype in which attention gets them."""
    if not autocasts(tensors[0].device):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    # autocast leaves float64 as it is
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which products on a device have the dtype of their factors."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; some kinds of devices do not have it."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
