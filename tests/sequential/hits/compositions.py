"""What the tests of hits share: families and compositions, models with and without a store, prompts alike at first."""

import copy
from functools import cache as memoize

import pytest
import torch

from hf_kvcache import (
    H2O,
    AdaKV,
    CriticalKV,
    KVSharer,
    KVzip,
    Offload,
    Sequential,
    SharingPlan,
    SnapKV,
    TurboQuant,
    patch_model,
)
from hf_kvcache.testing import greedy, random_ids, sharing_maps, tiny_model

PAGE = 8
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi3", "gemma2", "gemma3_text")
COMPOSITIONS = (
    "none",
    "turboquant",
    "sharer+turboquant+offload",
    "snapkv",
    "h2o",
    "kvzip+turboquant",
    "sharer+snapkv+adakv+criticalkv+turboquant+offload",
)
EVERYTHING = COMPOSITIONS[-1]
two_families = pytest.mark.parametrize("family", ["llama", "gemma3_text"])


def matrix(families, everyday):
    """Families x compositions; those not of every day are marked slow."""
    return pytest.mark.parametrize(
        ("family", "name"),
        [
            pytest.param(family, name, id=f"{family}-{name}", marks=() if everyday(family, name) else pytest.mark.slow)
            for family in families
            for name in COMPOSITIONS
        ],
    )


whole_matrix = matrix(FAMILIES, lambda family, name: name == EVERYTHING or family == "llama")
small_matrix = matrix(
    ("llama", "gemma3_text"),
    lambda family, name: (
        (family, name) == ("gemma3_text", EVERYTHING)
        or (family == "llama" and name in ("none", "h2o", "kvzip+turboquant"))
    ),
)


@memoize
def original(family):
    return tiny_model(family)


def methods(model, name):
    depth = model.config.num_hidden_layers
    parts = {
        "sharer": KVSharer(plan=SharingPlan.from_pairs(depth, sharing_maps(model)["adjacent"][:1])),
        "snapkv": SnapKV(window=4, budget=16),
        "h2o": H2O(budget=16),
        "kvzip": KVzip(instructions=((5, 6, 7), (8, 9)), chunk=16, budget=16),
        "adakv": AdaKV(),
        "criticalkv": CriticalKV(),
        "turboquant": TurboQuant(bits=8),
        "offload": Offload(),
    }
    return [] if name == "none" else [parts[part] for part in name.split("+")]


def cold(family, name="none"):
    model = copy.deepcopy(original(family))
    return patch_model(model, methods(model, name))


def stored(family, store, name="none", **options):
    model = copy.deepcopy(original(family))
    return patch_model(model, [*methods(model, name), Sequential(store=store, **options)])


def prompts():
    """Three prompts that begin alike: the second forks in the middle of a page, the third is a part of the first."""
    first = random_ids(length=45)
    return first, torch.cat([first[:, :37], random_ids(length=12, seed=4)], dim=1), first[:, :30]


def adopted(model, store, ids, **kwargs):
    """Tokens that a run adopts, when the store has all of them from another run."""
    before = store.counts.adopted_tokens
    greedy(model, ids, tokens=2, **kwargs)
    store.flush()
    return store.counts.adopted_tokens - before
