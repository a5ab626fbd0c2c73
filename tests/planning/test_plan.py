"""Plans: what they say is what the cache holds, they survive a file, and a foreign or broken one is refused."""

import logging
from dataclasses import replace

import pytest
import torch

from hf_kvcache import SharingPlan, compress, is_patched, new_cache, patch_model, report, unpatch_model
from hf_kvcache.fingerprint import fingerprint
from hf_kvcache.methods.planned import without_measuring
from hf_kvcache.plan import CachePlan
from hf_kvcache.planning import solve
from hf_kvcache.testing import FAMILIES, greedy, random_ids, tiny_model
from tests.letters import Letters
from tests.planning.made_up import random_costs

KEPT = torch.tensor([[0.2, 0.6], [1.0, 0.4], [0.5, 0.5], [0.3, 0.9]])
BITS = torch.tensor([[8, 4], [4, 4], [4, 2], [16, 16]])
IDS = random_ids(1, 200)


# nothing is always kept by knorm, the first 4 tokens are by streamingllm and kvzip, the last 8 by rkv
@pytest.mark.parametrize("scorer", ["knorm", "streamingllm", "kvzip", "rkv"])
def test_every_head_and_layer_gets_what_the_plan_says(scorer):
    model = tiny_model("llama")
    plan = CachePlan(KEPT, BITS, scorer, fingerprint=fingerprint(model))
    patch_model(model, plan=plan, tokenizer=Letters())
    cache = compress(model, IDS)
    for layer, cached in enumerate(cache.layers):
        (segment,) = cached.segments
        assert list(segment.lengths[0]) == (200 * KEPT[layer]).round().int().tolist()
        widths = [getattr(segment.codec, name, 16) for name in ("key_bits", "value_bits")]
        assert widths == BITS[layer].tolist()


def test_a_head_keeps_no_less_than_its_scorer_always_does():
    model = tiny_model("llama")
    patch_model(model, plan=CachePlan(torch.tensor([[0.05, 0.8]]).repeat(4, 1), BITS, "snapkv"))
    assert all(layer.segments[0].lengths[0] == (64, 160) for layer in compress(model, IDS).layers)


def test_a_shared_layer_keeps_what_its_own_row_says():
    model = tiny_model("llama")
    sharing = SharingPlan.from_pairs(4, [(2, 0)], fingerprint=fingerprint(model))
    patch_model(model, plan=CachePlan(KEPT, BITS, "knorm", sharing))
    cache = compress(model, IDS)
    assert [cache.layers[layer].segments[0].lengths[0] for layer in (0, 1)] == [(40, 120), (200, 80)]


def test_a_summary_is_of_the_layers_that_a_plan_changes():
    assert CachePlan(KEPT, BITS, "knorm").summary() == (
        "knorm keeps 55% on average (20% to 100%); keys in 16 x 1, 8 x 1, 4 x 2 bits; "
        "values in 16 x 1, 4 x 2, 2 x 1 bits"
    )
    shared = CachePlan(KEPT[[0, 0, 1, 1]], BITS[[1, 1, 2, 2]], "knorm", SharingPlan.from_pairs(4, [(2, 1), (3, 1)]))
    assert shared.summary() == "shared layers 2<-1, 3<-1; knorm keeps 40% on average (20% to 60%); " + (
        "keys in 4 bits; values in 4 bits"
    )
    assert CachePlan.uniform(4, 2, 1.0, 16, 16).summary() == "4 of 4 layers as they are"


def test_layers_that_were_not_measured_are_not_in_the_summary():
    costs = replace(random_costs(), layers=(1, 3), num_layers=4)
    plan, _ = solve(costs, 256 / 68 * 1.2)
    assert plan.bits[[0, 2]].unique().tolist() == [16] and bool((plan.kept[[0, 2]] == 1).all())
    mean = float(plan.kept[[1, 3]].mean())
    assert f"knorm keeps {mean:.0%} on average" in plan.summary() and "2 of 4 layers as they are" in plan.summary()


