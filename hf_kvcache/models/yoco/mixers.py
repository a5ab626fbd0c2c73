"""What mixes tokens in YOCO: gated retention, and attention over a window or over the shared keys and values."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from hf_kvcache.attention import attend_windows
from hf_kvcache.kernels.gated_retention import gated_retention
from hf_kvcache.models.yoco.configuration_yoco import YocoConfig
from hf_kvcache.models.yoco.masks import by_blocks

Rotary = tuple[Tensor, Tensor]


class RetentionProjection(nn.Linear):
    """A matrix of retention: without a bias, and with an initial gain of its own."""

    def __init__(self, inputs: int, outputs: int, gain: float) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.gain = gain


class YocoRetention(nn.Module):
    """Gated retention with per-head normalisation and a SiLU gate: the default mixer of the self-decoder.

    Its state `[B, H, d, d]` is all that later tokens need of earlier ones.
    """

    def __init__(self, config: YocoConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        width = config.num_attention_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.gate_proj, self.decay_proj = (
            RetentionProjection(config.hidden_size, outputs, gain=2**-2.5)
            for outputs in (*[width] * 4, config.num_attention_heads)
        )
        self.o_proj = RetentionProjection(width, config.hidden_size, gain=2**-1)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotary,
        token_mask: Tensor | None = None,
        restarts: dict[int, Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key = key * self.head_dim**-0.5
        log_decay = functional.logsigmoid(self.decay_proj(hidden_states).float()) / self.config.gate_logit_normalizer
        log_decay = log_decay.transpose(1, 2)
        if token_mask is not None:
            # padding neither enters the state nor fades it
            key, log_decay = key * token_mask[:, None, :, None], log_decay * token_mask[:, None]
        state = None if past_key_values is None else past_key_values.layers[self.layer_idx].recurrent_states[0]
        if state is not None and torch.is_grad_enabled():
            # transformers' cache writes the next state over this one, which the gradient is still computed with
            state = state.clone()
        # RoPE's tables are in float32 in mixed precision, and the operator's kernels take one dtype
        query, key = query.to(value.dtype), key.to(value.dtype)
        retain = partial(retain_apart, restarts) if restarts else gated_retention
        out, state = retain(query, key, value, log_decay, state, chunk=self.config.retention_chunk_size)
        if past_key_values is not None:
            past_key_values.layers[self.layer_idx].update_recurrent_state(state.detach(), tokens=query.shape[2])
        out = functional.rms_norm(out, (self.head_dim,), eps=self.config.rms_norm_eps)
        out = out.transpose(1, 2).flatten(2) * functional.silu(self.gate_proj(hidden_states))
        return self.o_proj(out), None


def retain_apart(
    restarts: dict[int, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    *,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Gated retention of several sequences in one row: the state is emptied where one begins.

    A gate of 0 would do that in one call, but logarithms of gates are summed, and would lose their digits to it.
    """
    found = []
    for start, end in pairwise([0, *restarts, query.shape[2]]):
        if state is not None and start in restarts:
            state = state.masked_fill(restarts[start], 0)
        q, k, v, decay = (tensor[:, :, start:end] for tensor in (query, key, value, log_decay))
        out, state = gated_retention(q, k, v, decay, state, chunk=chunk)
        found.append(out)
    assert state is not None
    return torch.cat(found, dim=2), state


class YocoAttention(nn.Module):
    """Softmax attention: over a window of its own keys and values, or, in the cross-decoder, over the shared ones.

    Args:
        own_kv: whether it makes keys and values itself.
    """

    def __init__(self, config: YocoConfig, layer_idx: int, own_kv: bool) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.scaling, self.attention_dropout, self.is_causal = config.head_dim**-0.5, config.attention_dropout, True
        heads, width = config.num_attention_heads, config.num_attention_heads * config.head_dim
        self.num_key_value_groups = 1 if own_kv else heads // config.num_key_value_heads
        self.sliding_window = config.sliding_window if own_kv else None
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        if own_kv:
            self.k_proj, self.v_proj = (nn.Linear(config.hidden_size, width, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotary,
        attention_mask: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        if key is None:
            key, value = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.k_proj, self.v_proj))
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
        else:
            query = apply_rotary_pos_emb(query, query[:, :1], *position_embeddings)[0]
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attend = partial(
            function,
            self,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        window = self.sliding_window
        # a layer of our cache stands for key and value, and does the same by itself
        if window and by_blocks(self.config, attention_mask, query.shape[2], window) and isinstance(key, Tensor):
            out = attend_windows(lambda *block: attend(*block)[0], query, key, value, window)
            weights = None
        else:
            out, weights = attend(query, key, value, attention_mask)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights
