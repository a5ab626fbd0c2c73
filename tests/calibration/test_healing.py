"""Healing: the regressions solve what they say, the divergence falls on other texts, and the model is left alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_kvcache import KVSharer, SharingPlan, find_plan, patch_model, unpatch_model
from hf_kvcache.calibration.healing import Ridge
from hf_kvcache.calibration.query_fit import query_with, scores
from hf_kvcache.measure import continuation, kl_divergence
from hf_kvcache.testing import model_state, random_ids, tiny_model

CALIBRATION = random_ids(batch=40, length=64, seed=3)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "starcoder2", "cohere", "qwen3_moe")


def healed_plan(model, share=0.25) -> SharingPlan:
    """The plan of the KL order, healed, on random tokens."""
    return find_plan(model, KVSharer(share=share, calibration=CALIBRATION, threshold=-1.0))


def divergence(model, plan, ids) -> float:
    """Mean KL of the continuation under a plan."""
    full = continuation(model, ids, 20)
    patch_model(model, KVSharer(plan=plan))
    shared = continuation(model, ids, 20)
    unpatch_model(model)
    return kl_divergence(full, shared)


def test_ridge_is_the_minimiser():
    """At the minimum of ||X W^T - Y||^2 + pull ||W - W0||^2 the gradient is zero."""
    given, wanted, old = torch.randn(50, 7), torch.randn(50, 5), torch.randn(5, 7)
    fit = Ridge(old)
    fit.add(given[:20].view(4, 5, 7), wanted[:20].view(4, 5, 5))
    fit.add(given[20:], wanted[20:])
    weight = fit.solve(strength=0.1).double()
    pull = 0.1 * (given.T @ given).diagonal().mean().double()
    gradient = (given.double() @ weight.T - wanted.double()).T @ given.double() + pull * (weight - old.double())
    assert gradient.abs().max() < 1e-4


def test_a_strong_pull_keeps_the_old_weights():
    fit = Ridge(old := torch.randn(5, 7))
    fit.add(torch.randn(50, 7), torch.randn(50, 5))
    torch.testing.assert_close(fit.solve(strength=1e8), old, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_divergence_falls_on_other_text(family):
    model = tiny_model(family)
    plan = healed_plan(model)
    assert plan.healed
    unhealed = replace(plan, healed={})
    ids = [random_ids(length=60, seed=seed) for seed in (20, 21, 22)]
    before, after = (sum(divergence(model, p, row) for row in ids) for p in (unhealed, plan))
    assert after < 0.9 * before


def test_only_consumers_are_refitted():
    model = tiny_model("llama")
    plan = healed_plan(model, share=0.5)
    expected = {f"layers.{i}.self_attn.{name}" for i in plan.consumers for name in ("q_proj", "o_proj")}
    assert set(plan.healed) == expected


def test_fused_projections_heal_their_outputs_only():
    plan = healed_plan(tiny_model("phi3"))
    assert [name.rpartition(".")[2] for name in plan.healed] == ["o_proj"]


def test_healing_is_deterministic_and_survives_a_file(tmp_path):
    model = tiny_model("llama")
    plan, again = healed_plan(model), healed_plan(model)
    assert all(torch.equal(plan.healed[name], again.healed[name]) for name in plan.healed)
    plan.save(tmp_path / "plan.safetensors")
    loaded = SharingPlan.load(tmp_path / "plan.safetensors")
    ids = random_ids(length=60, seed=20)
    assert divergence(model, loaded, ids) == divergence(model, plan, ids)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_calibration_leaves_the_model_as_it_was(family):
    model = tiny_model(family)
    before = model_state(model)
    plan = healed_plan(model)
    before.assert_equal(model_state(model))
    patch_model(model, KVSharer(plan=plan))
    unpatch_model(model)
    before.assert_equal(model_state(model))


def test_state_dict_of_a_healed_model_is_the_original():
    model = tiny_model("llama")
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch_model(model, KVSharer(plan=healed_plan(model)))
    patched = model.state_dict()
    assert patched.keys() == original.keys()
    assert all(torch.equal(patched[name], tensor) for name, tensor in original.items())


def test_tied_output_projections_are_not_corrupted():
    model = tiny_model("llama")
    layers = model.model.layers
    layers[2].self_attn.o_proj.weight = layers[3].self_attn.o_proj.weight
    tied = layers[3].self_attn.o_proj.weight.clone()
    plan = find_plan(model, KVSharer(plan=None, share=0.25, calibration=CALIBRATION, threshold=-1.0))
    patch_model(model, KVSharer(plan=plan))
    unpatch_model(model)
    assert layers[2].self_attn.o_proj.weight is layers[3].self_attn.o_proj.weight
    assert torch.equal(layers[3].self_attn.o_proj.weight, tied)


def test_a_projection_that_is_no_plain_linear_is_refused():
    class Quantised(nn.Linear):
        """Stands for a quantised layer."""

    model = tiny_model("llama")
    for layer in model.model.layers:
        old = layer.self_attn.o_proj
        layer.self_attn.o_proj = Quantised(old.in_features, old.out_features, bias=False)
    before = model_state(model)
    with pytest.raises(NotImplementedError, match=r"o_proj of layer \d.* is a Quantised on cpu.* use heal=False"):
        patch_model(model, "kvsharer", calibration=CALIBRATION)
    before.assert_equal(model_state(model))


def test_the_query_fit_sees_the_models_own_queries():
    """With the old weight the fit's query is the one that the untouched forward attends with."""
    from hf_kvcache.attention import SharingContext
    from hf_kvcache.calibration.healing import Stream
    from hf_kvcache.calibration.probe import ModelProbe
    from hf_kvcache.patches.adapters import find_adapter
    from hf_kvcache.patches.compat import sliding_windows
    from hf_kvcache.spec import CacheSpec

    model = tiny_model("qwen3")
    probe = ModelProbe(model, find_adapter(model), CacheSpec.full(sliding_windows(model)))
    probe.use_texts(CALIBRATION, 8, 64)
    with torch.no_grad(), probe.attached():
        stream = Stream(probe, probe.batch(CALIBRATION[:4]), SharingPlan.identity(4))
        attention = probe.layers[0].self_attn
        stream.context = SharingContext(SharingPlan.identity(4))
        probe.run_layer(0, stream.healed, stream.batch, stream.context)
        call, key, _ = stream.untouched_example(0, attention.o_proj)
        stream.healed = stream.batch.hidden
        example = stream.attention_example(0, attention, call, key)
        query = query_with(attention, "q_proj", attention.q_proj.weight, example)
        torch.testing.assert_close(query, call.query)
        weights = scores(call, query, key, torch.tensor([5])).softmax(-1)
        assert weights.shape == (4, 6, 1, 64) and float(weights[..., 6:].sum()) == 0
