"""Caches, masks and arguments that a patched model cannot take are refused, and the next call runs as before."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_kvcache import KVSharer, SharingPlan, compress, new_cache, patch_model, report, unpatch_model
from hf_kvcache.cache import KVCache
from hf_kvcache.codecs import DenseCodec
from hf_kvcache.spec import CacheSpec
from hf_kvcache.testing import greedy, random_ids, tiny_model
from tests.bad_input.refusals import PLAN, original, refused


@pytest.mark.parametrize("kind", ["dynamic", "static", "tuple"])
def test_a_foreign_cache(shared, kind):
    ids = random_ids(length=8)
    caches = {
        "dynamic": lambda: DynamicCache(config=original().config),
        "static": lambda: StaticCache(config=original().config, max_cache_len=32),
        "tuple": lambda: ((torch.zeros(1, 2, 1, 8),) * 2,) * 4,
    }
    name = {"dynamic": "DynamicCache", "static": "StaticCache", "tuple": "tuple"}[kind]
    with refused(TypeError, "takes a KVCache", f"got a {name}", "new_cache(model)", model=shared):
        shared(ids, past_key_values=caches[kind]())
    if kind != "tuple":  # generate refuses tuples itself
        with refused(TypeError, "takes a KVCache", f"got a {name}", "new_cache(model)", model=shared):
            greedy(shared, ids, past_key_values=caches[kind]())


def test_a_foreign_cache_for_one_kv_head():
    """With one KV head the zeros of a skipped projection have the right shape, so that nothing else would notice."""
    model = tiny_model("llama", num_key_value_heads=1)
    patch_model(model, KVSharer(plan=PLAN))
    with refused(TypeError, "takes a KVCache", model=model):
        model(random_ids(length=8), past_key_values=DynamicCache(config=model.config))


def test_the_cache_of_another_plan(shared, model):
    foreign = KVCache(CacheSpec.full((None,) * 4))
    for run in (shared, lambda ids, **kwargs: greedy(shared, ids, **kwargs)):
        with refused(ValueError, "another plan", "new_cache(model)", model=shared):
            run(random_ids(length=8), past_key_values=foreign)
    deeper = KVCache(CacheSpec((None,) * 5, "", SharingPlan((0, 0, 2, 2, 4)), (DenseCodec(),) * 5))
    with refused(ValueError, "another model", "new_cache(model)", model=shared):
        shared(random_ids(length=8), past_key_values=deeper)


def test_the_cache_of_another_model(model):
    """Equal plans do not make caches of different weights interchangeable."""
    other = patch_model(tiny_model("llama", seed=1))
    patch_model(model)
    cache = other(random_ids(length=8)).past_key_values
    with refused(ValueError, "another model", "new_cache(model)", model=model):
        model(random_ids(length=2), past_key_values=cache)


def test_a_question_without_the_context_that_was_read(model):
    patch_model(model, "knorm", budget=0.5)
    cache = compress(model, random_ids(length=20))
    with refused(ValueError, "go on after the 20 that the cache has read", "torch.cat", model=model):
        greedy(model, random_ids(length=4), past_key_values=cache)


def test_an_unpatched_model_refuses_our_cache_or_agrees(model):
    """A cache of ours in a model without our attention function must not give a wrong result in silence."""
    cache = new_cache(patch_model(copy.deepcopy(model)))
    ids = random_ids(length=8)
    try:
        actual = model(ids, past_key_values=cache).logits
    except (TypeError, AttributeError, ValueError, RuntimeError):
        return
    torch.testing.assert_close(actual, model(ids).logits)


@pytest.mark.parametrize("method", [None, "shared"], ids=["none", "shared"])
def test_a_4d_mask_with_a_cache(model, method):
    patch_model(model, None if method is None else KVSharer(plan=PLAN))
    ids = random_ids(length=8)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    with refused(NotImplementedError, "4-D attention mask", "2-D", "use_cache=False", model=model):
        model(ids, attention_mask=mask, past_key_values=new_cache(model))
    with refused(NotImplementedError, "4-D attention mask", model=model):
        model(ids, attention_mask=mask)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, attention_mask=mask, use_cache=False).logits, expected)


def test_output_attentions(shared):
    with refused(NotImplementedError, "attention weights", "unpatch_model", model=shared):
        shared(random_ids(length=8), output_attentions=True)
    with refused(NotImplementedError, "attention weights", "unpatch_model", model=shared):
        greedy(shared, random_ids(length=8), output_attentions=True, return_dict_in_generate=True)


def test_output_attentions_in_the_configuration(model):
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    patch_model(model, KVSharer(plan=PLAN))
    with pytest.raises(NotImplementedError, match="unpatch_model"):
        model(random_ids(length=8))


@pytest.mark.parametrize("implementation", ["static", "quantized", "offloaded"])
def test_another_cache_implementation(shared, implementation):
    words = ("makes its own cache", f"'{implementation}'", "unpatch_model")
    with refused(ValueError, *words, model=shared):
        greedy(shared, random_ids(length=8), cache_implementation=implementation)


def test_changing_the_attention_of_a_patched_model(shared):
    ids = random_ids(length=8)
    expected = greedy(shared, ids)
    name = shared.config._attn_implementation
    shared.set_attn_implementation("eager")
    for run in (shared, lambda ids: shared(ids, use_cache=False), lambda ids: greedy(shared, ids)):
        with pytest.raises(RuntimeError, match="changed to 'eager'") as error:
            run(ids)
        assert "unpatch_model first" in str(error.value) and "patch again" in str(error.value)
    shared.set_attn_implementation(name)
    assert torch.equal(greedy(shared, ids), expected)
    shared.set_attn_implementation("eager")
    assert torch.equal(greedy(unpatch_model(shared), ids), greedy(original(), ids))


def test_crop_of_more_than_there_is(shared):
    cache = shared(random_ids(length=8)).past_key_values
    cache.crop(-50)
    assert cache.get_seq_length() == 0


def test_a_report_on_something_else():
    with refused(TypeError, "KVCache", "DynamicCache"):
        report(DynamicCache())


def test_a_prompt_that_is_not_copied_as_announced(model):
    patch_model(model)
    cache = new_cache(model)
    cache.expect(8, copies=3)
    with refused(ValueError, "3 copies", "4 rows"):
        model(random_ids(batch=4, length=8), past_key_values=cache)


@pytest.mark.parametrize("given", ["a text", [1, 2, 3]])
def test_a_context_that_is_no_tensor(model, given):
    patch_model(model, "streamingllm", budget=8)
    with pytest.raises(TypeError, match=rf"must be a tensor .*, got {type(given).__name__}; a tokenizer makes one"):
        compress(model, given)
