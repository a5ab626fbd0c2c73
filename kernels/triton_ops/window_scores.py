"""`window_scores` in Triton: one pass over the keys for the log-sum-exp of every query, one for the scores.

A program of either pass holds all query rows of a KV head and lets its stretch of the keys go by, so that a pass reads
the keys once. The first has the query rows as rows of its products and the second as their columns: what is summed up
lies in one thread then, but for a few numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_kvcache.kernels.ragged_attention import programs_of
from hf_kvcache.kernels.triton_ops.launch import INTERPRETED, LOG2E, known, power_of_two, tanh_capped

# tokens of a tile, query rows of a program at most and bytes that these may take, and partial sums joined at a time
TOKENS, ROWS, BYTES, JOINED = 64, 256, 1 << 16, 32


@triton.jit
def _queries(
    Q, run, group, window, pieces,
    DIM: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The query rows of this program `[ROWS, WIDE]`, WINDOW of each member of the group, and which of them exist."""
    row, dim = tl.arange(0, ROWS), tl.arange(0, WIDE)
    member = tl.program_id(0) // pieces * (ROWS // WINDOW) + row // WINDOW
    place = tl.program_id(0) % pieces * WINDOW + row % WINDOW
    inside = (member < group) & (place < window)
    query = tl.load(
        Q + ((run * group + member) * window + place)[:, None] * DIM + dim[None, :],
        mask=inside[:, None] & (dim < DIM)[None, :],
        other=0,
    )
    if UPCAST:
        query = query.to(tl.float32)
    return query, inside


@triton.jit
def _keys(
    K, start, end, k_row, DIM: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """The keys `[TOKENS, WIDE]` from `start` on, 0 from `end` on."""
    token, dim = start + tl.arange(0, TOKENS), tl.arange(0, WIDE)
    keys = tl.load(
        K + token.to(tl.int64)[:, None] * k_row + dim[None, :],
        mask=(token < end)[:, None] & (dim < DIM)[None, :],
        other=0,
    )
    if UPCAST:
        keys = keys.to(tl.float32)
    return keys


@triton.jit
def lse_kernel(
    Q, K, LSE, tokens, heads, group, window, pieces, per, k_run, k_head, k_row, scale, cap,
    DIM: tl.constexpr, WIDE: tl.constexpr, CAP: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp, to the base two, of ROWS queries over `per` tokens: `LSE [runs, stretches, blocks, ROWS]`."""
    run = tl.program_id(2).to(tl.int64)
    K += run // heads * k_run + run % heads * k_head
    query, _ = _queries(Q, run, group, window, pieces, DIM, WIDE, UPCAST, ROWS, WINDOW)
    place = tl.arange(0, ROWS) % WINDOW
    # the last token that the first row sees; each further row sees one more
    seen = tokens - window + tl.program_id(0) % pieces * WINDOW
    # scores stay without their scale until the exponential, which takes it in the same instruction
    factor = 1.0 if CAP else scale
    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first = tl.program_id(1) * per
    end = tl.minimum(first + per, tokens)
    for start in range(first, end, TOKENS):
        keys = _keys(K, start, end, k_row, DIM, WIDE, UPCAST, TOKENS)
        scores = tl.dot(query, tl.trans(keys), input_precision="tf32x3")
        if CAP:
            scores = tanh_capped(scores * scale, cap)
        if start + TOKENS > seen + 1:
            token = start - seen + tl.arange(0, TOKENS)
            scores = tl.where(token[None, :] <= place[:, None], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        total *= tl.exp2((highest - higher) * factor)
        total += tl.sum(tl.exp2(scores * factor - (higher * factor)[:, None]), 1)
        highest = higher
    lse = tl.where(total > 0, highest * factor + tl.log2(tl.maximum(total, 1e-30)), float("-inf"))
    target = ((run * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)) * ROWS
    tl.store(LSE + target + tl.arange(0, ROWS), lse)


@triton.jit
def window_scores_kernel(
    Q, K, LSE, OUT, tokens, heads, group, window, pieces, per, k_run, k_head, k_row, scale, cap,
    DIM: tl.constexpr, WIDE: tl.constexpr, CAP: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """The mean weight of `per` tokens in the window of each query head: `OUT [runs, G, pieces, tokens]`."""
    run = tl.program_id(2).to(tl.int64)
    K += run // heads * k_run + run % heads * k_head
    query, inside = _queries(Q, run, group, window, pieces, DIM, WIDE, UPCAST, ROWS, WINDOW)
    blocks, stretches = tl.num_programs(0), tl.num_programs(1)
    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, stretches, JOINED):
        stretch, row = start + tl.arange(0, JOINED), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        part = tl.load(
            LSE + (run * stretches + stretch)[:, None] * blocks * ROWS + row[None, :],
            mask=(stretch < stretches)[:, None],
            other=float("-inf"),
        )
        higher = tl.maximum(highest, tl.max(part, 0))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(part - higher[None, :]), 0)
        highest = higher
    # with the length of the window in it the weights add up to their mean, and a row that is none has the weight 0
    lse = tl.where(inside, highest + tl.log2(total * window), float("inf"))
    seen = tokens - window + tl.program_id(0) % pieces * WINDOW
    place = tl.arange(0, ROWS) % WINDOW
    factor = 1.0 if CAP else scale
    member = tl.program_id(0) // pieces * (ROWS // WINDOW) + tl.arange(0, ROWS // WINDOW)
    OUT += run * group * pieces * tokens
    target = (member * pieces + tl.program_id(0) % pieces) * tokens
    first = tl.program_id(1) * per
    end = tl.minimum(first + per, tokens)
    for start in range(first, end, TOKENS):
        keys = _keys(K, start, end, k_row, DIM, WIDE, UPCAST, TOKENS)
        scores = tl.dot(keys, tl.trans(query), input_precision="tf32x3")
        if CAP:
            scores = tanh_capped(scores * scale, cap)
        # the exponentials stand in both branches: masked scores that leave the first one would cost 12 registers
        if start + TOKENS > seen + 1:
            token = start - seen + tl.arange(0, TOKENS)
            weights = tl.where(token[:, None] <= place[None, :], tl.exp2(scores * factor - lse[None, :]), 0)
        else:
            weights = tl.exp2(scores * factor - lse[None, :])
        sums = tl.sum(tl.reshape(weights, [TOKENS, ROWS // WINDOW, WINDOW]), 2)
        token = start + tl.arange(0, TOKENS)
        tl.store(OUT + target[None, :] + token[:, None], sums, mask=(member < group)[None, :] & (token < end)[:, None])


def window_scores(query: Tensor, key: Tensor, scale: float, softcap: float) -> Tensor:
    """The operator; `NotImplemented` for float64, several dtypes, wide heads and a scale that is not positive."""
    batch, heads, group, window, dim = query.shape
    if not known(query, key) or query.dtype != key.dtype or not query.numel() or scale <= 0:
        return NotImplemented
    if dim * query.element_size() > 512:
        return NotImplemented
    query, key = query.contiguous(), key if key.stride(-1) == 1 else key.contiguous()
    tokens, runs = key.shape[2], batch * heads
    made = configuration(dim, group, window, query.element_size())
    pieces = triton.cdiv(window, made["WINDOW"])
    blocks = triton.cdiv(group * made["WINDOW"], made["ROWS"]) * pieces
    # two programs a multiprocessor
    stretches = max(4, programs_of(query.device) // (6 * runs * blocks))
    per = triton.cdiv(triton.cdiv(tokens, made["TOKENS"]), stretches) * made["TOKENS"]
    grid = (blocks, triton.cdiv(tokens, per), runs)
    made |= {"CAP": softcap > 0, "UPCAST": INTERPRETED and query.dtype == torch.bfloat16}
    numbers = (tokens, heads, group, window, pieces, per, *key.stride()[:3], scale * LOG2E, softcap * LOG2E)
    lse = query.new_empty(runs, grid[1], blocks, made["ROWS"], dtype=torch.float32)
    out = query.new_empty(batch, heads, group, pieces, tokens, dtype=torch.float32)
    lse_kernel[grid](query, key, lse, *numbers, **made)
    window_scores_kernel[grid](query, key, lse, out, *numbers, JOINED=JOINED, **made)
    return out.sum(3) if pieces > 1 else out.squeeze(3)


def configuration(dim: int, group: int, window: int, itemsize: int) -> dict[str, int]:
    """What the kernels are compiled for. A window of more rows than a program has is cut into pieces."""
    wide = power_of_two(dim, 16)
    # float32 is split in three numbers for its products: half as much of everything
    tokens, bytes_held = (TOKENS, BYTES) if itemsize == 2 else (TOKENS // 2, BYTES // 2)
    most = min(ROWS, bytes_held // (wide * itemsize))
    columns = min(power_of_two(window, 16), most)
    rows = min(columns * power_of_two(group), most)
    return {
        "DIM": dim, "WIDE": wide, "TOKENS": tokens, "ROWS": rows, "WINDOW": columns,
        "num_warps": 8 if rows > 128 else 4, "num_stages": 2,
    }  # fmt: skip
