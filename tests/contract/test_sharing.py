"""Law 17: cached generation under any sharing map is one uncached full pass."""

import random

import pytest
import torch
from transformers import DynamicCache

from hf_kvcache import KVSharer, SharingPlan, patch_model
from hf_kvcache.api import make_probe
from hf_kvcache.testing import FAMILIES, random_ids
from tests.contract.matrix import every_family, fresh, generate, methods_of, original
from tests.forward import close, logits


class SharedReference(DynamicCache):
    """An independent statement of sharing for one forward of an unpatched model: hand out the source's KV."""

    def __init__(self, config, source_layers):
        super().__init__(config=config)
        self.source_layers, self.handed_out = source_layers, {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.handed_out[layer_idx] = key_states, value_states
        return self.handed_out[self.source_layers[layer_idx]]


def random_plan(model, seed: int) -> SharingPlan:
    """A random map within layer types; chains come up and resolve."""
    choose, kinds = random.Random(seed), make_probe(model, None).kinds
    pairs = []
    for consumer in range(1, len(kinds)):
        sources = [source for source in range(consumer) if kinds[source] == kinds[consumer]]
        if sources and choose.random() < 0.6:
            pairs.append((consumer, choose.choice(sources)))
    return SharingPlan.from_pairs(len(kinds), pairs)


def assert_cached_is_full_pass(family: str, plan: SharingPlan):
    model = patch_model(fresh(family), KVSharer(plan=plan))
    prompt = random_ids(batch=2, length=14)
    tokens, cached, _ = generate(model, prompt, tokens=10)
    text = torch.cat([prompt, tokens], dim=1)
    with torch.no_grad():
        reference = SharedReference(original(family).config, plan.source_layers)
        full = original(family)(text, past_key_values=reference).logits
    close(cached, full[:, 13:-1])
    close(logits(model, text), full)
    close(logits(model, text, use_cache=False), full)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_cached_generation_is_one_full_pass(family, seed):
    plan = random_plan(original(family), seed=FAMILIES.index(family) + 100 * seed)
    assert_cached_is_full_pass(family, plan)


@every_family
@pytest.mark.parametrize("method", ["adjacent", "distant", "several"])
def test_cached_generation_is_one_full_pass_for_named_maps(family, method):
    assert_cached_is_full_pass(family, methods_of(original(family), method)[0].plan)


@pytest.mark.parametrize("seed", range(6))
def test_sharing_changes_the_result(seed):
    """Without this the laws above could hold for a sharing that does nothing."""
    model = fresh("llama")
    plan = random_plan(model, seed)
    ids = random_ids(length=14)
    shared = logits(patch_model(model, KVSharer(plan=plan)), ids)
    same = torch.allclose(shared, logits(original("llama"), ids), atol=1e-2)
    assert same == plan.is_identity
