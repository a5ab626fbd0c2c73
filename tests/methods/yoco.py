"""What the tests of yoco and yoco++ share: tiny models, patched, and residual weights that matter."""

import pytest
import torch

from hf_kvcache import patch_model
from hf_kvcache.testing import FAMILIES, tiny_model

every_family = pytest.mark.parametrize("family", FAMILIES)
# deep enough that layers of both kinds have something to add
MIXED = {"num_hidden_layers": 8, "layer_types": ["sliding_attention", "full_attention"] * 4}
DEEP = {"num_hidden_layers": 6}


def fresh(family="llama", **changes):
    if family in ("cohere2", "gemma2", "gemma3_text", "ministral", "olmo3"):
        changes = {**MIXED, **changes}
    if family == "smollm3":
        # the last of every four layers has no RoPE
        changes = {"num_hidden_layers": 8, **changes}
    return tiny_model(family, **changes)


def patched(family="llama", method="yoco++", **options):
    return patch_model(fresh(family), method, **options)


def shake(model, seed=0):
    """Gives the residual weights values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "kv_residual" in name:
                weight.add_(torch.randn(2, generator=generator) * 0.01)
    return model


def residual_names(model):
    return [name for name, _ in model.named_parameters() if "kv_residual" in name]
