"""`solve`: the cheapest plan for the bytes asked, a knapsack with several choices a layer and head.

Costs of different layers and heads add up: the KL is quadratic in small changes, and errors of different layers have
hardly anything to do with each other. So for a price of a byte every layer chooses for itself, and the price is raised
until the plan is small enough (Lagrange); what is left of the bytes then goes where it buys most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_kvcache.plan import CachePlan
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
    loss, size = costs.loss.double(), sizes(costs)
    heads = loss.shape[-1]
    allowed = float(costs.full_bytes.double().sum()) * heads / ratio
    smallest = float(size.min(1).values.min(1).values.sum()) * heads
    if smallest > allowed:
        raise ValueError(
            f"the smallest plan is {float(costs.full_bytes.sum()) * heads / smallest:.1f} times smaller than 16 bits, "
            f"but {ratio} was asked for; ask for less"
        )
    low, high = 0.0, 1.0
    while _bytes(size, *_best(loss, size, high)) > allowed:
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _bytes(size, *_best(loss, size, middle)) <= allowed else (middle, high)
    width, kept = _best(loss, size, high)
    kept = _fill(loss, size, width, kept, allowed)
    # layers that were not measured hold a window or another layer's KV, and no entry of theirs is looked at
    shares = torch.ones(costs.num_layers, heads)
    bits = torch.full((costs.num_layers, 2), 8)
    rows = list(costs.layers)
    shares[rows] = torch.tensor(costs.kept)[kept]
    bits[rows] = torch.tensor(costs.widths)[width]
    row = torch.arange(len(rows))[:, None]
    expected = float(loss[row, width[:, None], kept, torch.arange(heads)].sum())
    return CachePlan(shares, bits, costs.scorer, None, fingerprint), expected


def sizes(costs: Costs) -> Tensor:
    """Bytes that each choice keeps of one token of one head, `[layers, widths, kept]`."""
    kept = torch.tensor(costs.kept, dtype=torch.float64)
    evicted = torch.where(kept < 1, POSITION_BYTES, 0)
    return (costs.entry_bytes.double()[..., None] + evicted) * kept


def _best(loss: Tensor, size: Tensor, price: float) -> tuple[Tensor, Tensor]:
    """The choice of every layer and head at a price of a byte: index of widths `[layers]`, of kept `[layers, H]`."""
    paid = loss + price * size[..., None]
    least, kept = paid.min(2)
    width = least.sum(-1).argmin(1)
    return width, kept[torch.arange(len(width)), width]


def _bytes(size: Tensor, width: Tensor, kept: Tensor) -> float:
    row = torch.arange(len(width))[:, None]
    return float(size[row, width[:, None], kept].sum())


def _fill(loss: Tensor, size: Tensor, width: Tensor, kept: Tensor, allowed: float) -> Tensor:
    """Raises shares one by one, the step that buys most first, while the bytes allow it."""
    kept = kept.clone()
    left = allowed - _bytes(size, width, kept)
    while True:
        steps = []
        for layer in range(len(width)):
            for head in range(kept.shape[1]):
                now = int(kept[layer, head])
                if now == 0:
                    continue
                grown = float(size[layer, width[layer], now - 1] - size[layer, width[layer], now])
                gained = float(loss[layer, width[layer], now, head] - loss[layer, width[layer], now - 1, head])
                if grown <= left and gained > 0:
                    steps.append((gained / grown, layer, head, grown))
        if not steps:
            return kept
        _, layer, head, grown = max(steps)
        kept[layer, head] -= 1
        left -= grown
