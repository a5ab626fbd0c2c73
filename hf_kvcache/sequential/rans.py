"""Range coding (rANS) of many small integers in numpy: one coder a column, all of them side by side.

Symbols are coded row by row. Every column has a state of its own, the states share one stream of 16-bit words, and
every row is coded under one of several tables of frequencies. Duda's asymmetric numeral systems (arXiv 1311.2540),
interleaved as in Giesen (arXiv 1402.3392). Integers throughout, so what one machine wrote another one reads.
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


def encode(symbols: np.ndarray, choices: np.ndarray, tables: Tables) -> tuple[bytes, bytes]:
    """(states, words) of symbols `[R, n]`, each row under the table of `choices` `[R]`."""
    state = np.full(symbols.shape[1], LOWEST, dtype=np.int64)
    words = []
    for row in range(len(symbols) - 1, -1, -1):
        frequency = tables.frequencies[choices[row]].take(symbols[row])
        over = np.flatnonzero(state >= frequency << (32 - PRECISION))
        words.append(state[over].astype("<u2"))
        state[over] >>= 16
        state += state // frequency * (TOTAL - frequency) + tables.starts[choices[row]].take(symbols[row])
    stream = np.concatenate(words[::-1]) if words else np.empty(0, "<u2")
    return state.astype("<u4").tobytes(), stream.tobytes()


def decode(states: bytes, words: bytes, columns: int, choices: np.ndarray, tables: Tables) -> np.ndarray:
    """The inverse of `encode`: symbols `[R, n]`, uint8.

    Raises:
        PageError: for bytes that are not a code of that many symbols.
    """
    if len(states) != 4 * columns or len(words) % 2:
        raise PageError(f"{columns} columns must have {4 * columns} bytes of states, got {len(states)}")
    state = np.frombuffer(states, "<u4").astype(np.int64)
    stream = np.frombuffer(words, "<u2").astype(np.int64)
    result = np.empty((len(choices), columns), dtype=np.uint8)
    position = 0
    for row, choice in enumerate(choices):
        slot = state & (TOTAL - 1)
        symbol = tables.symbols[choice].take(slot)
        result[row] = symbol
        slot -= tables.starts[choice].take(symbol)
        state >>= PRECISION
        state *= tables.frequencies[choice].take(symbol)
        state += slot
        low = np.flatnonzero(state < LOWEST)
        if len(low):
            taken = stream[position : position + len(low)]
            if len(taken) < len(low):
                raise PageError("the code of a page ends too soon")
            state[low] = state[low] << 16 | taken
            position += len(low)
    if position != len(stream) or (state != LOWEST).any():
        raise PageError("the code of a page does not end where it should")
    return result
