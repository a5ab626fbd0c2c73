"""`select` in Triton: the threshold of every row, then the mask.

No sort, no indices, no atomics, and no number read back to the host. A short row stays in the registers of one program,
which finds the threshold bit by bit. A long one is cut into splits, a program each, and its threshold found by
histograms of 8 bits: in each of four launches the programs write those of their splits, and the programs of the next
launch sum them up to know the digit. The last launch also sees there how many equal scores precede its split.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_kvcache.kernels.ragged_attention import programs_of
from hf_kvcache.kernels.triton_ops.launch import power_of_two

# scores of a tile, splits of a row at most, and scores of a row up to which one program takes less time than launches
TILE, SPLITS, SHORT = 2048, 128, 16384


@triton.jit
def _ordered(SCORE, place, inside):
    """Scores as unsigned numbers in the same order; what is outside as 0, below every score but a negative NaN."""
    bits = tl.load(SCORE + place, mask=inside, other=0).to(tl.uint32, bitcast=True)
    # -0.0 is 0.0
    bits = tl.where(bits == 0x80000000, 0, bits)
    ordered = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(inside, ordered, 0)


@triton.jit
def row_kernel(SCORE, COUNTS, OUT, tokens, WIDE: tl.constexpr):
    """The mask of one row of at most WIDE scores."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(COUNTS + row).to(tl.int32)
    place = tl.arange(0, WIDE)
    inside = place < tokens
    ordered = _ordered(SCORE + row * tokens, place, inside)
    # the largest number that at least `count` scores reach
    found = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        reached = tl.sum((ordered >= (found | bit)).to(tl.int32), 0)
        found = tl.where(reached >= count, found | bit, found)
        bit = bit >> 1
    above = ordered > found
    equal = ((ordered == found) & inside).to(tl.int32)
    rank = tl.cumsum(equal, 0) - equal
    taken = above | ((equal != 0) & (rank < count - tl.sum(above.to(tl.int32), 0)))
    tl.store(OUT + row * tokens + place, taken.to(tl.uint8), mask=inside)


@triton.jit
def _digit(HISTOGRAM, FOUND, COUNTS, row, turn: tl.constexpr, SPLITS: tl.constexpr):
    """With the digit that the histograms of turn `turn` decide: the threshold's bits so far, how many scores of these
    bits are to be taken, and how many there are in the splits before this one."""
    rows, splits, split = tl.num_programs(1).to(tl.int64), tl.num_programs(0), tl.program_id(0)
    if turn == 0:
        found, missing = tl.full([], 0, tl.uint32), tl.load(COUNTS + row).to(tl.int32)
    else:
        last = FOUND + ((turn - 1) * rows + row) * 2
        found, missing = tl.load(last).to(tl.uint32, bitcast=True), tl.load(last + 1)
    bins, number = tl.arange(0, 256), tl.arange(0, SPLITS)
    place = (turn * rows + row) * splits + number
    parts = tl.load(HISTOGRAM + place[:, None] * 256 + bins[None, :], mask=(number < splits)[:, None], other=0)
    histogram = tl.sum(parts, 0)
    # how many are in higher bins than each: the threshold lies in the one where that first is too few
    above = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)
    chosen = tl.min(tl.where(above < missing, bins, 255), 0)
    missing -= tl.sum(tl.where(bins == chosen, above, 0), 0)
    before = tl.sum(tl.sum(tl.where((number < split)[:, None] & (bins == chosen)[None, :], parts, 0), 0), 0)
    return found | (chosen.to(tl.uint32) << (24 - 8 * turn)), missing, before


