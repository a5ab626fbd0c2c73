"""Models that cannot be patched are refused, and a second patch that fails leaves the first in force."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_kvcache import KVSharer, SharingPlan, is_patched, new_cache, patch_model, unpatch_model
from hf_kvcache.testing import greedy, model_state, random_ids
from tests.bad_input.refusals import PLAN, original, refused


def test_encoder_decoder_model():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 97}
    t5 = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes))
    with refused(NotImplementedError, "T5ForConditionalGeneration", "encoder-decoder", "decoder-only"):
        patch_model(t5)
    assert not is_patched(t5)


def test_unsupported_family():
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=97)
    gpt2 = AutoModelForCausalLM.from_config(config).eval()
    with refused(NotImplementedError, "'gpt2' has no adapter", "llama", "CONTRIBUTING.md", model=gpt2):
        patch_model(gpt2)


def test_something_that_is_no_transformers_model():
    with refused(TypeError, "transformers model", "Linear"):
        patch_model(torch.nn.Linear(2, 2))
    with refused(TypeError, "transformers model", "str"):
        patch_model("meta-llama/Llama-3.2-1B")


def test_a_llama_that_is_not_shaped_like_one(model):
    model.model.layers[2].self_attn.v_proj = torch.nn.Identity()
    with refused(NotImplementedError, "LlamaForCausalLM", "out_features", "CONTRIBUTING.md"):
        patch_model(model)
    del model.model.layers[2].self_attn.v_proj
    with refused(NotImplementedError, "LlamaForCausalLM", "v_proj", "CONTRIBUTING.md"):
        patch_model(model)
    assert not is_patched(model)


def test_model_without_weights():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(original().config)
    with refused(ValueError, "LlamaForCausalLM", "meta device", "load them first"):
        patch_model(model)
    assert not is_patched(model)


def test_unsupported_attention(model):
    before = model_state(model)
    model.set_attn_implementation("flex_attention")
    with refused(NotImplementedError, "'flex_attention' is not supported", "sdpa", "eager"):
        patch_model(model)
    assert not is_patched(model) and model.config._attn_implementation == "flex_attention"
    model.set_attn_implementation("sdpa")
    before.assert_equal(model_state(model))


# patching twice


def test_patching_a_patched_model_replaces_the_method(model):
    before = model_state(model)
    ids = random_ids(length=12)
    plain = greedy(model, ids)
    sharing = greedy(patch_model(model, KVSharer(plan=PLAN)), ids)
    assert not torch.equal(sharing, plain)
    patch_model(model, KVSharer(plan=SharingPlan((0, 1, 1, 3))))
    assert new_cache(model).spec.sharing.consumers == (2,)
    assert torch.equal(greedy(patch_model(model, None), ids), plain)
    before.assert_equal(model_state(unpatch_model(model)))


def test_a_failing_second_patch_leaves_the_first_in_force(shared):
    ids = random_ids(length=12)
    expected = greedy(shared, ids)
    for wrong in ("kvsharr", KVSharer(plan=SharingPlan((0, 0, 0))), KVSharer()):
        with pytest.raises(ValueError):
            patch_model(shared, wrong)
        assert is_patched(shared)
        assert new_cache(shared).spec.sharing.source_layers == PLAN.source_layers
        assert torch.equal(greedy(shared, ids), expected)
    assert torch.equal(greedy(unpatch_model(shared), ids), greedy(original(), ids))


def test_a_failing_second_patch_keeps_the_healed_weights(model):
    healed = {"layers.1.self_attn.o_proj": torch.randn(48, 48) / 7}
    ids = random_ids(length=12)
    expected = greedy(patch_model(model, KVSharer(plan=SharingPlan((0, 0, 2, 2), healed))), ids)
    with pytest.raises(ValueError):
        patch_model(model, KVSharer(plan=SharingPlan((0, 0, 0))))
    assert torch.equal(greedy(model, ids), expected)
    assert torch.equal(greedy(unpatch_model(model), ids), greedy(original(), ids))


def test_unpatching_a_model_that_is_not_patched(model):
    before = model_state(model)
    assert unpatch_model(model) is model
    before.assert_equal(model_state(model))


def test_new_cache_of_a_model_that_is_not_patched(model):
    with refused(ValueError, "LlamaForCausalLM is not patched", "patch_model", model=model):
        new_cache(model)


def test_a_failure_inside_a_method_restores_the_model(model):
    class Breaks(KVSharer):
        def apply(self, spec, probe):
            raise KeyboardInterrupt

    before = model_state(model)
    with pytest.raises(KeyboardInterrupt):
        patch_model(model, Breaks())
    before.assert_equal(model_state(model))
