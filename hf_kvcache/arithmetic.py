"""The bytes that the cache of a configuration takes, computed and not measured."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

import hf_kvcache.models  # noqa: F401 - registers our own configurations
from hf_kvcache.models.shared import SharedConfig, layer_bytes_per_token


def arithmetic(name: str) -> str:
    """The bytes that a model's cache takes in 16 bit, from its configuration: of a folder, a name or a model type."""
    given = _configuration(name)
    config = given.original() if isinstance(given, SharedConfig) else given
    layers = config.num_hidden_layers
    full = layer_bytes_per_token(config) * layers
    if not hasattr(config, "kv_bytes_per_token") and "sliding_attention" in (
        getattr(config, "layer_types", None) or ()
    ):
        raise NotImplementedError(
            f"{config.model_type} has layers with windows; load it and measure with report(cache)"
        )
    own, state = getattr(given, "kv_bytes_per_token", full), getattr(config, "state_bytes", 0)
    retention = getattr(config, "self_decoder", None) == "retention"
    lines = [
        f"{config.model_type}: {layers} layers, keys and values in 16 bit",
        f"keys and values of a token: {own:,d} B; {full:,d} B where every layer keeps its own",
        f"constant part of a sequence: {state:,d} B{', states in float32' if retention else ''}",
    ]
    for tokens in (2**15, 2**20):
        sizes = [(tokens * a_token + part) / 1e9 for a_token, part in ((own, state), (full, 0))]
        lines.append(f"{tokens:,d} tokens: {sizes[0]:.2f} GB; {sizes[1]:.2f} GB where every layer keeps its own")
    return "\n".join(lines)


def _configuration(name: str) -> Any:
    if name in CONFIG_MAPPING:
        return AutoConfig.for_model(name)
    try:
        return AutoConfig.from_pretrained(name)
    except OSError as error:
        raise ValueError(
            f"expected the folder, name or model type of a model in --config, got {name!r}: {error}"
        ) from error
