"""Wrong input raises the right error, with what was expected, what was given and what to do, and changes nothing."""

import copy
from functools import cache as memoize
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, StaticCache

from hf_kvcache import KVSharer, SharingPlan, is_patched, new_cache, patch_model, report, unpatch_model
from hf_kvcache.cache import KVCache
from hf_kvcache.codecs import DenseCodec
from hf_kvcache.fingerprint import fingerprint
from hf_kvcache.spec import CacheSpec
from hf_kvcache.testing import greedy, model_state, random_ids, tiny_model

PLAN = SharingPlan((0, 0, 2, 2))


@memoize
def original():
    return tiny_model("llama")


@pytest.fixture
def model():
    return copy.deepcopy(original())


@pytest.fixture
def shared(model):
    return patch_model(model, KVSharer(plan=PLAN))


class refused:
    """Expects an error that says all of `words`, and the model afterwards as it was before."""

    def __init__(self, kind: type[Exception], *words: str, model=None):
        self.kind, self.words, self.model = kind, words, model

    def __enter__(self):
        self.before = None if self.model is None else model_state(self.model)
        self.patched = self.model is not None and is_patched(self.model)

    def __exit__(self, kind, error, traceback):
        assert error is not None, f"expected {self.kind.__name__}, and nothing was raised"
        if not isinstance(error, self.kind):
            return False
        missing = [word for word in self.words if word not in str(error)]
        assert not missing, f"{missing} not in: {error}"
        if self.model is not None:
            assert is_patched(self.model) == self.patched
            self.before.assert_equal(model_state(self.model))
        return True


# what patch_model is told


def test_unknown_method(model):
    with refused(ValueError, "unknown method 'kvsharr'", "available", "kvsharer", "offload", model=model):
        patch_model(model, "kvsharr")
    with refused(ValueError, "unknown method 'snap'", model=model):
        patch_model(model, "kvsharer + snap", plan=PLAN)
    with refused(ValueError, "unknown method ''", model=model):
        patch_model(model, "")


@pytest.mark.parametrize(
    "method", [3, [KVSharer], [None], {"kvsharer": 1}.items()], ids=["int", "class", "none", "pair"]
)
def test_a_method_of_the_wrong_type(model, method):
    with refused(TypeError, "a method is a name or a Method instance", "got", model=model):
        patch_model(model, method)


def test_unknown_option(model):
    with refused(ValueError, "unknown option 'shar'", "valid options", "share", "threshold", model=model):
        patch_model(model, "kvsharer", shar=0.5)
    with refused(ValueError, "unknown option 'shar'", "none", model=model):
        patch_model(model, "offload", shar=0.5)
    with refused(ValueError, "unknown option 'bit'", model=model):
        patch_model(model, None, bit=4)


def test_option_of_a_method_that_is_not_named(model):
    with refused(ValueError, "'share' belongs to kvsharer", "offload", "name that method", model=model):
        patch_model(model, "offload", share=0.5)
    with refused(ValueError, "'share' belongs to kvsharer", "None", model=model):
        patch_model(model, None, share=0.5)


def test_option_beside_an_instance(model):
    with refused(ValueError, "'share' belongs to kvsharer", "set it on the instance", model=model):
        patch_model(model, KVSharer(plan=PLAN), share=0.5)


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
def test_share_outside_its_range(model, share):
    with refused(ValueError, "share must be a number in [0, 1)", str(share), model=model):
        patch_model(model, "kvsharer", share=share)


@pytest.mark.parametrize("share", ["0.5", None], ids=repr)
def test_share_of_the_wrong_type(model, share):
    with refused((TypeError, ValueError), "share must be a number in [0, 1)", repr(share), model=model):
        patch_model(model, "kvsharer", share=share)


@pytest.mark.parametrize("threshold", [-1.5, 2.0])
def test_threshold_outside_its_range(model, threshold):
    with refused(ValueError, "threshold", "[-1, 1]", str(threshold), model=model):
        patch_model(model, "kvsharer", threshold=threshold)


def test_unknown_order(model):
    with refused(ValueError, "order must be one of kl, dissimilar, similar, random", "'diss'", model=model):
        patch_model(model, "kvsharer", order="diss")


def test_two_methods_for_one_slot(model):
    with refused(ValueError, "'kvsharer' sets the slot 'sharing'", "use one of them", model=model):
        patch_model(model, [KVSharer(plan=PLAN), KVSharer(plan=PLAN)])


# plans


def test_plan_of_another_model(model):
    plan = SharingPlan((0, 0, 2, 2), fingerprint=fingerprint(tiny_model("llama", seed=1)))
    with refused(ValueError, "was made for the model", fingerprint(model), "calibrate a plan", model=model):
        patch_model(model, "kvsharer", plan=plan)
    assert is_patched(patch_model(model, "kvsharer", plan=SharingPlan((0, 0, 2, 2), fingerprint=fingerprint(model))))


@pytest.mark.parametrize("depth", [3, 5])
def test_plan_of_another_depth(model, depth):
    with refused(ValueError, f"{depth} layers", "has 4", "calibrate a plan", model=model):
        patch_model(model, "kvsharer", plan=SharingPlan((0,) * depth))


def test_plan_across_layer_types():
    gemma = tiny_model("gemma2")
    with refused(ValueError, "layer 1", "window None", "layer 0", "window 8", "one layer type", model=gemma):
        patch_model(gemma, "kvsharer", plan=SharingPlan((0, 0, 2, 3)))


