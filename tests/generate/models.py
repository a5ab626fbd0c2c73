"""What the tests of `generate` share: tiny models of four families, patched with nothing lost or with shared layers."""

import copy
from functools import cache as memoize

import pytest
import torch
import transformers
from packaging.version import Version

from hf_kvcache import KVSharer, SharingPlan, patch_model
from hf_kvcache.testing import left_pad, random_ids, sharing_maps, tiny_model

# seen with 5.14 and 5.17, not with 5.23
OLD = Version(transformers.__version__) < Version("5.20")

FAMILIES = ("llama", "mistral", "gemma2", "phi3")
METHODS = ("none", "shared")
FULL = ("llama", "phi3")

every_family = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("method", METHODS)


@memoize
def original(family: str):
    return tiny_model(family)


def patched(family: str, method: str):
    return patch(copy.deepcopy(original(family)), method)


def patch(model, method: str):
    """Patches with nothing lost, or with as many consumers of one producer as there can be."""
    if method == "none":
        return patch_model(model, method=None)
    pairs = sharing_maps(model)["several"]
    return patch_model(model, KVSharer(plan=SharingPlan.from_pairs(model.config.num_hidden_layers, pairs)))


def uncached(model, ids, tokens=12, mask=None):
    """Greedy tokens by full passes without a cache: the reference for a shared model."""
    mask = torch.ones_like(ids) if mask is None else mask
    text = ids
    for _ in range(tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(text, attention_mask=mask, position_ids=positions, use_cache=False).logits
        text = torch.cat([text, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return text[:, ids.shape[1] :]


def padded_batch():
    return left_pad([random_ids(length=length, seed=length)[0] for length in (17, 9)])
