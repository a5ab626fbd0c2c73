"""`gated_retention` in Triton: chunk by chunk with the state in registers, or token by token where there are few.

A program has the state of one head, some of its columns. Where there are fewer programs than a GPU runs at once, the
tokens are cut into parts: the first pass finds what each part adds to the state, `carry_kernel` what each begins with,
and the second pass computes the outputs. Gates are summed in float32, and states kept in it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_kvcache.kernels.ragged_attention import programs_of
from hf_kvcache.kernels.triton_ops.launch import INTERPRETED, known, power_of_two

# up to so many tokens one after the other
FEW = 4
# parts that the tokens of a head are cut into, at most, and chunks of a part, at least
PARTS, CHUNKS = 8, 2


@triton.jit
def chunk_kernel(
    Q, K, V, DECAY, START, OUT, LAST, TOTAL, heads, length, per, parts,
    q_run, q_head, q_row, k_run, k_head, k_row, v_run, v_head, v_row, decay_run, decay_head, decay_row,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr,
    OUTPUT: tl.constexpr, STATE: tl.constexpr, ROUND: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`per` tokens of one head and COLUMNS numbers of their values.

    `START` and `LAST` `[runs * parts, DIM, VALUE_DIM]`, the state before and after, and `TOTAL [runs * parts]`, the sum
    of the gates, in float32. Without OUTPUT nothing else is written. With ROUND the query meets the
    state in its own dtype.
    """
    part = tl.program_id(0)
    run = (part // parts).to(tl.int64)
    batch, head = run // heads, run % heads
    Q += batch * q_run + head * q_head
    K += batch * k_run + head * k_head
    V += batch * v_run + head * v_head
    DECAY += batch * decay_run + head * decay_head
    dims, order = tl.arange(0, WIDE), tl.arange(0, N)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real, held = (dims < DIM)[None, :], (column < VALUE_DIM)[None, :]
    place = part.to(tl.int64) * (DIM * VALUE_DIM) + dims[:, None] * VALUE_DIM + column[None, :]
    kept = (dims < DIM)[:, None] & held
    state = tl.load(START + place, mask=kept, other=0) if STATE else tl.zeros([WIDE, COLUMNS], tl.float32)
    total = tl.full([], 0, tl.float32)
    first = part % parts * per
    for start in range(first, tl.minimum(first + per, length), N):
        token = (start + order).to(tl.int64)
        inside = token < length
        key = tl.load(K + token[:, None] * k_row + dims[None, :], mask=inside[:, None] & real, other=0)
        value = tl.load(V + token[:, None] * v_row + column[None, :], mask=inside[:, None] & held, other=0)
        gate = tl.load(DECAY + token * decay_row, mask=inside, other=0).to(tl.float32)
        if UPCAST:
            key, value = key.to(tl.float32), value.to(tl.float32)
        decay = tl.cumsum(gate, 0)
        whole = tl.sum(gate, 0)
        if OUTPUT:
            query = tl.load(Q + token[:, None] * q_row + dims[None, :], mask=inside[:, None] & real, other=0)
            if UPCAST:
                query = query.to(tl.float32)
            since = tl.where(order[:, None] >= order[None, :], decay[:, None] - decay[None, :], float("-inf"))
            weights = tl.dot(query, tl.trans(key), input_precision="tf32x3") * tl.exp(since)
            if ROUND:
                out = tl.dot(query, state.to(query.dtype), input_precision="tf32x3") * tl.exp(decay)[:, None]
            else:
                out = tl.dot(query.to(tl.float32), state, input_precision="tf32x3") * tl.exp(decay)[:, None]
            out = tl.dot(weights.to(value.dtype), value, out, input_precision="tf32x3")
            target = OUT + (run * length + token[:, None]) * VALUE_DIM + column[None, :]
            tl.store(target, out, mask=inside[:, None] & held)
        faded = (key.to(tl.float32) * tl.exp(whole - decay)[:, None]).to(value.dtype)
        state = tl.dot(tl.trans(faded), value, state * tl.exp(whole), input_precision="tf32x3")
        total += whole
    tl.store(LAST + place, state, mask=kept)
    if tl.program_id(1) == 0:
        tl.store(TOTAL + part, total)


@triton.jit
def carry_kernel(FOUND, TOTAL, START, LAST, parts, size, STATE: tl.constexpr, N: tl.constexpr):
    """N numbers of the states of one head: what every part begins with `[runs * parts, size]`, from what each adds.

    The first part begins with `LAST [runs, size]` where there is a STATE; the last state takes its place.
    """
    run = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * N + tl.arange(0, N)
    inside = number < size
    state = tl.load(LAST + run * size + number, mask=inside, other=0) if STATE else tl.zeros([N], tl.float32)
    for part in range(0, parts):
        place = (run * parts + part) * size + number
        tl.store(START + place, state, mask=inside)
        state = state * tl.exp(tl.load(TOTAL + run * parts + part)) + tl.load(FOUND + place, mask=inside, other=0)
    tl.store(LAST + run * size + number, state, mask=inside)


@triton.jit
def step_kernel(
    Q, K, V, DECAY, START, OUT, LAST, heads, length,
    q_run, q_head, q_row, k_run, k_head, k_row, v_run, v_head, v_row, decay_run, decay_head, decay_row,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """All tokens of one head, one by one, and COLUMNS numbers of their values."""
    run = tl.program_id(0).to(tl.int64)
    batch, head = run // heads, run % heads
    dims, column = tl.arange(0, WIDE), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real, held = dims < DIM, column < VALUE_DIM
    place = run * (DIM * VALUE_DIM) + dims[:, None] * VALUE_DIM + column[None, :]
    kept = real[:, None] & held[None, :]
    state = tl.load(START + place, mask=kept, other=0) if STATE else tl.zeros([WIDE, COLUMNS], tl.float32)
    for token in range(0, length):
        query = tl.load(Q + batch * q_run + head * q_head + token * q_row + dims, mask=real, other=0).to(tl.float32)
        key = tl.load(K + batch * k_run + head * k_head + token * k_row + dims, mask=real, other=0).to(tl.float32)
        value = tl.load(V + batch * v_run + head * v_head + token * v_row + column, mask=held, other=0).to(tl.float32)
        gate = tl.load(DECAY + batch * decay_run + head * decay_head + token * decay_row).to(tl.float32)
        state = state * tl.exp(gate) + key[:, None] * value[None, :]
        out = tl.sum(query[:, None] * state, 0)
        tl.store(OUT + (run * length + token) * VALUE_DIM + column, out, mask=held)
    tl.store(LAST + place, state, mask=kept)


def gated_retention(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """The operator, whose result does not depend on `chunk`; `NotImplemented` for float64, several dtypes and wide
    heads."""
    batch, heads, length, dim = query.shape
    value_dim = value.shape[-1]
    some = known(query, key, value, log_decay) and query.dtype == key.dtype == value.dtype
    if not some or max(dim, value_dim) > 256 or not query.numel() or not value.numel():
        return NotImplemented
    if state is not None and (state.dtype != torch.float32 or state.device != query.device):
        return NotImplemented
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    runs, size = batch * heads, dim * value_dim
    out = query.new_empty(*query.shape[:-1], value_dim)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *log_decay.stride())
    start = query if state is None else state.contiguous()
    if length <= FEW:
        last = query.new_empty(batch, heads, dim, value_dim, dtype=torch.float32)
        made = step_configuration(dim, value_dim)
        step_kernel[(runs, triton.cdiv(value_dim, made["COLUMNS"]))](
            query, key, value, log_decay, start, out, last, heads, length, *strides, STATE=state is not None, **made
        )
        return out, last
    made = configuration(dim, value_dim, query.dtype)
    columns = triton.cdiv(value_dim, made["COLUMNS"])
    parts = parts_for(runs * columns, triton.cdiv(length, made["N"]), query.device)
    per = triton.cdiv(triton.cdiv(length, made["N"]), parts) * made["N"]
    parts = triton.cdiv(length, per)
    made["UPCAST"] = INTERPRETED and query.dtype == torch.bfloat16
    grid = (runs * parts, columns)
    found = query.new_empty(runs * parts, dim, value_dim, dtype=torch.float32)
    total = query.new_empty(runs * parts, dtype=torch.float32)
    numbers = (heads, length, per, parts, *strides)
    if parts == 1:
        chunk_kernel[grid](
            query, key, value, log_decay, start, out, found, total, *numbers, OUTPUT=True, STATE=state is not None,
            **made,
        )  # fmt: skip
        return out, found.view(batch, heads, dim, value_dim)
    chunk_kernel[grid](
        query, key, value, log_decay, start, out, found, total, *numbers, OUTPUT=False, STATE=False, **made
    )
    begun, last = torch.empty_like(found), torch.empty_like(found[:runs])
    if state is not None:
        last.copy_(state.flatten(0, 1))
    carry_kernel[(runs, triton.cdiv(size, 1024))](
        found, total, begun, last, parts, size, STATE=state is not None, N=1024, num_warps=4
    )
    chunk_kernel[grid](
        query, key, value, log_decay, begun, out, found, total, *numbers, OUTPUT=True, STATE=True, **made
    )
    return out, last.view(batch, heads, dim, value_dim)


def parts_for(programs: int, chunks: int, device: torch.device) -> int:
    """Into how many parts the tokens of a head are cut, by the programs that there are without that."""
    return max(1, min(PARTS, programs_of(device) // programs, chunks // CHUNKS))


def configuration(dim: int, value_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the chunk kernel is compiled for: the columns of a state that four warps hold in registers."""
    small = dtype == torch.bfloat16 and max(dim, value_dim) <= 128
    return {
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "WIDE": power_of_two(dim, 16),
        "COLUMNS": min(power_of_two(value_dim, 16), 64 if small else 32),
        "N": 32,
        # float16 does not hold every state
        "ROUND": dtype == torch.bfloat16,
        "num_warps": 4 if max(dim, value_dim) <= 128 else 8,
        "num_stages": 2,
    }


def step_configuration(dim: int, value_dim: int) -> dict[str, Any]:
    """What the step kernel is compiled for: few columns, so that there are many programs."""
    return {
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "WIDE": power_of_two(dim, 16),
        "COLUMNS": min(power_of_two(value_dim, 8), 16),
        "num_warps": 1 if dim <= 64 else 4,
    }
