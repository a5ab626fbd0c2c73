"""The rotary embedding as eviction and codecs see it: the family's own, undone exactly, and without side effects."""

import copy

import pytest
import torch

from hf_kvcache.patches.adapters import find_adapter
from hf_kvcache.testing import FAMILIES, random_ids, tiny_model

POSITIONS = torch.tensor([0, 1, 5, 37, 200])


def rotations(model):
    adapter = find_adapter(model)
    decoder = adapter.find_decoder(model)
    layers = range(model.config.num_hidden_layers)
    return [adapter.rotary.of(decoder, adapter.find_attention(model, layer)) for layer in layers]


def keys_before_and_after(model, ids):
    """Of every layer the keys that its own forward gives to the rotary embedding, and those that it caches."""
    before: list[torch.Tensor] = []
    adapter = find_adapter(model)
    attentions = [adapter.find_attention(model, layer) for layer in range(model.config.num_hidden_layers)]
    hooks = []
    for attention in attentions:
        # the last module that makes keys: a norm over heads where there is one, else the projection
        for name in ("k_norm", "k_proj", "qkv_proj"):
            module = getattr(attention, name, None)
            if module is not None:
                hooks.append(module.register_forward_hook(lambda _, args, output: before.append(output)))
                break
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    for hook in hooks:
        hook.remove()
    heads, dim = model.config.num_key_value_heads, attentions[0].head_dim
    keys = []
    for output in before:
        if output.dim() == 3:
            output = output[..., heads * 3 * dim : heads * 4 * dim] if output.shape[-1] > heads * dim else output
            output = output.unflatten(-1, (heads, dim))
        # some normalise before they put heads first, some after
        keys.append(output if output.shape[1] == heads and output.shape[2] == ids.shape[1] else output.transpose(1, 2))
    return keys, [layer.keys for layer in cache.layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_rotating_what_the_model_rotates_gives_what_it_caches(family):
    model, ids = tiny_model(family, **({"sliding_window": 64} if family in ("mistral",) else {})), random_ids(length=7)
    positions = torch.arange(7)
    for rotate, before, after in zip(rotations(model), *keys_before_and_after(model, ids), strict=True):
        torch.testing.assert_close(rotate(before, positions), after, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rotate(after, positions, inverse=True), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_back_and_forth_is_the_identity_and_the_mean_is_the_mean(family):
    for rotate in rotations(tiny_model(family)):
        vectors = torch.randn(2, 3, len(POSITIONS), rotate.dim)
        there = rotate(vectors, POSITIONS)
        torch.testing.assert_close(rotate(there, POSITIONS, inverse=True), vectors, rtol=1e-5, atol=1e-5)
        assert there.norm(dim=-1).allclose(vectors.norm(dim=-1), rtol=1e-4)
        one = vectors[0, 0, :1]
        mean = torch.stack([rotate(one, POSITIONS[i : i + 1]) for i in range(len(POSITIONS))]).mean(0)
        torch.testing.assert_close(one @ rotate.mean(POSITIONS), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["cohere2", "smollm3"])
def test_layers_without_rotary_embedding_are_left_alone(family):
    unused = [rotate for rotate in rotations(tiny_model(family)) if not rotate.used]
    vectors = torch.randn(2, len(POSITIONS), 8)
    assert unused and len(unused) < 4
    for rotate in unused:
        assert torch.equal(rotate(vectors, POSITIONS), vectors)
        assert torch.equal(rotate.mean(POSITIONS), torch.eye(8))


def test_layer_types_have_embeddings_of_their_own():
    sliding, full = rotations(tiny_model("gemma3_text"))[:2]
    vectors = torch.randn(len(POSITIONS), 8)
    assert not sliding(vectors, POSITIONS).allclose(full(vectors, POSITIONS))


def state_of(module):
    """Its plain attributes and the values of its buffers."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str, set))}
    return copy.deepcopy(plain), {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "yarn"])
def test_asking_about_far_positions_changes_nothing(kind):
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    if kind == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    model = tiny_model("llama", rope_parameters=parameters, max_position_embeddings=64)
    embedding, ids = model.model.rotary_emb, random_ids(length=12)
    with torch.no_grad():
        expected = model(ids).logits
        before, buffers = state_of(embedding)
        rotate = rotations(model)[0]
        vectors = torch.randn(3, 8)
        far = torch.tensor([3, 70, 500])
        torch.testing.assert_close(rotate(rotate(vectors, far), far, inverse=True), vectors, rtol=1e-4, atol=1e-4)
        assert state_of(embedding)[0] == before
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in embedding.named_buffers())
        assert torch.equal(model(ids).logits, expected)
