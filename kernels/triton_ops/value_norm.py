"""`value_norm` in Triton: projection and norm in one kernel, so that the image of the values is never written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_kvcache.kernels.triton_ops.launch import INTERPRETED, known, power_of_two

TOKENS, WIDTH = 64, 64


@triton.jit
def value_norm_kernel(
    V, WEIGHT, OUT, tokens, heads, group, width, v_run, v_head, v_row,
    DIM: tl.constexpr, WIDE: tl.constexpr, GRAM: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one run. Products in the dtype of the values, sums in float32."""
    run = tl.program_id(0).to(tl.int64)
    head = run % heads
    V += run // heads * v_run + head * v_head
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    dim = tl.arange(0, WIDE)
    value = tl.load(
        V + token[:, None] * v_row + dim[None, :], mask=(token < tokens)[:, None] & (dim < DIM)[None, :], other=0
    )
    if UPCAST:
        value = value.to(tl.float32)
    norms = tl.zeros([TOKENS], tl.float32)
    for member in range(0, group):
        sums = tl.zeros([TOKENS], tl.float32)
        matrix = WEIGHT + (head * group + member) * DIM * width
        for start in range(0, width, WIDTH):
            column = start + tl.arange(0, WIDTH)
            inside = (dim < DIM)[:, None] & (column < width)[None, :]
            weight = tl.load(matrix + dim[:, None] * width + column[None, :], mask=inside, other=0)
            image = tl.dot(value, weight.to(value.dtype), input_precision="tf32x3")
            if GRAM:
                own = tl.load(
                    V + token[:, None] * v_row + column[None, :],
                    mask=(token < tokens)[:, None] & (column < DIM)[None, :],
                    other=0,
                )
                if UPCAST:
                    own = own.to(tl.float32)
                sums += tl.sum(image * own.to(tl.float32), 1)
            else:
                sums += tl.sum(tl.abs(image), 1)
        if GRAM:
            sums = tl.sqrt(tl.maximum(sums, 0))
        norms += sums
    tl.store(OUT + run * tokens + token, norms / group, mask=token < tokens)


def value_norm(value: Tensor, weight: Tensor, gram: bool) -> Tensor:
    """The operator; `NotImplemented` for float64, wide heads, and a weight elsewhere than the values."""
    batch, heads, tokens, dim = value.shape
    if not known(value, weight) or dim > 256 or not value.numel():
        return NotImplemented
    value, weight = value if value.stride(-1) == 1 else value.contiguous(), weight.contiguous()
    group, width = weight.shape[1], weight.shape[3]
    out = value.new_empty(batch, heads, tokens, dtype=torch.float32)
    value_norm_kernel[(batch * heads, triton.cdiv(tokens, TOKENS))](
        value, weight, out, tokens, heads, group, width, *value.stride()[:3], DIM=dim, GRAM=gram,
        UPCAST=INTERPRETED and value.dtype == torch.bfloat16, **configuration(dim),
    )  # fmt: skip
    return out


def configuration(dim: int) -> dict[str, int]:
    """What the kernel is compiled for."""
    return {"WIDE": power_of_two(dim, 16), "TOKENS": TOKENS, "WIDTH": WIDTH, "num_warps": 4, "num_stages": 2}
