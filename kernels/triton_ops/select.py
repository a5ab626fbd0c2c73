"""`select` in Triton: the threshold of every row by histograms of 8 bits at a time, then one pass for the mask.

No sort, no indices, and no number read back to the host. One program a row: four passes that count and one that writes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048


@triton.jit
def _ordered(SCORE, place, inside):
    """Scores as unsigned numbers in the same order; what is outside as 0, below every score but a negative NaN."""
    bits = tl.load(SCORE + place, mask=inside, other=0).to(tl.uint32, bitcast=True)
    # -0.0 is 0.0
    bits = tl.where(bits == 0x80000000, 0, bits)
    ordered = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(inside, ordered, 0)


@triton.jit
def select_kernel(SCORE, COUNTS, OUT, tokens, TILE: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    SCORE += row * tokens
    OUT += row * tokens
    missing = tl.load(COUNTS + row).to(tl.int32)
    bins = tl.arange(0, 256)
    # the scores above the threshold are taken; `found` are its bits so far
    found = tl.full([], 0, tl.uint32)
    for turn in tl.static_range(4):
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, tokens, TILE):
            place = start + tl.arange(0, TILE)
            inside = place < tokens
            ordered = _ordered(SCORE, place, inside)
            if turn > 0:
                inside = inside & (ordered >> (32 - 8 * turn) == found >> (32 - 8 * turn))
            histogram += tl.histogram((ordered >> (24 - 8 * turn) & 255).to(tl.int32), 256, mask=inside)
        # how many are in higher bins than each: the threshold lies in the one where that first is too few
        above = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)
        chosen = tl.min(tl.where(above < missing, bins, 255), 0)
        missing -= tl.sum(tl.where(bins == chosen, above, 0), 0)
        found = found | (chosen.to(tl.uint32) << (24 - 8 * turn))
    equals = tl.full([], 0, tl.int32)
    for start in range(0, tokens, TILE):
        place = start + tl.arange(0, TILE)
        inside = place < tokens
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
    out = torch.empty_like(score, dtype=torch.uint8)
    rows = score.numel() // score.shape[-1]
    counts = counts.to(score.device).contiguous()
    select_kernel[(rows,)](score, counts, out, score.shape[-1], TILE=TILE, num_warps=8)
    return out.view(torch.bool)
