"""Wrong methods and options of `patch_model` are refused, with what was expected, what was given and what to do."""

import pytest

from hf_kvcache import KVSharer, patch_model
from hf_kvcache.spec import CacheSpec
from tests.bad_input.refusals import PLAN, refused


def test_unknown_method(model):
    with refused(ValueError, "unknown method 'kvsharr'", "available", "kvsharer", "offload", model=model):
        patch_model(model, "kvsharr")
    with refused(ValueError, "unknown method 'snap'", model=model):
        patch_model(model, "kvsharer + snap", plan=PLAN)
    with refused(ValueError, "unknown method ''", model=model):
        patch_model(model, "")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("snapvk", "did you mean 'snapkv'"),
        ("SnapKV", "did you mean 'snapkv'"),
        ("expected-attention", "did you mean 'expected_attention'"),
        ("snapkv,turboquant", "several are joined by '+'"),
    ],
)
def test_what_a_misspelt_method_may_have_been(model, given, meant):
    with refused(ValueError, meant, "available", model=model):
        patch_model(model, given)


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
    with refused(ValueError, "unknown option 'methods' (did you mean 'method'?)", model=model):
        patch_model(model, methods="snapkv")
    with refused(ValueError, "unknown option 'buget' (did you mean 'budget'?)", model=model):
        patch_model(model, "snapkv", buget=5)


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


def test_the_slot_of_a_method():
    spec = CacheSpec.full((None,) * 4)
    with refused(ValueError, "slot must be one of sharing, scorer, allocator, selector, codec, store", "'colour'"):
        spec.fill("colour", 3, by="painter")
