"""Roles of eviction that do the same twice, or nothing: what is left out by itself, and what `patch_model` warns of."""

import warnings

import pytest
import torch

from hf_kvcache import new_cache, patch_model
from hf_kvcache.methods import AdaKV, CriticalKV, ExpectedAttention
from hf_kvcache.report import kept_positions
from hf_kvcache.testing import random_ids, tiny_model


def scorer_of(method, **options):
    return new_cache(patch_model(tiny_model("llama"), method, **options)).spec.eviction.scorer


@pytest.mark.filterwarnings("error")
def test_the_norm_of_a_value_counts_once():
    assert scorer_of("expected_attention").weighs_values
    assert scorer_of("expected_attention+adakv").weighs_values
    assert not scorer_of("expected_attention+criticalkv").weighs_values
    assert not scorer_of("criticalkv+adakv+expected_attention").weighs_values
    # one stage is the host's top-k
    assert scorer_of("expected_attention+criticalkv", first_stage=1.0).weighs_values
    kept = []
    for scorer in ("expected_attention", ExpectedAttention(value_norm=False)):
        cache = new_cache(model := patch_model(tiny_model("llama"), [scorer, AdaKV(budget=0.25), CriticalKV()]))
        with torch.no_grad():
            model(random_ids(length=60), past_key_values=cache)
        kept.append([head.tolist() for layer in kept_positions(cache) for head in layer])
    assert kept[0] == kept[1]


def test_a_norm_that_counts_twice_is_warned_of():
    with pytest.warns(UserWarning, match="'expected_attention' multiplies its score by norms .* 'criticalkv'"):
        assert scorer_of([ExpectedAttention(value_norm=True), CriticalKV()]).weighs_values
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scorer_of([ExpectedAttention(value_norm=True)]).weighs_values


def test_a_model_without_full_attention_is_warned_of():
    with pytest.warns(UserWarning, match="'snapkv' will drop nothing: .* leave the method out") as found:
        model = patch_model(tiny_model("mistral"), "snapkv+adakv", budget=10, window=4)
        with torch.no_grad():
            model(random_ids(length=30))
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(tiny_model("mistral", sliding_window=None), "snapkv", budget=10, window=4)
        patch_model(tiny_model("gemma2"), "snapkv", budget=10, window=4)
        patch_model(tiny_model("mistral"))
        patch_model(tiny_model("mistral", sliding_window=None), "turboquant+offload")
        patch_model(tiny_model("gemma2"), "turboquant+offload")
    for method in ("turboquant", "offload"):
        with pytest.warns(UserWarning, match=f"'{method}' will do nothing: .* leave the method out"):
            patch_model(tiny_model("mistral"), method)
