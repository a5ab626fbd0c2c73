"""KVSharer (arXiv 2410.18517): layers share the KV of *dissimilar* layers, found by a search on a few short texts.

Algorithm 1 of the paper, in its order:

1. Run the model on the calibration texts and average each layer's keys and values over them.
2. d(i, j) = 1/2 (mean ||K_i - K_j||_2 + mean ||V_i - V_j||_2), the norms over the head dimension, the means over heads
   and positions.
3. Sort the pairs of layers by d, the largest (most dissimilar) first.
4. In this order let the layer nearer the output take the KV of the layer nearer the input; keep the pair when the
   cosine similarity of the final hidden states with and without it exceeds the threshold T.
5. Stop when C layers share. A chain of pairs resolves to the layer that owns its KV; layer 0 is never replaced.

`order="kl"`, the default, is not the paper's: steps 1 to 3 are replaced by trying neighbouring layers and sorting their
pairs by the divergence from the untouched model that is left after healing, and chains are made only when nothing else
is left. On SmolLM2-135M it is better (examples/benchmarks/results/kvsharer_healing.csv), and there the published order
is worse than its opposite (kvsharer_orders.csv). Steps 2 and 4 are computed as in the reference code: means of norms
by position, and the mean over texts of cosines.

Different from the reference code: consumers do not compute the keys and values that they would throw away, only layers
of one kind share (the same attention window, and RoPE or none), a search that ends early says how far it got and keeps
what it found (the paper returns None), the texts have no BOS token, and the cache is appended by layer (the reference
overwrites the history of upper layers in decoding).
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.methods.method import CalibrationModel, Method
from hf_kvcache.progress import progress
from hf_kvcache.sharing import SharingPlan
from hf_kvcache.spec import CacheSpec

ORDERS = ("kl", "dissimilar", "similar", "random")
SAMPLES, LENGTH = 30, 64
# how far below a consumer the KL order looks for its source: it matters little which of the nearest it is
REACH = 2


@dataclass(frozen=True)
class KVSharer(Method):
    """Layers share the KV of other layers.

    Args:
        share: share of the layers that give up their own KV, in [0, 1); C = share x layers, rounded.
        threshold: T, the least cosine similarity of the final hidden states for a pair to be kept.
        order: which pairs come first. `"dissimilar"` is the published rule; `"kl"`, the default, tries neighbouring
            layers and takes the pairs first whose healed divergence from the untouched model is least; `"similar"` and
            `"random"` are for comparison.
        plan: a `SharingPlan`, or the path of a saved one; nothing is searched then.
        calibration: texts to search on, a list of strings or the path of a text file; None for the shipped sample.
        heal: refit the consumers' projections to the untouched model after the search (not in the paper).
        seed: of the random order.
    """

    name: ClassVar[str] = "kvsharer"
    slot: ClassVar[str] = "sharing"
    paper: ClassVar[str] = "arXiv 2410.18517"

    share: float = 0.25
    threshold: float = 0.5
    order: str = "kl"
    plan: SharingPlan | str | Path | None = None
    calibration: Sequence[str] | str | Path | None = None
    heal: bool = True
    seed: int = 0

    def __post_init__(self):
        if not (isinstance(self.share, (int, float)) and 0 <= self.share < 1):
            raise ValueError(f"share must be a number in [0, 1), got {self.share!r}")
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold is a cosine similarity in [-1, 1], got {self.threshold}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")

    def apply(self, spec: CacheSpec, model: CalibrationModel) -> CacheSpec:
        return spec.fill("sharing", self.find_plan(model), by=self.name)

    def find_plan(self, model: CalibrationModel) -> SharingPlan:
        """The plan that was given, or the one that the search finds."""
        if self.plan is not None:
            return self.plan if isinstance(self.plan, SharingPlan) else SharingPlan.load(self.plan)
        count = int(self.share * model.num_layers + 0.5)
        if count == 0:
            return SharingPlan.identity(model.num_layers)
        model.use_texts(self.calibration, SAMPLES, LENGTH)
        plan = search(model, self.ordered_pairs(model), count, self.threshold, chains=self.order != "kl")
        settings = {name: str(getattr(self, name)) for name in ("share", "threshold", "order", "seed", "heal")}
        plan = replace(plan, fingerprint=model.fingerprint, settings=settings)
        return model.heal(plan) if self.heal else plan

    def ordered_pairs(self, model: CalibrationModel) -> list[tuple[int, int]]:
        """The (consumer, source) pairs of layers of one kind, in the order in which to try them."""
        kinds = model.kinds
        pairs = [(high, low) for low, high in itertools.combinations(range(len(kinds)), 2) if kinds[low] == kinds[high]]
        if self.order == "random":
            random.Random(self.seed).shuffle(pairs)
            return pairs
        if self.order == "kl":
            return by_healed_divergence(model, pairs)
        kv = model.average_kv()
        distance = {pair: kv_distance(kv[pair[0]], kv[pair[1]]) for pair in pairs}
        return sorted(pairs, key=distance.__getitem__, reverse=self.order == "dissimilar")


def by_healed_divergence(model: CalibrationModel, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs of near layers, the least divergence after healing first."""
    near = [
        (consumer, source)
        for consumer in sorted({consumer for consumer, _ in pairs})
        for source in sorted((low for high, low in pairs if high == consumer), reverse=True)[:REACH]
    ]
    divergence = {}
    with progress("scoring pairs of layers", len(near)) as advance:
        for pair in near:
            divergence[pair] = model.healed_divergence(*pair)
            advance()
    return sorted(near, key=divergence.__getitem__)


def kv_distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """d(i, j) of two layers' average keys and values `[H_kv, T, D]`."""
    key, value = (torch.linalg.vector_norm(a - b, dim=-1).mean() for a, b in zip(one, other, strict=True))
    return float((key + value) / 2)


def search(
    model: CalibrationModel, pairs: list[tuple[int, int]], count: int, threshold: float, chains: bool = True
) -> SharingPlan:
    """Steps 4 and 5: keeps pairs in the given order until `count` layers share.

    Args:
        model: to evaluate plans on.
        pairs: (consumer, source) in the order to try.
        count: C, the number of layers that are to share.
        threshold: T.
        chains: whether a source may give up its own KV from the start, as in the paper; its consumers then read what it
            reads. If not, chains are formed only when nothing else is left.
    """
    identity = SharingPlan.identity(model.num_layers)
    original = model.final_hidden(identity)
    kept: list[tuple[int, int]] = []
    plan = identity
    passes = (True,) if chains else (False, True)
    with progress("searching layers to share", count) as advance:
        for allow_chain, (consumer, source) in itertools.product(passes, pairs):
            if len(kept) == count:
                break
            taken, used = {pair[0] for pair in kept}, {pair[1] for pair in kept}
            if consumer in taken or (not allow_chain and (consumer in used or source in taken)):
                continue
            candidate = SharingPlan.from_pairs(model.num_layers, [*kept, (consumer, source)])
            if mean_cosine(original, model.final_hidden(candidate)) > threshold:
                kept.append((consumer, source))
                plan = candidate
                advance()
    if len(kept) < count:
        warnings.warn(
            f"KVSharer found {len(kept)} of {count} layers to share above the similarity threshold {threshold}; "
            "lower the threshold or the share to choose otherwise",
            stacklevel=2,
        )
    return plan


def mean_cosine(one: Tensor, other: Tensor) -> float:
    """Mean over rows of the cosine between all hidden states of a row, flattened into one vector."""
    return float(torch.cosine_similarity(one.flatten(1), other.flatten(1), dim=-1).mean())
