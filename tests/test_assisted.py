"""Assisted decoding under methods that change the prompt: a draft sees what a token that came alone would have seen."""

import copy

import pytest
import torch

from hf_kvcache import KVSharer, Offload, SharingPlan, StreamingLLM, TurboQuant, compress, patch_model
from hf_kvcache.testing import greedy, random_ids, tiny_model

METHODS = {
    "snapkv": "snapkv",
    "tova": "tova",
    "streamingllm": "streamingllm",
    "adakv+criticalkv": "adakv+criticalkv",
    "turboquant": "turboquant",
    "snapkv+turboquant": "snapkv+turboquant",
}
OPTIONS = {"snapkv": {"window": 4}, "adakv": {"window": 4}}


def patched(family: str, method: str):
    options = {"budget": 16} if method != "turboquant" else {}
    if "turboquant" in method:
        options["bits"] = 2
    return patch_model(tiny_model(family), METHODS[method], **options, **OPTIONS.get(method.split("+")[0], {}))


@pytest.mark.parametrize("assistant", ["the model itself", "another", "prompt lookup"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("method", METHODS)
def test_assisted_decoding_is_greedy_decoding(method, family, assistant):
    model, ids = patched(family, method), random_ids(length=40)
    ids[:, 30:] = ids[:, 10:20]
    expected = greedy(model, ids, tokens=30)
    if assistant == "prompt lookup":
        drafted = greedy(model, ids, tokens=30, prompt_lookup_num_tokens=3)
    else:
        draft = tiny_model(family, seed=0 if assistant == "the model itself" else 1)
        drafted = greedy(model, ids, tokens=30, assistant_model=draft)
    assert torch.equal(drafted, expected)


@pytest.mark.parametrize(
    "method",
    [
        StreamingLLM(budget=16, every=4),
        [StreamingLLM(budget=16), KVSharer(plan=SharingPlan.from_pairs(4, [(3, 2)]))],
        [TurboQuant(bits=8), KVSharer(plan=SharingPlan.from_pairs(4, [(3, 2)]))],
    ],
    ids=["every", "shared and evicted", "shared and encoded"],
)
def test_what_would_change_the_text_is_refused(method):
    model = patch_model(tiny_model("llama"), method)
    with pytest.raises(NotImplementedError, match="assisted decoding would change"):
        greedy(model, random_ids(length=40), assistant_model=tiny_model("llama", seed=1))


@pytest.mark.parametrize("other", [None, Offload()], ids=["dense", "offload"])
def test_sharing_what_is_kept_as_it_is_changes_nothing(other):
    model = patch_model(
        tiny_model("llama"), [KVSharer(plan=SharingPlan.from_pairs(4, [(3, 2)])), *([other] if other else [])]
    )
    ids = random_ids(length=40)
    assert torch.equal(greedy(model, ids, assistant_model=tiny_model("llama")), greedy(model, ids))


@torch.no_grad()
@pytest.mark.parametrize("other", [StreamingLLM(budget=16), TurboQuant(bits=2)], ids=["evicted", "encoded"])
def test_drafts_behind_a_sealed_prompt_are_not_refused(other):
    """Whatever shares it: they come in no forward with it."""
    model = patch_model(tiny_model("llama"), [other, KVSharer(plan=SharingPlan.from_pairs(4, [(3, 2)]))])
    cache, drafts = compress(model, random_ids(length=40)), random_ids(length=6, seed=1)
    alone = copy.deepcopy(cache)
    expected = torch.cat([model(draft, past_key_values=alone).logits for draft in drafts.split(1, dim=1)], dim=1)
    cache.activate_past_recording()
    for accepted in (2, 5):
        found = model(drafts[:, cache.get_seq_length() - 40 :], past_key_values=cache).logits
        torch.testing.assert_close(found, expected[:, -found.shape[1] :], rtol=1e-4, atol=1e-4)
        cache.crop(40 + accepted - cache.get_seq_length())
