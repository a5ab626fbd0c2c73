"""`DeviceStore`: a segment rests on the device of its layer. The default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class DeviceStore:
    """Leaves the payload where it was made."""

    name: ClassVar[str] = "device"

    def put(self, payload: dict[str, Tensor]) -> dict[str, Tensor]:
        return payload

    def get(self, held: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        return held
