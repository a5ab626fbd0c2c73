"""A model of one's own to patch, as it is and with shared layers."""

import copy

import pytest

from hf_kvcache import KVSharer, patch_model
from tests.bad_input.refusals import PLAN, original


@pytest.fixture
def model():
    return copy.deepcopy(original())


@pytest.fixture
def shared(model):
    return patch_model(model, KVSharer(plan=PLAN))
