"""`decode_attention`: attention of a few queries over one dense block of keys and values, with its log-sum-exp.

    S = softcap(scale * Q K^T) + mask,   lse = log sum_t exp(S_t),   O = exp(S - lse) V

The block is only a part of the context, so the result is a *partial* one: `merge_states` joins the partial results of
all blocks by their log-sum-exp (the split-KV scheme of Flash-Decoding).

Shapes: query `[B, H_kv, M, D]` with the query group folded into the rows (M = group size x number of queries), key and
value `[B, H_kv, T, D]` with T >= 1, each in any dtype, mask None, boolean (True = attend) or additive, broadcastable to
`[B, H_kv, M, T]`. Returns out `[B, H_kv, M, D]` in the dtype of the query and lse `[B, H_kv, M]` in float32 (float64
for float64 inputs).

Folding the group into the rows reads each key once for the whole group; `repeat_kv` copies it once per query head, and
SDPA's `enable_gqa` reads it once per query head.
"""

import torch
from torch import Tensor

from hf_kvcache.kernels.library import LIBRARY, refuse_gradient, straight_to_cpu, with_triton

# numbers of keys that are brought to float32 at once: 64 MiB
NUMBERS = 1 << 24

LIBRARY.define(
    "decode_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, float softcap)"
    " -> (Tensor, Tensor)"
)


@torch.library.impl(LIBRARY, "decode_attention", "CompositeExplicitAutograd")
def decode_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """The formula above in plain PyTorch; scores and sums in float32 (float64 for float64 inputs)."""
    accumulate = torch.promote_types(query.dtype, torch.float32)
    scores = _products(query.to(accumulate), key) * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        # finfo.min, not -inf: a row whose keys are all masked then stays finite instead of becoming NaN
        lowest = torch.finfo(accumulate).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask.to(accumulate)
        scores = scores.clamp_min(lowest)
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    return torch.matmul(weights, value).to(query.dtype), torch.logsumexp(scores, dim=-1)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """Q K^T in the dtype of the query; of keys in another, `NUMBERS` at a time are brought to it, for they are many."""
    if key.dtype == query.dtype:
        return torch.matmul(query, key.transpose(-1, -2))
    tokens = key.shape[-2]
    some = max(1, NUMBERS * tokens // max(1, key.numel()))
    scores = query.new_empty(*query.shape[:-1], tokens)
    for start in range(0, tokens, some):
        part = key[..., start : start + some, :].to(query.dtype)
        scores[..., start : start + some] = torch.matmul(query, part.transpose(-1, -2))
    return scores


def decode_attention_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    out, lse = _fused(query, key, value, mask, scale, softcap)
    return out.contiguous(), lse.contiguous()


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """PyTorch's fused CPU kernel, which also returns the log-sum-exp; the plain formula where it does not apply."""
    same = query.dtype == key.dtype == value.dtype and key.shape[-1] == value.shape[-1]
    if softcap > 0 or query.dtype == torch.float64 or not same:
        return decode_attention_reference(query, key, value, mask, scale, softcap)
    if mask is not None:
        mask = _additive(mask, query.dtype).expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=mask, scale=scale
    )


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype).clamp_min(torch.finfo(dtype).min)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


with_triton("decode_attention", decode_attention_cpu, "CPU")
with_triton("decode_attention", decode_attention_reference, "CUDA")


@torch.library.impl(LIBRARY, "decode_attention", "Meta")
def _(query, key, value, mask, scale, softcap):
    return query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(
        query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32)
    )


torch.library.register_autograd("hf_kvcache::decode_attention", refuse_gradient("decode_attention"), lib=LIBRARY)


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Calls the operator. See the module's first lines for formula and shapes.

    Example:
        >>> q, k, v = torch.randn(1, 2, 3, 64), torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 64)
        >>> out, lse = decode_attention(q, k, v, scale=64**-0.5)
        >>> out.shape, lse.shape
        (torch.Size([1, 2, 3, 64]), torch.Size([1, 2, 3]))
    """
    if straight_to_cpu(query):
        return _fused(query, key, value, mask, scale, softcap)
    return torch.ops.hf_kvcache.decode_attention(query, key, value, mask, scale, softcap)
