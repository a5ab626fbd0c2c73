"""ADAPTERS: the supported model families. A Llama-shaped family is one entry; an odd one has a file of its own."""

from __future__ import annotations

from torch import nn

from hf_kvcache.patches.adapter import Adapter, OwnSharing, SeparateKV
from hf_kvcache.patches.phi3 import FusedQKV
from hf_kvcache.patches.rotary import Rotary

LLAMA = Adapter(kv=SeparateKV())

ADAPTERS: dict[str, Adapter] = {
    "arcee": LLAMA,
    "cohere": LLAMA,
    "cohere2": Adapter(kv=SeparateKV(), rotary=Rotary(switch="sliding_window")),
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "granite": LLAMA,
    "helium": LLAMA,
    "llama": LLAMA,
    "ministral": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "olmo3": LLAMA,
    "phi3": Adapter(kv=FusedQKV(), query=None),
    "qwen2": LLAMA,
    "qwen2_moe": LLAMA,
    "qwen3": LLAMA,
    "qwen3_moe": LLAMA,
    "seed_oss": LLAMA,
    "smollm3": Adapter(kv=SeparateKV(), rotary=Rotary(switch="use_rope")),
    "starcoder2": LLAMA,
    "yoco": Adapter(kv=OwnSharing(), sources="source_layers"),
}


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter of a model's family; raises when there is none, or when the model is not as it says."""
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise TypeError(f"expected a transformers model, got {type(model).__name__}, which has no config.model_type")
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{type(model).__name__} is an encoder-decoder model; only decoder-only models are supported"
        )
    if model_type not in ADAPTERS:
        raise NotImplementedError(
            f"model type {model_type!r} has no adapter, supported are {', '.join(sorted(ADAPTERS))}; "
            "see CONTRIBUTING.md, 'Add a model family'"
        )
    adapter = ADAPTERS[model_type]
    adapter.check(model)
    return adapter
