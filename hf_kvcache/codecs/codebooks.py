"""Scalar codebooks for one coordinate of a random direction in D dimensions.

A coordinate x of a uniformly random unit vector has the density

    f(x) = Γ(D/2) / (√π Γ((D-1)/2)) (1 - x²)^((D-3)/2),   which tends to N(0, 1/D).

All levels are for √D x, which has variance 1. `lloyd_max` are the levels of least mean square error; `cubic` the
nearest of the form t (a + b t²), t = code - (2^bits - 1) / 2, which a kernel can compute instead of looking up.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

POINTS = 1 << 16
MIN_DIM = 8


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def lloyd_max(dim: int, bits: int) -> Tensor:
    """The 2^bits levels `[2^bits]` of least mean square error, ascending, float64; Lloyd's algorithm on the density."""
    points, below, moment = _density(dim)
    count = 2**bits
    # Bennett: the best levels are spread as the cube root of the density
    spread = below.diff(prepend=below.new_zeros(1)).clamp_min(1e-300).pow(1 / 3).cumsum(0)
    wanted = (torch.arange(count, dtype=torch.float64) + 0.5) / count * spread[-1]
    levels = points[torch.searchsorted(spread, wanted)]
    for _ in range(5000):
        edges = (levels[1:] + levels[:-1]) / 2
        cells = [_between(table, edges, points) for table in (below, moment)]
        better = cells[1] / cells[0].clamp_min(1e-300)
        better = (better - better.flip(0)) / 2
        moved = float((better - levels).abs().max())
        levels = better
        if moved < 1e-7:
            break
    return levels


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def cubic(dim: int, bits: int) -> Tensor:
    """Levels t (a + b t²) `[2^bits]` nearest to those of `lloyd_max`, by the share of coordinates that use each."""
    levels = lloyd_max(dim, bits)
    points, below, _ = _density(dim)
    weight = _between(below, (levels[1:] + levels[:-1]) / 2, points).sqrt()[:, None]
    t = torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2
    basis = torch.stack([t, t**3], dim=1)
    factors = torch.linalg.lstsq(basis * weight, levels[:, None] * weight).solution
    return (basis @ factors)[:, 0]


def distortion(dim: int, bits: int) -> float:
    """The mean square error of `lloyd_max` on unit vectors, relative to their squared norm."""
    levels = lloyd_max(dim, bits)
    points, below, _ = _density(dim)
    mass = below.diff(prepend=below.new_zeros(1))
    nearest = levels[torch.bucketize(points, (levels[1:] + levels[:-1]) / 2)]
    return float((mass * (points - nearest) ** 2).sum())


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _density(dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points of √D x, and up to each of them the probability and the first moment, by the midpoint rule."""
    if dim < MIN_DIM:
        raise ValueError(f"head_dim must be at least {MIN_DIM}, got {dim}: its coordinates have no useful common law")
    # beyond 12 standard deviations the density is below what float64 can add
    reach = min(1.0, 12 / math.sqrt(dim))
    x = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS * 2 * reach - reach
    mass = torch.exp((dim - 3) / 2 * torch.log1p(-x * x))
    mass /= mass.sum()
    points = x * math.sqrt(dim)
    return points, mass.cumsum(0), (mass * points).cumsum(0)


def _between(table: Tensor, edges: Tensor, points: Tensor) -> Tensor:
    """The part of a cumulated table in each of the cells that `edges` bound, interpolated between points."""
    step = points[1] - points[0]
    # entry i of the table reaches to the upper end of point i's interval
    place = ((edges - points[0]) / step - 0.5).clamp(0, len(points) - 2)
    low = place.long()
    at = table[low] + (place - low) * (table[low + 1] - table[low])
    return torch.cat([at, table[-1:]]) - torch.cat([table.new_zeros(1), at])
