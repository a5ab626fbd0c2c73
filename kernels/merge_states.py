"""`merge_states`: joins two partial attention results by their log-sum-exp.

    w = sigmoid(lse_a - lse_b),   out = w out_a + (1 - w) out_b,   lse = logaddexp(lse_a, lse_b)

which is exactly softmax attention over the union of the two blocks (Flash-Decoding, FlashInfer). A part that saw no key
at all has lse = -inf and weight 0.

Shapes: out `[..., M, D]`, lse `[..., M]` in float32. The result has the dtype of the second part; the first may be in
float32 beside it.
"""

import torch
from torch import Tensor

from hf_kvcache.kernels.library import LIBRARY, refuse_gradient, straight_to_cpu, with_triton

LIBRARY.define("merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)")


@torch.library.impl(LIBRARY, "merge_states", "CompositeExplicitAutograd")
def merge_states_reference(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    # two parts without a key give nan (-inf - -inf); any weight is right there, both outputs being zero
    weight = torch.sigmoid(lse_a - lse_b).nan_to_num(0.5).unsqueeze(-1)
    out = torch.lerp(out_b.to(weight.dtype), out_a.to(weight.dtype), weight).to(out_b.dtype)
    return out.contiguous(), torch.logaddexp(lse_a, lse_b).contiguous()


with_triton("merge_states", merge_states_reference)


@torch.library.impl(LIBRARY, "merge_states", "Meta")
def _(out_a, lse_a, out_b, lse_b):
    return out_b.new_empty(out_b.shape), lse_a.new_empty(lse_a.shape)


torch.library.register_autograd("hf_kvcache::merge_states", refuse_gradient("merge_states"), lib=LIBRARY)


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Calls the operator. See the module's first lines for formula and shapes."""
    if straight_to_cpu(out_a):
        return merge_states_reference(out_a, lse_a, out_b, lse_b)
    return torch.ops.hf_kvcache.merge_states(out_a, lse_a, out_b, lse_b)


def merge_partials(out: Tensor, lse: Tensor, owner: Tensor, owners: int) -> tuple[Tensor, Tensor]:
    """Joins any number of partial results for each of R owners, in time and memory linear in their number.

    Args:
        out: partial results `[P, M, D]`.
        lse: `[P, M]`, -inf for a part that saw no key.
        owner: int64 `[P]`, whose each part is, below R.
        owners: R.

    Returns:
        out `[R, M, D]` and lse `[R, M]`; an owner without keys has out 0 and lse -inf.
    """
    top = lse.new_full((owners, lse.shape[1]), -torch.inf)
    top.scatter_reduce_(0, owner[:, None].expand_as(lse), lse, "amax")
    # an owner without keys: exp(-inf - lowest) = 0 instead of exp(-inf + inf) = nan
    top.clamp_min_(torch.finfo(lse.dtype).min)
    weight = (lse - top.index_select(0, owner)).exp_()
    total = torch.zeros_like(top).index_add_(0, owner, weight)
    merged = weight.new_zeros(owners, *out.shape[1:]).index_add_(0, owner, out.to(weight.dtype) * weight.unsqueeze(-1))
    merged /= total.clamp_min(torch.finfo(total.dtype).tiny).unsqueeze(-1)
    return merged.to(out.dtype), total.log_() + top
