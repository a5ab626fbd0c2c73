"""The original YOCO (arXiv 2405.05254): "You Only Cache Once".

    self-decoder   X' = X + Mixer(RMSNorm(X)),  X'' = X' + SwiGLU(RMSNorm(X'))       Mixer: gated retention or a window
    shared KV      K = RoPE(RMSNorm(M) W_K),    V = RMSNorm(M) W_V                   M: the self-decoder's output
    cross-decoder  the same blocks, Mixer(X) = softmax(RoPE(X W_Q) K^T / sqrt(d)) V W_O, one K and V for all of them

The cache holds one K and V for all of the upper layers and states of constant size for the lower ones. The keys and
values of the prompt need the self-decoder alone, so a prefill that wants the next token only skips the upper layers for
all other positions (early exit). This is exact.

As in the authors' code, where the paper is silent: keys of retention are scaled by d^-1/2, tau = 16, embeddings are
multiplied by the root of the width, heads of retention are normalised without a weight, and the initialisation.
Different from it: RoPE has transformers' frequencies and layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_kvcache.models.yoco import masks
from hf_kvcache.models.yoco.configuration_yoco import YocoConfig
from hf_kvcache.models.yoco.mixers import RetentionProjection, Rotary, YocoAttention, YocoRetention
from hf_kvcache.patches.early_exit import POSITIONS, positions_wanted


class YocoDecoderLayer(GradientCheckpointingLayer):
    """One block of either decoder; `key` and `value` are given to those of the cross-decoder."""

    def __init__(self, config: YocoConfig, layer_idx: int) -> None:
        super().__init__()
        own_kv = layer_idx < config.num_self_decoder_layers
        retention = own_kv and config.self_decoder == "retention"
        self.self_attn = YocoRetention(config, layer_idx) if retention else YocoAttention(config, layer_idx, own_kv)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: Tensor, key: Tensor | None = None, value: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        mixed, _ = self.self_attn(self.input_layernorm(hidden_states), key=key, value=value, **kwargs)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class YocoSharedKV(nn.Module):
    """The one key and value of the cross-decoder, made of the self-decoder's output."""

    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        width = config.num_key_value_heads * config.head_dim
        self.k_proj, self.v_proj = (nn.Linear(config.hidden_size, width, bias=False) for _ in range(2))

    def forward(self, hidden_states: Tensor, position_embeddings: Rotary) -> tuple[Tensor, Tensor]:
        """Key, after RoPE, and value `[B, H_kv, T, d]` of hidden states `[B, T, D]`."""
        normed = self.norm(hidden_states)
        shape = (*normed.shape[:-1], -1, self.head_dim)
        key, value = (projection(normed).view(shape).transpose(1, 2) for projection in (self.k_proj, self.v_proj))
        return apply_rotary_pos_emb(key[:, :1], key, *position_embeddings)[1], value


class YocoPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: YocoConfig
    config_class = YocoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["YocoDecoderLayer"]  # noqa: RUF012 - transformers' names, here and below
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": YocoDecoderLayer, "attentions": YocoAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the authors: Xavier with a small gain in retention, PyTorch's own for other matrices."""
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.hidden_size**-0.5)
        elif isinstance(module, RetentionProjection):
            init.xavier_uniform_(module.weight, gain=module.gain)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As usual, but weights of another configuration are an error and not a warning."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        # a bare decoder may be read out of a language model
        wrong = {name: info[name] for name in ("missing_keys", "mismatched_keys") if info[name]}
        wrong |= {"unexpected_keys": found} if (found := _foreign(info["unexpected_keys"])) else {}
        if wrong:
            details = "; ".join(f"{name}: {sorted(map(str, keys))[:3]}" for name, keys in wrong.items())
            raise ValueError(
                f"these weights are of another configuration than self_decoder={model.config.self_decoder!r} with "
                f"{model.config.num_self_decoder_layers} of {model.config.num_hidden_layers} layers ({details}); load "
                "them with the configuration that they were saved with"
            )
        return (model, info) if output_loading_info else model


def _foreign(names: Any) -> list[str]:
    return [name for name in names if "lm_head" not in name]


