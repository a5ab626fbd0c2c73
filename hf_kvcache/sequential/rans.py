"""Range coding (rANS) of many small integers in numpy: one coder a column, all of them side by side.

Symbols are coded row by row. Every column has a state of its own, the states share one stream of 16-bit words, and
every symbol names the table of frequencies that it is coded under. Duda's asymmetric numeral systems (arXiv 1311.2540),
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
    """(states, words) of symbols `[J, n]`, each under the table `choices` `[J, n]`."""
    state = np.full(symbols.shape[1], LOWEST, dtype=np.uint64)
    frequencies = tables.frequencies[choices, symbols].astype(np.uint64)
    starts = tables.starts[choices, symbols].astype(np.uint64)
    full = frequencies << (32 - PRECISION)
    words = []
    for row in range(len(symbols) - 1, -1, -1):
        over = state >= full[row]
        words.append(state[over].astype("<u2"))
        state[over] >>= 16
        quotient = state // frequencies[row]
        state += quotient * (TOTAL - frequencies[row]) + starts[row]
    stream = np.concatenate(words[::-1]) if words else np.empty(0, "<u2")
    return state.astype("<u4").tobytes(), stream.tobytes()


@dataclass
class Decoder:
    """Decodes what `encode` wrote, some rows at a time, so that a table may depend on what came before.

    Args:
        state: of every column.
        stream: the words.
        tables: as for `encode`.
        position: of the next word.
    """

    state: np.ndarray
    stream: np.ndarray
    tables: Tables
    position: int = 0

    @classmethod
    def of(cls, states: bytes, words: bytes, columns: int, tables: Tables) -> Decoder:
        if len(states) != 4 * columns or len(words) % 2:
            raise PageError(f"{columns} columns must have {4 * columns} bytes of states, got {len(states)}")
        return cls(np.frombuffer(states, "<u4").astype(np.int64), np.frombuffer(words, "<u2").astype(np.int64), tables)

    def rows(self, choices: np.ndarray) -> np.ndarray:
        """The next symbols, uint8, under the tables `choices` `[R, n]`.

        Raises:
            PageError: when the words end too soon.
        """
        result = np.empty(choices.shape, dtype=np.uint8)
        slots, kinds = choices * TOTAL, choices * self.tables.frequencies.shape[1]
        state, position = self.state, self.position
        for row in range(len(choices)):
            slot = state & (TOTAL - 1)
            symbol = self.tables.symbols.take(slots[row] + slot)
            result[row] = symbol
            index = kinds[row] + symbol
            state = self.tables.frequencies.take(index) * (state >> PRECISION) + slot - self.tables.starts.take(index)
            low = np.flatnonzero(state < LOWEST)
            words = self.stream[position : position + len(low)]
            if len(words) < len(low):
                raise PageError("the code of a page ends too soon")
            state[low] = state[low] << 16 | words
            position += len(low)
        self.state, self.position = state, position
        return result

    def finish(self) -> None:
        """Checks that all has been read.

        Raises:
            PageError: when there is more.
        """
        if self.position != len(self.stream) or (self.state != LOWEST).any():
            raise PageError("the code of a page does not end where it should")
