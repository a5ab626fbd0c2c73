"""A model's fingerprint: what a saved plan or cache is checked against before it is used."""

from __future__ import annotations

import hashlib
import json

import torch

# the parts of a configuration that change what a cached key or value means
FIELDS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rope_theta",
    "rope_parameters",
    "sliding_window",
    "layer_types",
)
SAMPLED_ROWS = 64


def fingerprint(model: torch.nn.Module) -> str:
    """Returns `"<architecture>-<weights>"`, each 16 hexadecimal digits.

    The second part hashes a sample of the input embedding rounded to bfloat16, so that a model loaded in another dtype
    keeps its fingerprint. It is `"unknown"` where the weights are not in memory.
    """
    config = model.config.to_dict()
    text = json.dumps({name: config.get(name) for name in FIELDS}, sort_keys=True, default=str)
    weight = model.get_input_embeddings().weight
    if weight.device.type == "meta" or not weight.is_floating_point():
        return f"{_digest(text.encode())}-unknown"
    rows = torch.linspace(0, weight.shape[0] - 1, SAMPLED_ROWS).long()
    sample = weight.detach()[rows.to(weight.device)].to("cpu", torch.bfloat16).contiguous()
    return f"{_digest(text.encode())}-{_digest(sample.view(torch.int16).numpy().tobytes())}"


def matches(one: str, other: str) -> bool:
    """Whether two fingerprints can be of one model; an empty one matches any."""
    if not one or not other:
        return True
    architecture, weights = one.split("-")
    other_architecture, other_weights = other.split("-")
    return architecture == other_architecture and (weights == other_weights or "unknown" in (weights, other_weights))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
