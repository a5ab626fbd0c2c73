"""`merge_states`: joins two partial attention results by their log-sum-exp.

    w = sigmoid(lse_a - lse_b),   out = w out_a + (1 - w) out_b,   lse = logaddexp(lse_a, lse_b)

which is exactly softmax attention over the union of the two blocks (Flash-Decoding, FlashInfer). A part that saw no key
at all has lse = -inf and weight 0.

Shapes: out `[..., M, D]`, lse `[..., M]` in float32.
"""

import torch
from torch import Tensor

from hf_kvcache.kernels.library import LIBRARY, refuse_gradient, straight_to_cpu, with_triton

LIBRARY.define("merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)")


@torch.library.impl(LIBRARY, "merge_states", "CompositeExplicitAutograd")
def merge_states_reference(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    # two parts without a key give nan (-inf - -inf); any weight is right there, both outputs being zero
    weight = torch.sigmoid(lse_a - lse_b).nan_to_num(0.5).unsqueeze(-1)
    out = torch.lerp(out_b.to(weight.dtype), out_a.to(weight.dtype), weight).to(out_a.dtype)
    return out, torch.logaddexp(lse_a, lse_b)


with_triton("merge_states", merge_states_reference)


@torch.library.impl(LIBRARY, "merge_states", "Meta")
def _(out_a, lse_a, out_b, lse_b):
    return torch.empty_like(out_a), torch.empty_like(lse_a)


torch.library.register_autograd("hf_kvcache::merge_states", refuse_gradient("merge_states"), lib=LIBRARY)


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Calls the operator. See the module's first lines for formula and shapes."""
    if straight_to_cpu(out_a):
        return merge_states_reference(out_a, lse_a, out_b, lse_b)
    return torch.ops.hf_kvcache.merge_states(out_a, lse_a, out_b, lse_b)


def merge_partials(out: Tensor, lse: Tensor, owned: Tensor) -> tuple[Tensor, Tensor]:
    """Joins any number of partial results for each of R owners.

    Args:
        out: partial results `[P, M, D]`.
        lse: `[P, M]`, -inf for a part that saw no key.
        owned: `[R, P]`, 0 where a part is the owner's and -inf where it is not.

    Returns:
        out `[R, M, D]` and lse `[R, M]`; an owner without keys has out 0 and lse -inf.
    """
    parts = lse.t().unsqueeze(1) + owned
    # an owner without keys: softmax over nothing but -inf is nan
    weight = torch.softmax(parts, dim=-1).nan_to_num_(0.0)
    merged = torch.bmm(weight, out.transpose(0, 1).to(weight.dtype))
    # what the heaviest part says of the sum: logsumexp takes several times as long on so few numbers
    heaviest = weight.amax(-1).clamp_min_(torch.finfo(weight.dtype).tiny)
    return merged.transpose(0, 1).to(out.dtype), (parts.amax(-1) - heaviest.log_()).t()
