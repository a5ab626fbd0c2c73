"""What the laws are checked on: families of models, methods by name, and models patched with them."""

import copy
from functools import cache as memoize

import pytest
import torch

from hf_kvcache import KVSharer, Method, Offload, SharingPlan, patch_model
from hf_kvcache.testing import sharing_maps, tiny_model

SIX_LAYERS = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}

# families of the whole matrix; those with two layer types are deep enough for several consumers of one producer
MATRIX = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {},
    "phi3": {},
    "gemma2": SIX_LAYERS,
    "gemma3_text": SIX_LAYERS,
}
METHODS = ("none", "offload", "adjacent", "distant", "several", "several+offload")

every_family = pytest.mark.parametrize("family", MATRIX)
every_method = pytest.mark.parametrize("method", METHODS)


def matrix(*full: str):
    """Families x methods: all methods for the families `full`, one for the others, the rest marked slow."""
    return pytest.mark.parametrize(
        ("family", "method"),
        [
            pytest.param(family, method, id=f"{family}-{method}", marks=() if everyday else pytest.mark.slow)
            for family in MATRIX
            for method in METHODS
            for everyday in [family in full or method == "several+offload"]
        ],
    )


whole_matrix = matrix("llama", "gemma2")


@memoize
def original(family: str):
    """An unpatched model that all tests share; those that patch take `fresh`."""
    return tiny_model(family, **MATRIX.get(family, {}))


def fresh(family: str):
    return copy.deepcopy(original(family))


def methods_of(model, method: str) -> list[Method] | None:
    """The methods behind a name of `METHODS`, with plans that fit the model."""
    if method == "none":
        return None
    maps = sharing_maps(model)
    depth = model.config.num_hidden_layers
    return [
        Offload() if part == "offload" else KVSharer(plan=SharingPlan.from_pairs(depth, maps[part]))
        for part in method.split("+")
    ]


def patched(family: str, method: str):
    model = fresh(family)
    return patch_model(model, methods_of(model, method))


def generate(model, ids, tokens=12, **kwargs):
    """Greedy tokens `[B, tokens]`, the logits they were chosen from `[B, tokens, V]`, and the cache."""
    out = model.generate(
        ids,
        **{"attention_mask": torch.ones_like(ids), **kwargs},
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1), out.past_key_values
