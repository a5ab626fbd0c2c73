"""`decode_attention` in Triton: split-KV attention over dense keys and values.

A program has a stretch of one run's entries and the query rows that read it. Tokens are the rows of the tensor-core
products and queries their columns, so that a group of up to 8 query heads wastes nothing. The results of a run's
stretches are joined by `merge_states.join_stretches`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_kvcache.kernels.triton_ops.launch import INTERPRETED, LOG2E, columns_for, cut, known, power_of_two, tanh_capped
from hf_kvcache.kernels.triton_ops.merge_states import join_stretches

LN2 = tl.constexpr(0.6931471805599453)
# what a mask makes of a score: lower than any, and finite, so that a row that sees nothing averages, as the reference
MASKED = tl.constexpr(-3e38)


@triton.jit
def dense_kernel(
    Q, K, V, MASK, WORK, OUT, LSE, tokens, heads, splits, per, queries, scale, cap,
    q_run, q_head, q_row, k_run, k_head, k_row, v_run, v_head, v_row, mask_run, mask_head, mask_row, mask_token,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr, MASKING: tl.constexpr,
    CAP: tl.constexpr, RAGGED: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One stretch of entries and COLUMNS query rows.

    `Q [B, heads, queries, DIM]`, `K` and `V` `[B, heads, tokens, *]`, `MASK` (uint8) `[B, heads, queries, tokens]`,
    each with its strides; `OUT [stretches, queries, VALUE_DIM]`, `LSE [stretches, queries]` in float32. With RAGGED,
    `K` and `V` are `[N, *]` and `WORK [stretches, 3]` holds (run, first entry, end). UPCAST: the interpreter cannot
    compute with bfloat16.
    """
    stretch = tl.program_id(0)
    if RAGGED:
        run = tl.load(WORK + stretch * 3)
        first = tl.load(WORK + stretch * 3 + 1).to(tl.int64)
        end = tl.load(WORK + stretch * 3 + 2).to(tl.int64)
    else:
        run = stretch // splits
        first = (stretch % splits).to(tl.int64) * per
        end = tl.minimum(first + per, tokens)
    row, head = (run // heads).to(tl.int64), (run % heads).to(tl.int64)
    if not RAGGED:
        K += row * k_run + head * k_head
        V += row * v_run + head * v_head
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < queries
    dims, value_dims, rows = tl.arange(0, WIDE), tl.arange(0, VALUE_WIDE), tl.arange(0, N)
    query = tl.load(
        Q + row * q_run + head * q_head + column[None, :].to(tl.int64) * q_row + dims[:, None],
        mask=real[None, :] & (dims < DIM)[:, None],
        other=0,
    )
    if UPCAST:
        query = query.to(tl.float32)
    highest = tl.full([COLUMNS], MASKED, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    sums = tl.zeros([COLUMNS, VALUE_WIDE], tl.float32)
    for start in range(0, (end - first).to(tl.int32), N):
        place = first + start + rows
        inside = place < end
        keys = tl.load(
            K + place[:, None] * k_row + dims[None, :], mask=inside[:, None] & (dims < DIM)[None, :], other=0
        )
        if UPCAST:
            keys = keys.to(tl.float32)
        scores = tl.dot(keys, query, input_precision="ieee") * scale
        if CAP:
            scores = tanh_capped(scores, cap)
        if MASKING:
            # of 64 bits: a long turn has many query rows, and each is a row of the mask
            seen_from = row * mask_run + head * mask_head + column[None, :].to(tl.int64) * mask_row
            seen = tl.load(
                MASK + seen_from + place[:, None] * mask_token,
                mask=inside[:, None] & real[None, :],
                other=0,
            )
            scores = tl.where(seen != 0, scores, MASKED)
        scores = tl.where(inside[:, None], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 0))
        fade = tl.exp2(highest - higher)
        weights = tl.exp2(scores - higher[None, :])
        total = total * fade + tl.sum(weights, 0)
        highest = higher
        values = tl.load(
            V + place[:, None] * v_row + value_dims[None, :],
            mask=inside[:, None] & (value_dims < VALUE_DIM)[None, :],
            other=0,
        )
        if UPCAST:
            values = values.to(tl.float32)
        across = tl.trans(weights.to(values.dtype))
        sums = tl.dot(across, values, sums * fade[:, None], input_precision="ieee")
    target = OUT + (stretch.to(tl.int64) * queries + column[:, None]) * VALUE_DIM + value_dims[None, :]
    result = sums / tl.maximum(total, 1e-30)[:, None]
    tl.store(target, result, mask=real[:, None] & (value_dims < VALUE_DIM)[None, :])
    lse = tl.where(total > 0, (highest + tl.log2(tl.maximum(total, 1e-30))) * LN2, float("-inf"))
    tl.store(LSE + stretch.to(tl.int64) * queries + column, lse, mask=real)


def launch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, work: Tensor | None, parts: Tensor | None,
    scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both forms: query `[B, H, M, D]` over key and value `[B, H, T, *]`, or over `[N, *]` by a list of work."""
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    batch, heads, queries, dim = query.shape
    value_dim, runs = value.shape[-1], batch * heads
    columns = columns_for(queries)
    if work is None:
        tokens = key.shape[2]
        splits, per = cut(runs, tokens, queries, query.device)
        stretches = runs * splits
        strides = (*key.stride()[:3], *value.stride()[:3])
    else:
        tokens, splits, per, stretches = 0, 1, 0, len(work)
        strides = (0, 0, key.stride(0), 0, 0, value.stride(0))
    final = work is None and splits == 1
    shape = (stretches, queries, value_dim)
    out = query.new_empty(shape, dtype=query.dtype if final else torch.float32)
    lse = query.new_empty(shape[:2], dtype=torch.float32)
    if mask is None:
        masking, mask_strides = query, (0, 0, 0, 0)
    else:
        masking = mask.view(torch.uint8).expand(batch, heads, queries, tokens)
        mask_strides = masking.stride()
    log2_cap = softcap * LOG2E
    if stretches:
        dense_kernel[(stretches, triton.cdiv(queries, columns))](
            query, key, value, masking, query if work is None else work, out, lse, tokens, heads, splits, per, queries,
            scale * LOG2E, log2_cap, *query.stride()[:3], *strides, *mask_strides,
            MASKING=mask is not None, CAP=softcap > 0, RAGGED=work is not None,
            UPCAST=INTERPRETED and query.dtype == torch.bfloat16,
            **configuration(dim, value_dim, columns, query.dtype.itemsize),
        )  # fmt: skip
    if not final:
        out, lse = join_stretches(out, lse, parts, splits, runs, query.dtype)
    return out.view(batch, heads, queries, value_dim), lse.view(batch, heads, queries)


def configuration(dim: int, value_dim: int, columns: int, itemsize: int) -> dict[str, Any]:
    """What the kernel is compiled for: keys and values of two stages in 32 KiB leave room for several programs."""
    wide, value_wide = power_of_two(dim, 16), power_of_two(value_dim, 16)
    return {
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "WIDE": wide,
        "VALUE_WIDE": value_wide,
        "COLUMNS": columns,
        "N": min(64, max(16, 8192 // (max(wide, value_wide) * itemsize))),
        "num_warps": 4 if columns > 16 else 1 if max(wide, value_wide) <= 128 else 2,
        "num_stages": 2,
    }


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """The operator; `NotImplemented` for an additive mask, several dtypes, float64 and wide heads."""
    if not takes(query, key, value) or (mask is not None and mask.dtype != torch.bool):
        return NotImplemented
    return launch(query, key, value, mask, None, None, scale, softcap)


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there is a kernel for these dtypes and head dimensions."""
    same = query.dtype == key.dtype == value.dtype
    return known(query, key, value) and same and max(query.shape[-1], value.shape[-1]) <= 256 and query.numel() > 0
