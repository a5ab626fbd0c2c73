"""Packing small integers, most of them zero, in about the bits that they carry.

Rows are components, columns tokens. Every row has a class, the mean size of its codes in thirds of an octave, and all
codes of one class are range coded (`rans`) under one table of frequencies, which the page carries. Of large codes the
low bits are as good as random and are kept as they are; of the rest, those that reach far are listed. A row of zeros
takes nothing but its class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_kvcache.sequential import rans
from hf_kvcache.sequential.packing import PageError

# class 0 is a row of zeros; class c a mean size of 2 ** ((c - 0.5) / 3 - 8)
CLASSES = 64
# symbols 0 to 62 stand for -31 to 31, the last one for what reaches further
MOST = 31
ESCAPE = 2 * MOST + 1
SYMBOLS = ESCAPE + 1
# low bits that are kept apart: from a mean size of 4 on, one for every octave
APART = [max(0, (kind - 1) // 3 - 9) for kind in range(CLASSES)]
SHIFT = np.array(APART, dtype=np.int32)


def pack_codes(codes: np.ndarray, classes: np.ndarray) -> dict[str, bytes]:
    """Sections by name, of codes `[J, n]`, int32, whose rows have the classes of `classes_of`, or some near them."""
    order = _order(classes)
    rows, shift = codes[order], SHIFT[classes[order]][:, None]
    high = rows >> shift
    far = np.abs(high) > MOST
    symbols = np.where(far, ESCAPE, high + MOST)
    frequencies = frequencies_of(classes[order], symbols)
    states, words = rans.encode(symbols, classes[order], rans.Tables.of(frequencies))
    return {
        "classes": classes.tobytes(),
        "frequencies": frequencies.astype("<u2").tobytes(),
        "states": states,
        "words": words,
        "low": _low_bits(rows, shift[:, 0]),
        "far": high[far].astype("<i4").tobytes(),
    }


def unpack_codes(sections: Mapping[str, Any], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack_codes`: codes `[J, n]`, int32, and the classes of their rows `[J]`.

    Raises:
        PageError: for sections that do not hold codes of this shape.
    """
    missing = {"classes", "frequencies", "states", "words", "low", "far"} - set(sections)
    if missing:
        raise PageError(f"coded components must have the section {min(missing)!r}")
    classes = np.frombuffer(sections["classes"], dtype=np.uint8)
    if len(classes) != shape[0] or int(classes.max(initial=0)) >= CLASSES:
        raise PageError(f"{shape[0]} components must have a class each, below {CLASSES}")
    if len(sections["frequencies"]) != 2 * CLASSES * SYMBOLS or len(sections["far"]) % 4:
        raise PageError(f"the tables of a page are {CLASSES} times {SYMBOLS} frequencies of two bytes")
    frequencies = np.frombuffer(sections["frequencies"], dtype="<u2").reshape(CLASSES, SYMBOLS)
    order = _order(classes)
    tables = rans.Tables.of(frequencies)
    symbols = rans.decode(sections["states"], sections["words"], shape[1], classes[order], tables)
    high = symbols.astype(np.int32)
    high -= MOST
    far = np.flatnonzero(symbols == ESCAPE)
    values = np.frombuffer(sections["far"], dtype="<i4")
    if len(values) != len(far):
        raise PageError(f"a page has {len(values)} far codes, expected {len(far)}")
    high.reshape(-1)[far] = values
    shift = SHIFT[classes[order]]
    low = _from_low_bits(sections["low"], shift, shape[1])
    # the rows with low bits are the first ones
    high[: len(low)] = high[: len(low)] << shift[: len(low), None] | low
    codes = np.zeros(shape, dtype=np.int32)
    codes[order] = high
    return codes, classes


def classes_of(codes: np.ndarray) -> np.ndarray:
    """The class of every row of codes `[J, n]`, uint8."""
    return class_of(np.abs(codes).mean(1, dtype=np.float64))


def class_of(mean: Any) -> Any:
    """The class of codes with this mean size, uint8."""
    with np.errstate(divide="ignore"):
        found = np.floor(3 * (np.log2(mean) + 8)) + 1
    return np.where(np.asarray(mean) > 0, np.clip(found, 1, CLASSES - 1), 0).astype(np.uint8)


def frequencies_of(classes: np.ndarray, symbols: np.ndarray) -> np.ndarray:
    """Tables `[CLASSES, SYMBOLS]`, each adding up to `rans.TOTAL`, in which no symbol that occurs is missing."""
    index = classes.astype(np.int64)[:, None] * SYMBOLS + symbols
    counts = np.bincount(index.reshape(-1), minlength=CLASSES * SYMBOLS)
    counts = counts.reshape(CLASSES, SYMBOLS).astype(np.int64)
    counts[counts.sum(1) == 0, MOST] = 1
    frequencies = np.maximum(counts * rans.TOTAL // counts.sum(1, keepdims=True), counts > 0)
    # what rounding took or added, the most frequent symbol gives or gets
    rest = rans.TOTAL - frequencies.sum(1)
    frequencies[np.arange(CLASSES), counts.argmax(1)] += rest
    return frequencies


def _order(classes: np.ndarray) -> np.ndarray:
    """Rows that are not zero, the largest class first."""
    order = np.argsort(-classes.astype(np.int64), kind="stable")
    return order[: int((classes > 0).sum())]


def _low_bits(rows: np.ndarray, shift: np.ndarray) -> bytes:
    pieces = [
        ((rows[shift == bits][..., None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(-1)
        for bits in np.unique(shift[shift > 0])
    ]
    return np.packbits(np.concatenate(pieces)).tobytes() if pieces else b""


def _from_low_bits(data: Any, shift: np.ndarray, tokens: int) -> np.ndarray:
    """The low bits of the rows that have some, `[R, tokens]`; `shift` falls from row to row."""
    total = tokens * int(shift.sum())
    if len(data) != -(-total // 8):
        raise PageError(f"{total} low bits do not fit {len(data)} bytes")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=total)
    shift = shift[shift > 0]
    low = np.zeros((len(shift), tokens), dtype=np.int32)
    first = 0
    for width in np.unique(shift):
        rows = shift == width
        size = int(rows.sum()) * tokens * int(width)
        own = bits[first : first + size].reshape(-1, tokens, width).astype(np.int32)
        low[rows] = (own << np.arange(width, dtype=np.int32)).sum(2)
        first += size
    return low