class YocoModel(YocoPreTrainedModel):
    """Both decoders, without the head."""

    padding_idx: int | None

    def __init__(self, config: YocoConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self._is_stateful = config.self_decoder == "retention"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(YocoDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.shared_kv = YocoSharedKV(config)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        positions_to_keep: int = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the decoders.

        Where `position_ids` begin again within a row the next sequence begins, which reads none before it. As in
        transformers that is for rows without padding, and since a cache has one past for every row, without a cache.

        Args:
            positions_to_keep: run the cross-decoder for so many last positions only; 0 for all of them. The hidden
                states returned are of these positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if attention_mask is not None and attention_mask.dim() == 2 and bool(attention_mask.all()):
            attention_mask = None
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        given = inputs_embeds if input_ids is None else input_ids
        assert given is not None
        batch, length = given.shape[:2]
        sequences = None
        if position_ids is None:
            position_ids = torch.arange(seen, seen + length, device=given.device).unsqueeze(0)
        else:
            sequences = masks.sequences_of(position_ids, attention_mask, past_key_values)
        # of the last positions, how many run through the cross-decoder
        rows = positions_to_keep if 0 < positions_to_keep < length else length
        # now, since the cache takes the new tokens below
        mask = masks.cross_mask(
            self.config,
            # what matters of it is its shape, dtype and device
            self.embed_tokens.weight[:1].expand(batch, length, -1).to(given.device),
            attention_mask,
            past_key_values,
            position_ids,
            sequences,
            rows,
        )
        if sequences is not None and mask is None:
            masks.expect_bounds(self.config, sequences, **kwargs)
        found = []
        for part in self._parts(length, rows, attention_mask, past_key_values):
            hidden_states, rotary = self._self_decoder(
                self.embed_tokens(given[:, part]) if inputs_embeds is None else given[:, part],
                None if attention_mask is None else attention_mask[..., : seen + part.stop],
                position_ids[:, part],
                # a row of several sequences is one part
                sequences,
                past_key_values,
                **kwargs,
            )
            found.append(self.shared_kv(hidden_states, rotary))
        key, value = found[0] if len(found) == 1 else (torch.cat(parts, dim=2) for parts in zip(*found, strict=True))
        below = self.config.num_self_decoder_layers
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, below)
        if rows < length:
            hidden_states = hidden_states[:, -rows:]
            rotary = tuple(table[:, -rows:] for table in rotary)
        for layer in self.layers[below:]:
            hidden_states = layer(hidden_states, key, value, attention_mask=mask, position_embeddings=rotary, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _parts(self, length: int, wanted: int, mask: Tensor | None, cache: Cache | None) -> list[slice]:
        """The parts of a prompt that the self-decoder reads one after the other; the last holds what is wanted above.

        The cache carries its state from part to part, so that a prefill has the memory of one part and of the shared
        key and value. Gradients do not pass through a cache.
        """
        size = self.config.self_decoder_chunk_size
        whole = mask is not None and mask.dim() != 2
        if size is None or wanted > size or cache is None or whole or torch.is_grad_enabled():
            return [slice(0, length)]
        ends = range(length, 0, -size)
        return [slice(max(end - size, 0), end) for end in reversed(ends)]

    def _self_decoder(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        sequences: Tensor | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Rotary]:
        """Hidden states `[B, T, D]` behind the self-decoder, and the tables of RoPE at their positions."""
        arguments = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "position_ids": position_ids,
        }
        window_mask = token_mask = restarts = None
        length, window = inputs_embeds.shape[1], self.config.sliding_window
        if self.config.self_decoder == "retention":
            token_mask, restarts = masks.token_mask(attention_mask, length), masks.restarts_of(sequences)
        elif sequences is not None or not masks.by_blocks(self.config, attention_mask, length, window):
            window_mask = create_sliding_window_causal_mask(**arguments)
        hidden_states = inputs_embeds * self.config.hidden_size**0.5
        rotary = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers[: self.config.num_self_decoder_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=window_mask,
                token_mask=token_mask,
                restarts=restarts,
                position_embeddings=rotary,
                past_key_values=cache,
                **kwargs,
            )
        return hidden_states, rotary


class YocoForCausalLM(YocoPreTrainedModel, GenerationMixin):
    """YOCO with a language model's head.

    Example:
        >>> model = AutoModelForCausalLM.from_config(YocoConfig(**sizes))
        >>> model.generate(**inputs)          # early-exit prefill
        >>> model(**inputs).logits            # all positions: all layers over all positions
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers' name

    def __init__(self, config: YocoConfig) -> None:
        super().__init__(config)
        self.model = YocoModel(config)
        self._is_stateful = self.model._is_stateful
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As other causal language models. With an int `logits_to_keep` the cross-decoder runs for these positions."""
        if self.config.early_exit:
            asked = {"logits_to_keep": logits_to_keep, "labels": labels, **kwargs}
            kwargs[POSITIONS] = positions_wanted(self.config, **asked)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """Leaves the mask to the forward, which knows what it skips; `generate` would make it for a static cache."""
        return attention_mask
