"""`window_scores` in Triton: one pass over the keys for the log-sum-exp of every query, one for the scores."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_kvcache.kernels.triton_ops.launch import INTERPRETED, LOG2E, known, power_of_two, tanh_capped

# tokens and query rows of a tile, and stretches that a run's tokens are cut into for the first pass
TOKENS, ROWS, STRETCHES = 64, 64, 16


@triton.jit
def _scores(
    Q, K, run, token, row, tokens, queries, k_row, scale, cap, window,
    DIM: tl.constexpr, WIDE: tl.constexpr, CAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores, in powers of two, of some tokens `[tokens, rows]`; the lowest number where a query does not see one."""
    dim = tl.arange(0, WIDE)
    keys = tl.load(
        K + token[:, None] * k_row + dim[None, :], mask=(token < tokens)[:, None] & (dim < DIM)[None, :], other=0
    )
    query = tl.load(
        Q + (run * queries + row)[None, :] * DIM + dim[:, None],
        mask=(row < queries)[None, :] & (dim < DIM)[:, None],
        other=0,
    )
    if UPCAST:
        keys, query = keys.to(tl.float32), query.to(tl.float32)
    scores = tl.dot(keys, query, input_precision="tf32x3") * scale
    if CAP:
        scores = tanh_capped(scores, cap)
    # query row g * window + w stands at column tokens - window + w
    last = tokens - window + row % window
    return tl.where(token[:, None] <= last[None, :], scores, float("-inf"))


@triton.jit
def lse_kernel(
    Q, K, LSE, tokens, heads, queries, per, k_run, k_head, k_row, scale, cap, window,
    DIM: tl.constexpr, WIDE: tl.constexpr, CAP: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp, to the base two, of ROWS queries over `per` tokens: `LSE [runs, stretches, queries]`."""
    run, stretch = tl.program_id(0).to(tl.int64), tl.program_id(1)
    K += run // heads * k_run + run % heads * k_head
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    highest = tl.full([ROWS], -3e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first = stretch * per
    for start in range(first, tl.minimum(first + per, tokens), TOKENS):
        token = (start + tl.arange(0, TOKENS)).to(tl.int64)
        scores = _scores(Q, K, run, token, row, tokens, queries, k_row, scale, cap, window, DIM, WIDE, CAP, UPCAST)
        scores = tl.where((token < first + per)[:, None], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 0))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(scores - higher[None, :]), 0)
        highest = higher
    lse = tl.where(total > 0, highest + tl.log2(tl.maximum(total, 1e-30)), float("-inf"))
    tl.store(LSE + (run * tl.num_programs(1) + stretch) * queries + row, lse, mask=row < queries)


@triton.jit
def window_scores_kernel(
    Q, K, LSE, OUT, tokens, heads, queries, k_run, k_head, k_row, scale, cap, window,
    DIM: tl.constexpr, WIDE: tl.constexpr, CAP: tl.constexpr, UPCAST: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The mean weight of TOKENS tokens in the window of one query head: `OUT [runs, G, tokens]`."""
    run, member = tl.program_id(0).to(tl.int64), tl.program_id(2)
    K += run // heads * k_run + run % heads * k_head
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    sums = tl.zeros([TOKENS], tl.float32)
    for start in range(0, window, ROWS):
        place = start + tl.arange(0, ROWS)
        row = member * window + tl.where(place < window, place, 0)
        lse = tl.load(LSE + run * queries + row)
        scores = _scores(Q, K, run, token, row, tokens, queries, k_row, scale, cap, window, DIM, WIDE, CAP, UPCAST)
        weights = tl.where((place < window)[None, :], tl.exp2(scores - lse[None, :]), 0)
        sums += tl.sum(weights, 1)
    target = (run * tl.num_programs(2) + member) * tokens + token
    tl.store(OUT + target, sums / window, mask=token < tokens)


def window_scores(query: Tensor, key: Tensor, scale: float, softcap: float) -> Tensor:
    """The operator; `NotImplemented` for float64, several dtypes and wide heads."""
    batch, heads, group, window, dim = query.shape
    if not known(query, key) or query.dtype != key.dtype or dim > 256 or not query.numel():
        return NotImplemented
    query, key = query.contiguous(), key if key.stride(-1) == 1 else key.contiguous()
    tokens, runs, queries = key.shape[2], batch * heads, group * window
    per = triton.cdiv(triton.cdiv(tokens, TOKENS), STRETCHES) * TOKENS
    stretches = triton.cdiv(tokens, per)
    numbers = (tokens, heads, queries)
    rest = (*key.stride()[:3], scale * LOG2E, softcap * LOG2E, window)
    upcast = INTERPRETED and query.dtype == torch.bfloat16
    made = configuration(dim) | {"CAP": softcap > 0, "UPCAST": upcast}
    part = query.new_empty(runs, stretches, queries, dtype=torch.float32)
    lse_kernel[(runs, stretches, triton.cdiv(queries, ROWS))](query, key, part, *numbers, per, *rest, **made)
    # to the base two: logsumexp is to the base e
    lse = torch.logsumexp(part / LOG2E, dim=1) * LOG2E if stretches > 1 else part
    out = query.new_empty(batch, heads, group, tokens, dtype=torch.float32)
    window_scores_kernel[(runs, triton.cdiv(tokens, TOKENS), group)](query, key, lse, out, *numbers, *rest, **made)
    return out


def configuration(dim: int) -> dict[str, int]:
    """What the kernels are compiled for."""
    return {"DIM": dim, "WIDE": power_of_two(dim, 16), "TOKENS": TOKENS, "ROWS": ROWS, "num_warps": 4, "num_stages": 2}
