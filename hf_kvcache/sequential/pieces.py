"""`Pieces`: the keys and values of a prompt as its forwards left them, and the pages that are made of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_kvcache.sequential.page import Geometry, Page


class Pieces:
    """What was adopted or computed and will be written.

    Attributes:
        parts: by producer, (first column, key, value) with tensors `[B, H_kv, n, D]`.
    """

    def __init__(self) -> None:
        self.parts: dict[int, list[tuple[int, Tensor, Tensor]]] = {}

    def add(self, producer: int, first: int, key: Tensor, value: Tensor) -> None:
        """Takes keys and values of the columns from `first` on."""
        self.parts.setdefault(producer, []).append((first, key, value))

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, also of those that no page is made of."""
        return sum(key.nbytes + value.nbytes for parts in self.parts.values() for _, key, value in parts)

    def to_host(self) -> None:
        """Moves all of it to the memory of the host; does nothing the second time."""
        for producer, parts in self.parts.items():
            # layer by layer, so that the device gets back what has been copied
            self.parts[producer] = [(first, key.cpu(), value.cpu()) for first, key, value in parts]

    def page(self, geometry: Geometry, number: int, padding: int, ids: np.ndarray, start: int) -> Page:
        """A page, in the memory of the host.

        Args:
            geometry: of the cache.
            number: of the row.
            padding: columns of the row before its first token.
            ids: of the page.
            start: the position of its first token.
        """
        self.to_host()
        end = start + len(ids)
        keys, values = [], []
        for producer in geometry.producers:
            inside = [
                (key[number, :, skip:stop], value[number, :, skip:stop])
                for first, key, value in self.parts[producer]
                for skip, stop in [(max(padding + start - first, 0), padding + end - first)]
                if skip < min(stop, key.shape[2])
            ]
            keys.append(torch.cat([key for key, _ in inside], dim=1))
            values.append(torch.cat([value for _, value in inside], dim=1))
        return Page(ids, start, keys, values)
