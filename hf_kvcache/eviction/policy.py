"""`EvictionPolicy`: scorer x allocator x selector under a budget, applied to one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvcache.eviction.observation import Observation
from hf_kvcache.eviction.roles import Allocator, Scorer, Selector, TopK, Uniform

DEFAULT_BUDGET = 0.5


class Limits(NamedTuple):
    """A budget in tokens a KV head, and how many of them are the first and the last ones."""

    budget: int
    sinks: int
    window: int


@dataclass(frozen=True)
class EvictionPolicy:
    """Which tokens every layer keeps.

    Args:
        scorer: how much a token matters.
        allocator: how many tokens each head keeps.
        selector: which.
        budget: tokens kept a KV head, protected ones included: an int, or a float share of the tokens there are.
        every: while decoding, evict again whenever so many tokens have come; None to evict the prompt only.
    """

    scorer: Scorer
    allocator: Allocator = field(default_factory=Uniform)
    selector: Selector = field(default_factory=TopK)
    budget: int | float = DEFAULT_BUDGET
    every: int | None = None

    def __post_init__(self):
        check_budget(self.budget, self.every)
        if isinstance(self.budget, int):
            _, sinks, window = self.limits(self.budget + 1)
            if self.budget <= sinks + window:
                raise ValueError(
                    f"budget={self.budget} must exceed the tokens that {self.scorer.name!r} always keeps: "
                    f"{sinks} first and {window} last; raise it, or lower the window or sinks"
                )
        if self.every is not None and not self.scorer.while_decoding:
            raise ValueError(
                f"every={self.every} evicts while decoding, which {self.scorer.name!r} is not defined for; "
                "use a scorer that is (h2o, tova, snapkv, rkv, defensivekv, streamingllm, knorm, keydiff, random), "
                "or leave every out"
            )

    @property
    def deferred(self) -> bool:
        """Whether the decision needs the dense KV of all layers."""
        return self.scorer.replays or self.allocator.over_layers

    def limits(self, tokens: int) -> Limits:
        """What the budget means for a row of `tokens`.

        A share that is less than what is protected gives way to it, and none is less than a token: short prompts would
        be forgotten whole.
        """
        sinks, window = self.scorer.sinks, self.scorer.window
        budget = self.budget if isinstance(self.budget, int) else int(self.budget * tokens)
        if isinstance(window, float):
            window = int(window * min(budget, tokens))
        if isinstance(self.budget, float):
            budget = max(budget, sinks + window, 1)
        return Limits(min(budget, tokens), min(sinks, tokens), min(window, tokens))

    def keep(self, observation: Observation) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Decides about all tokens of a layer.

        Returns:
            A mask `[B, H_kv, T]`, True for what is kept, and what the scorer wants remembered; None when everything is
            within the budget and nothing has to be remembered.
        """
        budget, sinks, window = self.limits(observation.seen)
        if budget >= observation.seen and not (self.every and self.scorer.carried):
            return None
        score, limit, remembered = self.candidates(observation)
        always = min(sinks + window, observation.num_tokens)
        counts = self.allocator.allocate(score, budget, limit, always, observation)
        return self.selector.select(score, counts, observation), remembered

    def keep_layers(self, observations: Sequence[Observation]) -> list[Tensor] | None:
        """Decides about all tokens of all layers together; as `keep`, but for what is remembered."""
        tokens = observations[0].seen
        budget, sinks, window = self.limits(tokens)
        if budget >= tokens:
            return None
        judged = [self.candidates(observation) for observation in observations]
        if self.allocator.over_layers:
            counts = self.allocator.allocate_layers(
                [score for score, _, _ in judged], budget, [limit for _, limit, _ in judged]
            )
        else:
            counts = [
                self.allocator.allocate(score, budget, limit, min(sinks + window, tokens), observation)
                for (score, limit, _), observation in zip(judged, observations, strict=True)
            ]
        return [
            self.selector.select(score, count, observation)
            for (score, _, _), count, observation in zip(judged, counts, observations, strict=True)
        ]

    def candidates(self, observation: Observation) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Scores a layer.

        Returns:
            The score `[B, H_kv, T]`, +inf for tokens that are kept anyway and -inf for places without a token; the
            number of tokens `[B, H_kv]`; and what the scorer wants remembered.
        """
        scorer, valid = self.scorer, observation.valid
        batch, heads, tokens, _ = observation.key.shape
        _, sinks, window = self.limits(observation.seen)
        score = scorer.score(observation)
        if not bool(torch.isfinite(score if valid is None else score.masked_fill(~valid, 0)).all()):
            raise FloatingPointError(
                f"{scorer.name!r} gave a score that is not finite in layer {observation.layer} of those that evict; "
                "nothing was dropped. Keys, values or queries hold NaN or infinity: check the model's dtype"
            )
        remembered = scorer.remember(observation, score)
        column = torch.arange(tokens, device=score.device)
        if valid is None:
            limit = torch.full((batch, heads), tokens, device=score.device)
            rank = column
        else:
            limit = valid.sum(-1)
            rank = valid.cumsum(-1) - 1
            score = score.masked_fill(~valid, -torch.inf)
        protected = (rank < sinks) | (column >= tokens - window)
        if valid is not None:
            protected &= valid
        return score.masked_fill(protected, torch.inf), limit, remembered


def check_budget(budget: int | float, every: int | None) -> None:
    """Raises for a budget that is neither a number of tokens nor a share of them."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"budget is a number of tokens (int) or a share of them (float), got {budget!r}")
    if isinstance(budget, float) and not 0 < budget <= 1:
        raise ValueError(f"a float budget is a share of the tokens, in (0, 1], got {budget}; for tokens pass an int")
    if isinstance(budget, int) and budget < 1:
        raise ValueError(f"an int budget is a number of tokens, at least 1, got {budget}")
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(f"every is a number of tokens, at least 1, or None, got {every!r}")
