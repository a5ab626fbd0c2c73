"""`HostStore`: a segment rests in the memory of the host and visits the device of its layer only to be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class HostStore:
    """Keeps payloads in host memory, pinned where the model is on CUDA so that the copy back is asynchronous."""

    name: ClassVar[str] = "host"

    def put(self, payload: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: _to_host(tensor) for name, tensor in payload.items()}

    def get(self, held: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        return {name: tensor.to(device, non_blocking=True) for name, tensor in held.items()}


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor)
