"""`refused` and `model_state`, which the tests of bad input rest on, can fail themselves."""

from types import SimpleNamespace

import pytest
import torch

from hf_kvcache.testing import model_state
from tests.bad_input.refusals import refused


def test_the_fixture_notices_changes(model):
    """`refused` and `model_state` themselves can fail."""
    state = model_state(model)
    model.extra = SimpleNamespace()
    with pytest.raises(AssertionError, match="attributes changed"):
        state.assert_equal(model_state(model))
    del model.extra
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(AssertionError, match=r"lm_head\.weight in the state dict changed"):
        state.assert_equal(model_state(model))
    with pytest.raises(AssertionError, match="nothing was raised"), refused(ValueError):
        pass
    with pytest.raises(AssertionError, match="'plan'"), refused(ValueError, "plan"):
        raise ValueError("something else")
