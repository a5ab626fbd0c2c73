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
    length, tokens = query.shape[3], key.shape[2]
    scores = torch.matmul(query.float().flatten(2, 3), key.float().transpose(-1, -2)).unflatten(2, (-1, length)) * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    column = torch.arange(tokens, device=key.device)
    future = column > torch.arange(tokens - length, tokens, device=key.device)[:, None]
    return scores.masked_fill_(future, torch.finfo(scores.dtype).min).softmax(-1).mean(dim=3)


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
