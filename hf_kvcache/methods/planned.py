"""A cache by plan: `patch_model(model, plan=...)` and `patch_model(model, target_ratio=8)`.

A `CachePlan` says for every layer and head what is kept and in how many bits. A plan is a composition of the methods
here: the scorer it names under its shares (`head_shares`), TurboQuant with bits by layer, and KVSharer's map.

`target_ratio` alone takes a plan that was made without any measurement of the model: the same for all layers and heads,
from a table that was chosen on two small models (`examples/benchmarks/plans.py`). A measured plan loses less.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hf_kvcache.fingerprint import matches
from hf_kvcache.methods.head_shares import HeadShares
from hf_kvcache.methods.kvsharer import KVSharer
from hf_kvcache.methods.method import CalibrationModel, Method
from hf_kvcache.methods.turboquant import TurboQuant
from hf_kvcache.plan import DENSE, CachePlan
from hf_kvcache.spec import CacheSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned(Method):
    """Applies a plan that `hf-kvcache tune` measured.

    Args:
        plan: a `CachePlan`, or the path of a saved one.
    """

    name: ClassVar[str] = "planned"
    slot: ClassVar[str] = "sharing, scorer, allocator, codec"
    paper: ClassVar[str] = "-"
    implied_by: ClassVar[str | None] = "plan"

    plan: CachePlan | str | Path | None = None

    def __post_init__(self):
        if not isinstance(self.plan, (CachePlan, str, Path)):
            raise TypeError(
                f"plan must be a CachePlan or the path of a saved one, got {type(self.plan).__name__}; make one with "
                "`hf-kvcache tune MODEL -o FILE`"
            )

    def apply(self, spec: CacheSpec, model: CalibrationModel) -> CacheSpec:
        plan = self.plan if isinstance(self.plan, CachePlan) else CachePlan.load(self.plan)  # type: ignore[arg-type]
        if not matches(plan.fingerprint, spec.fingerprint) or plan.num_layers != spec.num_layers:
            raise ValueError(
                f"the plan was made for the model {plan.fingerprint or '(unnamed)'} with {plan.num_layers} layers, "
                f"this one is {spec.fingerprint} with {spec.num_layers}; make one with `hf-kvcache tune MODEL -o FILE`"
            )
        for method in methods_of(plan, spec):
            spec = method.apply(spec, model)
        return spec


@dataclass(frozen=True)
class TargetRatio(Method):
    """Takes a plan for an asked ratio without measuring anything, and says which.

    Args:
        target_ratio: how many times smaller than a 16-bit cache the cache is to be, from 1 to 32.
    """

    name: ClassVar[str] = "auto"
    slot: ClassVar[str] = "scorer, codec"
    paper: ClassVar[str] = "-"
    implied_by: ClassVar[str | None] = "target_ratio"

    target_ratio: float = 8.0

    def __post_init__(self):
        if isinstance(self.target_ratio, bool) or not isinstance(self.target_ratio, (int, float)):
            raise TypeError(f"target_ratio is a number, got {self.target_ratio!r}")
        if not 1 <= self.target_ratio <= LARGEST:
            raise ValueError(f"target_ratio must be from 1 to {LARGEST}, got {self.target_ratio}")

    def apply(self, spec: CacheSpec, model: CalibrationModel) -> CacheSpec:
        from hf_kvcache.methods import METHODS

        kept, key_bits, value_bits = without_measuring(self.target_ratio)
        parts = []
        if kept < 1:
            spec = METHODS[SCORER](budget=kept).apply(spec, model)  # type: ignore[call-arg]
            parts.append(f"{SCORER} keeps {kept:.0%}")
        if key_bits != DENSE:
            spec = TurboQuant(key_bits=key_bits, value_bits=value_bits).apply(spec, model)
            parts.append(f"keys in {key_bits} bits, values in {value_bits}")
        logger.warning(
            "target_ratio=%g: %s. Nothing was measured; `hf-kvcache tune` makes a plan for this model that loses less.",
            self.target_ratio,
            ", ".join(parts) or "everything is kept as it is",
        )
        return spec


SCORER = "kvzip"
LARGEST = 32
# ratio up to which a pair of widths is used, and the bits a number that it takes with its scales at head_dim 64
WIDTHS_BY_RATIO: tuple[tuple[float, int, int], ...] = ((4.2, 8, 4), (12.0, 4, 4), (LARGEST, 4, 3))
# of a scale (16 bits a vector of 64 numbers) and, for what is evicted from, of a position (32 bits a key and value)
SCALE, POSITION = 16 / 64, 32 / 128


def without_measuring(ratio: float) -> tuple[float, int, int]:
    """The share kept, and the bits of keys and of values, that make a cache about `ratio` times smaller than 16 bit."""
    if ratio < DENSE / (8 + SCALE):
        return (1.0, DENSE, DENSE) if ratio == 1 else (1.0, 8, 8)
    key_bits, value_bits = next((key, value) for most, key, value in WIDTHS_BY_RATIO if ratio <= most)
    stored = (key_bits + value_bits) / 2 + SCALE
    kept = DENSE / ratio / stored
    return (1.0 if kept >= 1 else DENSE / ratio / (stored + POSITION)), key_bits, value_bits


def scorer_names() -> list[str]:
    """The methods that a plan may name as its scorer."""
    from hf_kvcache.methods import METHODS

    return sorted(name for name, method in METHODS.items() if method.slot == "scorer")


def methods_of(plan: CachePlan, spec: CacheSpec) -> list[Method]:
    """The methods that a plan is a composition of."""
    from hf_kvcache.methods import METHODS

    found: list[Method] = []
    if plan.sharing is not None:
        found.append(KVSharer(plan=plan.sharing))
    sources = list(spec.sharing.source_layers if plan.sharing is None else plan.sharing.source_layers)
    if plan.evicts:
        scoring = scorer_names()
        if plan.scorer not in scoring:
            raise ValueError(f"the plan needs the scoring method {plan.scorer!r}; available: {', '.join(scoring)}")
        # the layers that evict, each counted once however many read it
        owners = [
            layer for layer, window in enumerate(spec.sliding_windows) if window is None and sources[layer] == layer
        ]
        mean = float(plan.kept[owners].mean()) if owners else 1.0
        found += [METHODS[plan.scorer](budget=mean), HeadShares(plan.kept)]  # type: ignore[call-arg]
    if bool((plan.bits != DENSE).any()):
        key_bits, value_bits = plan.bits.T.tolist()
        found.append(TurboQuant(key_bits=key_bits, value_bits=value_bits))
    return found
