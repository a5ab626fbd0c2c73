"""How the encoding kernel finds the level nearest to a number: by a polynomial, whose numbers are made here.

Levels are t (a + b t²) with t = code - (2^bits - 1) / 2. The polynomial is the inverse, a few powers long; what it
gives is rounded to a whole number when MAGIC is added to it in float16 (see `halves.py`).
"""

from functools import lru_cache
from typing import Any

import torch

from hf_kvcache.kernels.triton_ops.code_attention import codebook
from hf_kvcache.kernels.triton_ops.halves import twice

# added to a number below 1024, it rounds it to a whole one, which then stands in the lowest bits of a float16
MAGIC = 1024


@lru_cache(maxsize=64)
def placing(levels: tuple[float, ...], factors: tuple[float, ...]) -> tuple[Any, ...] | None:
    """Bits, and what the kernel has to know of levels t (a + b t²), as pairs of float16 numbers.

    These are the last code; two numbers that make of a code plus MAGIC a multiple of t; the number of powers of the
    polynomial less one; and for every factor what it is, the polynomial's numbers, and -a and -b for such multiples, in
    root mean squares. The polynomial finds the code of a number: it takes the middle between two levels to the middle
    of their places. None where the levels have no such form, or the polynomial is off by more than a tenth of a step: a
    number so near to the middle has two levels that are nearly as good.
    """
    book = codebook(torch.tensor(levels, dtype=torch.float64))
    if book is None:
        return None
    bits, a, b = book
    positive = torch.tensor(levels[2 ** (bits - 1) :], dtype=torch.float64)
    middles = (positive[1:] + positive[:-1]) / 2
    wanted = torch.arange(1.0, len(middles) + 1, dtype=torch.float64)
    # of the absolute value, or odd powers
    powers = [1] if b == 0 else [1, 2, 3, 4] if len(middles) > 3 else [1, 3, 5][: len(middles)]
    basis = torch.stack([middles**power for power in powers], 1)
    found = torch.linalg.lstsq(basis, wanted[:, None]).solution[:, 0]
    off = (basis @ found - wanted).abs().max()
    # one beyond, up to the largest number that a vector of 256 can have, has the last place
    numbers = torch.cat([positive, torch.linspace(float(positive[-1]), 32, 1000, dtype=torch.float64)])
    places = sum(factor * numbers**power for factor, power in zip(found.tolist(), powers, strict=True))
    wrong = (places[: len(positive)] - (torch.arange(len(positive)) + 0.5)).abs().max()
    if off > 0.1 or wrong >= 0.45 or places[len(positive) :].min() < len(positive) - 1:
        return None
    last = 2**bits - 1
    scale, offset = _centre(MAGIC + last / 2)
    made: list[Any] = []
    for factor in factors:
        inverse = [number / (factor**power * last) for number, power in zip(found.tolist(), powers, strict=True)]
        inverse += [0.0] * (4 - len(powers))
        made.append((factor, *map(twice, (*inverse, 0.0 - factor * a / scale, 0.0 - factor * b / scale**3))))
    return bits, twice(last), twice(scale), twice(offset), len(powers) - 1, *made


def _centre(middle: float) -> tuple[float, float]:
    """Two float16 numbers, a and b, for which a * middle + b is as near to 0 as can be.

    MAGIC and a half have more digits than float16; a multiple of them has almost none behind its 11th.
    """
    scales = [1 + i / 1024 for i in range(1024) if (1 + i / 1024) * middle <= 2048]
    scale = min(scales, key=lambda scale: abs(scale * middle - round(scale * middle)))
    return scale, -float(round(scale * middle))
