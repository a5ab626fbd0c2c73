"""Layers with RoPE and layers without it (SmolLM3) do not take each other's keys and values."""

import pytest
import torch

from hf_kvcache import KVSharer, SharingPlan, new_cache, patch_model
from hf_kvcache.api import attach_plan
from hf_kvcache.planning.share import Sharing
from hf_kvcache.sharing import ResidualPlan
from hf_kvcache.spec import LayerKind
from hf_kvcache.testing import random_ids, sharing_maps, tiny_model
from tests.forward import close, logits
from tests.methods.yoco import shake

# the last of every four layers has no RoPE
UNROTATED = {3, 7}
METHODS = {
    "yoco": {},
    "yoco++": {},
    "kvsharer": {"share": 0.6, "threshold": -1.0, "order": "dissimilar", "heal": False},
}


def fresh(family="smollm3"):
    return tiny_model(family, num_hidden_layers=8)


def patched(method, options):
    if method == "kvsharer":
        options = {**options, "calibration": random_ids(batch=30, length=64)}
    return shake(patch_model(fresh(), method, **options))


def mixes(pairs):
    return any((layer in UNROTATED) != (source in UNROTATED) for layer, source in pairs)


@pytest.mark.parametrize(("method", "options"), METHODS.items())
def test_only_distances_matter(method, options):
    model, ids = patched(method, options), random_ids(length=20)
    plan = new_cache(model).spec.sharing
    assert plan.consumers and not mixes(enumerate(plan.source_layers))
    here = torch.arange(20)[None]
    close(logits(model, ids, position_ids=here + 100), logits(model, ids, position_ids=here))


def test_a_plan_that_mixes_them_is_refused():
    with pytest.raises(ValueError, match=r"layer 3 has .* no RoPE and cannot take the KV of layer 2, .* and RoPE"):
        patch_model(fresh(), KVSharer(plan=SharingPlan((0, 1, 2, 2, 4, 5, 6, 7))))
    added = ResidualPlan((0, 0, 0, 0, 4, 5, 6, 7), 35.0)
    with pytest.raises(ValueError, match=r"layer 3 .* layer 0, .* share within one layer type"):
        attach_plan(fresh(), SharingPlan((0, 1, 2, 3, 2, 2, 2, 3), residual=added, part_of_model=True))


@pytest.mark.parametrize("family", ["smollm3", "llama"])
def test_the_neighbour_that_is_priced_is_of_the_same_kind(family):
    found = Sharing(fresh(family), None, random_ids(), range(8)).candidates
    pairs = {"smollm3": [(1, 0), (2, 1), (4, 2), (5, 4), (6, 5), (7, 3)], "llama": [(n + 1, n) for n in range(7)]}
    assert found == pairs[family]


def test_pairs_for_tests_do_not_mix():
    assert not any(mixes(pairs) for pairs in sharing_maps(fresh()).values())


def test_families_where_the_window_says_it_all():
    cohere = new_cache(patch_model(tiny_model("cohere2"), None)).spec.kinds
    assert cohere == (LayerKind(8), LayerKind(None, rotated=False)) * 2
    llama = new_cache(patch_model(tiny_model("llama"), None)).spec.kinds
    assert llama == (LayerKind(None),) * 4
