"""The share map of a plan: what it costs when a layer reads its neighbour's keys and values and stores none.

KVSharer's default order prices pairs of layers one by one, each by the divergence that is left once the reader is
healed (`methods.kvsharer`). Here the same prices stand beside those of evicted entries and narrower codes: pairs are
taken cheapest first, and each time the knapsack is solved again for the layers that still store something, whose
entries then answer for every layer that reads them. As soon as one more pair makes the whole dearer, no more are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_kvcache.api import base_model, make_probe
from hf_kvcache.calibration.healing import healable
from hf_kvcache.calibration.probe import ModelProbe
from hf_kvcache.calibration.texts import LEAST_TOKENS
from hf_kvcache.plan import CachePlan
from hf_kvcache.planning.costs import Costs
from hf_kvcache.planning.solve import solve
from hf_kvcache.sharing import SharingPlan


@dataclass(frozen=True)
class Pair:
    """One layer that may read another's keys and values.

    Args:
        consumer, source: the layers.
        loss: nats a token once the consumer is healed, over all that is asked of a window.
    """

    consumer: int
    source: int
    loss: float


class Sharing:
    """Prices pairs of layers of an unpatched model, and heals the maps that are chosen.

    Args:
        model, tokenizer: to measure.
        ids: `[N, T]` windows to fit and to judge on.
        layers: that keep all tokens of a context and may share.
        questions: how many are asked of a window. Other prices are sums over them, and a layer that has lost its own
            keys and values errs in each.
    """

    def __init__(self, model: Any, tokenizer: Any, ids: Tensor, layers: Sequence[int], questions: int = 1) -> None:
        self.ids, self.layers, self.questions = ids.cpu(), layers, questions
        self.probe: ModelProbe = make_probe(base_model(model), tokenizer)
        self._healed: dict[tuple[int, ...], SharingPlan] = {}

    @property
    def possible(self) -> bool:
        """Whether there are pairs, no map that came with the model, and text enough to fit a projection to."""
        return len(self.layers) > 1 and self.probe.full.sharing.is_identity and self.ids.numel() >= LEAST_TOKENS

    def price(self, done: Callable[[], None] = lambda: None) -> list[Pair]:
        """Each layer with the nearest one below, the cheapest first.

        Raises:
            NotImplementedError: when healing could not refit a projection of a layer, before anything is measured.
        """
        for consumer in self.layers[1:]:
            healable(self.probe, consumer)
        self.probe.use_texts(self.ids, 1, self.ids.shape[1])
        pairs = []
        for source, consumer in zip(self.layers, self.layers[1:]):
            loss = self.questions * self.probe.healed_divergence(consumer, source)
            pairs.append(Pair(consumer, source, loss))
            done()
        return sorted(pairs, key=lambda pair: pair.loss)

    def heal(self, plan: CachePlan) -> CachePlan:
        """The plan with weights fitted to its map, if it has one; a map is healed once."""
        if plan.sharing is None:
            return plan
        key = plan.sharing.source_layers
        if key not in self._healed:
            self._healed[key] = self.probe.heal(replace(plan.sharing, fingerprint=plan.fingerprint))
        return replace(plan, sharing=self._healed[key])


def solve_shared(costs: Costs, pairs: Sequence[Pair], ratio: float, fingerprint: str = "") -> tuple[CachePlan, float]:
    """`solve` over share maps too.

    Args:
        costs: what the other choices cost.
        pairs: the cheapest first. Prices of pairs add up as others do, so a source never gives up its own.
        ratio, fingerprint: as in `solve`.

    Returns:
        The plan, its map not healed yet, and the loss it is expected to cost, in nats a token.

    Raises:
        ValueError: when not even the smallest choices reach the ratio, whatever is shared.
    """
    best, refused = None, None
    taken: list[Pair] = []
    for pair in (None, *pairs):
        if pair is not None:
            sources = {other.source for other in taken}
            if pair.consumer in sources or pair.source in {other.consumer for other in taken}:
                continue
            taken.append(pair)
        sharing = SharingPlan.from_pairs(costs.num_layers, [(one.consumer, one.source) for one in taken])
        try:
            plan, expected = solve(fold(costs, sharing), ratio, fingerprint)
        except ValueError as error:
            refused = error
            continue
        expected += sum(one.loss for one in taken)
        if best is not None and expected >= best[1]:
            break
        best = (replace(plan, sharing=sharing) if taken else plan), expected
    if best is None:
        assert refused is not None
        raise refused
    return best


def fold(costs: Costs, sharing: SharingPlan) -> Costs:
    """The costs of the layers that store something: each answers for all layers that read it, and for their bytes."""
    owners = [layer for layer in costs.layers if sharing.source_layers[layer] == layer]
    row = torch.tensor([owners.index(sharing.source_layers[layer]) for layer in costs.layers])
    loss = torch.zeros(len(owners), *costs.loss.shape[1:]).index_add(0, row, costs.loss)
    full = torch.zeros(len(owners)).index_add(0, row, costs.full_bytes)
    entry = costs.entry_bytes[[costs.layers.index(layer) for layer in owners]]
    return replace(costs, loss=loss, entry_bytes=entry, full_bytes=full, layers=tuple(owners))
