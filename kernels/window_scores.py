"""`window_scores`: how much attention the last queries of a prompt pay to each of its tokens.

    S = softcap(scale * Q K^T), causal;   scores_t = mean over the window of softmax(S)_t

Shapes: query `[B, H_kv, G, W, D]`, the last W queries of the G heads of every group; key `[B, H_kv, T, D]`, W <= T.
Returns `[B, H_kv, G, T]` in float32. In PyTorch the whole `[B, H_kv, G, W, T]` exists for a moment; the Triton version
reads the keys twice, once for the log-sum-exp of every query, and writes nothing of that size.
"""

import torch
from torch import Tensor

from hf_kvcache.kernels.library import LIBRARY, refuse_gradient, straight_to_cpu, with_triton

LIBRARY.define("window_scores(Tensor query, Tensor key, float scale, float softcap) -> Tensor")


@torch.library.impl(LIBRARY, "window_scores", "CompositeExplicitAutograd")
def window_scores_reference(query: Tensor, key: Tensor, scale: float, softcap: float) -> Tensor:
    length = query.shape[3]
    # in place: where the tensor of all pairs is large, making another takes longer than any of these lines
    scores = causal_logits(query, key, key.shape[2] - length, scale, softcap)
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    share = 1 / (scores.sum(-1) * length)
    return torch.matmul(share.unsqueeze(-2), scores).squeeze(-2)


def causal_logits(query: Tensor, key: Tensor, first: int, scale: float, softcap: float) -> Tensor:
    """S `[B, H_kv, G, W, T]` in float32, the lowest number where a query sees nothing.

    Args:
        query, key: `[B, H_kv, G, W, D]` and `[B, H_kv, T, D]`.
        first: the column at which the first query stands.
        scale, softcap: factor of the scores, and their tanh cap, 0 for none.
    """
    length, tokens = query.shape[3], key.shape[2]
    # the factor goes to the queries and the mask to the last columns alone: there are many more scores than those
    scaled = query.float().flatten(2, 3) * (scale / (softcap or 1.0))
    scores = torch.matmul(scaled, key.float().transpose(-1, -2)).unflatten(2, (-1, length))
    if softcap > 0:
        scores.tanh_().mul_(softcap)
    column = torch.arange(first, tokens, device=key.device)
    future = column > column[:length, None]
    scores[..., first:].masked_fill_(future, torch.finfo(scores.dtype).min)
    return scores


with_triton("window_scores", window_scores_reference)


@torch.library.impl(LIBRARY, "window_scores", "Meta")
def _(query, key, scale, softcap):
    return query.new_empty(*query.shape[:3], key.shape[2], dtype=torch.float32)


torch.library.register_autograd("hf_kvcache::window_scores", refuse_gradient("window_scores"), lib=LIBRARY)


def window_scores(query: Tensor, key: Tensor, *, scale: float, softcap: float = 0.0) -> Tensor:
    """Calls the operator. See the module's first lines for formula and shapes."""
    if straight_to_cpu(query):
        return window_scores_reference(query, key, scale, softcap)
    return torch.ops.hf_kvcache.window_scores(query, key, scale, softcap)
