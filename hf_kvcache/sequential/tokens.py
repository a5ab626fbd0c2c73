"""`Tokens`: the bound of the paper. A page is its token ids; keys and values are computed again from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hf_kvcache.sequential.page import UNLIMITED, Coded, Context, Page


@dataclass(frozen=True)
class Tokens:
    """Codes nothing but the ids, which every page file has anyway: packed into the fewest bits, then zstd."""

    name: ClassVar[str] = "tokens"
    restores: ClassVar[bool] = False
    repeatable: ClassVar[int] = UNLIMITED

    @property
    def identity(self) -> str:
        return self.name

    def encode(self, page: Page, context: Context) -> Coded:
        return Coded()

    def decode(self, coded: Coded, ids: np.ndarray, start: int, context: Context) -> Page:
        return Page(ids, start)
