"""The probe runs the model layer by layer as its own forward does, from the first layer that a plan changes."""

import pytest
import torch

from hf_kvcache import KVSharer, SharingPlan, patch_model, unpatch_model
from hf_kvcache.api import make_probe
from hf_kvcache.calibration.healing import PairJudge
from hf_kvcache.calibration.probe import ModelProbe
from hf_kvcache.patches.adapters import find_adapter
from hf_kvcache.patches.compat import sliding_windows
from hf_kvcache.spec import CacheSpec
from hf_kvcache.testing import FAMILIES, model_state, random_ids, sharing_maps, tiny_model

IDS = random_ids(batch=5, length=24, seed=2)


def probe_of(model) -> ModelProbe:
    """A probe with the calibration batch set."""
    probe = ModelProbe(model, find_adapter(model), CacheSpec.full(sliding_windows(model)))
    probe.use_texts(IDS, 5, 24)
    return probe


@pytest.mark.parametrize("family", FAMILIES)
def test_final_hidden_is_that_of_a_full_forward(family):
    model = tiny_model(family)
    probe = probe_of(model)
    for pairs in sharing_maps(sliding_windows(model)).values():
        plan = SharingPlan.from_pairs(4, pairs)
        hidden = probe.final_hidden(plan)
        patch_model(model, KVSharer(plan=plan))
        with torch.no_grad():
            expected = model.model(IDS, use_cache=False).last_hidden_state
        unpatch_model(model)
        torch.testing.assert_close(hidden, expected)


# families that scale or cap their logits, with numbers that matter; the others as they are
LOGITS = {
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "gemma2": {"final_logit_softcapping": 3.0},
}


@pytest.mark.parametrize("family", [*FAMILIES, "yoco"])
def test_logits_are_the_models_own(family):
    model = tiny_model(family, **LOGITS.get(family, {}))
    before = model_state(model)
    with torch.no_grad():
        hidden, expected = model.model(IDS).last_hidden_state, model(IDS).logits
        torch.testing.assert_close(make_probe(model, None).logits(hidden), expected)
    before.assert_equal(model_state(model))


def test_a_decoder_is_read_out_by_its_embeddings():
    model = tiny_model("llama", tie_word_embeddings=True)
    with torch.no_grad():
        hidden, expected = model.model(IDS).last_hidden_state, model(IDS).logits
        torch.testing.assert_close(make_probe(model.model, None).logits(hidden), expected)


@pytest.mark.parametrize("family", LOGITS)
def test_pairs_are_judged_by_the_models_own_logits(family):
    model, ids = tiny_model(family, **LOGITS[family]), random_ids(batch=16, length=24)
    probe = make_probe(model, None)
    probe.use_texts(ids, 1, 24)
    with torch.no_grad(), probe.attached():
        judged = PairJudge(probe).full
    with torch.no_grad():
        expected = model(ids[4::5]).logits.log_softmax(-1)
    torch.testing.assert_close(torch.stack(judged), expected)


def test_a_plan_is_run_from_the_first_layer_that_it_changes():
    model = tiny_model("llama")
    probe = probe_of(model)
    runs = []
    for index, layer in enumerate(probe.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: runs.append(index))
    probe.final_hidden(SharingPlan.from_pairs(4, [(2, 1)]))
    assert runs == [2, 3]
    runs.clear()
    # the first two changes are known from the run before
    probe.final_hidden(SharingPlan.from_pairs(4, [(2, 1), (3, 0)]))
    assert runs == [3]
    runs.clear()
    probe.final_hidden(SharingPlan.identity(4))
    assert runs == []


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_average_kv_is_the_mean_over_rows(family):
    model = tiny_model(family)
    with torch.no_grad():
        cache = model(IDS[:, :6], use_cache=True).past_key_values
    probe = ModelProbe(model, find_adapter(model), CacheSpec.full(sliding_windows(model)))
    probe.use_texts(IDS[:, :6], 5, 6)
    for layer, (key, value) in zip(cache.layers, probe.average_kv(), strict=True):
        torch.testing.assert_close(key, layer.keys.mean(0))
        torch.testing.assert_close(value, layer.values.mean(0))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_the_model_is_left_as_it_was(family):
    model = tiny_model(family).train()
    before = model_state(model)
    probe = probe_of(model)
    probe.final_hidden(SharingPlan.from_pairs(4, [(3, 1)]))
    before.assert_equal(model_state(model))
    assert model.training


def test_asking_before_texts_are_set_raises():
    model = tiny_model("llama")
    probe = ModelProbe(model, find_adapter(model), CacheSpec.full(sliding_windows(model)))
    with pytest.raises(RuntimeError, match="call use_texts first"):
        probe.average_kv()
