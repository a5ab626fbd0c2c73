"""`Auto`: the codec of a page by what it costs to have the page again."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from hf_kvcache.sequential.packing import PageError, compress
from hf_kvcache.sequential.page import Coded, Context, Page, PageCodec
from hf_kvcache.sequential.tokens import Tokens

# bytes a second, until a store has read something: a disk
BANDWIDTH = 1e9


@dataclass(frozen=True)
class Auto:
    """Chooses for every page what brings it back soonest.

    A page that keeps keys and values costs bytes / bandwidth + the seconds of decoding; one that keeps its tokens costs
    tokens / prefill rate. What the options do not say is measured: the bandwidth over what the store has read, the
    prefill over long forwards of the model, decoding on the first page of every codec. A run that finds a page of
    tokens computes it and all that follows, so the choice is worth most where it is the same for a whole prompt.

    Args:
        kept: codecs that keep keys and values.
        bandwidth: bytes a second; None to measure it.
        prefill_rate: tokens a second; None to measure it.
    """

    name: ClassVar[str] = "auto"
    restores: ClassVar[bool] = True

    kept: tuple[PageCodec, ...]
    bandwidth: float | None = None
    prefill_rate: float | None = None
    _decoding: dict[str, float] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        for name in ("bandwidth", "prefill_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be a positive number a second, or None to measure it, got {value!r}")

    @property
    def repeatable(self) -> int:
        return min(codec.repeatable for codec in self.kept)

    @property
    def identity(self) -> str:
        return " or ".join([self.name, *(codec.identity for codec in self.kept)])

    def encode(self, page: Page, context: Context) -> Coded:
        """The page by the codec that is cheapest; `by` of its facts says which."""
        compute = 1 / self.prefill_rate if self.prefill_rate else context.prefill_seconds
        best, coded = len(page) * compute, Coded({"by": Tokens.name})
        if not compute:
            # nothing is known of this model's prefill: keep what was computed
            best = float("inf")
        for codec in self.kept:
            own = codec.encode(page, context)
            seconds = self.seconds(codec, own, page, context)
            if seconds < best:
                best, coded = seconds, replace(own, facts={**own.facts, "by": codec.name})
        return coded

    def decode(self, coded: Coded, ids: np.ndarray, start: int, context: Context) -> Page:
        by = coded.facts.get("by")
        for codec in (*self.kept, Tokens()):
            if codec.name == by:
                facts = {name: value for name, value in coded.facts.items() if name != "by"}
                return codec.decode(Coded(facts, coded.sections), ids, start, context)
        raise PageError(f"the page is coded by {str(by)[:20]!r}, which is not among the codecs of this store")

    def seconds(self, codec: PageCodec, coded: Coded, page: Page, context: Context) -> float:
        """What reading and decoding a coded page takes."""
        stored = sum(len(compress(section)[1]) for section in coded.sections.values())
        bandwidth = self.bandwidth or context.bandwidth or BANDWIDTH
        if codec.name not in self._decoding:
            began = time.perf_counter()
            codec.decode(coded, page.ids, page.start, context)
            self._decoding[codec.name] = (time.perf_counter() - began) / len(page)
        return stored / bandwidth + len(page) * self._decoding[codec.name]
