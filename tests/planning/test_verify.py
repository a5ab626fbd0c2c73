"""Verification: the ratio of a plan is that of a model in 16 bits, whatever the model it is measured on computes in."""

import pytest
import torch

from hf_kvcache.planning.verify import references, verify
from hf_kvcache.testing import tiny_model
from tests.planning.made_up import window


def ratio(family: str, dtype: torch.dtype, method: str | None, **options) -> float:
    model, held_back = tiny_model(family).to(dtype), [window()]
    return verify(model, None, held_back, references(model, held_back), method, **options).ratio


# layers that keep everything, that keep a window, and that keep a state
FAMILIES = ("llama", "gemma2", "yoco")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_that_keeps_everything_is_no_smaller(family, dtype):
    assert ratio(family, dtype, None) == pytest.approx(1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ratio_is_that_of_a_model_in_16_bits(family):
    found = ratio(family, torch.float32, "turboquant", key_bits=8, value_bits=4)
    assert found == pytest.approx(ratio(family, torch.bfloat16, "turboquant", key_bits=8, value_bits=4))
    assert found > 1
