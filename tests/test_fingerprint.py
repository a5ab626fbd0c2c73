"""What is hashed of a model's weights."""

import pytest
import torch
from torch import nn

from hf_kvcache.fingerprint import model_digest, weights_digest
from hf_kvcache.testing import tiny_model


def test_a_tensor_larger_than_whole_numbers_in_float32_is_sampled():
    module = nn.Module()
    # float32 rounds the last index up
    module.register_buffer("large", torch.zeros(28_311_552, dtype=torch.int8))
    before = weights_digest(module)
    module.large[-1] = 1
    assert weights_digest(module) != before


def test_the_digest_knows_names_shapes_dtypes_and_numbers():
    def digest(name, tensor):
        module = nn.Module()
        module.register_buffer(name, tensor)
        return weights_digest(module)

    found = [
        digest("a", torch.zeros(4)),
        digest("b", torch.zeros(4)),
        digest("a", torch.zeros(2, 2)),
        digest("a", torch.zeros(4, dtype=torch.float64)),
        digest("a", torch.tensor([0.0, 0.0, 1.0, 0.0])),
        digest("a", torch.zeros(1)),
        digest("a", torch.zeros(0)),
    ]
    assert len(set(found)) == len(found)
    assert digest("a", torch.zeros(4)) == found[0]


def test_adapters_are_told_apart_and_models_are_not_printed(monkeypatch):
    model = tiny_model("llama").model
    monkeypatch.setattr(torch.nn.Module, "__repr__", lambda self: pytest.fail("a model was printed"))
    layer = model.layers[1].self_attn.q_proj
    found = [weights_digest(model)]
    layer.disable_adapters = False
    for scaling in (1.0, 2.0):
        layer.active_adapters, layer.scaling = ["one"], {"one": scaling}
        found.append(weights_digest(model))
    layer.active_adapters = ["two"]
    found.append(weights_digest(model))
    assert len(set(found)) == 4


def test_settings_that_cannot_matter_are_left_out(tmp_path):
    model = tiny_model("gemma3_text")
    before = model_digest(model.model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert model_digest(loaded.model) == before
    aside = {"use_cache": False, "pad_token_id": 3, "output_hidden_states": True, "_name_or_path": "x"}
    for name, value in aside.items():
        setattr(model.config, name, value)
    assert model_digest(model.model) == before
    model.config.query_pre_attn_scalar = 7
    assert model_digest(model.model) != before
