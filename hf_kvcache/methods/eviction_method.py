"""What all eviction methods have in common: the budget, and what each role must say about itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from hf_kvcache.eviction import Allocator, Observation, Scorer, Selector, Uniform
from hf_kvcache.eviction.policy import check_budget
from hf_kvcache.methods.method import CalibrationModel, Method
from hf_kvcache.spec import CacheSpec


@dataclass(frozen=True)
class EvictionMethod(Method):
    """A method that takes one role of eviction. What it composes with takes the others.

    Args:
        budget: tokens kept a KV head, always-kept ones included: an int, or a float share of the prompt. None leaves it
            to the other methods named; 0.5 when none says it.
        every: evict again whenever so many tokens were generated; None to evict the prompt only.
    """

    # of allocators: whether they must see all layers at once
    over_layers: ClassVar[bool] = False
    # whether one head's tokens are chosen by looking at other heads, which another process may hold
    across_heads: ClassVar[bool] = False

    budget: int | float | None = field(default=None, kw_only=True)
    every: int | None = field(default=None, kw_only=True)

    def __post_init__(self):
        check_budget(1 if self.budget is None else self.budget, self.every)

    @property
    def weighs_values(self) -> bool:
        """Whether the norms of the values are in the score, or in what a selector makes of it."""
        return False

    def apply(self, spec: CacheSpec, model: CalibrationModel) -> CacheSpec:
        return spec.fill(self.slot, self, by=self.name).limit(self.budget, self.every, by=self.name)


@dataclass(frozen=True)
class ScoringMethod(EvictionMethod):
    """A scorer. Subclasses implement `score`; see `hf_kvcache.eviction.Scorer` for what it is given and returns.

    Args:
        window: how many of the last tokens are always kept.
        sinks: how many of the first tokens are always kept.
    """

    slot: ClassVar[str] = "scorer"
    carried: ClassVar[tuple[str, ...]] = ()
    while_decoding: ClassVar[bool] = False
    replays: ClassVar[bool] = False
    rotates: ClassVar[bool] = False

    window: int | float = 0
    sinks: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.check_window()
        check_count("sinks", self.sinks)

    def check_window(self) -> None:
        """Raises for a window that is no number of tokens."""
        check_count("window", self.window)

    @property
    def queries(self) -> int | None:
        """How many of the last queries `score` looks at; None for all of them."""
        return 0

    @property
    def host(self) -> Allocator:
        """The allocator to use when no method brings one."""
        return Uniform()

    def beside(self, selector: Selector) -> Scorer:
        """The scorer for this selector, which most need not know."""
        return self

    def passes(self, ids: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """How to read the context again; for scorers with `replays`."""
        raise NotImplementedError(f"{type(self).__name__} does not read the context again")

    def score(self, observation: Observation) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must implement score(observation)")

    def remember(self, observation: Observation, score: Tensor) -> dict[str, Tensor]:
        """Nothing, unless a subclass names it in `carried`."""
        return {}


def check_count(name: str, count: Any, least: int = 0) -> None:
    """Raises unless the option `name` is a number of tokens of at least `least`."""
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise ValueError(f"{name} is a number of tokens, at least {least}, got {count!r}")