def test_a_plan_survives_a_file(tmp_path):
    model = tiny_model("llama")
    sharing = SharingPlan.from_pairs(4, [(2, 1)], fingerprint=fingerprint(model))
    plan = CachePlan(KEPT, BITS, "knorm", sharing, fingerprint(model), {"why": "a test"})
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    loaded = CachePlan.load(path)
    assert torch.equal(loaded.kept, KEPT) and torch.equal(loaded.bits, BITS)
    assert loaded.scorer == "knorm" and loaded.settings == plan.settings
    assert loaded.sharing is not None and loaded.sharing.source_layers == sharing.source_layers
    tokens = greedy(patch_model(model, plan=plan), IDS)
    assert torch.equal(greedy(patch_model(unpatch_model(model), plan=str(path)), IDS), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_works_on_every_family(family):
    model = tiny_model(family)
    heads = model.config.num_key_value_heads
    plan = CachePlan.uniform(4, heads, 0.5, 8, 4, scorer="knorm")
    plain = greedy(model, IDS, tokens=4)
    assert greedy(patch_model(model, plan=plan), IDS, tokens=4).shape == plain.shape
    cache = compress(model, IDS)
    assert bool(cache.spec.evicting) == (report(cache).ratio > 1.05)
    assert torch.equal(greedy(unpatch_model(model), IDS, tokens=4), plain)


def test_a_plan_composes_with_a_selector_and_a_store():
    model = tiny_model("llama")
    plan = CachePlan(KEPT, BITS, "snapkv")
    patch_model(model, "criticalkv+offload", plan=plan)
    spec = new_cache(model).spec
    assert spec.selector.name == "criticalkv" and spec.scorer.name == "snapkv" and spec.store.name == "host"


def test_a_plan_that_keeps_everything_evicts_nothing():
    model = tiny_model("llama")
    patch_model(model, plan=CachePlan.uniform(4, 2, 1.0, 4, 4))
    assert new_cache(model).spec.scorer is None


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: CachePlan(KEPT, BITS[:3]), ValueError, "bits \\[layers, 2\\]"),
        (lambda: CachePlan(KEPT * 2, BITS), ValueError, "shares of a context"),
        (lambda: CachePlan(KEPT, BITS + 1), ValueError, "expected 2, 3, 4 or 8"),
        (lambda: CachePlan(KEPT, BITS, sharing=SharingPlan.identity(3)), ValueError, "its sharing 3"),
        (lambda: patch_model(tiny_model("llama"), plan=7), TypeError, "path of a saved one"),
        (lambda: patch_model(tiny_model("llama"), plan="missing"), FileNotFoundError, "hf-kvcache tune"),
        (
            lambda: patch_model(tiny_model("llama"), plan=CachePlan(KEPT, BITS, fingerprint="a-b")),
            ValueError,
            "made for the model a-b",
        ),
        (lambda: patch_model(tiny_model("llama"), plan=CachePlan(KEPT[:2], BITS[:2])), ValueError, "with 2 layers"),
        (lambda: patch_model(tiny_model("llama"), target_ratio=0.5), ValueError, "from 1 to 32"),
        (lambda: patch_model(tiny_model("llama"), target_ratio="8"), TypeError, "a number"),
        (
            lambda: patch_model(tiny_model("llama"), "snapkv", plan=CachePlan(KEPT, BITS, "knorm")),
            ValueError,
            "already did",
        ),
        (
            lambda: patch_model(tiny_model("llama"), plan=CachePlan(KEPT, BITS, "no")),
            ValueError,
            "needs the scoring method",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize("ratio", [1, 1.5, 2, 4, 8, 12, 16, 32])
def test_a_plan_made_without_measuring_holds_about_what_was_asked(ratio):
    kept, key_bits, value_bits = without_measuring(ratio)
    assert 0 < kept <= 1
    stored = (key_bits + value_bits) / 2 + (0 if key_bits == 16 else 16 / 64)
    per_token = kept * (stored + (32 / 128 if kept < 1 else 0))
    assert 16 / per_token >= ratio * 0.99
    # and not much less, unless everything is kept
    assert kept == 1 or 16 / per_token <= ratio * 1.01


def test_target_ratio_says_what_it_chose(caplog):
    model = tiny_model("llama")
    with caplog.at_level(logging.WARNING):
        # the test model has no tokenizer, which kvzip would look for
        with pytest.raises(ValueError, match="tokenizer"):
            patch_model(model, target_ratio=8)
        assert not is_patched(model)
        patch_model(model, target_ratio=2)
    assert "target_ratio=2: keys in 8 bits, values in 4" in caplog.text
    assert new_cache(model).spec.codecs[0].name == "turboquant"
