"""`Replay`: a layer's part in reading its own context again, to find out which tokens are looked at (KVzip).

While a replay is on, new tokens attend to the whole context and to each other and are forgotten afterwards. For every
token of the part of the context that is being repeated, the layer remembers the highest attention that any query of any
head gave it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_kvcache.attention import AttentionCall
from hf_kvcache.eviction import Observation
from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.kernels.merge_states import merge_states

# so many new tokens attend at once: enough for fast products, few enough for their scores to stay in a core's cache
QUERIES_AT_ONCE = 128


class Replay:
    """One replay of a part of the context, or several in turn.

    Args:
        observation: the context as it is observed, without padding.

    Attributes:
        score: the highest attention weight that each token of the context got, `[B, H_kv, T]`.
    """

    def __init__(self, observation: Observation) -> None:
        self.key, self.value = key, _ = observation.key, observation.value
        self.score = torch.zeros(key.shape[:-1], dtype=torch.float32, device=key.device)
        self._part = slice(0, 0)
        self._new: tuple[Tensor, Tensor] | None = None

    def begin(self, start: int, end: int) -> None:
        """Announces which columns of the context the next forward repeats."""
        self._part = slice(start, end)

    def take(self, key: Tensor, value: Tensor) -> None:
        """The keys and values of the tokens that repeat, `[B, H_kv, L, D]`."""
        self._new = key.detach(), value.detach()

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention over the context and the repetition so far; returns `[B, L, H_q, D]`."""
        assert self._new is not None
        call = call.to(self.key.device)
        new_key, new_value = self._new
        outs = []
        for start in range(0, call.length, QUERIES_AT_ONCE):
            part = call.part(start, min(start + QUERIES_AT_ONCE, call.length))
            end = start + part.length
            query = part.folded_query(self.key.shape[1])
            group = query.shape[2] // part.length
            out, lse = decode_attention(query, self.key, self.value, scale=call.scale, softcap=call.softcap)
            causal = torch.ones(part.length, end, dtype=torch.bool, device=query.device).tril(start)
            own, own_lse = decode_attention(
                query,
                new_key[:, :, :end],
                new_value[:, :, :end],
                causal.repeat(group, 1)[None, None],
                scale=call.scale,
                softcap=call.softcap,
            )
            out, lse = merge_states(out, lse, own, own_lse)
            self._remember(query, lse, call)
            outs.append(part.unfolded(out))
        return torch.cat(outs, dim=1)

    def _remember(self, query: Tensor, lse: Tensor, call: AttentionCall) -> None:
        # rounded to 16 bits, a product would change the highest weights more than they differ
        accumulate = torch.promote_types(query.dtype, torch.float32)
        key = self.key[:, :, self._part].to(accumulate)
        # the small factor is scaled, not the large product
        logits = torch.matmul(query.to(accumulate) * call.scale, key.transpose(-1, -2))
        if call.softcap:
            logits = torch.tanh(logits / call.softcap) * call.softcap
        highest = logits.sub_(lse.unsqueeze(-1)).amax(2).exp_()
        part = self.score[:, :, self._part]
        torch.maximum(part, highest, out=part)
