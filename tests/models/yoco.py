"""What the tests of the original YOCO share: tiny models with either kind of self-decoder."""

import pytest

from hf_kvcache import patch_model
from hf_kvcache.testing import tiny_model

KINDS = ("retention", "window")
every_kind = pytest.mark.parametrize("kind", KINDS)


def model_of(kind, **changes):
    return tiny_model("yoco", self_decoder=kind, **{"sliding_window": 8, "retention_chunk_size": 8, **changes})


def patched_or_not(kind, method):
    model = model_of(kind)
    return model if method == "unpatched" else patch_model(model, None if method == "none" else method)
