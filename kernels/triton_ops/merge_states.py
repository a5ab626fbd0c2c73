"""`merge_states` in Triton, and the joining of the partial results of a run's stretches in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_kvcache.kernels.triton_ops.launch import INTERPRETED, known, power_of_two

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# numbers of a row that one program of `join_kernel` joins
WIDTH = 64
# partial results that it reads at once
PARTS = 32


@triton.jit
def merge_kernel(
    A, LSE_A, B, LSE_B, OUT, LSE, rows, DIM: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr, UPCAST: tl.constexpr
):
    """N rows of two partial results `[rows, DIM]`."""
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = row < rows
    lse_a = tl.load(LSE_A + row, mask=inside, other=0)
    lse_b = tl.load(LSE_B + row, mask=inside, other=0)
    highest = tl.maximum(lse_a, lse_b)
    # two parts without a key: any weight is right, both outputs being zero
    empty = highest == float("-inf")
    weight_a = tl.where(empty, 0.5, tl.exp2((lse_a - highest) * LOG2E))
    weight_b = tl.where(empty, 0.5, tl.exp2((lse_b - highest) * LOG2E))
    total = weight_a + weight_b
    dim = tl.arange(0, WIDE)
    place = row[:, None] * DIM + dim[None, :]
    keep = inside[:, None] & (dim < DIM)[None, :]
    a, b = tl.load(A + place, mask=keep, other=0), tl.load(B + place, mask=keep, other=0)
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    merged = (weight_a / total)[:, None] * a.to(tl.float32) + (weight_b / total)[:, None] * b.to(tl.float32)
    tl.store(OUT + place, merged, mask=keep)
    tl.store(LSE + row, tl.where(empty, highest, highest + tl.log2(total) * LN2), mask=inside)


@triton.jit
def join_kernel(
    IN, IN_LSE, RANGES, OUT, LSE, splits, queries,
    DIM: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """WIDTH numbers of one query row of a run: the partial results `IN [stretches, queries, DIM]` of its stretches,
    which are `splits` for every run, or with RAGGED those from `RANGES[run]` to before `RANGES[run + 1]`."""
    run, row = (tl.program_id(0) // queries).to(tl.int64), tl.program_id(0) % queries
    if RAGGED:
        first, end = tl.load(RANGES + run).to(tl.int64), tl.load(RANGES + run + 1).to(tl.int64)
    else:
        first, end = run * splits, run * splits + splits
    dim = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    highest = tl.full([], -3e38, tl.float32)
    total = tl.full([], 0, tl.float32)
    sums = tl.zeros([WIDTH], tl.float32)
    for start in range(0, (end - first).to(tl.int32), PARTS):
        part = first + start + tl.arange(0, PARTS)
        place = part * queries + row
        lse = tl.load(IN_LSE + place, mask=part < end, other=float("-inf")) * LOG2E
        found = tl.load(
            IN + place[:, None] * DIM + dim[None, :], mask=(part < end)[:, None] & (dim < DIM)[None, :], other=0
        )
        higher = tl.maximum(highest, tl.max(lse, 0))
        weights = tl.exp2(lse - higher)
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(weights, 0)
        sums = sums * fade + tl.sum(weights[:, None] * found, 0)
        highest = higher
    target = run * queries + row
    tl.store(OUT + target * DIM + dim, sums / tl.maximum(total, 1e-30), mask=dim < DIM)
    if tl.program_id(1) == 0:
        lse = tl.where(total > 0, (highest + tl.log2(tl.maximum(total, 1e-30))) * LN2, float("-inf"))
        tl.store(LSE + target, lse)


def join_stretches(
    out: Tensor, lse: Tensor, ranges: Tensor | None, splits: int, runs: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Joins the partial results of every run's stretches.

    Args:
        out, lse: `[stretches, M, D]` and `[stretches, M]`, float32, run after run.
        ranges: `[runs + 1]`, where the stretches of every run begin; None when each has `splits` of them.
        splits, runs: see there.
        dtype: of the result.

    Returns:
        out `[runs, M, D]` and lse `[runs, M]`.
    """
    _, queries, dim = out.shape
    joined = out.new_empty(runs, queries, dim, dtype=dtype)
    joined_lse = lse.new_empty(runs, queries)
    join_kernel[(runs * queries, triton.cdiv(dim, WIDTH))](
        out, lse, lse if ranges is None else ranges, joined, joined_lse, splits, queries,
        DIM=dim, WIDTH=WIDTH, PARTS=PARTS, RAGGED=ranges is not None, num_warps=1,
    )  # fmt: skip
    return joined, joined_lse


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The operator; `NotImplemented` for float64 and parts of different shapes."""
    same = out_a.shape == out_b.shape and lse_a.shape == lse_b.shape == out_a.shape[:-1] and out_a.numel() > 0
    if not same or not known(out_a, out_b, lse_a, lse_b) or not lse_a.dtype == lse_b.dtype == torch.float32:
        return NotImplemented
    out_a, lse_a, out_b, lse_b = (tensor.contiguous() for tensor in (out_a, lse_a, out_b, lse_b))
    dim = out_a.shape[-1]
    wide = power_of_two(dim)
    some = max(1, 1024 // wide)
    out, lse = torch.empty_like(out_b), torch.empty_like(lse_a)
    merge_kernel[(triton.cdiv(lse_a.numel(), some),)](
        out_a, lse_a, out_b, lse_b, out, lse, lse_a.numel(),
        DIM=dim, WIDE=wide, N=some, UPCAST=INTERPRETED and torch.bfloat16 in (out_a.dtype, out_b.dtype), num_warps=4,
    )  # fmt: skip
    return out, lse
