"""What is kept for a process may be made in inference mode and used with gradients on, by this model and by others."""

import pytest
import torch

from hf_kvcache import TurboQuant, patch_model
from hf_kvcache.codecs import codebooks
from hf_kvcache.codecs.rotation import rotation
from hf_kvcache.testing import random_ids, tiny_model

METHODS = {
    "practical": TurboQuant(),
    "paper": TurboQuant(mode="paper"),
    "outliers": TurboQuant(mode="paper", bits=2.5),
    "prod": TurboQuant(mode="paper", variant="prod"),
}


@pytest.fixture(autouse=True)
def nothing_is_kept_yet():
    for kept in (rotation, codebooks.lloyd_max, codebooks.cubic, codebooks._density):
        kept.cache_clear()


@pytest.mark.parametrize("method", METHODS)
def test_gradients_may_be_on_after_inference_mode(method):
    model, ids = patch_model(tiny_model("llama", head_dim=16), METHODS[method]), random_ids(length=12)
    with torch.inference_mode():
        before = model(ids).past_key_values
        expected = model(ids[:, :1], past_key_values=before).logits
        before.crop(-1)
    for cache in (before, model(ids).past_key_values):
        logits = model(ids[:, :1], past_key_values=cache).logits
        torch.testing.assert_close(logits, expected)
        with pytest.raises(RuntimeError):
            logits.sum().backward()
