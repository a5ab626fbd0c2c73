"""`CacheSpec`: the frozen description of a cache, which methods fold over.

A cache is a stack of layers, and each layer is independent choices: which layers store KV (`sharing`), which tokens are
kept (`scorer`, `allocator`, `selector`, under one `budget`), how an entry is stored (`codec`) and where it is stored
(`store`). Beside them a `prefix` store may keep prompts from one run to the next. A method fills one of these slots;
two methods that fill the same slot contradict each other, and the error names both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from hf_kvcache.codecs import Codec, DenseCodec
from hf_kvcache.eviction import Allocator, EvictionPolicy, Scorer, Selector, TopK
from hf_kvcache.eviction.policy import DEFAULT_BUDGET
from hf_kvcache.sharing import SharingPlan
from hf_kvcache.stores import DeviceStore, PrefixSource, Store

# the window of a layer that keeps a state of constant size in place of keys and values
STATE = 0

# slot -> the field that holds it
SLOTS = {
    "sharing": "sharing",
    "scorer": "scorer",
    "allocator": "allocator",
    "selector": "selector",
    "codec": "codecs",
    "store": "store",
    "prefix": "prefix",
}


class LayerKind(NamedTuple):
    """What layers must have in common to read each other's keys and values, or to add them to their own.

    Args:
        window: tokens that a query sees, as in `CacheSpec`.
        rotated: whether RoPE turns the layer's queries and keys. A query that is not turned sees in turned keys where
            they stand, not how far behind it, and the other way round.
    """

    window: int | None
    rotated: bool = True

    def __str__(self) -> str:
        return f"attention window {self.window} and {'RoPE' if self.rotated else 'no RoPE'}"


@dataclass(frozen=True)
class CacheSpec:
    """What a cache is made of.

    Args:
        sliding_windows: for every layer of the model the size of its attention window, None for full attention, `STATE`
            for a layer without keys and values.
        unrotated: the layers whose queries and keys RoPE does not turn.
        fingerprint: of the model (see `hf_kvcache.fingerprint`).
        output: the attribute of an attention module that projects its heads to the residual stream (W_O).
        sharing: which layers store KV.
        scorer, allocator, selector: which tokens are kept; without a scorer all are, and without an allocator the
            scorer's own host allocates.
        budget: how many (see `EvictionPolicy`); None for the default.
        every: after how many generated tokens to evict again; None for never.
        codecs: for every layer how a sealed entry is stored.
        store: where it is stored.
        prefix: where prompts are looked up and kept between runs; None for nowhere.
        filled_by: for every slot that a method filled, the name of that method.
    """

    sliding_windows: tuple[int | None, ...]
    fingerprint: str
    sharing: SharingPlan
    codecs: tuple[Codec, ...]
    output: str = "o_proj"
    scorer: Scorer | None = None
    allocator: Allocator | None = None
    selector: Selector = TopK()  # noqa: RUF009 - a frozen value
    budget: int | float | None = None
    every: int | None = None
    store: Store = DeviceStore()  # noqa: RUF009 - a frozen value
    prefix: PrefixSource | None = None
    unrotated: tuple[int, ...] = ()
    filled_by: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def full(
        cls,
        sliding_windows: tuple[int | None, ...],
        fingerprint: str = "",
        output: str = "o_proj",
        sharing: SharingPlan | None = None,
        unrotated: tuple[int, ...] = (),
    ) -> CacheSpec:
        """Every layer keeps every token as it is, on its device: the start of the fold, and `method=None`.

        `sharing` is what the architecture itself shares; then no method can share anything else.
        """
        layers = len(sliding_windows)
        filled_by = {} if sharing is None else {"sharing": "the model's own architecture"}
        plan = sharing or SharingPlan.identity(layers)
        dense = (DenseCodec(),) * layers
        return cls(sliding_windows, fingerprint, plan, dense, output, unrotated=unrotated, filled_by=filled_by)

    @property
    def num_layers(self) -> int:
        return len(self.sliding_windows)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Of every layer."""
        windows = enumerate(self.sliding_windows)
        return tuple(LayerKind(window, layer not in self.unrotated) for layer, window in windows)

    def fill(self, slot: str, value: Any, by: str) -> CacheSpec:
        """The spec with `slot` set to `value` by the method named `by`."""
        if slot not in SLOTS:
            raise ValueError(f"slot must be one of {', '.join(SLOTS)}, got {slot!r}")
        if slot in self.filled_by:
            raise ValueError(
                f"{by!r} sets the slot {slot!r}, but {self.filled_by[slot]!r} already did; use one of them"
            )
        return replace(self, **{SLOTS[slot]: value}, filled_by={**self.filled_by, slot: by})

    def limit(self, budget: int | float | None, every: int | None, by: str) -> CacheSpec:
        """The spec with the budget and the interval that the method named `by` asks for; None asks for nothing."""
        wanted: dict[str, Any] = {"budget": budget, "every": every}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        for name, value in wanted.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(
                    f"{by!r} sets {name}={value}, but {self.filled_by.get(name)!r} already set {getattr(self, name)}; "
                    "give it once"
                )
        return replace(self, **wanted, filled_by={**dict.fromkeys(wanted, by), **self.filled_by})

    @property
    def eviction(self) -> EvictionPolicy | None:
        """The policy that the eviction slots make, None when every token is kept."""
        if self.scorer is None:
            return None
        budget = DEFAULT_BUDGET if self.budget is None else self.budget
        scorer = self.scorer.beside(self.selector)
        return EvictionPolicy(scorer, self.allocator or scorer.host, self.selector, budget, self.every)

    @property
    def evicting(self) -> tuple[int, ...]:
        """The layers that eviction applies to: producers with full attention."""
        producers = (layer for layer, source in enumerate(self.sharing.source_layers) if layer == source)
        return tuple(layer for layer in producers if self.sliding_windows[layer] is None)

    @property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """For every layer that eviction applies to, the layers that read its KV, itself first."""
        sources = self.sharing.source_layers
        return tuple(
            tuple(layer for layer, source in enumerate(sources) if source == producer) for producer in self.evicting
        )

    def doubts(self) -> list[str]:
        """What can be done, but is hardly what was meant: a sentence for each."""
        found, policy = [], self.eviction
        if policy is not None and policy.scorer.weighs_values and policy.selector.weighs_values:
            found.append(
                f"{policy.scorer.name!r} multiplies its score by norms of values, and {policy.selector.name!r}, which "
                "expects attention alone, does so again; leave value_norm out"
            )
        if not self.evicting:
            none = (
                "layers with full attention, and here are none, but layers whose window or state bounds what they keep"
            )
            if policy is not None:
                found.append(
                    f"{policy.scorer.name!r} will drop nothing: it evicts from {none}; leave the method out, or, where "
                    "prompts are shorter than the window, load the model with sliding_window=None in its configuration"
                )
            found += [
                f"{self.filled_by[slot]!r} will do nothing: it is for what is kept by {none}; leave the method out"
                for slot in ("codec", "store")
                if slot in self.filled_by
            ]
        return found

    def check(self) -> None:
        """Raises when the sharing plan does not fit the model, or the eviction slots do not fit each other."""
        if self.scorer is None and {"allocator", "selector"} & set(self.filled_by):
            raise ValueError(
                f"{self.filled_by.get('allocator') or self.filled_by.get('selector')!r} needs a scorer to work on; "
                "name one, for example snapkv"
            )
        if len(self.codecs) != self.num_layers:
            raise ValueError(f"expected a codec for each of {self.num_layers} layers, got {len(self.codecs)}")
        _ = self.eviction
        plan = self.sharing
        if plan.num_layers != self.num_layers:
            raise ValueError(
                f"the sharing plan is for a model of {plan.num_layers} layers, this model has {self.num_layers}; "
                "calibrate a plan for this model"
            )
        kinds = self.kinds
        added = () if plan.residual is None else plan.residual.sources
        for layer, source in (*enumerate(plan.source_layers), *enumerate(added)):
            if kinds[layer] != kinds[source]:
                raise ValueError(
                    f"layer {layer} has {kinds[layer]} and cannot take the KV of layer {source}, which has "
                    f"{kinds[source]}; share within one layer type, or calibrate a plan for this model"
                )

    def __deepcopy__(self, memo) -> CacheSpec:
        return self