@pytest.mark.parametrize(
    ("source_layers", "words"),
    [
        ((1, 0, 2, 3), ("layer 0 reads layer 1", "earlier layer", "swap the pair")),
        ((0, 0, 1, 3), ("layer 2 reads layer 1", "reads layer 0 itself", "resolve the chain")),
        ((0, 1, 2, 4), ("source_layers[3]", "below 4", "got 4")),
        ((0, -1, 2, 3), ("source_layers[1]", "got -1")),
    ],
    ids=["cycle", "unresolved", "beyond", "negative"],
)
def test_plan_that_is_no_map(source_layers, words):
    with refused(ValueError, *words):
        SharingPlan(source_layers)


@pytest.mark.parametrize("pair", [(0, 1), (2, 2), (4, 0), (1, -1)], ids=str)
def test_pair_that_cannot_share(pair):
    with refused(ValueError, "(consumer, source)", "0 <= source < consumer < 4", f"got {pair}"):
        SharingPlan.from_pairs(4, [pair])


def test_plan_that_heals_what_is_no_linear(model):
    plan = SharingPlan((0, 0, 2, 2), healed={"layers.1.input_layernorm": torch.ones(48, 48)})
    with refused(NotImplementedError, "layers.1.input_layernorm", "LlamaRMSNorm", "heal=False", model=model):
        patch_model(model, "kvsharer", plan=plan)


def test_plan_that_heals_with_another_shape(model):
    plan = SharingPlan((0, 0, 2, 2), healed={"layers.1.self_attn.o_proj": torch.ones(48, 49)})
    with refused(ValueError, "layers.1.self_attn.o_proj", "(48, 49)", "(48, 48)", "calibrate", model=model):
        patch_model(model, "kvsharer", plan=plan)


def test_plan_that_heals_what_is_not_there(model):
    plan = SharingPlan((0, 0, 2, 2), healed={"layers.1.self_attn.w_o": torch.ones(48, 48)})
    with refused((ValueError, NotImplementedError, AttributeError), "w_o", model=model):
        patch_model(model, "kvsharer", plan=plan)


def test_plan_file_that_is_missing(model, tmp_path):
    with refused(FileNotFoundError, "missing.safetensors", "calibrate", model=model):
        patch_model(model, "kvsharer", plan=tmp_path / "missing.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_plan_file_that_is_truncated(model, tmp_path, kept):
    path = tmp_path / "plan.safetensors"
    SharingPlan((0, 0, 2, 2), healed={"layers.1.self_attn.o_proj": torch.eye(48)}).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with refused(ValueError, str(path), "calibrate", model=model):
        patch_model(model, "kvsharer", plan=path)


def test_plan_file_that_is_something_else(model, tmp_path):
    from safetensors.torch import save_file

    weights = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(3)}, weights)
    with refused(ValueError, str(weights), "format", "sharing_plan", "calibrate", model=model):
        patch_model(model, "kvsharer", plan=weights)
    text = tmp_path / "plan.json"
    text.write_text('{"source_layers": [0, 0, 2, 2]}' * 9)
    with refused(ValueError, str(text), "calibrate", model=model):
        patch_model(model, "kvsharer", plan=str(text))
    with refused((ValueError, OSError), str(tmp_path), model=model):
        patch_model(model, "kvsharer", plan=tmp_path)


# calibration


def test_calibration_text_that_is_too_short(model):
    tokenizer = lambda text, **_: {"input_ids": [3] * 100}  # noqa: E731
    words = ("too short", "30 windows of 64 tokens", "got 1 (100 tokens)", "give more text")
    with refused(ValueError, *words, model=model):
        patch_model(model, KVSharer(calibration=["a short text"]), tokenizer=tokenizer)


def test_calibration_without_a_tokenizer(model):
    with refused(ValueError, "needs a tokenizer", "tokenizer=", "[N, T]", "plan", model=model):
        patch_model(model, "kvsharer")


def test_calibration_file_that_is_missing(model, tmp_path):
    tokenizer = lambda text, **_: {"input_ids": [3] * 100}  # noqa: E731
    with refused(FileNotFoundError, "calibration", "nowhere.txt", model=model):
        patch_model(model, "kvsharer", calibration=str(tmp_path / "nowhere.txt"), tokenizer=tokenizer)


def test_calibration_without_texts(model):
    tokenizer = lambda text, **_: {"input_ids": [3] * 100}  # noqa: E731
    with refused(ValueError, "too short", "got 0", model=model):
        patch_model(model, KVSharer(calibration=[]), tokenizer=tokenizer)


# models


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


# what a patched model is given


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


def test_the_slot_of_a_method():
    spec = CacheSpec.full((None,) * 4)
    with refused(ValueError, "slot must be one of sharing, scorer, allocator, selector, codec, store", "'colour'"):
        spec.fill("colour", 3, by="painter")


def test_a_prompt_that_is_not_copied_as_announced(model):
    patch_model(model)
    cache = new_cache(model)
    cache.expect(8, copies=3)
    with refused(ValueError, "3 copies", "4 rows"):
        model(random_ids(batch=4, length=8), past_key_values=cache)


def test_the_fixture_notices_changes(model):
    """`refused` and `model_state` themselves can fail."""
    state = model_state(model)
    model.extra = SimpleNamespace()
    with pytest.raises(AssertionError, match="attributes changed"):
        state.assert_equal(model_state(model))
    del model.extra
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(AssertionError, match=r"lm_head\.weight in the state dict changed"):
        state.assert_equal(model_state(model))
    with pytest.raises(AssertionError, match="nothing was raised"), refused(ValueError):
        pass
    with pytest.raises(AssertionError, match="'plan'"), refused(ValueError, "plan"):
        raise ValueError("something else")
