"""`value_norm`: the norm of what a token's value adds to the residual stream, the mean over the heads that read it.

    n_t = mean over g of || v_t W_g ||_1      or, through the Gram matrix M_g = W_g W_g^T,  of sqrt(v_t M_g v_t^T)

Shapes: value `[B, H_kv, T, D]`, weight `[H_kv, G, D, E]` in float32: W itself with E the size of the residual stream
for the L1 norm, M, which has to be symmetric, with E = D for the L2 norm. Returns `[B, H_kv, T]` in float32. The image
of the values, `[T, E]` a head, is never held as a whole.
"""

import torch
from torch import Tensor

from hf_kvcache.kernels.library import LIBRARY, refuse_gradient, straight_to_cpu, with_triton

# projected values of at most so many elements are in memory at once
ELEMENTS_AT_ONCE = 1 << 21

LIBRARY.define("value_norm(Tensor value, Tensor weight, bool gram) -> Tensor")


@torch.library.impl(LIBRARY, "value_norm", "CompositeExplicitAutograd")
def value_norm_reference(value: Tensor, weight: Tensor, gram: bool) -> Tensor:
    heads, group, _, width = weight.shape
    step = max(1, ELEMENTS_AT_ONCE // max(1, value.shape[0] * heads * width))
    parts = []
    for chunk in value.float().split(step, dim=2):
        norms = torch.zeros(chunk.shape[:-1], device=value.device)
        for member in range(group):
            image = torch.matmul(chunk, weight[:, member])
            norms += image.mul_(chunk).sum(-1).clamp_min(0).sqrt() if gram else image.abs_().sum(-1)
        parts.append(norms / group)
    return torch.cat(parts, dim=2)


with_triton("value_norm", value_norm_reference)


@torch.library.impl(LIBRARY, "value_norm", "Meta")
def _(value, weight, gram):
    return value.new_empty(value.shape[:-1], dtype=torch.float32)


torch.library.register_autograd("hf_kvcache::value_norm", refuse_gradient("value_norm"), lib=LIBRARY)


def value_norm(value: Tensor, weight: Tensor, gram: bool) -> Tensor:
    """Calls the operator. See the module's first lines for formula and shapes."""
    if straight_to_cpu(value):
        return value_norm_reference(value, weight, gram)
    return torch.ops.hf_kvcache.value_norm(value, weight, gram)
