"""What cannot be reused is not: pages of other weights, plans and tokens, and prompts that are not plain ids."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_kvcache import Sequential, compress, patch_model
from hf_kvcache.fingerprint import SAMPLED_ROWS
from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.testing import greedy, tiny_model
from tests.sequential.hits.compositions import PAGE, adopted, cold, original, prompts, stored


def test_pages_are_never_another_models(store):
    ids = prompts()[0]
    model = stored("llama", store)
    assert adopted(model, store, ids) == 0
    assert adopted(model, store, ids) == 44
    assert adopted(stored("qwen2", store), store, ids) == 0
    other = patch_model(tiny_model("llama", seed=1), Sequential(store=store))
    assert adopted(other, store, ids) == 0
    half = patch_model(tiny_model("llama").to(torch.bfloat16), Sequential(store=store))
    assert adopted(half, store, ids) == 0
    assert adopted(half, store, ids) == 44
    # another plan computes other keys behind the first layer that it changes
    assert adopted(stored("llama", store, "sharer"), store, ids) == 0
    assert adopted(stored("llama", store, codec="tokens"), store, ids) == 0


@pytest.mark.parametrize(
    "family, setting",
    [
        ("llama", {"rms_norm_eps": 1e-2}),
        ("gemma2", {"attn_logit_softcapping": 0.5}),
        ("qwen3_moe", {"num_experts_per_tok": 1}),
    ],
)
def test_pages_are_never_of_other_settings(family, setting, store):
    ids = prompts()[0]
    adopted(stored(family, store), store, ids)
    model = patch_model(tiny_model(family, **setting), Sequential(store=store))
    assert model.model.get_input_embeddings().weight.equal(original(family).get_input_embeddings().weight)
    assert adopted(model, store, ids) == 0
    assert adopted(model, store, ids) == 44


@pytest.mark.parametrize("place", ["layers.1", "layers.2.self_attn.k_proj", "embed_tokens", "", "everywhere"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_of_others_are_not_trusted(place, kind, store):
    """What steers a layer is neither in the weights nor in the settings."""
    ids, model = prompts()[0], stored("llama", store)
    adopted(model, store, ids)
    if place == "everywhere":
        register = getattr(torch.nn.modules.module, f"register_module_{kind}_hook")
    else:
        register = getattr(model.model.get_submodule(place), f"register_{kind}_hook")
    handle = register(lambda *_: None)
    try:
        written = store.counts.written_pages
        other = torch.cat([ids[:, :20], ids[:, :20]], dim=1)
        assert adopted(model, store, ids) == adopted(model, store, other) == 0
        assert store.counts.written_pages == written
    finally:
        handle.remove()
    assert adopted(model, store, ids) == 44


def test_hooks_that_only_record_are_no_reason(store):
    ids, model = prompts()[0], stored("llama", store)
    model.enable_input_require_grads()
    adopted(model, store, ids)
    assert adopted(model, store, ids, output_hidden_states=True, return_dict_in_generate=True) == 44
    assert model.model.layers[0]._forward_hooks
    assert adopted(model, store, ids) == 44


@pytest.mark.parametrize("place", ["model.layers.1.mlp.down_proj.weight", "model.layers.3.self_attn.q_proj.weight"])
@pytest.mark.parametrize(
    "way", [lambda weight: weight.mul_(1.01), lambda weight: weight.data.mul_(1.01)], ids=["", "data"]
)
def test_training_forgets_the_pages(place, way, store):
    ids, model = prompts()[0], stored("llama", store)
    adopted(model, store, ids)
    assert adopted(model, store, ids) == 44
    with torch.no_grad():
        way(model.get_parameter(place))
    assert adopted(model, store, ids) == 0
    assert adopted(model, store, ids) == 44


def test_a_step_on_one_row_of_the_embedding_forgets_the_pages(store):
    ids, model = prompts()[0], stored("llama", store)
    weight = model.get_input_embeddings().weight
    # whose row a sample of as many numbers as of other tensors misses
    sampled = torch.arange(SAMPLED_ROWS) * (weight.numel() - 1) // (SAMPLED_ROWS - 1) // weight.shape[1]
    token = next(token for token in ids[0].tolist() if token not in sampled.tolist())
    adopted(model, store, ids)
    assert adopted(model, store, ids) == 44
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    weight.grad = torch.zeros_like(weight)
    weight.grad[token] = 1.0
    optimizer.step()
    assert adopted(model, store, ids) == 0
    assert adopted(model, store, ids) == 44


def test_adapters_have_pages_of_their_own(store):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    model = patch_model(peft.get_peft_model(tiny_model("llama"), config).eval(), Sequential(store=store))
    ids = prompts()[0]
    assert adopted(model, store, ids) == 0
    assert adopted(model, store, ids) == 44
    with model.disable_adapter():
        assert adopted(model, store, ids) == 0
    assert adopted(model, store, ids) == 44


def test_adapters_that_rows_choose_have_no_pages(store):
    """PEFT tells the layers which adapter a row wants by hooks; nothing else of the model changes."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama"), config, adapter_name="one").eval()
    model.add_adapter("two", config)
    patch_model(model, Sequential(store=store))
    ids = prompts()[0]
    adopted(model, store, ids)
    for name in ("one", "two", "__base__"):
        assert adopted(model, store, ids, adapter_names=[name]) == 0
    assert adopted(model, store, ids) == 44
    assert store.counts.written_pages == 6


