"""Law 13: `unpatch_model` restores everything; other instances, copies and saved models never change."""

import copy
import io

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_kvcache import is_patched, patch_model, unpatch_model
from hf_kvcache.testing import FAMILIES, greedy, model_state, random_ids, tiny_model
from tests.contract.matrix import MATRIX, every_family, fresh, methods_of, original, patched


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_restores_the_model(family):
    model = fresh(family)
    before = model_state(model)
    for method in ("none", "several+offload"):
        assert patch_model(model, methods_of(model, method)) is model
        assert is_patched(model)
        greedy(model, random_ids(length=9), tokens=3)
        assert unpatch_model(model) is model
        assert not is_patched(model)
        before.assert_equal(model_state(model))
    unpatch_model(model)
    before.assert_equal(model_state(model))


@every_family
def test_state_dict_of_a_patched_model_is_the_original(family):
    model = fresh(family)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    patch_model(model, methods_of(model, "several"))
    actual = model.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())
    assert model.load_state_dict(expected) is not None


@every_family
def test_save_pretrained_writes_the_original(family, tmp_path):
    model = patched(family, "several")
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.config._attn_implementation == original(family).config._attn_implementation
    ids = random_ids(length=11)
    assert torch.equal(greedy(loaded, ids), greedy(original(family), ids))


@every_family
def test_loading_weights_into_a_patched_model_reaches_the_original(family):
    other = tiny_model(family, seed=1, **MATRIX[family])
    model = patched(family, "several")
    model.load_state_dict(other.state_dict())
    unpatch_model(model)
    ids = random_ids(length=11)
    assert torch.equal(greedy(model, ids), greedy(other, ids))


@every_family
def test_models_of_one_config_object_are_independent(family):
    config = copy.deepcopy(original(family).config)
    first, second = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    assert first.config is second.config
    before = model_state(second)
    patch_model(first, methods_of(first, "several"))
    greedy(first, random_ids(length=9), tokens=3)
    before.assert_equal(model_state(second))
    unpatch_model(first)
    before.assert_equal(model_state(second))
    assert first.config is second.config is config


def test_patching_leaves_other_models_attention_alone():
    ids = random_ids(length=12)
    bystander = tiny_model("llama", seed=3)
    expected = greedy(bystander, ids)
    shared = patched("llama", "several")
    greedy(shared, ids)
    assert torch.equal(greedy(bystander, ids), expected)
    assert AutoConfig.for_model("llama")._attn_implementation is None


@every_family
def test_deepcopy_of_a_patched_model_is_independent(family):
    ids = random_ids(length=13)
    model = fresh(family)
    before = model_state(model)
    patch_model(model, methods_of(model, "several+offload"))
    expected = greedy(model, ids)
    twin = copy.deepcopy(model)
    assert is_patched(twin)
    assert torch.equal(greedy(twin, ids), expected)

    # the copy runs on its own weights, its own projections included
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5)
    assert torch.equal(greedy(twin, ids), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-2)

    unpatch_model(twin)
    assert not is_patched(twin) and is_patched(model)
    assert torch.equal(greedy(twin, ids), greedy(original(family), ids))
    assert twin.config is not model.config
    assert torch.equal(greedy(model, ids), expected)
    unpatch_model(model)
    before.assert_equal(model_state(model))


@every_family
def test_pickle_of_a_patched_model_works(family):
    ids = random_ids(length=13)
    model = patched(family, "several+offload")
    expected = greedy(model, ids)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert is_patched(loaded)
    assert torch.equal(greedy(loaded, ids), expected)
    assert torch.equal(greedy(unpatch_model(loaded), ids), greedy(original(family), ids))
