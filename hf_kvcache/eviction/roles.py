"""The three roles of eviction, and the allocators and the selector of hosts that need no more.

A *scorer* says how much a token matters to a KV head, an *allocator* how many tokens each head keeps, a *selector*
which. The papers compose in this way: SnapKV is a score, AdaKV and HeadKV only change the counts, CriticalKV only
replaces the top-k step of its host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hf_kvcache.eviction.observation import Observation
from hf_kvcache.kernels.select import select


class Scorer(Protocol):
    """How much every token matters.

    Attributes:
        name: of the method.
        window: how many of the last tokens are always kept; a float is a share of the budget.
        sinks: how many of the first tokens are always kept.
        queries: how many of the last queries `score` looks at; None for all of them, 0 for none.
        carried: names of values of every token that `score` returns to be remembered with it.
        while_decoding: whether it can score a set from which tokens are missing already.
        replays: whether the context is to be read again before it is scored (see `passes`). Then, and when the
            allocator looks at all layers at once, the whole cache is held dense until that is done.
        host: the allocator to use when no method brings one.
        rotates: whether it needs the rotary embeddings (`Reading.rotate`).
        weighs_values: whether the norms of the values are in the score.
    """

    name: ClassVar[str]
    carried: ClassVar[tuple[str, ...]]
    while_decoding: ClassVar[bool]
    replays: ClassVar[bool]

    rotates: ClassVar[bool]

    @property
    def host(self) -> Allocator: ...

    @property
    def weighs_values(self) -> bool: ...

    @property
    def window(self) -> int | float: ...

    @property
    def sinks(self) -> int: ...

    @property
    def queries(self) -> int | None: ...

    def beside(self, selector: Selector) -> Scorer:
        """The scorer for this selector: options that were left to depend on it are set."""
        ...

    def score(self, observation: Observation) -> Tensor:
        """Returns scores `[B, H_kv, T]`, float32; the higher, the sooner kept."""
        ...

    def passes(self, ids: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """How to read the context `ids` `[B, T]` again.

        Yields:
            the first and the end column of the part that is repeated, and the tokens `[B, L]` to run the model on,
            as a continuation of the context, so that it does.
        """
        ...

    def remember(self, observation: Observation, score: Tensor) -> dict[str, Tensor]:
        """What to carry along with the tokens that are kept, `[B, H_kv, T]` by name."""
        ...


class Allocator(Protocol):
    """How many tokens each head keeps.

    Attributes:
        name: of the method.
        over_layers: whether it must see all layers at once; then `allocate_layers` is called in place of `allocate`.
    """

    name: ClassVar[str]
    over_layers: ClassVar[bool]

    def allocate(self, score: Tensor, budget: int, limit: Tensor, protected: int, observation: Observation) -> Tensor:
        """Splits the budget of a layer over its heads.

        Args:
            score: `[B, H_kv, T]`; +inf for tokens that are kept anyway, -inf for places without a token.
            budget: tokens a KV head on average, protected ones included.
            limit: `[B, H_kv]`, how many tokens there are.
            protected: how many of them are kept anyway.
            observation: what else there is to see.

        Returns:
            counts `[B, H_kv]`, each between `protected` and `limit`.
        """
        ...

    def allocate_layers(self, scores: Sequence[Tensor], budget: int, limits: Sequence[Tensor]) -> list[Tensor]:
        """`allocate` for all layers that evict, in their order."""
        ...


class Selector(Protocol):
    """Which tokens a head keeps, given how many.

    Attributes:
        name: of the method.
        weighs_values: whether it multiplies scores by norms of the values.
    """

    name: ClassVar[str]

    @property
    def weighs_values(self) -> bool: ...

    def select(self, score: Tensor, counts: Tensor, observation: Observation) -> Tensor:
        """Returns a mask `[B, H_kv, T]`, True for exactly `counts` tokens of every head; shapes as above."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Every head keeps the same number of tokens."""

    name: ClassVar[str] = "uniform"
    over_layers: ClassVar[bool] = False

    def allocate(self, score: Tensor, budget: int, limit: Tensor, protected: int, observation: Observation) -> Tensor:
        return limit.clamp(max=budget)

    def allocate_layers(self, scores: Sequence[Tensor], budget: int, limits: Sequence[Tensor]) -> list[Tensor]:
        return [limit.clamp(max=budget) for limit in limits]


@dataclass(frozen=True)
class Global:
    """The heads of all layers share one budget: the highest scores of the model are kept, wherever they are."""

    name: ClassVar[str] = "global"
    over_layers: ClassVar[bool] = True

    def allocate(self, score: Tensor, budget: int, limit: Tensor, protected: int, observation: Observation) -> Tensor:
        return self.allocate_layers([score], budget, [limit])[0]

    def allocate_layers(self, scores: Sequence[Tensor], budget: int, limits: Sequence[Tensor]) -> list[Tensor]:
        sizes = [score.shape[1] for score in scores]
        together = torch.cat([score.to(scores[0].device) for score in scores], dim=1)
        batch, heads, _ = together.shape
        # protected tokens have the score +inf and come first; places without a token, -inf, come last
        total = min(budget * heads, sum(int(limit.sum(-1).min()) for limit in limits))
        best = top_mask(together.flatten(1), torch.full((batch,), total, device=together.device))
        counts = best.view(together.shape).sum(-1)
        return [part.to(score.device) for part, score in zip(counts.split(sizes, dim=1), scores, strict=True)]


@dataclass(frozen=True)
class TopK:
    """Every head keeps its highest scores."""

    name: ClassVar[str] = "top-k"
    weighs_values: ClassVar[bool] = False

    def select(self, score: Tensor, counts: Tensor, observation: Observation) -> Tensor:
        return top_mask(score, counts)


def top_mask(score: Tensor, counts: Tensor) -> Tensor:
    """The `counts` `[B, H]` highest scores of every head of `[B, H, T]`, as a mask; also without heads."""
    return select(score, counts)


def no_memory(observation: Observation, score: Tensor) -> dict[str, Tensor]:
    """What a scorer that carries nothing remembers."""
    return {}


def largest_remainder(share: Tensor, total: int, limit: Tensor) -> Tensor:
    """Whole numbers in proportion to `share` `[..., n]` that sum to `total` exactly and stay within `limit` `[..., n]`.

    What one part cannot take is offered to the others in proportion to their shares. Where all limits together are less
    than the total, everything is taken.
    """
    # a few numbers: on a GPU every line would be a launch, and every turn a wait for it
    device = share.device
    share, limit = torch.stack([share.double(), limit.to(device, torch.float64)]).cpu()
    total_left = torch.minimum(torch.full_like(limit.sum(-1), float(total)), limit.sum(-1))
    given = torch.zeros_like(limit)
    for _ in range(limit.shape[-1]):
        open_ = given < limit
        weight = torch.where(open_, share.clamp_min(1e-12), torch.zeros_like(share))
        left = (total_left - given.sum(-1)).clamp_min(0)
        step = torch.minimum(
            weight / weight.sum(-1, keepdim=True).clamp_min(1e-300) * left.unsqueeze(-1), limit - given
        )
        given = given + step
        if bool((left - step.sum(-1) < 1e-9).all()):
            break
    whole = (given + 1e-9).floor()
    missing = (total_left - whole.sum(-1)).round().long()
    # a part that is at its limit has no fraction, so it is never given more
    rank = (given - whole).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (whole + (rank < missing.unsqueeze(-1))).long().to(device)


def describe(role: Any) -> str:
    """A role and its options, for messages."""
    return getattr(role, "name", type(role).__name__)
