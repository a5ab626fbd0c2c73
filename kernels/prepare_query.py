"""`prepare_query`: a query rotated as codes of keys are, and what the means removed from those keys add to its scores.

    turned = q R,   shift = q . mean_o,   where o owns the entries that q reads

Shapes: query `[R, H, M, D]`, rotation `[D, D]` in float32, mean `[O, D]` or None, owners int64 `[R, H]` or None: run
r * H + h reads its own. An owner without a mean has no entries either, and gets any. Returns turned `[R, H, M, D]` and
shift `[R, H, M]` in float32; shift is empty where there are no means.
"""

import torch
from torch import Tensor

from hf_kvcache.kernels.library import LIBRARY, refuse_gradient, straight_to_cpu, with_triton

LIBRARY.define("prepare_query(Tensor query, Tensor rotation, Tensor? mean, Tensor? owners) -> (Tensor, Tensor)")


@torch.library.impl(LIBRARY, "prepare_query", "CompositeExplicitAutograd")
def prepare_query_reference(
    query: Tensor, rotation: Tensor, mean: Tensor | None, owners: Tensor | None
) -> tuple[Tensor, Tensor]:
    exact = query.to(torch.float32)
    turned = exact @ rotation
    if mean is None:
        return turned, exact.new_empty(0)
    runs, means = query.shape[:2], mean.to(torch.float32)
    if owners is not None or len(means) != runs.numel():
        whose = torch.arange(runs.numel(), device=query.device) if owners is None else owners.flatten()
        means = means.index_select(0, whose.clamp(max=len(means) - 1))
    return turned, (exact @ means.view(*runs, -1, 1)).squeeze(3)


with_triton("prepare_query", prepare_query_reference)


@torch.library.impl(LIBRARY, "prepare_query", "Meta")
def _(query, rotation, mean, owners):
    shape = (0,) if mean is None else query.shape[:-1]
    return query.new_empty(query.shape, dtype=torch.float32), query.new_empty(shape, dtype=torch.float32)


torch.library.register_autograd("hf_kvcache::prepare_query", refuse_gradient("prepare_query"), lib=LIBRARY)


def prepare_query(
    query: Tensor, rotation: Tensor, mean: Tensor | None, owners: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Calls the operator; the shift is None where there are no means. The module's first lines have the shapes."""
    if straight_to_cpu(query):
        turned, shift = prepare_query_reference(query, rotation, mean, owners)
    else:
        turned, shift = torch.ops.hf_kvcache.prepare_query(query, rotation, mean, owners)
    return turned, None if mean is None else shift
