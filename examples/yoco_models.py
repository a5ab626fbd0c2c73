"""The models that `train_yoco.py --from-scratch` compares, of one size: Transformer, YOCO in four forms, and a control.

All are pre-norm with RMSNorm, RoPE and SwiGLU, embeddings times the root of the width, and one initialisation, so that
only the sharing differs. The Transformer is transformers' Granite, which is Llama with multipliers, for the sake of the
one of its embedding. The width of the MLP makes the numbers of parameters equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GraniteConfig, MistralConfig, PreTrainedModel

from hf_kvcache import patch_model
from hf_kvcache.models import YocoConfig

# what is patched onto the plain Transformer
PATCHED = {"yoco-half": "yoco", "yoco++": "yoco++"}
NATIVE = {"yoco-retention": "retention", "yoco-window": "window"}
MODELS = ("transformer", *NATIVE, *PATCHED)
CONTROL = "window-only"


def device() -> torch.device:
    """Where models are trained: on the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(name: str, sizes: dict[str, Any], window: int, seed: int, parameters: int | None = None) -> PreTrainedModel:
    """A model of random weights, on the CPU: they are the same wherever it is trained.

    Args:
        name: one of `MODELS`, or `CONTROL`, a Transformer with windows in all layers.
        sizes: fields of the configuration.
        window: of the self-decoder with windows, and of the control.
        seed: of the weights.
        parameters: how many it shall have; None to take the MLP's width from `sizes`.
    """
    if parameters is not None:
        missing = parameters - count(_build(name, sizes, window, "meta"))
        wider = round(missing / (3 * sizes["hidden_size"] * sizes["num_hidden_layers"]))
        sizes = {**sizes, "intermediate_size": sizes["intermediate_size"] + wider}
    torch.manual_seed(seed)
    model = _build(name, sizes, window, "cpu")
    if name not in NATIVE:
        _draw(model)
    return model


def count(model: nn.Module) -> int:
    """Parameters that are in use: those of projections that nobody runs are not."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _build(name: str, sizes: dict[str, Any], window: int, device: str) -> PreTrainedModel:
    width = sizes["hidden_size"]
    if name in NATIVE:
        config: Any = YocoConfig(**sizes, self_decoder=NATIVE[name], sliding_window=window, retention_chunk_size=64)
    elif name == CONTROL:
        config = MistralConfig(**sizes, sliding_window=window, rms_norm_eps=1e-5)
    else:
        multiplier = (width // sizes["num_attention_heads"]) ** -0.5
        config = GraniteConfig(
            **sizes, embedding_multiplier=width**0.5, attention_multiplier=multiplier, rms_norm_eps=1e-5
        )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if name in PATCHED:
        # weights that nobody runs are frozen by the patch; a patched model cannot rest on the meta device
        if device == "meta":
            model = model.to_empty(device="cpu")
        patch_model(model, PATCHED[name])
    return model


@torch.no_grad()
def _draw(model: PreTrainedModel) -> None:
    """The initialisation of YOCO's authors for what is not retention: PyTorch's own, and unit embeddings."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
