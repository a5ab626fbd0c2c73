"""Law 14: orthogonal methods commute, conflicting ones are refused by name."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from hf_kvcache import Method, SharingPlan, is_patched, new_cache, patch_model, report
from hf_kvcache.testing import greedy, random_ids
from tests.contract.matrix import every_family, fresh, methods_of


@dataclass(frozen=True)
class FirstLayerOnly(Method):
    """A third-party method: every layer reads the KV of the first."""

    name: ClassVar[str] = "first-layer-only"
    slot: ClassVar[str] = "sharing"
    paper: ClassVar[str] = "-"

    def apply(self, spec, model):
        return spec.fill("sharing", SharingPlan((0,) * spec.num_layers), by=self.name)


@every_family
def test_orthogonal_methods_commute(family):
    ids = random_ids(length=13)
    model = fresh(family)
    sharing, offload = methods_of(model, "several+offload")
    one = greedy(patch_model(model, [sharing, offload]), ids)
    spec = new_cache(model).spec
    other = greedy(patch_model(model, [offload, sharing]), ids)
    assert torch.equal(one, other)
    for slot in ("sharing", "codecs", "store"):
        assert getattr(new_cache(model).spec, slot) == getattr(spec, slot), slot


@pytest.mark.parametrize("order", [1, -1], ids=["first", "second"])
def test_a_conflict_names_both_methods(order):
    model = fresh("llama")
    methods = [methods_of(model, "several")[0], FirstLayerOnly()][::order]
    with pytest.raises(ValueError, match="sharing") as error:
        patch_model(model, methods)
    assert "'kvsharer'" in str(error.value) and "'first-layer-only'" in str(error.value)
    assert not is_patched(model)


def test_a_third_party_method_needs_no_registration():
    ids = random_ids(length=13)
    model = patch_model(fresh("llama"), [FirstLayerOnly(), "offload"])
    cache = model(ids).past_key_values
    assert cache.spec.sharing.source_layers == (0, 0, 0, 0)
    assert report(cache).ratio == pytest.approx(4.0)


def test_the_name_none_is_the_cache_with_nothing_lost():
    model = fresh("llama")
    expected = greedy(patch_model(model), random_ids())
    assert torch.equal(greedy(patch_model(model, "none"), random_ids()), expected)
    assert not new_cache(model).spec.filled_by
    with pytest.raises(ValueError, match="unknown method 'none'"):
        patch_model(model, "none+snapkv")
    with pytest.raises(ValueError, match="option 'bits' belongs to"):
        patch_model(model, "none", bits=4)
