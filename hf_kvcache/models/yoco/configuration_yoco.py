"""`YocoConfig`: the configuration of the original YOCO. Its defaults are the published 3B model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# self-decoder -> what transformers calls its layers
LAYER_TYPES = {"retention": "linear_attention", "window": "sliding_attention"}


@strict
class YocoConfig(PreTrainedConfig):
    """Configuration of YOCO: a self-decoder with states of constant size below, a cross-decoder over one KV above.

    Fields that other models have too keep transformers' names and meaning.

    Args:
        num_self_decoder_layers: layers of the self-decoder, from the bottom; None for half of all layers.
        self_decoder: `"retention"` (gated retention) or `"window"` (sliding-window attention).
        sliding_window: tokens that a query of the self-decoder sees, itself included, with `"window"`.
        num_key_value_heads: KV heads of the cross-decoder; the self-decoder has as many as query heads, as published.
        gate_logit_normalizer: tau, which brings the decay of gated retention near 1.
        retention_chunk_size: tokens that retention computes in parallel; the result does not depend on it.
        self_decoder_chunk_size: tokens of a prompt that the self-decoder reads at once where the cross-decoder is
            skipped; bounds the memory of a prefill, the result does not depend on it. None to read a prompt at once.
        early_exit: run the cross-decoder only for the positions whose logits are asked for (`logits_to_keep`, which is
            1 in `generate`). This is exact. False runs all layers over all positions.

    Example:
        >>> config = YocoConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        ...                     num_attention_heads=4, num_key_value_heads=2)
        >>> config.source_layers
        (0, 1, 2, 2)
    """

    model_type = "yoco"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' name

    vocab_size: int = 100288
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 26
    num_attention_heads: int = 24
    self_decoder: str = "retention"
    sliding_window: int | None = 1024
    gate_logit_normalizer: int | float = 16
    retention_chunk_size: int = 256
    self_decoder_chunk_size: int | None = 2048
    early_exit: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_dropout: int | float = 0.0
    mlp_bias: bool = False
    layer_types: list[str] | None = None
    if TYPE_CHECKING:
        # numbers, once `__post_init__` has filled them in
        num_self_decoder_layers: Any
        num_key_value_heads: Any
        head_dim: Any
    else:
        num_self_decoder_layers: int | None = None
        num_key_value_heads: int | None = 8
        head_dim: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        layers = self.num_hidden_layers
        if self.num_self_decoder_layers is None:
            if layers % 2:
                raise ValueError(
                    f"num_hidden_layers={layers} is odd and cannot be halved; give an even number, or say with "
                    "num_self_decoder_layers how many layers the self-decoder has"
                )
            self.num_self_decoder_layers = layers // 2
        if not 0 < self.num_self_decoder_layers < layers:
            raise ValueError(
                f"num_self_decoder_layers must be between 1 and {layers - 1}, so that both decoders have a layer, "
                f"got {self.num_self_decoder_layers}"
            )
        if self.self_decoder not in LAYER_TYPES:
            raise ValueError(f"self_decoder must be one of {', '.join(LAYER_TYPES)}, got {self.self_decoder!r}")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of num_key_value_heads="
                f"{self.num_key_value_heads}"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is no multiple of num_attention_heads={self.num_attention_heads}; "
                    "give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.self_decoder_chunk_size is not None and self.self_decoder_chunk_size < 1:
            raise ValueError(
                f"self_decoder_chunk_size must be at least 1 token, or None, got {self.self_decoder_chunk_size}"
            )
        if self.self_decoder == "window":
            self._check_window()
        else:
            self.sliding_window = None
        below = self.num_self_decoder_layers
        self.layer_types = [LAYER_TYPES[self.self_decoder]] * below + ["full_attention"] * (layers - below)
        super().__post_init__(**kwargs)

    def _check_window(self) -> None:
        if self.sliding_window is None or self.sliding_window < 2:
            raise ValueError(f"sliding_window must be at least 2 tokens, got {self.sliding_window}")
        if self.sliding_window > self.max_position_embeddings:
            raise ValueError(
                f"sliding_window={self.sliding_window} is longer than the context of max_position_embeddings="
                f"{self.max_position_embeddings} tokens; make the window shorter or the context longer"
            )

    @property
    def source_layers(self) -> tuple[int, ...]:
        """For every layer the layer whose KV or state it reads: the cross-decoder shares that of its first layer."""
        below = self.num_self_decoder_layers
        return tuple(min(layer, below) for layer in range(self.num_hidden_layers))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token in the cache in 16 bit: one key and one value a KV head, whatever the depth."""
        return 2 * self.num_key_value_heads * self.head_dim * 2

    @property
    def state_bytes(self) -> int:
        """Bytes of a sequence's constant part: `H d^2` numbers a retention layer, held in float32 whatever the model's
        dtype, or the window's keys and values in 16 bit."""
        heads, size = self.num_attention_heads, self.head_dim
        layer = heads * size**2 * 4 if self.sliding_window is None else 2 * heads * size * self.sliding_window * 2
        return self.num_self_decoder_layers * layer
