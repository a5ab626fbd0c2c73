"""Scalar quantisation of rotated vectors: a code a coordinate and one scale a vector.

The two bytes in which TurboQuant keeps a vector's norm hold a better number: of a few scales around the norm the one
whose codes, with the scale then refitted to them by least squares, leave the least error. Refitting alone is what is
known as norm correction. Decoding costs the same.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

# steps of the table of nearest levels in a root mean square: they miss only where two levels are nearly as near
STEPS = 256
# vectors at once: what is in work stays in the cache of the processor
ROWS = 1024
LARGEST = torch.finfo(torch.float16).max
# norm of a vector that counts as zero: its reciprocal is still finite
LEAST = 1e-30


def quantise(x: Tensor, levels: Tensor, factors: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises the rows of x to `scale * levels[code]`.

    Args:
        x: float32 `[N, D]`.
        levels: `[2^bits]`, ascending, symmetric, for coordinates of variance 1.
        factors: scales to try, in root mean squares of the row.

    Returns:
        codes, uint8 `[N, D]`; scales, float32 `[N]`, rounded as they will be stored; and squared errors `[N]`.
    """
    parts = [_quantise(rows, levels, factors) for rows in x.split(ROWS)]
    codes, scales, errors = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes, scales, errors


def _quantise(x: Tensor, levels: Tensor, factors: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    # no coordinate is larger than all of its row, so that nothing needs to be clamped
    reach = math.ceil(x.shape[1] ** 0.5 / min(factors)) + 1
    codes_of, levels_of = _nearest(tuple(levels.tolist()), reach, x.device)
    energy = torch.linalg.vecdot(x, x)
    size = (energy / x.shape[1]).sqrt()
    best_codes = best_scale = best_error = None
    for factor in factors:
        unit = x * (STEPS / factor / size.clamp_min(LEAST))[:, None]
        place = unit.add_(reach * STEPS + 0.5).to(torch.int32).view(-1)
        level = torch.index_select(levels_of, 0, place).view(x.shape)
        along, length = torch.linalg.vecdot(level, x), torch.linalg.vecdot(level, level)
        scale = as_stored(along / length)
        error = energy - 2 * scale * along + scale.square() * length
        if best_error is None:
            best_place, best_scale, best_error = place.view(x.shape), scale, error
        else:
            better = error < best_error
            best_place = torch.where(better[:, None], place.view(x.shape), best_place)
            best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    best_codes = torch.index_select(codes_of, 0, best_place.reshape(-1)).view(x.shape)
    return best_codes, best_scale, best_error


def as_stored(scale: Tensor) -> Tensor:
    """The scales rounded to float16; those of a tensor that float16 cannot hold stay as they are."""
    return scale if bool((scale.abs() > LARGEST).any()) else scale.to(torch.float16).to(torch.float32)


def stored(scale: Tensor) -> Tensor:
    """The scales in two bytes each, or in four where one of them is too large for float16."""
    return scale if bool((scale.abs() > LARGEST).any()) else scale.to(torch.float16)


@lru_cache(maxsize=64)
def _nearest(levels: tuple[float, ...], reach: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every step of [-reach, reach] the code of the nearest level and the level itself."""
    exact = torch.tensor(levels, dtype=torch.float64)
    steps = torch.arange(2 * reach * STEPS + 1, dtype=torch.float64) / STEPS - reach
    codes = torch.bucketize(steps, (exact[1:] + exact[:-1]) / 2)
    return codes.to(torch.uint8).to(device), exact[codes].to(torch.float32).to(device)
