"""`gated_retention` in Triton: chunk by chunk with the state in registers, or token by token where there are few.

A program has the state of one head, some of its columns. Where there are fewer programs than a GPU runs at once, the
tokens are cut into parts: a first pass finds what each part but the last adds to the state, and in the second, which
computes the outputs, a program begins by adding up the parts before its own. Gates are summed up once, before both, in
float32, and states kept in it.

The state is held as `[columns, dims]`, its transpose: so it is the left operand of every product that it meets, and the
tensor cores take that one from registers. Only the weights inside a chunk go through shared memory.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_kvcache.kernels.triton_ops.launch import INTERPRETED, known, power_of_two

# up to so many tokens one after the other
FEW = 4
# parts that the tokens of a head are cut into, at most, and chunks of a part, at least
PARTS, CHUNKS = 16, 2
# chunks that one program sums up the gates of
MANY = 16


@triton.jit(do_not_specialize=["length", "chunks"])
def gates_kernel(
    DECAY, GATES, heads, length, chunks, decay_run, decay_head, decay_row, N: tl.constexpr, MANY: tl.constexpr
):
    """What the gates of MANY chunks of one head come to, `GATES [runs, chunks, 3, N]`, in float32.

    For every token: the sum of the gates since its chunk began, its own included, in powers of two; how much it still
    sees of the state that the chunk began with; and how much of it the state holds when the chunk ends.
    """
    blocks = tl.cdiv(chunks, MANY)
    run = (tl.program_id(0) // blocks).to(tl.int64)
    chunk = tl.program_id(0) % blocks * MANY + tl.arange(0, MANY)[:, None]
    order = tl.arange(0, N)[None, :]
    token = chunk.to(tl.int64) * N + order
    DECAY += run // heads * decay_run + run % heads * decay_head
    gate = tl.load(DECAY + token * decay_row, mask=token < length, other=0).to(tl.float32)
    # the exponential of -104 is 0; with a lower gate the sums, whose differences are needed, would lose all others
    gate = tl.maximum(gate, -104.0, propagate_nan=tl.PropagateNan.ALL) * 1.4426950408889634
    sums = tl.cumsum(gate, 1)
    later = tl.cumsum(gate, 1, reverse=True) - gate
    place = GATES + (run * chunks + chunk) * (3 * N) + order
    tl.store(place, sums, mask=chunk < chunks)
    tl.store(place + N, tl.exp2(sums), mask=chunk < chunks)
    tl.store(place + 2 * N, tl.exp2(later), mask=chunk < chunks)


@triton.jit(do_not_specialize=["length", "chunks", "per", "parts"])
def chunk_kernel(
    Q, K, V, GATES, START, FOUND, FADED, OUT, LAST, heads, length, chunks, per, parts,
    q_run, q_head, q_row, k_run, k_head, k_row, v_run, v_head, v_row,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr,
    OUTPUT: tl.constexpr, STATE: tl.constexpr, ROUND: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`per` chunks of one head and COLUMNS numbers of their values.

    Without OUTPUT it writes what a part adds to the state, `FOUND [runs, parts - 1, DIM, VALUE_DIM]`, and how much of
    the state before it is left, `FADED [runs, parts - 1]`, in float32. With it the outputs, and the state after all
    tokens: `START` (where there is a STATE) and `LAST` are `[runs, DIM, VALUE_DIM]`. With ROUND the state meets the
    query in the query's dtype, else in float32 with PRECISION.
    """
    columns: tl.constexpr = (VALUE_DIM + COLUMNS - 1) // COLUMNS
    size: tl.constexpr = DIM * VALUE_DIM
    # programs that read the same queries and keys are side by side
    item = tl.program_id(0) // columns
    walked = parts if OUTPUT else parts - 1
    part = item % walked
    run = (item // walked).to(tl.int64)
    batch, head = run // heads, run % heads
    Q += batch * q_run + head * q_head
    K += batch * k_run + head * k_head
    V += batch * v_run + head * v_head
    OUT += run * length * VALUE_DIM
    GATES += run * chunks * (3 * N)
    FOUND += run * (parts - 1) * size
    FADED += run * (parts - 1)
    dims, order = tl.arange(0, WIDE), tl.arange(0, N)
    column = tl.program_id(0) % columns * COLUMNS + tl.arange(0, COLUMNS)
    real, held = (dims < DIM)[None, :], (column < VALUE_DIM)[None, :]
    place = dims[None, :] * VALUE_DIM + column[:, None]
    kept = real & (column < VALUE_DIM)[:, None]
    state = tl.zeros([COLUMNS, WIDE], tl.float32)
    if OUTPUT:
        if STATE:
            state = tl.load(START + run * size + place, mask=kept, other=0)
        for earlier in range(0, part):
            state *= tl.load(FADED + earlier)
            state += tl.load(FOUND + earlier * size + place, mask=kept, other=0)
    left = tl.full([], 1, tl.float32)
    first = part * per
    past = tl.minimum(first + per, chunks)
    for step in range(first, past):
        # the first pass goes backwards: no sum waits for another, and the second finds what was read last in the cache
        chunk = step if OUTPUT else first + past - 1 - step
        begin = tl.cast(chunk, tl.int64) * N
        inside = (order < length - chunk * N)[:, None]
        gates = GATES + chunk * (3 * N)
        key = tl.load(K + begin * k_row + (order[:, None] * k_row + dims[None, :]), mask=inside & real, other=0)
        value = tl.load(V + begin * v_row + (order[:, None] * v_row + column[None, :]), mask=inside & held, other=0)
        share = tl.load(gates + 2 * N + order)
        whole = tl.load(gates + 2 * N - 1)
        if UPCAST:
            key, value = key.to(tl.float32), value.to(tl.float32)
        value = tl.trans(value)
        if OUTPUT:
            query = tl.load(Q + begin * q_row + (order[:, None] * q_row + dims[None, :]), mask=inside & real, other=0)
            sums = tl.load(gates + order)
            seen = tl.load(gates + N + order)
            if UPCAST:
                query = query.to(tl.float32)
            query = tl.trans(query)
            # keys are the rows; masked before the exponential, and after the product, whose registers it would take
            weights = tl.dot(key, query, input_precision=PRECISION)
            since = tl.where(order[:, None] <= order[None, :], sums[None, :] - sums[:, None], float("-inf"))
            weights = (weights * tl.exp2(since)).to(value.dtype)
            if ROUND:
                out = tl.dot(state.to(query.dtype), query, input_precision=PRECISION)
            else:
                out = tl.dot(state, query.to(tl.float32), input_precision=PRECISION)
            out = tl.dot(value, weights, out * seen[None, :], input_precision=PRECISION)
            target = OUT + begin * VALUE_DIM + (order[:, None] * VALUE_DIM + column[None, :])
            tl.store(target, tl.trans(out).to(OUT.dtype.element_ty), mask=inside & held)
            state *= whole
        else:
            share *= left
            left *= whole
        faded = (value.to(tl.float32) * share[None, :]).to(value.dtype)
        state = tl.dot(faded, key, state, input_precision=PRECISION)
    if not OUTPUT:
        tl.store(FOUND + part * size + place, state, mask=kept)
        if tl.program_id(0) % columns == 0:
            tl.store(FADED + part, left)
    elif part == parts - 1:
        tl.store(LAST + run * size + place, state, mask=kept)


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
    runs = batch * heads
    out = query.new_empty(*query.shape[:-1], value_dim)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    start = query if state is None else state.contiguous()
    last = query.new_empty(batch, heads, dim, value_dim, dtype=torch.float32)
    if length <= FEW:
        made = step_configuration(dim, value_dim)
        step_kernel[(runs, triton.cdiv(value_dim, made["COLUMNS"]))](
            query, key, value, log_decay, start, out, last, heads, length, *strides, *log_decay.stride(),
            STATE=state is not None, **made,
        )  # fmt: skip
        return out, last
    made = configuration(dim, value_dim, query.dtype, wide_tensor_cores(query.device))
    columns, chunks = triton.cdiv(value_dim, made["COLUMNS"]), triton.cdiv(length, made["N"])
    parts = parts_for(runs * columns, chunks, made["num_warps"], query.device)
    per = triton.cdiv(chunks, parts)
    parts = triton.cdiv(chunks, per)
    gates = query.new_empty(runs, chunks, 3, made["N"], dtype=torch.float32)
    gates_kernel[(runs * triton.cdiv(chunks, MANY),)](
        log_decay, gates, heads, length, chunks, *log_decay.stride(), N=made["N"], MANY=MANY, num_warps=4
    )
    found = query.new_empty(runs, parts - 1, dim, value_dim, dtype=torch.float32)
    faded = query.new_empty(runs, parts - 1, dtype=torch.float32)
    made["UPCAST"] = INTERPRETED and query.dtype == torch.bfloat16
    given = (query, key, value, gates, start, found, faded, out, last, heads, length, chunks, per, parts, *strides)
    if parts > 1:
        chunk_kernel[(runs * (parts - 1) * columns,)](*given, OUTPUT=False, STATE=False, **made)
    chunk_kernel[(runs * parts * columns,)](*given, OUTPUT=True, STATE=state is not None, **made)
    return out, last


def wide_tensor_cores(device: torch.device) -> bool:
    """Whether four warps multiply as one, out of 227 KB of shared memory: data centre GPUs since Hopper."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def parts_for(programs: int, chunks: int, warps: int, device: torch.device) -> int:
    """Into how many parts the tokens of a head are cut, by the programs that there are without that.

    The registers of a multiprocessor are eight warps' with a state. Elsewhere than on a GPU few, so that tests see
    several parts.
    """
    most = 6
    if device.type == "cuda":
        most = torch.cuda.get_device_properties(device).multi_processor_count * 8 // warps
    return max(1, min(PARTS, most // programs, chunks // CHUNKS))


def configuration(dim: int, value_dim: int, dtype: torch.dtype, wide: bool) -> dict[str, Any]:
    """What the chunk kernel is compiled for: the columns of a state that its warps hold in registers."""
    half, large, high = dtype != torch.float32, max(dim, value_dim) > 128, power_of_two(dim, 16)
    made = {"COLUMNS": 32, "N": 32, "num_warps": 4, "num_stages": 2}
    if half and large:
        made["num_warps"] = 8
    elif half and wide:
        columns = min(power_of_two(value_dim, 16), 128)
        # a chunk of 64 tokens is the least that `wgmma` takes, and more than four warps hold beside a high state
        tokens = 64 if dtype == torch.bfloat16 and high <= columns else 32
        made = {"COLUMNS": columns, "N": tokens, "num_warps": 8 if columns == 128 else 4, "num_stages": 3}
    elif half:
        made["COLUMNS"] = 64
    elif large:
        made |= {"COLUMNS": 64, "N": 16, "num_warps": 8, "num_stages": 1}
    elif high > 64:
        made["N"] = 16
    return made | {
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "WIDE": high,
        "COLUMNS": min(power_of_two(value_dim, 16), made["COLUMNS"]),
        # float16 does not hold every state; TF32 does, with as many digits
        "ROUND": dtype == torch.bfloat16,
        # the three parts of a high state in float32 do not fit in the registers
        "PRECISION": "tf32" if half else "ieee" if large else "tf32x3",
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
