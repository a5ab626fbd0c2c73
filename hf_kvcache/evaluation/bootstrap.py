"""Confidence intervals over contexts.

Answers of one context are not independent, so contexts are resampled, not answers; methods measured on the same
contexts are resampled together, so that their difference is a paired one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """A statistic with the ends of its confidence interval."""

    value: float
    low: float
    high: float


def _first(mean: Tensor) -> Tensor:
    return mean


def bootstrap(
    *arms: Sequence[Sequence[float]],
    statistic: Callable[..., Tensor] = _first,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a statistic of the means of one or several arms.

    Args:
        arms: for each method the values by context, `arm[context][answer]`; the contexts of all arms are the same.
        statistic: of the arms' means, one tensor `[resamples + 1]` an arm; the mean itself for a single arm.
        resamples, level, seed: of the interval.

    Example:
        >>> bootstrap([[1.0, 0.0], [1.0, 1.0]]).value
        0.75
        >>> bootstrap(full, snapkv, statistic=lambda full, other: full - other).low > 0
        True
    """
    contexts = {len(arm) for arm in arms}
    if len(contexts) != 1 or 0 in contexts:
        raise ValueError(f"every arm must have values of the same contexts, got {[len(arm) for arm in arms]} contexts")
    if not all(len(values) for arm in arms for values in arm):
        raise ValueError("every context must have at least one value; leave out the context in all arms")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    (count,) = contexts
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (resamples, count), generator=generator)
    # how often each context is in each resample; the first row is the sample itself
    weights = torch.ones(resamples + 1, count, dtype=torch.float64)
    weights[1:] = torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones_like(drawn, dtype=torch.float64)
    )
    result = statistic(*(_means(arm, weights) for arm in arms))
    low, high = result[1:].quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=result.dtype))
    return Interval(float(result[0]), float(low), float(high))


def _means(arm: Sequence[Sequence[float]], weights: Tensor) -> Tensor:
    """Mean over all answers of the contexts weighted so, `[resamples + 1]`."""
    sums = torch.tensor([float(sum(values)) for values in arm], dtype=torch.float64)
    sizes = torch.tensor([float(len(values)) for values in arm], dtype=torch.float64)
    return (weights @ sums) / (weights @ sizes)
