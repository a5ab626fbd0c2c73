"""What every kernel moves, and the time below which no GPU of a given bandwidth can be. Computed, not measured.

    python examples/benchmarks/roofline.py       writes results/roofline.csv, for an H200

`least` are the bytes that any implementation has to move: what goes in and what comes out, once. `moved` are those of
our kernels, with partial results and second passes. The floor in microseconds is `moved` by the bandwidth that a copy
reaches; where `results/kernels_aot.csv` knows how many instructions the loop takes an element, the time that these take
is beside it, and the larger of the two is the bound. `tests/kernels/test_roofline.py` counts what the interpreter
loads and stores and compares it with `moved`.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common import RESULTS, write_results

# of an H200: multiprocessors, clock under load, bytes a second that a copy reaches
MULTIPROCESSORS, CLOCK, BANDWIDTH = 132, 1.755e9, 4.3e12
LANES = 128
# programs on a multiprocessor at once, as `kernels/ragged_attention.py` has it
PROGRAMS = 12
FLOAT = 4


@dataclass(frozen=True)
class Moved:
    """Bytes of one call."""

    least: float
    moved: float


def code_attention(
    entries: int, dim: int, bits: tuple[int, int], runs: int, queries: int, stretches: int, bias: bool = True
) -> Moved:
    """Attention of `queries` rows of each of `runs` over all their entries, cut into `stretches` in all.

    A row of up to 32 queries reads the entries once; a query in float32 is read once a stretch.
    """
    passes = -(-queries // 32)
    held = entries * (dim * sum(bits) / 8 + 2 + 2)
    rows = runs * queries
    ends = rows * (dim + bias) * FLOAT + rows * (dim + 1) * FLOAT
    if stretches == runs:
        return Moved(held + ends, held * passes + ends)
    read_again = (stretches - runs) * queries * (dim + bias) * FLOAT
    partial = 2 * stretches * queries * (dim + 1) * FLOAT
    return Moved(held + ends, held * passes + ends + read_again + partial)


def decode_attention(
    entries: int, dim: int, itemsize: int, runs: int, queries: int, stretches: int, masked: bool = False
) -> Moved:
    """As `code_attention`, over dense keys and values; a mask takes a byte an entry and query."""
    passes = -(-queries // 32)
    held = entries * 2 * dim * itemsize
    rows = runs * queries
    ends = 2 * rows * dim * itemsize + rows * FLOAT + masked * entries * queries
    if stretches == runs:
        return Moved(held + ends, held * passes + ends)
    read_again = (stretches - runs) * queries * dim * itemsize
    partial = 2 * stretches * queries * (dim + 1) * FLOAT
    return Moved(held + ends, held * passes + ends + read_again + partial)


def merge_states(rows: int, dim: int, itemsize: int) -> Moved:
    """Two partial results to one."""
    number = 3 * rows * (dim * itemsize + FLOAT)
    return Moved(number, number)


def encode_entries(entries: int, dim: int, bits: tuple[int, int], itemsize: int, gather: bool, owned: bool) -> Moved:
    """Keys and values in, codes and scales out. Rotation and means are read by every program, from the cache."""
    values = entries * 2 * dim * itemsize
    codes = entries * (dim * sum(bits) / 8 + 2 * FLOAT)
    # the index is read for keys and for values
    return Moved(values + codes + entries * 8 * (gather + owned), values + codes + entries * 8 * (2 * gather + owned))


def window_scores(
    runs: int, tokens: int, dim: int, itemsize: int, group: int, window: int, stretches: int = 32
) -> Moved:
    """Keys in, scores of every query head out. Ours reads the keys for the log-sum-exp and for the scores, each time
    once for all of up to 256 query rows, and joins the log-sum-exps of the stretches in every program."""
    keys = runs * tokens * dim * itemsize
    query = runs * group * window * dim * itemsize
    out = runs * group * tokens * FLOAT
    rows = group * max(16, 1 << (window - 1).bit_length())
    # queries stay in the cache
    partial = runs * rows * stretches * (1 + stretches) * FLOAT
    return Moved(keys + query + out, 2 * keys * -(-rows // 256) + query + partial + out)


def value_norm(
    runs: int, tokens: int, dim: int, itemsize: int, heads: int, group: int, width: int, parts: int = 1
) -> Moved:
    """Values and weights in, norms out. The weights stay in the cache, and so do values that two programs read at once;
    the norm of a group in several parts is summed up at the end. The L1 norm casts its weights first."""
    weights = heads * group * dim * width
    number = runs * tokens * (dim * itemsize + FLOAT) + weights * FLOAT
    cast = 0 if width == dim else 2 * weights * itemsize
    return Moved(number, number + cast + (runs * tokens * 2 * parts * FLOAT if parts > 1 else 0))


def select(rows: int, tokens: int, splits: int = 1) -> Moved:
    """Scores in, a mask out. Ours reads a short row once and a long one, in splits, five times; every program reads
    the four histograms, of 256 numbers, of all splits of its row."""
    least = rows * tokens * (FLOAT + 1)
    if splits == 1:
        return Moved(least, least)
    return Moved(least, rows * tokens * (5 * FLOAT + 1) + 4 * rows * splits * (1 + splits) * 256 * FLOAT)


def gated_retention(
    runs: int, tokens: int, dim: int, value_dim: int, itemsize: int, columns: int = 128, chunk: int = 64, parts: int = 1
) -> Moved:
    """Query, key, value and gates in, outputs and states out.

    A program has `columns` of the values, and reads all of query and key for them. The sums of gates take three numbers
    a token; all parts of a long text but the last are read once more, for the states that later parts begin with.
    Nothing is taken to come from the cache.
    """
    key, value, state = dim * itemsize, value_dim * itemsize, runs * dim * value_dim * FLOAT
    least = runs * tokens * (2 * key + 2 * value + FLOAT) + 2 * state
    programs, chunks = -(-value_dim // columns), -(-tokens // chunk)
    # a program reads one of the sums twice, as what is left of a state
    padded = runs * chunks * FLOAT
    moved = runs * tokens * (2 * programs * key + 2 * value + FLOAT) + 2 * state
    moved += padded * (3 * chunk + programs * (3 * chunk + 1))
    before = -(-chunks // parts) * (parts - 1)
    moved += runs * before * (chunk * (programs * key + value) + programs * (chunk + 1) * FLOAT)
    # states of the parts: found, and read by all parts behind them, as is the first one
    return Moved(least, moved + (2 * (parts - 1) + parts * (parts - 1) / 2) * state)


def microseconds(number: float) -> float:
    """The time that a copy of as many bytes takes, read and written together."""
    return number / BANDWIDTH * 1e6


def instructions_an_element() -> dict[str, float]:
    """By the name of the kernel, on sm_90."""
    path = RESULTS / "kernels_aot.csv"
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["target"] == "sm_90" and row["instructions an element"]]
    return {row["kernel"]: float(row["instructions an element"]) for row in rows}


def rows() -> Iterator[dict[str, Any]]:
    """One layer of Llama-3.1-8B: 8 KV heads, 4 query heads each, head_dim 128."""
    heads, group, dim, half = 8, 4, 128, 2
    known = instructions_an_element()
    for batch, tokens in ((1, 8192), (1, 32768), (1, 131072), (8, 8192), (8, 32768), (32, 8192)):
        runs, size = batch * heads, f"{batch} x {tokens}"
        entries = runs * tokens
        stretches = min(PROGRAMS * MULTIPROCESSORS, entries // 256)
        dense = decode_attention(entries, dim, half, runs, group, stretches)
        name = f"decode_attention bf16, head_dim {dim}, 8 query rows, ragged"
        yield row(name, size, dense, 2 * entries * dim, known.get(name))
        for bits in (4, 3, 2):
            for kind in ("equal steps", "cubic"):
                name = f"code_attention {bits} bits, {kind}, head_dim {dim}, 8 query rows"
                moved = code_attention(entries, dim, (bits, bits), runs, group, stretches)
                yield row(name, size, moved, 2 * entries * dim, known.get(name))
    for tokens in (8192, 32768, 131072):
        size, entries = f"1 x {tokens}", heads * tokens
        for bits in (4, 3, 2):
            moved = encode_entries(entries, dim, (bits, bits), half, gather=False, owned=True)
            name = f"encode_entries bf16, {bits}+{bits} bits, head_dim {dim}"
            yield row(name, size, moved, 2 * entries * dim, known.get(name))
        passes = [known.get(f"window_scores bf16, head_dim {dim}, {one}") for one in ("log-sum-exp", "scores")]
        each = sum(one for one in passes if one) if all(passes) else None
        window = 64
        moved = window_scores(heads, tokens, dim, half, group, window)
        yield row(f"window_scores, {window} queries", size, moved, entries * group * window, each)
        for norm, width in (("L2", dim), ("L1", heads * group * dim)):
            moved = value_norm(heads, tokens, dim, half, heads, group, width, parts=2 if norm == "L2" else 1)
            each = known.get(f"value_norm bf16, head_dim {dim}, {norm}")
            yield row(f"value_norm {norm}", size, moved, entries * group * width, each)
        yield row("select", size, select(heads, tokens, splits=1 if tokens <= 16384 else min(32, tokens // 2048)))
        # one program a multiprocessor: four parts of each head, three of which take both passes
        states, parts = heads * group, MULTIPROCESSORS // (heads * group)
        name = f"gated_retention bf16, heads of {dim} and {dim}"
        both = [known.get(f"{name}, {one}") for one in ("outputs", "states")]
        each = both[0] + both[1] * (parts - 1) / parts if all(both) else None
        moved = gated_retention(states, tokens, dim, dim, half, parts=parts)
        yield row("gated_retention, 32 heads", size, moved, states * tokens * dim, each)
    yield row("merge_states, 32 heads", "8", merge_states(8 * 32, dim, half))


def row(name: str, size: str, moved: Moved, elements: int = 0, each: float | None = None) -> dict[str, Any]:
    """A line of the table."""
    busy = None if each is None else elements * each / (MULTIPROCESSORS * LANES * CLOCK) * 1e6
    floor = microseconds(moved.moved)
    return {
        "kernel": name,
        "batch x tokens": size,
        "least bytes": int(moved.least),
        "bytes moved": int(moved.moved),
        "microseconds of the bytes": floor,
        "microseconds of the instructions": busy,
        "bound by": "instructions" if busy is not None and busy > floor else "bytes",
    }


def main() -> int:
    write_results("roofline", list(rows()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
