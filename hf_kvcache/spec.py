"""`CacheSpec`: the frozen description of a cache, which methods fold over.

A cache is a stack of layers, and each layer is independent choices: which layers store KV (`sharing`), how an entry is
stored (`codec`) and where it is stored (`store`). A method fills one of these slots; two methods that fill the same
slot contradict each other, and the error names both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_kvcache.codecs import Codec, DenseCodec
from hf_kvcache.sharing import SharingPlan
from hf_kvcache.stores import DeviceStore, Store

SLOTS = ("sharing", "codec", "store")


@dataclass(frozen=True)
class CacheSpec:
    """What a cache is made of.

    Args:
        sliding_windows: for every layer of the model the size of its attention window, None for full attention.
        fingerprint: of the model (see `hf_kvcache.fingerprint`).
        sharing: which layers store KV.
        codec: how a sealed entry is stored.
        store: where it is stored.
        filled_by: for every slot that a method filled, the name of that method.
    """

    sliding_windows: tuple[int | None, ...]
    fingerprint: str
    sharing: SharingPlan
    codec: Codec = DenseCodec()  # noqa: RUF009 - a frozen value
    store: Store = DeviceStore()  # noqa: RUF009 - a frozen value
    filled_by: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def full(cls, sliding_windows: tuple[int | None, ...], fingerprint: str = "") -> CacheSpec:
        """Every layer keeps every token as it is, on its device: the start of the fold, and `method=None`."""
        return cls(sliding_windows, fingerprint, SharingPlan.identity(len(sliding_windows)))

    @property
    def num_layers(self) -> int:
        return len(self.sliding_windows)

    def fill(self, slot: str, value: Any, by: str) -> CacheSpec:
        """The spec with `slot` set to `value` by the method named `by`."""
        if slot not in SLOTS:
            raise ValueError(f"slot must be one of {', '.join(SLOTS)}, got {slot!r}")
        if slot in self.filled_by:
            raise ValueError(
                f"{by!r} sets the slot {slot!r}, but {self.filled_by[slot]!r} already did; use one of them"
            )
        return replace(self, **{slot: value}, filled_by={**self.filled_by, slot: by})

    def check(self) -> None:
        """Raises when the sharing plan does not fit the model."""
        plan = self.sharing
        if plan.num_layers != self.num_layers:
            raise ValueError(
                f"the sharing plan is for a model of {plan.num_layers} layers, this model has {self.num_layers}; "
                "calibrate a plan for this model"
            )
        for consumer in plan.consumers:
            source = plan.source_layers[consumer]
            if self.sliding_windows[consumer] != self.sliding_windows[source]:
                raise ValueError(
                    f"layer {consumer} has attention window {self.sliding_windows[consumer]} and cannot read the KV of "
                    f"layer {source} with window {self.sliding_windows[source]}; share within one layer type"
                )

    def __deepcopy__(self, memo) -> CacheSpec:
        return self
