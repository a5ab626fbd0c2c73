"""The bytes that the cache of a configuration takes, computed and not measured."""

from __future__ import annotations

from transformers import CONFIG_MAPPING, AutoConfig

import hf_kvcache.models  # noqa: F401 - registers our own configurations


def arithmetic(name: str) -> str:
    """The bytes that a model's cache takes in 16 bit, from its configuration: of a folder, a name or a model type."""
    config = AutoConfig.for_model(name) if name in CONFIG_MAPPING else AutoConfig.from_pretrained(name)
    layers, dim = config.num_hidden_layers, getattr(config, "head_dim", None)
    dim = dim or config.hidden_size // config.num_attention_heads
    full = 2 * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * dim * 2 * layers
    if not hasattr(config, "kv_bytes_per_token") and "sliding_attention" in (
        getattr(config, "layer_types", None) or ()
    ):
        raise NotImplementedError(
            f"{config.model_type} has layers with windows; load it and measure with report(cache)"
        )
    own, state = getattr(config, "kv_bytes_per_token", full), getattr(config, "state_bytes", 0)
    lines = [
        f"{config.model_type}: {layers} layers, 16 bit",
        f"keys and values of a token: {own:,d} B; {full:,d} B where every layer keeps its own",
        f"constant part of a sequence: {state:,d} B",
    ]
    for tokens in (2**15, 2**20):
        sizes = [(tokens * a_token + part) / 1e9 for a_token, part in ((own, state), (full, 0))]
        lines.append(f"{tokens:,d} tokens: {sizes[0]:.2f} GB; {sizes[1]:.2f} GB where every layer keeps its own")
    return "\n".join(lines)