def test_what_cannot_be_reused_soundly_is_computed(store):
    ids, model = prompts()[0], stored("llama", store)
    adopted(model, store, ids)
    reference = cold("llama")
    embeds = model.get_input_embeddings()(ids)
    for given in ({"inputs_embeds": embeds}, {"input_ids": ids, "position_ids": torch.arange(45)[None] + 3}):
        before = store.counts.adopted_tokens
        actual, expected = (
            m.generate(**given, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
            for m in (model, reference)
        )
        assert torch.equal(actual, expected)
        assert store.counts.adopted_tokens == before
    before = store.counts.adopted_tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compress(model, ids)
    assert store.counts.adopted_tokens == before
    right = torch.ones_like(ids)
    right[:, -5:] = 0
    assert adopted(model, store, ids, attention_mask=right) == 0
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    dynamic_model = patch_model(tiny_model("llama", rope_parameters=dynamic), Sequential(store=store))
    assert adopted(dynamic_model, store, ids) == adopted(dynamic_model, store, ids) == 0


def test_a_page_of_other_tokens_is_not_adopted(store, monkeypatch):
    """Where what finds pages says that a fork shares more than it does."""
    model, reference = stored("llama", store), cold("llama")
    first, second, _ = prompts()
    greedy(model, first)
    store.flush()
    found = PrefixStore.match

    def lie(self, identity, ids, **kwargs):
        matches = found(self, identity, ids, **kwargs)
        return [replace(match, length=min(PAGE, len(ids) - match.start)) for match in matches]

    monkeypatch.setattr(PrefixStore, "match", lie)
    assert torch.equal(greedy(model, second), greedy(reference, second))
    assert store.counts.adopted_tokens == 32


def test_tokens_pages_are_recognised_and_computed_again(store):
    model, reference, ids = stored("llama", store, codec="tokens"), cold("llama"), prompts()[0]
    for _ in range(2):
        assert torch.equal(greedy(model, ids), greedy(reference, ids))
        store.flush()
    assert store.counts.written_pages == 6 and store.counts.adopted_tokens == 0
    entries = list(store.entries())
    assert {entry.codec for entry in entries} == {"tokens"}
    assert np.array_equal(np.concatenate([e.ids for e in sorted(entries, key=lambda e: e.start)]), ids[0].numpy())
