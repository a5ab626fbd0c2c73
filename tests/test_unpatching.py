"""What the user did to a model, before it was patched or since, is there after `unpatch_model` and another patch."""

import copy
import pickle

import pytest
import torch

from hf_kvcache import KVSharer, SharingPlan, compile_decode, patch_model, unpatch_model
from hf_kvcache.patches.attach import METHODS, attached
from hf_kvcache.testing import model_state, random_ids, tiny_model


def own(*args, **kwargs):
    """A method that the user put on a model."""


@pytest.mark.parametrize(
    "how", [unpatch_model, lambda model: unpatch_model(copy.deepcopy(model))], ids=["it", "a copy"]
)
@pytest.mark.parametrize("name", METHODS)
def test_methods_on_the_instance_come_back(name, how):
    model = tiny_model("llama")
    setattr(model, name, own)
    model = how(patch_model(patch_model(model), "yoco"))
    assert {method: model.__dict__.get(method) for method in METHODS} == {**dict.fromkeys(METHODS), name: own}


def test_a_changed_configuration_stays_changed():
    model = patch_model(tiny_model("llama"))
    original = attached(model).original_config
    attention = original._attn_implementation
    model.resize_token_embeddings(120, mean_resizing=False)
    model.config.pad_token_id, model.config.of_the_user = 7, [1, 2]
    for method in ("snapkv", "turboquant"):
        patch_model(model, method)
        assert (model.config.vocab_size, model.config.pad_token_id, model.config.of_the_user) == (120, 7, [1, 2])
    unpatch_model(model)
    assert model.config is original and original._attn_implementation == attention
    assert (original.vocab_size, original.pad_token_id, original.of_the_user) == (120, 7, [1, 2])
    assert len(model.get_input_embeddings().weight) == 120
    with torch.no_grad():
        assert model(random_ids(vocabulary=120)).logits.shape[-1] == 120


def test_what_the_original_was_given_meanwhile_is_not_taken_back():
    model = patch_model(tiny_model("llama"))
    attached(model).original_config.eos_token_id = 9
    assert unpatch_model(model).config.eos_token_id == 9


@pytest.mark.parametrize(
    "kept", [lambda model: model, lambda model: pickle.loads(pickle.dumps(model))], ids=["", "pickled"]
)
def test_a_patch_that_fails_leaves_a_compiled_model_compiled(kept):
    model = kept(compile_decode(patch_model(tiny_model("llama"), "snapkv")))
    with pytest.raises(ValueError, match="for a model of 7 layers"):
        patch_model(model, KVSharer(plan=SharingPlan.from_pairs(7, [(3, 1)])))
    assert attached(model).compiled is not None
    before = model_state(tiny_model("llama"))
    assert before.attributes[""] == model_state(unpatch_model(model)).attributes[""]
