"""`gated_retention`: linear attention with one scalar decay a head and token (gRet of YOCO, arXiv 2405.05254).

    S_n = gamma_n S_(n-1) + k_n^T v_n,   O_n = q_n S_n,   gamma_n = exp(log_decay_n) in (0, 1]

There is no softmax and no denominator, so that a state S of constant size holds all the past. Three forms give the
same: recurrent (above, token by token), parallel (`O = (Q K^T * D) V` with `D_nm = exp(G_n - G_m)` for n >= m, else 0,
and G = cumsum(log_decay)) and chunk by chunk, which is parallel inside a chunk and recurrent between chunks. The
operator is the chunk form, in time linear in T and with memory for one chunk.

Shapes: query and key `[B, H, T, D_k]`, value `[B, H, T, D_v]`, log_decay `[B, H, T]` (<= 0), state None for zeros or
`[B, H, D_k, D_v]`; any T >= 1, not only multiples of the chunk. Returns out `[B, H, T, D_v]` in the dtype of the query
and the state after the last token `[B, H, D_k, D_v]` in float32 (float64 for float64 inputs), which starts the next
call. Sums are in that type too, also in mixed precision. The scale of the keys is the caller's. A token with log_decay
0 and key 0 leaves the state as it is: that is how padding is passed over. One with a very negative log_decay, or -inf,
forgets all before it.

It has a gradient for every input, and the gradient is three more calls of the operator (`_backward`), so that an
implementation for another device needs to bring the forward only.
"""

import torch
from torch import Tensor

from hf_kvcache.kernels.library import LIBRARY, straight_to_cpu, with_triton

CHUNK = 64
# the exponential of it is 0 in the type of the sums; with a lower log decay these would lose all others
LOWEST = {torch.float32: -104.0, torch.float64: -746.0}

LIBRARY.define(
    "gated_retention(Tensor query, Tensor key, Tensor value, Tensor log_decay, Tensor? state, int chunk)"
    " -> (Tensor, Tensor)"
)


@torch.library.impl(LIBRARY, "gated_retention", "CompositeExplicitAutograd")
def gated_retention_chunked(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """The chunk form in plain PyTorch, on any device; `chunk` >= T is the parallel form, 1 the recurrent one."""
    accumulate = torch.promote_types(query.dtype, torch.float32)
    batch, heads, length, _ = query.shape
    if state is None:
        state = key.new_zeros(batch, heads, key.shape[-1], value.shape[-1], dtype=accumulate)
    state = state.to(accumulate)
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    # mixed precision would round the operands of every sum
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, length, chunk):
            part = slice(start, start + chunk)
            q, k, v = (tensor[:, :, part].to(accumulate) for tensor in (query, key, value))
            decay = log_decay[:, :, part].to(accumulate).clamp_min(LOWEST[accumulate]).cumsum(-1)
            last = decay[..., -1:]
            weights = q @ k.transpose(-1, -2) * decay_matrix(decay)
            out[:, :, part] = weights @ v + (q * decay.exp()[..., None]) @ state
            state = state * last.exp()[..., None] + (k * (last - decay).exp()[..., None]).transpose(-1, -2) @ v
    return out, state


def decay_matrix(decay: Tensor) -> Tensor:
    """`exp(G_n - G_m)` for n >= m and 0 above the diagonal, `[..., T, T]`, of cumulated log decays `[..., T]`."""
    length = decay.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=decay.device).triu(1)
    # masked before the exponential, which would overflow above the diagonal
    return (decay[..., :, None] - decay[..., None, :]).masked_fill_(future, -torch.inf).exp_()


with_triton("gated_retention", gated_retention_chunked)


@torch.library.impl(LIBRARY, "gated_retention", "Meta")
def _(query, key, value, log_decay, state, chunk):
    accumulate = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_empty(*query.shape[:-1], value.shape[-1]),
        query.new_empty(*query.shape[:2], key.shape[-1], value.shape[-1], dtype=accumulate),
    )


def _setup_context(ctx, inputs, output):
    query, key, value, log_decay, state, ctx.chunk = inputs
    ctx.save_for_backward(query, key, value, log_decay, state, output[1])


def _backward(ctx, grad_out, grad_last):
    """The gradient of a retention is three retentions.

    dq is one with the roles of keys and values exchanged, dk and dv are two that run from the last token to the first.
    A log decay scales all that its token and later ones read from before, so its gradient is a sum over later tokens.
    That is a sum of small differences, so all is computed in the type of sums, and rounded when it is returned.
    """
    *given, log_decay, state, last = ctx.saved_tensors
    accumulate = last.dtype
    query, key, value, grad_out, grad_last = (tensor.to(accumulate) for tensor in (*given, grad_out, grad_last))
    flipped = None if state is None else state.transpose(-1, -2).contiguous()
    grad_query, _ = gated_retention(grad_out, value, key, log_decay, flipped, chunk=ctx.chunk)
    # seen from the end, a token is decayed by the gate of the token behind it, and the last one not at all
    shifted = torch.nn.functional.pad(log_decay[..., 1:], (0, 1)).flip(-1)
    q, k, v, g = (tensor.flip(2) for tensor in (query, key, value, grad_out))
    grad_key, _ = gated_retention(v, g, q, shifted, grad_last.transpose(-1, -2).contiguous(), chunk=ctx.chunk)
    grad_value, grad_first = gated_retention(k, q, g, shifted, grad_last, chunk=ctx.chunk)
    grad_key, grad_value = grad_key.flip(2), grad_value.flip(2)
    read = (query * grad_query).sum(-1) - (key * grad_key).sum(-1)
    later = read.flip(-1).cumsum(-1).flip(-1)
    grad_decay = later + (grad_last * last).sum((-1, -2)).unsqueeze(-1)
    # what a sum of differences leaves of nothing
    grad_decay = grad_decay.masked_fill(log_decay < LOWEST[accumulate], 0)
    grad_state = grad_first * log_decay[..., :1].to(accumulate).exp()[..., None]
    return (
        *(grad.to(tensor.dtype) for grad, tensor in zip((grad_query, grad_key, grad_value), given, strict=True)),
        grad_decay.to(log_decay.dtype),
        None if state is None else grad_state.to(state.dtype),
        None,
    )


torch.library.register_autograd("hf_kvcache::gated_retention", _backward, setup_context=_setup_context, lib=LIBRARY)


def gated_retention(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor | None = None, *, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Calls the operator. See the module's first lines for formula and shapes.

    Args:
        chunk: tokens that are computed in parallel; the result does not depend on it.

    Example:
        >>> q, k, v = torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 32)
        >>> log_decay = torch.nn.functional.logsigmoid(torch.randn(1, 2, 100)) / 16
        >>> out, state = gated_retention(q, k, v, log_decay)
        >>> out.shape, state.shape
        (torch.Size([1, 2, 100, 32]), torch.Size([1, 2, 16, 32]))
    """
    if straight_to_cpu(query):
        return gated_retention_chunked(query, key, value, log_decay, state, chunk)
    return torch.ops.hf_kvcache.gated_retention(query, key, value, log_decay, state, chunk)
