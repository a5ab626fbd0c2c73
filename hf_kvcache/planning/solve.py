"""`solve`: the cheapest plan for the bytes asked, a knapsack with several choices a layer and head.

Costs of different layers and heads add up: the KL is quadratic in small changes, and errors of different layers have
hardly anything to do with each other. So for a price of a byte every layer chooses for itself, and the price is raised
until the plan is small enough (Lagrange); what is left of the bytes then goes where it buys most.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_kvcache.plan import DENSE, CachePlan
from hf_kvcache.planning.costs import POSITION_BYTES, Costs


def solve(costs: Costs, ratio: float, fingerprint: str = "") -> tuple[CachePlan, float]:
    """Solves for the least loss.

    Args:
        costs: what every choice costs.
        ratio: how many times smaller than in 16 bits the layers of `costs` are to be.
        fingerprint: of the model.

    Returns:
        The plan, and the loss it is expected to cost, in nats a token.

    Raises:
        ValueError: when not even the smallest choices reach the ratio.
    """
    loss, sizes = costs.loss.double(), Sizes.of(costs)
    heads = loss.shape[-1]
    allowed = float(costs.full_bytes.double().sum()) * heads / ratio
    smallest = float(torch.minimum(sizes.evicted.amin((1, 2)), sizes.whole.amin(1)).sum()) * heads
    if smallest > allowed:
        raise ValueError(
            f"the smallest plan is {float(costs.full_bytes.sum()) * heads / smallest:.1f} times smaller than 16 bits, "
            f"but {ratio} was asked for; ask for less"
        )
    low, high = 0.0, 1.0
    while sizes.total(*_best(loss, sizes, high)) > allowed:
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if sizes.total(*_best(loss, sizes, middle)) <= allowed else (middle, high)
    width, kept = _best(loss, sizes, high)
    kept = _fill(loss, sizes, width, kept, allowed)
    # layers that were not measured hold a window or another layer's KV, and stay as they are
    shares = torch.ones(costs.num_layers, heads)
    bits = torch.full((costs.num_layers, 2), DENSE)
    rows = list(costs.layers)
    shares[rows] = torch.tensor(costs.kept)[kept]
    bits[rows] = torch.tensor(costs.widths)[width]
    row = torch.arange(len(rows))[:, None]
    expected = float(loss[row, width[:, None], kept, torch.arange(heads)].sum())
    return CachePlan(shares, bits, costs.scorer, None, fingerprint), expected


def planned_share(costs: Costs, plan: CachePlan) -> float:
    """The bytes of a plan in the layers of `costs`, by its choices, against those of 16 bits."""
    held = 0.0
    for layer, entry_bytes in zip(costs.layers, costs.entry_bytes, strict=True):
        if plan.sharing is None or plan.sharing.source_layers[layer] == layer:
            kept = plan.kept[layer].double()
            entry = float(entry_bytes[costs.widths.index(tuple(plan.bits[layer].tolist()))])
            held += (entry + POSITION_BYTES * bool((kept < 1).any())) * float(kept.sum())
    return held / (float(costs.full_bytes.double().sum()) * plan.kept.shape[1])


@dataclass(frozen=True)
class Sizes:
    """Bytes that each choice keeps of one token of one head.

    Args:
        evicted: in a layer of which some head drops something, `[layers, widths, kept]`: with the column of each entry,
            also of a head that drops nothing itself.
        whole: in a layer that keeps everything, `[layers, widths]`.
    """

    evicted: Tensor
    whole: Tensor

    @classmethod
    def of(cls, costs: Costs) -> Sizes:
        """The sizes of the choices of `costs`."""
        whole = costs.entry_bytes.double()
        return cls((whole[..., None] + POSITION_BYTES) * torch.tensor(costs.kept, dtype=torch.float64), whole)

    def by_layer(self, width: Tensor, kept: Tensor) -> Tensor:
        """Bytes of every layer, `[layers]`, with widths `[layers]` and shares `[layers, H]`, both as indices."""
        row = torch.arange(len(width))
        evicted = self.evicted[row[:, None], width[:, None], kept].sum(-1)
        return torch.where((kept == 0).all(-1), self.whole[row, width] * kept.shape[1], evicted)

    def total(self, width: Tensor, kept: Tensor) -> float:
        """Bytes of all layers."""
        return float(self.by_layer(width, kept).sum())


def _best(loss: Tensor, sizes: Sizes, price: float) -> tuple[Tensor, Tensor]:
    """The choice of every layer and head at a price of a byte: index of widths `[layers]`, of kept `[layers, H]`."""
    least, kept = (loss + price * sizes.evicted[..., None]).min(2)
    evicted, whole = least.sum(-1), (loss[:, :, 0] + price * sizes.whole[..., None]).sum(-1)
    width = torch.minimum(evicted, whole).argmin(1)
    row = torch.arange(len(width))
    drops = (evicted < whole)[row, width]
    return width, torch.where(drops[:, None], kept[row, width], 0)


def _fill(loss: Tensor, sizes: Sizes, width: Tensor, kept: Tensor, allowed: float) -> Tensor:
    """Raises shares one by one, by as much as buys most for its bytes, while the bytes allow it."""
    row = torch.arange(len(width))
    while True:
        held = sizes.by_layer(width, kept)
        left = allowed - float(held.sum())
        raises = []
        # not only to the next share, which may gain nothing where the one after it does
        for head, share in itertools.product(range(kept.shape[1]), range(sizes.evicted.shape[2])):
            grown = kept.clone()
            grown[:, head] = kept[:, head].clamp_max(share)
            cost = sizes.by_layer(width, grown) - held
            gain = loss[row, width, kept[:, head], head] - loss[row, width, grown[:, head], head]
            for layer in torch.nonzero((gain > 0) & (cost <= left))[:, 0].tolist():
                # the last head of a layer to keep everything saves the columns of the others, too
                raises.append((float(gain[layer]) / max(float(cost[layer]), 1e-9), layer, head, share))
        if not raises:
            return kept
        _, layer, head, share = max(raises)
        kept = kept.clone()
        kept[layer, head] = share
