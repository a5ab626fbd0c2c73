"""`prepare_query` in Triton: conversion, rotation and the products with the means in one launch.

Of a decoding step these are a few thousand numbers, so that what counts is how many launches there are.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_kvcache.kernels.triton_ops.launch import known, power_of_two

# query rows and columns of the rotation of one program
ROWS, COLUMNS = 16, 32


@triton.jit
def prepare_kernel(
    Q, TURN, MEAN, OWNERS, OUT, SHIFT, heads, queries, last, q_run, q_head, q_row,
    DIM: tl.constexpr, WIDE: tl.constexpr, MEANS: tl.constexpr, OWNED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one run and COLUMNS of what they are rotated to; programs of the first columns have the shift."""
    run = tl.program_id(0).to(tl.int64)
    row, dim = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    source = Q + run // heads * q_run + run % heads * q_head + row[:, None].to(tl.int64) * q_row + dim[None, :]
    query = tl.load(source, mask=(row < queries)[:, None] & (dim < DIM)[None, :], other=0).to(tl.float32)
    turn = tl.load(
        TURN + dim[:, None] * DIM + column[None, :], mask=(dim < DIM)[:, None] & (column < DIM)[None, :], other=0
    )
    target = run * queries + row
    tl.store(
        OUT + target[:, None] * DIM + column[None, :],
        tl.dot(query, turn, input_precision="tf32x3"),
        mask=(row < queries)[:, None] & (column < DIM)[None, :],
    )
    if MEANS:
        owner = tl.minimum(tl.load(OWNERS + run) if OWNED else run, last)
        mean = tl.load(MEAN + owner * DIM + dim, mask=dim < DIM, other=0).to(tl.float32)
        shift = tl.sum(query * mean[None, :], 1)
        tl.store(SHIFT + target, shift, mask=(row < queries) & (tl.program_id(2) == 0))


def prepare_query(query: Tensor, rotation: Tensor, mean: Tensor | None, owners: Tensor | None) -> tuple[Tensor, Tensor]:
    """The operator; `NotImplemented` for float64 and wide heads."""
    rows, heads, queries, dim = query.shape
    given = (query, rotation) if mean is None else (query, rotation, mean)
    if not known(*given) or rotation.dtype != torch.float32 or dim > 256 or not query.numel():
        return NotImplemented
    query, rotation = query if query.stride(-1) == 1 else query.contiguous(), rotation.contiguous()
    turned = query.new_empty(query.shape, dtype=torch.float32)
    shift = query.new_empty((0,) if mean is None else query.shape[:-1], dtype=torch.float32)
    means = rotation if mean is None else mean.contiguous()
    whose = rotation if owners is None else owners.contiguous()
    prepare_kernel[(rows * heads, triton.cdiv(queries, ROWS), triton.cdiv(dim, COLUMNS))](
        query, rotation, means, whose, turned, shift, heads, queries, len(means) - 1, *query.stride()[:3],
        MEANS=mean is not None, OWNED=owners is not None, **configuration(dim),
    )  # fmt: skip
    return turned, shift


def configuration(dim: int) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {"DIM": dim, "WIDE": power_of_two(dim, 16), "ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": 4}
