"""yoco and yoco++ on existing models: what is stored, and residuals and their gradients against a plain computation."""

import copy

import pytest
import torch

from hf_kvcache import Yoco, YocoPlusPlus, patch_model, report
from hf_kvcache.patches.attach import require_attached
from hf_kvcache.spec import LayerKind
from hf_kvcache.testing import greedy, live_bytes, random_ids
from tests.forward import close, logits
from tests.methods.yoco import DEEP, every_family, fresh, patched, residual_names, shake


@every_family
def test_yoco_plus_plus_is_yoco_at_the_start(family):
    ids = random_ids(batch=2, length=21)
    plain, residual = patched(family, "yoco"), patched(family, "yoco++")
    for kwargs in ({}, {"use_cache": False}):
        assert torch.equal(logits(residual, ids, **kwargs), logits(plain, ids, **kwargs))
    assert torch.equal(greedy(residual, ids), greedy(plain, ids))


@every_family
def test_cached_decoding_is_one_full_pass_with_residuals(family):
    model = shake(patched(family))
    ids = random_ids(batch=2, length=21)
    chosen = greedy(model, ids)
    whole = logits(model, torch.cat([ids, chosen], dim=1), use_cache=False)[:, 20:-1]
    assert torch.equal(whole.argmax(-1), chosen)
    assert not torch.equal(greedy(patched(family, "yoco"), ids), chosen)


def test_layers_of_one_kind_share():
    for kinds in ((LayerKind(8), LayerKind(None)), (LayerKind(None), LayerKind(None, rotated=False))):
        plan = Yoco(split=4).plan(kinds * 3)
        assert plan.source_layers == (0, 1, 2, 3, 2, 3)
        assert YocoPlusPlus(split=4).plan(kinds * 3).residual.sources == (0, 1, 0, 1, 4, 5)


@pytest.mark.parametrize("method", ["yoco", "yoco++"])
@pytest.mark.parametrize(("split", "kept"), [(0.5, 2), (0.75, 3), (1, 1), (3, 3)])
def test_bytes_follow_the_split(method, split, kept):
    model, ids = patched(method=method, split=split), random_ids(batch=2, length=37)
    with torch.no_grad():
        cache = model(ids).past_key_values
        full = live_bytes(fresh()(ids).past_key_values)
    assert live_bytes(cache) * 4 == full * kept
    assert report(cache).bytes == live_bytes(cache)


def test_upper_layers_compute_no_keys_and_values():
    model, called = fresh(), []
    for index, layer in enumerate(model.model.layers):
        for name in ("k_proj", "v_proj"):
            module = getattr(layer.self_attn, name)
            module.register_forward_hook(lambda *_, index=index: called.append(index))
    greedy(patch_model(model, "yoco"), random_ids(length=9), tokens=3)
    assert set(called) == {0, 1}


class Plain:
    """A Llama forward with YOCO++ written out, for one sequence and no cache."""

    def __init__(self, model):
        self.model = model
        plan = require_attached(model).spec.sharing
        self.sources = plan.source_layers

    def __call__(self, ids):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        decoder = self.model.model
        hidden = decoder.embed_tokens(ids)
        positions = torch.arange(ids.shape[1])[None]
        cos, sin = decoder.rotary_emb(hidden, positions)
        stored, first = {}, None
        for index, layer in enumerate(decoder.layers):
            x, attention = layer.input_layernorm(hidden), layer.self_attn
            shape = (1, ids.shape[1], -1, attention.head_dim)
            query = attention.q_proj(x).view(shape).transpose(1, 2)
            if self.sources[index] == index:
                key, value = (p(x).view(shape).transpose(1, 2) for p in (attention.k_proj, attention.v_proj))
                query, key = apply_rotary_pos_emb(query, key, cos, sin)
                if index == 0:
                    first = key, value
                else:
                    a, b = attention.kv_residual.key_weight
                    c, d = attention.kv_residual.value_weight
                    key, value = 35 * (a * first[0] + b * key), 35 * (c * first[1] + d * value)
                stored[index] = key, value
            else:
                query, _ = apply_rotary_pos_emb(query, query, cos, sin)
            key, value = stored[self.sources[index]]
            group = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
            scores = query @ key.transpose(-1, -2) * attention.scaling
            future = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
            mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
            hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(decoder.norm(hidden))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_residual_is_the_formula(attention, use_cache):
    model = fresh(**DEEP)
    model.set_attn_implementation(attention)
    shake(patch_model(model, "yoco++"))
    ids = random_ids(length=17)
    with torch.no_grad():
        close(logits(model, ids, use_cache=use_cache), Plain(model)(ids))


def test_the_mixed_kv_is_stored():
    model, ids = shake(patched()), random_ids(length=9)
    with torch.no_grad():
        model(ids)
        cache = model(ids).past_key_values
        plain = patched(method="yoco")
        below = plain(ids).past_key_values
    own = model.model.layers[1].self_attn.kv_residual
    dense = [[layer.segments[0].dense()[0] for layer in found.layers[:2]] for found in (cache, below)]
    for head in range(2):
        for part, weight in enumerate((own.key_weight, own.value_weight)):
            first, second = (35 * weight).tolist()
            # layer 0 is as it was, and its output with it
            expected = first * dense[1][0][head][part] + second * dense[1][1][head][part]
            torch.testing.assert_close(dense[0][0][head][part], dense[1][0][head][part])
            torch.testing.assert_close(dense[0][1][head][part], expected, rtol=1e-4, atol=1e-4)


def test_nothing_of_a_forward_stays_in_the_cache():
    model = shake(patched())
    with torch.no_grad():
        cache = model(random_ids(length=9)).past_key_values
    assert cache.residual is None
    assert report(cache).bytes == live_bytes(cache)
    copy.deepcopy(cache)


@every_family
def test_gradients_reach_the_residual_weights(family):
    ids, found = random_ids(batch=2, length=15), []
    for checkpointing in (False, True):
        model = shake(patched(family)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    assert residual_names(model)
    for name, grad in found[0].items():
        # not every expert is asked
        if "experts" not in name:
            assert grad is not None and bool(grad.abs().sum() > 0), name
        if grad is not None:
            torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-6)


def test_gradients_at_the_start_too():
    model, ids = patched().train(), random_ids(batch=2, length=15)
    model(ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        if "kv_residual" in name:
            assert bool((weight.grad != 0).all()), name
