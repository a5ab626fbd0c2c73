"""`value_norm` in Triton: projection and norm in one kernel, so that the image of the values is never written.

For the L2 norm a program holds the Gram matrices of two members of a group or so and lets its stretch of the values
go by, beside the program of the next two. M is symmetric, so a quarter of it need not be multiplied: with values cut
in halves, v M v^T = v_0 . (v_0 M_00 + 2 v_1 M_10) + v_1 . (v_1 M_11). M is rounded to the dtype of the values: norms
are off by about 1e-3, and by more only for values in directions that W_O all but deletes. For the L1 norm a program
holds values, and the weights go by.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_kvcache.kernels.ragged_attention import programs_of
from hf_kvcache.kernels.triton_ops.launch import INTERPRETED, known, power_of_two

# columns of a product
COLUMNS = 128


@triton.jit
def gram_norm_kernel(
    V, WEIGHT, OUT, tokens, heads, group, per, v_run, v_head, v_row,
    DIM: tl.constexpr, HALF: tl.constexpr, MEMBERS: tl.constexpr, TOKENS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The part of MEMBERS members in the norms of `per` tokens: `OUT [runs, parts, tokens]`. Products in the dtype of
    the values, sums in float32."""
    run, part = tl.program_id(2).to(tl.int64), tl.program_id(0)
    head = run % heads
    V += run // heads * v_run + head * v_head
    kind = tl.float32 if UPCAST else V.dtype.element_ty
    low, column = tl.arange(0, HALF), tl.arange(0, MEMBERS * HALF)
    high = HALF + low
    member = part * MEMBERS + column // HALF
    matrix = WEIGHT + ((head * group + member) * DIM * DIM + column % HALF)[None, :]
    left = ((member < group) & (column % HALF < DIM))[None, :]
    right = ((member < group) & (HALF + column % HALF < DIM))[None, :]
    corner = tl.load(matrix + low[:, None] * DIM, mask=(low < DIM)[:, None] & left, other=0)
    below = tl.load(matrix + high[:, None] * DIM, mask=(high < DIM)[:, None] & left, other=0) * 2
    last = tl.load(matrix + high[:, None] * DIM + HALF, mask=(high < DIM)[:, None] & right, other=0)
    corner, below, last = corner.to(kind), below.to(kind), last.to(kind)
    OUT += (run * tl.num_programs(0) + part) * tokens
    first = tl.program_id(1) * per
    end = tl.minimum(first + per, tokens)
    for start in range(first, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = token < end
        place = V + token.to(tl.int64)[:, None] * v_row
        one = tl.load(place + low[None, :], mask=inside[:, None] & (low < DIM)[None, :], other=0)
        two = tl.load(place + high[None, :], mask=inside[:, None] & (high < DIM)[None, :], other=0)
        if UPCAST:
            one, two = one.to(tl.float32), two.to(tl.float32)
        image = tl.dot(one, corner, input_precision="tf32x3")
        image = tl.dot(two, below, image, input_precision="tf32x3")
        squares = tl.sum(tl.reshape(image, [TOKENS, MEMBERS, HALF]) * one.to(tl.float32)[:, None, :], 2)
        image = tl.dot(two, last, input_precision="tf32x3")
        squares += tl.sum(tl.reshape(image, [TOKENS, MEMBERS, HALF]) * two.to(tl.float32)[:, None, :], 2)
        norms = tl.sum(tl.sqrt(tl.maximum(squares, 0)), 1) / group
        tl.store(OUT + token, norms, mask=inside)


@triton.jit
def sum_norm_kernel(
    V, WEIGHT, OUT, tokens, heads, group, v_run, v_head, v_row,
    DIM: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one run. Products in the dtype of values and weights, sums in float32."""
    run = tl.program_id(1).to(tl.int64)
    head = run % heads
    V += run // heads * v_run + head * v_head
    token, dim = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, WIDE)
    value = tl.load(
        V + token.to(tl.int64)[:, None] * v_row + dim[None, :],
        mask=(token < tokens)[:, None] & (dim < DIM)[None, :],
        other=0,
    )
    if UPCAST:
        value = value.to(tl.float32)
    sums = tl.zeros([TOKENS], tl.float32)
    steps = tl.cdiv(WIDTH, COLUMNS)
    for step in range(0, group * steps):
        column = step % steps * COLUMNS + tl.arange(0, COLUMNS)
        inside = (dim < DIM)[:, None] & (column < WIDTH)[None, :]
        matrix = WEIGHT + (head * group + step // steps) * DIM * WIDTH
        weight = tl.load(matrix + dim[:, None] * WIDTH + column[None, :], mask=inside, other=0)
        sums += tl.sum(tl.abs(tl.dot(value, weight.to(value.dtype), input_precision="tf32x3")), 1)
    tl.store(OUT + run * tokens + token, sums / group, mask=token < tokens)


def value_norm(value: Tensor, weight: Tensor, gram: bool) -> Tensor:
    """The operator; `NotImplemented` for float64, wide heads (and for the L2 norm such as a GPU with little shared
    memory cannot take), and a weight elsewhere than the values."""
    batch, heads, tokens, dim = value.shape
    if not known(value, weight) or dim * value.element_size() > 512 or not value.numel():
        return NotImplemented
    if gram and power_of_two(dim) * value.element_size() > 256 and shared_memory(value.device) < 128 * 1024:
        return NotImplemented
    value, weight = value if value.stride(-1) == 1 else value.contiguous(), weight.contiguous()
    group, runs = weight.shape[1], batch * heads
    made: dict[str, Any] = {"UPCAST": INTERPRETED and value.dtype == torch.bfloat16}
    if gram:
        largest = None
        if value.dtype == torch.float16:
            # it holds no squares of small or large weights
            largest = weight.abs().amax((1, 2, 3)).clamp_min(torch.finfo(weight.dtype).tiny)
            weight = weight / largest[:, None, None, None]
        made |= gram_configuration(dim, group, value.element_size())
        parts = triton.cdiv(group, made["MEMBERS"])
        # three programs a multiprocessor
        stretches = max(2, programs_of(value.device) // (4 * runs * parts))
        per = triton.cdiv(triton.cdiv(tokens, made["TOKENS"]), stretches) * made["TOKENS"]
        out = value.new_empty(batch, heads, parts, tokens, dtype=torch.float32)
        gram_norm_kernel[(parts, triton.cdiv(tokens, per), runs)](
            value, weight, out, tokens, heads, group, per, *value.stride()[:3], **made
        )
        norms = out.sum(2) if parts > 1 else out.squeeze(2)
        return norms if largest is None else norms * largest.sqrt()[:, None]
    out = value.new_empty(batch, heads, tokens, dtype=torch.float32)
    made |= sum_configuration(dim, value.element_size())
    # once, and not once a program: each reads the weights of a head
    sum_norm_kernel[(triton.cdiv(tokens, made["TOKENS"]), runs)](
        value, weight.to(value.dtype), out, tokens, heads, group, *value.stride()[:3], WIDTH=weight.shape[3], **made
    )
    return out


@lru_cache(maxsize=64)
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may take: 99 KB on GPUs that are not for data centres; elsewhere than on a GPU, many."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def gram_configuration(dim: int, group: int, itemsize: int) -> dict[str, int]:
    """What the kernel of the L2 norm is compiled for. Three programs that load in turn hide more than two that load
    ahead, and take fewer registers."""
    half = power_of_two(dim, 32) // 2
    # float32 is split in three numbers for its products
    columns = COLUMNS if itemsize == 2 else COLUMNS // 2
    return {
        "DIM": dim, "HALF": half, "MEMBERS": min(max(1, columns // half), power_of_two(group)),
        # with 64 tokens in float32 and products over 64 dimensions, Triton 3.7 compiles a trap for sm_100
        "TOKENS": 32 if itemsize == 4 and half > 32 else 64,
        "num_warps": 4 if half * itemsize <= 128 else 8, "num_stages": 1,
    }  # fmt: skip


def sum_configuration(dim: int, itemsize: int) -> dict[str, int]:
    """What the kernel of the L1 norm is compiled for: as many tokens as fit, since all weights go by for each tile."""
    wide = power_of_two(dim, 16)
    tokens = min(256, (1 << 17) // (wide * itemsize**2))
    return {
        "DIM": dim, "WIDE": wide, "TOKENS": tokens, "COLUMNS": tokens // 2, "num_warps": 8 if tokens > 64 else 4,
        "num_stages": 2,
    }  # fmt: skip
