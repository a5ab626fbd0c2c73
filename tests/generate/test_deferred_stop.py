"""On MPS transformers looks one step late whether to stop, and crops that step off a cache that it returns."""

import pytest
import torch
from transformers.generation import utils

from hf_kvcache import KVSharer, KVzip, SharingPlan, SnapKV, StreamingLLM, TurboQuant, patch_model
from hf_kvcache.testing import random_ids, tiny_model

METHODS = {
    "none": None,
    "turboquant": TurboQuant(),
    "kvzip": KVzip(instructions=((5,), (6,)), budget=16),
    "every": StreamingLLM(budget=16, every=4),
    "shared": [KVSharer(plan=SharingPlan.from_pairs(4, [(3, 1)])), SnapKV(budget=16, window=4)],
}


class Event:
    """What an event of a device is to one that is done at once."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self):
        pass

    synchronize = record


@pytest.fixture
def on_mps(monkeypatch):
    """Has transformers take the CPU for MPS."""
    check = getattr(utils, "DeferredStopCheck", None)
    if check is None:
        pytest.skip("this release of transformers looks at once")
    asked, mps = check.is_supported, torch.device("mps")
    monkeypatch.setattr(check, "is_supported", lambda device, *args, **kwargs: asked(mps, *args, **kwargs))
    monkeypatch.setattr(torch, "Event", Event)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_cache_is_returned_as_elsewhere(family, method, on_mps, monkeypatch):
    model, ids = patch_model(tiny_model(family), METHODS[method]), random_ids(length=40)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12}
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(utils.DeferredStopCheck, "is_supported", lambda *args, **kwargs: False)
        expected = model.generate(ids, **options)
        # stops before the last token that may come
        model.generation_config.eos_token_id = int(expected[0, 48])
        expected = model.generate(ids, **options)
    out = model.generate(ids, **options, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    assert out.past_key_values.get_seq_length() == expected.shape[1] - 1
    assert not any(layer.record_past for layer in out.past_key_values.producers.values())
