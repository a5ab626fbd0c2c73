"""Rounding components to codes of one error, and back: the large ones by a trellis, the small ones to the nearest step.

The class of a row (`codes`) says which of both it is. A little is taken off every size before it is rounded, since a
zero more costs less than it saves; by how much codes then miss what they stand for is kept for every class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_kvcache.sequential import trellis
from hf_kvcache.sequential.codes import CLASSES, class_of, classes_of, pack_codes, unpack_codes
from hf_kvcache.sequential.packing import PageError

# what is taken off a size before it is rounded to a step
DEAD = 0.12
# squared steps that a bit is worth: what one more bit of all numbers takes off their squared errors
BIT = 0.09
# the largest code, of which twice as much is still an int32
FAR = 1 << 29
# sizes whose mean miss is kept for every class: the first, the second, and those above
SIZES = 3
# classes of rows from which on a trellis is the better choice
TRELLIS = int(class_of(trellis.LEAST_SIZE))


def encode(components: np.ndarray) -> dict[str, bytes]:
    """Sections by name, of components `[J, n]`, float32, in steps."""
    codes = np.floor(np.abs(components) + (0.5 - DEAD))
    codes = np.copysign(np.minimum(codes, FAR), components).astype(np.int32)
    classes = classes_of(codes)
    rows = np.flatnonzero(classes >= TRELLIS)
    numbers = np.clip(components[rows] / np.float32(trellis.GAIN), -FAR, FAR)
    # of numbers whose size has this mean (Laplace's law), one larger by one takes so many bits more
    price = BIT / np.log(2) / np.abs(numbers).mean(1, dtype=np.float64).astype(np.float32)
    codes[rows] = trellis.quantise(numbers, price)
    return {**pack_codes(codes, classes), "centres": _centres(components, codes, classes).tobytes()}


def decode(sections: Mapping[str, Any], shape: tuple[int, int]) -> np.ndarray:
    """The inverse of `encode`: components `[J, n]`, float32, in steps.

    Raises:
        PageError: for sections that do not hold components of this shape.
    """
    codes, classes = unpack_codes(sections, shape)
    centres = sections.get("centres")
    if centres is None or len(centres) != CLASSES * SIZES:
        raise PageError(f"a coded page must have {CLASSES} times {SIZES} centres")
    moved = np.frombuffer(centres, dtype=np.int8).reshape(CLASSES, SIZES).astype(np.float32) / 256
    # what to add to a point: by class, and by the point from -SIZES to SIZES
    table = np.concatenate([-moved[:, ::-1], np.zeros((CLASSES, 1), np.float32), moved], axis=1)
    points, unit = _points(codes, classes)
    index = np.clip(points, -SIZES, SIZES)
    index += (table.shape[1] * classes.astype(np.int32) + SIZES)[:, None]
    components = table.take(index)
    components += points
    components *= unit[:, None]
    return components


def _points(codes: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What codes stand for, `[J, n]`, int32, in units `[J]` of their rows: both grids of a trellis make one of half its
    step."""
    rows = np.flatnonzero(classes >= TRELLIS)
    points, unit = codes.copy(), np.ones(len(codes), np.float32)
    points[rows] = 2 * codes[rows] + trellis.grids(codes[rows])
    unit[rows] = trellis.GAIN / 2
    return points, unit


def _centres(components: np.ndarray, codes: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """By class, and size 1, 2, or more of a point: the mean size of what was rounded to it, less its own; `[CLASSES,
    SIZES]`, int8, in 1/256 of a unit."""
    points, unit = _points(codes, classes)
    size = np.abs(points)
    missed = components * (np.sign(points) / unit[:, None]) - size
    index = (classes.astype(np.int64)[:, None] * (SIZES + 1) + np.minimum(size, SIZES)).reshape(-1)
    count = np.bincount(index, minlength=CLASSES * (SIZES + 1))
    total = np.bincount(index, weights=missed.reshape(-1), minlength=len(count))
    mean = (total / np.maximum(count, 1)).reshape(CLASSES, SIZES + 1)[:, 1:]
    return np.clip(np.round(256 * mean), -127, 127).astype(np.int8)
