"""yoco beside other methods: composition, what stays and what is restored, and splits that are refused."""

import copy

import pytest
import torch

from hf_kvcache import KVSharer, Yoco, patch_model, report, unpatch_model
from hf_kvcache.resolve import resolve, split_names
from hf_kvcache.sharing import SharingPlan
from hf_kvcache.testing import greedy, model_state, random_ids
from tests.forward import logits
from tests.methods.yoco import every_family, fresh, patched, residual_names, shake


@pytest.mark.parametrize("order", ["yoco+++turboquant", "turboquant+yoco++"])
def test_composes_with_a_codec(order):
    model, ids = shake(patched(method=order)), random_ids(batch=2, length=40)
    assert report(model(ids).past_key_values).ratio > 3
    assert greedy(model, ids).shape == (2, 12)


def test_names_that_end_in_two_plus_signs():
    assert split_names("yoco++") == ["yoco++"]
    assert split_names("yoco+++turboquant") == ["yoco++", "turboquant"]
    assert split_names("turboquant+yoco++") == ["turboquant", "yoco++"]
    assert [type(method) for method in resolve("yoco", {})] == [Yoco]
    with pytest.raises(ValueError, match="unknown method ''"):
        resolve("yoco++turboquant", {})


def test_the_plan_stays_when_other_methods_are_named():
    model, ids = shake(patched()), random_ids(length=15)
    weights, expected = residual_names(model), greedy(model, ids)
    patch_model(model, "turboquant", bits=2)
    assert residual_names(model) == weights and report(model(ids).past_key_values).layers[3].source == 1
    patch_model(model, None)
    assert torch.equal(greedy(model, ids), expected)
    patch_model(model, KVSharer(plan=SharingPlan.identity(4)))
    assert not residual_names(model)


@pytest.mark.parametrize("method", ["yoco", "yoco++"])
@every_family
def test_unpatch_restores_the_model(family, method):
    model = fresh(family)
    before = model_state(model)
    patch_model(model, method)
    greedy(model, random_ids(length=9), tokens=3)
    before.assert_equal(model_state(unpatch_model(model)))


def test_copies_keep_their_weights_apart():
    model = shake(patched())
    other = shake(copy.deepcopy(model), seed=1)
    ids = random_ids(length=15)
    assert not torch.equal(logits(model, ids), logits(other, ids))


@pytest.mark.parametrize("split", [0, 0.0, 1.0, -0.5, 1.5, True, "half"])
def test_impossible_splits_are_refused(split):
    with pytest.raises(ValueError, match="split"):
        Yoco(split=split)


@pytest.mark.parametrize(
    ("layers", "split", "message"),
    [(5, 0.5, "2.5 layers; give the number of layers, 2 or 3"), (4, 4, "leaves 4 of 4"), (4, 7, "leaves 7 of 4")],
)
def test_splits_that_do_not_fit_the_depth_are_refused(layers, split, message):
    model = fresh(num_hidden_layers=layers)
    before = model_state(model)
    with pytest.raises(ValueError, match=message):
        patch_model(model, "yoco", split=split)
    before.assert_equal(model_state(model))


def test_a_split_without_a_layer_of_the_kind_is_refused():
    with pytest.raises(ValueError, match=r"layer 1 has attention window None.*raise split"):
        patch_model(fresh("gemma3_text"), "yoco", split=1)


def test_another_sharing_method_is_refused():
    with pytest.raises(ValueError, match=r"yoco.*kvsharer|kvsharer.*yoco"):
        patch_model(fresh(), [Yoco(), KVSharer(plan=SharingPlan.identity(4))])
