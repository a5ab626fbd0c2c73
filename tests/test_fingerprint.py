"""What is hashed of a model's weights."""

import pytest
import torch
from torch import nn

from hf_kvcache.fingerprint import model_digest, row_sums, weights_digest
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 576])
def test_every_change_of_a_row_is_seen(width, dtype):
    generator = torch.Generator().manual_seed(width)
    table = torch.randint(-100, 100, (300, width), generator=generator).to(dtype)
    before = row_sums(table)
    assert torch.equal(row_sums(table.clone()), before)
    for row, column in ((0, 0), (7, width - 1), (299, width // 2)):
        changed = table.clone()
        changed.view(torch.uint8)[row, column * dtype.itemsize] ^= 1
        assert (row_sums(changed) != before).nonzero().flatten().tolist() == [row]
    other = table.clone()
    other[5] += 1
    other[9] = other[9].roll(1)
    differ = (other != table).any(1)
    assert torch.equal(row_sums(other) != before, differ)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_step_of_one_token_is_seen(wrapped):
    """A step trains a column of PEFT's first factor, or a row of the table."""
    module, embedding = nn.Module(), nn.Embedding(1000, 16)
    module.inner = embedding
    if wrapped:
        module.inner = nn.Module()
        module.inner.base_layer, module.inner.lora_embedding_A = embedding, nn.ParameterDict()
        module.inner.lora_embedding_A["one"] = nn.Parameter(torch.randn(2, 1000))
    trained = module.inner.lora_embedding_A["one"].data.T if wrapped else embedding.weight.data
    before = weights_digest(module)
    trained[501] += 1e-5
    after = weights_digest(module)
    assert after != before
    embedding.weight.data[77, 3] += 1e-5
    assert weights_digest(module) != after


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