@triton.jit
def count_kernel(
    SCORE, COUNTS, HISTOGRAM, FOUND, tokens, per, TURN: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The histogram of digit TURN of one split, `HISTOGRAM [4, rows, splits, 256]`, among the scores that have the
    threshold's digits before it. `FOUND [3, rows, 2]` is what `_digit` finds, for the next launch."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    found = tl.full([], 0, tl.uint32)
    if TURN > 0:
        found, missing, _ = _digit(HISTOGRAM, FOUND, COUNTS, row, TURN - 1, SPLITS)
        if split == 0:
            state = FOUND + ((TURN - 1) * tl.num_programs(1).to(tl.int64) + row) * 2
            tl.store(state, found.to(tl.int32, bitcast=True))
            tl.store(state + 1, missing)
    SCORE += row * tokens
    end = tl.minimum((split + 1) * per, tokens)
    histogram = tl.zeros([256], tl.int32)
    for start in range(split * per, end, TILE):
        place = start + tl.arange(0, TILE)
        inside = place < end
        ordered = _ordered(SCORE, place, inside)
        if TURN > 0:
            inside = inside & (ordered >> (32 - 8 * TURN) == found >> (32 - 8 * TURN))
        histogram += tl.histogram((ordered >> (24 - 8 * TURN) & 255).to(tl.int32), 256, mask=inside)
    target = (TURN * tl.num_programs(1).to(tl.int64) + row) * tl.num_programs(0) + split
    tl.store(HISTOGRAM + target * 256 + tl.arange(0, 256), histogram)


@triton.jit
def mask_kernel(
    SCORE, COUNTS, HISTOGRAM, FOUND, OUT, tokens, per, SPLITS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """What is above the threshold, and the first of those equal to it: `OUT [rows, tokens]`, one split."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    found, missing, equals = _digit(HISTOGRAM, FOUND, COUNTS, row, 3, SPLITS)
    SCORE += row * tokens
    OUT += row * tokens
    end = tl.minimum((split + 1) * per, tokens)
    for start in range(split * per, end, TILE):
        place = start + tl.arange(0, TILE)
        inside = place < end
        ordered = _ordered(SCORE, place, inside)
        equal = ((ordered == found) & inside).to(tl.int32)
        rank = equals + tl.cumsum(equal, 0) - equal
        taken = (ordered > found) | ((equal != 0) & (rank < missing))
        tl.store(OUT + place, taken.to(tl.uint8), mask=inside)
        equals += tl.sum(equal, 0)


def select(score: Tensor, counts: Tensor) -> Tensor:
    """The operator; `NotImplemented` for scores that are not float32."""
    if score.dtype != torch.float32 or not score.numel():
        return NotImplemented
    score = score.contiguous()
    counts = counts.to(score.device).contiguous()
    tokens = score.shape[-1]
    rows = score.numel() // tokens
    out = torch.empty_like(score, dtype=torch.uint8)
    if tokens <= SHORT:
        row_kernel[(rows,)](score, counts, out, tokens, **row_configuration(tokens))
        return out.view(torch.bool)
    tiles = triton.cdiv(tokens, TILE)
    # two programs a multiprocessor; each sums up the histograms of all splits of its row
    splits = max(1, min(tiles, SPLITS, programs_of(score.device) // (6 * rows)))
    per = triton.cdiv(tiles, splits) * TILE
    grid = (triton.cdiv(tokens, per), rows)
    histogram = score.new_empty(4, rows, grid[0], 256, dtype=torch.int32)
    found = score.new_empty(3, rows, 2, dtype=torch.int32)
    made = configuration(grid[0])
    for turn in range(4):
        count_kernel[grid](score, counts, histogram, found, tokens, per, TURN=turn, **made)
    mask_kernel[grid](score, counts, histogram, found, out, tokens, per, **made)
    return out.view(torch.bool)


def row_configuration(tokens: int) -> dict[str, int]:
    """What the kernel of short rows is compiled for: 32 scores a thread, which stay in registers."""
    wide = power_of_two(tokens, 1024)
    return {"WIDE": wide, "num_warps": max(4, wide // 1024)}


def configuration(splits: int) -> dict[str, int]:
    """What the kernels of long rows are compiled for."""
    return {"TILE": TILE, "SPLITS": power_of_two(splits), "num_warps": 8}
