"""`Offload`: sealed KV rests in host memory and visits the device only to be read.

Nothing is lost; a GPU then holds one layer's prompt at a time. The idea is transformers' `OffloadedCache`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_kvcache.methods.method import CalibrationModel, Method
from hf_kvcache.spec import CacheSpec
from hf_kvcache.stores import HostStore


@dataclass(frozen=True)
class Offload(Method):
    """Fills the store with `HostStore`."""

    name: ClassVar[str] = "offload"
    slot: ClassVar[str] = "store"
    paper: ClassVar[str] = "-"

    def apply(self, spec: CacheSpec, model: CalibrationModel) -> CacheSpec:
        return spec.fill("store", HostStore(), by=self.name)
