"""`select`: the mask of the highest scores of every row, as many as its count says.

Shapes: score `[..., T]` in float32 without NaN, counts `[...]` of int64 with 0 <= counts <= T. Returns boolean
`[..., T]`. For the heads of a layer the rows are heads; for a budget that they share, flatten them to one row. Among
equal scores the first ones are taken: what is kept of a prompt must not depend on how wide its batch is padded.
"""

import torch
from torch import Tensor

from hf_kvcache.kernels.library import LIBRARY, straight_to_cpu, with_triton

LIBRARY.define("select(Tensor score, Tensor counts) -> Tensor")


@torch.library.impl(LIBRARY, "select", "CompositeExplicitAutograd")
def select_reference(score: Tensor, counts: Tensor) -> Tensor:
    most = int(counts.max()) if counts.numel() else 0
    if not most:
        return torch.zeros_like(score, dtype=torch.bool)
    counts = counts.unsqueeze(-1)
    least = score.topk(most, dim=-1).values.gather(-1, (counts - 1).clamp_min(0))
    above, level = score > least, score == least
    return above | level & (level.cumsum(-1) <= counts - above.sum(-1, keepdim=True))


with_triton("select", select_reference)


@torch.library.impl(LIBRARY, "select", "Meta")
def _(score, counts):
    return torch.empty_like(score, dtype=torch.bool)


def select(score: Tensor, counts: Tensor) -> Tensor:
    """Calls the operator. See the module's first lines for the shapes."""
    if straight_to_cpu(score):
        return select_reference(score, counts)
    return torch.ops.hf_kvcache.select(score, counts)
