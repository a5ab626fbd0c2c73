"""`Lossless`: every number of a page, bit for bit. Byte planes, then zstd: exponents shrink, mantissas hardly do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from hf_kvcache.sequential.packing import PageError, join_planes, split_planes
from hf_kvcache.sequential.page import UNLIMITED, Coded, Context, Page

# numpy knows no bfloat16; planes are bytes, so integers of that width do
INTEGERS: dict[int, tuple[torch.dtype, np.dtype]] = {
    8: (torch.int64, np.dtype("<i8")),
    4: (torch.int32, np.dtype("<i4")),
    2: (torch.int16, np.dtype("<i2")),
}


@dataclass(frozen=True)
class Lossless:
    """Codes keys and values exactly, in the dtype of the model."""

    name: ClassVar[str] = "lossless"
    restores: ClassVar[bool] = True
    repeatable: ClassVar[int] = UNLIMITED

    @property
    def identity(self) -> str:
        return self.name

    def encode(self, page: Page, context: Context) -> Coded:
        integers, _ = INTEGERS[context.geometry.dtype.itemsize]
        planes = split_planes(page.flat().view(integers).numpy())
        return Coded(sections={f"plane{index}": plane.data for index, plane in enumerate(planes)})

    def decode(self, coded: Coded, ids: np.ndarray, start: int, context: Context) -> Page:
        geometry = context.geometry
        width = geometry.dtype.itemsize
        names = [f"plane{index}" for index in range(width)]
        expected = geometry.numbers * len(ids)
        if set(coded.sections) != set(names) or any(len(coded.sections[name]) != expected for name in names):
            raise PageError(f"a lossless page of {len(ids)} tokens must have {width} planes of {expected} bytes")
        flat = join_planes([coded.sections[name] for name in names], INTEGERS[width][1])
        return Page(ids, start, *geometry.split(torch.from_numpy(flat).view(geometry.dtype), len(ids)))
