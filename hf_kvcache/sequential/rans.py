"""Range coding (rANS) of many small integers in numpy: a few coders a column, all of them side by side.

Symbols are coded some rows at a time. Every column has a state for each of these, the states share one stream of 16-bit
words, and every row is coded under one of several tables of frequencies. Duda's asymmetric numeral systems (arXiv
1311.2540), interleaved as in Giesen (arXiv 1402.3392). Integers throughout, so what one machine wrote another one
reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_kvcache.sequential.packing import PageError

# frequencies of a table add up to this
PRECISION = 14
TOTAL = 1 << PRECISION
# states stay in [LOWEST, LOWEST << 16)
LOWEST = 1 << 16
# rows that are coded at once: more make short work of numpy's overhead, and take four bytes each a column
MOST_LANES, ROWS_A_LANE = 8, 384


@dataclass(frozen=True)
class Tables:
    """Frequencies of the symbols 0 to S - 1 in each of C tables.

    Args:
        frequencies: `[C, S]`, int64, each row adding up to `TOTAL`; what is 0 cannot be coded.
        starts: of each symbol, the sum of those before it.
        symbols: `[C, TOTAL]`, the symbol that a slot belongs to.
    """

    frequencies: np.ndarray
    starts: np.ndarray
    symbols: np.ndarray

    @classmethod
    def of(cls, frequencies: np.ndarray) -> Tables:
        """Tables of non-negative frequencies `[C, S]`.

        Raises:
            PageError: when those of a table do not add up to `TOTAL`.
        """
        frequencies = frequencies.astype(np.int64)
        ends = frequencies.cumsum(1)
        if (ends[:, -1] != TOTAL).any():
            raise PageError(f"the frequencies of a table add up to {TOTAL}")
        symbols = np.stack([np.repeat(np.arange(len(row)), row) for row in frequencies])
        return cls(frequencies, ends - frequencies, symbols.astype(np.uint8))


def lanes(rows: int) -> int:
    """How many rows are coded at once."""
    return min(max(rows // ROWS_A_LANE, 1), MOST_LANES)


def encode(symbols: np.ndarray, choices: np.ndarray, tables: Tables) -> tuple[bytes, bytes]:
    """(states, words) of symbols `[R, n]`, each row under the table of `choices` `[R]`."""
    columns, width, count = symbols.shape[1], tables.frequencies.shape[1], lanes(len(symbols))
    states = np.full(count * columns, LOWEST, dtype=np.int64)
    words = []
    for first in reversed(range(0, len(symbols), count)):
        own = slice(first, first + count)
        index = (symbols[own] + width * choices[own, None].astype(np.int64)).ravel()
        frequency = tables.frequencies.take(index)
        state = states[: len(index)]
        over = np.flatnonzero(state >= frequency << (32 - PRECISION))
        words.append(state[over].astype("<u2"))
        state[over] >>= 16
        state += state // frequency * (TOTAL - frequency) + tables.starts.take(index)
    stream = np.concatenate(words[::-1]) if words else np.empty(0, "<u2")
    return states.astype("<u4").tobytes(), stream.tobytes()


def decode(states: bytes, words: bytes, columns: int, choices: np.ndarray, tables: Tables) -> np.ndarray:
    """The inverse of `encode`: symbols `[R, n]`, uint8.

    Raises:
        PageError: for bytes that are not a code of that many symbols.
    """
    expected = 4 * lanes(len(choices)) * columns
    if len(states) != expected or len(words) % 2:
        raise PageError(f"{columns} columns must have {expected} bytes of states, got {len(states)}")
    whole = np.frombuffer(states, "<u4").astype(np.int64)
    stream = np.frombuffer(words, "<u2").astype(np.int64)
    width = tables.frequencies.shape[1]
    result = np.empty(len(choices) * columns, dtype=np.uint8)
    of_symbols, of_slots = (np.repeat(choices.astype(np.int64) * size, columns) for size in (width, TOTAL))
    position = 0
    for first in range(0, len(result), len(whole)):
        own = slice(first, first + len(whole))
        # the last rows can be fewer
        state = whole[: len(result) - first]
        slot = state & (TOTAL - 1)
        symbol = tables.symbols.take(slot + of_slots[own])
        result[own] = symbol
        index = of_symbols[own] + symbol
        slot -= tables.starts.take(index)
        state >>= PRECISION
        state *= tables.frequencies.take(index)
        state += slot
        low = np.flatnonzero(state < LOWEST)
        taken = stream[position : position + len(low)]
        if len(taken) < len(low):
            raise PageError("the code of a page ends too soon")
        state[low] = state[low] << 16 | taken
        position += len(low)
    if position != len(stream) or (whole != LOWEST).any():
        raise PageError("the code of a page does not end where it should")
    return result.reshape(-1, columns)
