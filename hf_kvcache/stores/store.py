"""The interface of a store: payloads in, the same payloads out, wherever they rest in between."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Store(Protocol):
    """Where the payload of a sealed segment rests. A store is a frozen value; what it holds is in the segment."""

    name: ClassVar[str]

    def put(self, payload: dict[str, Tensor]) -> dict[str, Tensor]:
        """Moves a payload to where this store keeps it and returns what the segment is to hold."""
        ...

    def get(self, held: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Returns the payload on `device`, ready to be attended."""
        ...
