"""Assisted decoding is greedy decoding, though the first forward brings drafts too and rejected ones are cropped."""

import copy

import pytest
import torch

from hf_kvcache import unpatch_model
from hf_kvcache.patches.compat import sliding_windows
from hf_kvcache.testing import greedy, random_ids, tiny_model
from tests.generate.models import METHODS, OLD, every_family, every_method, original, patch, patched


@every_family
@every_method
def test_prompt_lookup_is_greedy(family, method):
    model = patched(family, method)
    ids = random_ids(length=6).repeat(1, 4)  # repetitions make drafts
    expected = greedy(model, ids, tokens=24)
    for drafts in (1, 10):
        assert torch.equal(greedy(model, ids, tokens=24, prompt_lookup_num_tokens=drafts), expected)


def skip_if_upstream_fails(assistant):
    """transformers 5.17 cannot use an assistant with sliding layers, with or without a patch."""
    if OLD and any(sliding_windows(assistant)):
        pytest.skip("this release of transformers has no assistants with sliding layers")


@every_family
@every_method
@pytest.mark.parametrize("assistant_method", ["unpatched", "shared"])
def test_a_small_assistant_does_not_change_the_tokens(family, method, assistant_method):
    model = patched(family, method)
    assistant = tiny_model(family, seed=2)
    if assistant_method == "unpatched":
        skip_if_upstream_fails(assistant)
    else:
        patch(assistant, assistant_method)
    ids = random_ids(length=14)
    expected = greedy(model, ids, tokens=20)
    assert torch.equal(greedy(model, ids, tokens=20, assistant_model=assistant), expected)


@every_family
@every_method
@pytest.mark.parametrize("twin_is_patched", [True, False], ids=["patched", "unpatched"])
def test_an_assistant_with_the_same_weights_does_not_change_the_tokens(family, method, twin_is_patched):
    """Its drafts are good, so that long ones are accepted, some of them at once with the prompt."""
    model = patched(family, method)
    twin = copy.deepcopy(model)
    if not twin_is_patched:
        skip_if_upstream_fails(unpatch_model(twin))
    ids = random_ids(length=14)
    expected = greedy(model, ids, tokens=24)
    assert torch.equal(greedy(model, ids, tokens=24, assistant_model=twin), expected)


@every_family
def test_a_patched_assistant_helps_an_unpatched_model(family):
    model = original(family)
    ids = random_ids(length=14)
    expected = greedy(model, ids, tokens=20)
    for method in METHODS:
        assistant = patched(family, method)
        assert torch.equal(greedy(model, ids, tokens=20, assistant_model=assistant), expected)
