"""The codec that is chosen for every page by what it costs to have the page again."""

import copy

import pytest
import torch

from hf_kvcache import Sequential, patch_model
from hf_kvcache.sequential import record
from hf_kvcache.sequential.auto import Auto
from hf_kvcache.sequential.backends import Entry
from hf_kvcache.sequential.codecs import make_codec
from hf_kvcache.sequential.identity import page_key
from hf_kvcache.sequential.lossless import Lossless
from hf_kvcache.sequential.packing import PageError
from hf_kvcache.sequential.page import Coded, Context
from hf_kvcache.sequential.residual import Residual
from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.sequential.trials import CONTEXT, GEOMETRY, IDENTITY, random_page
from hf_kvcache.testing import greedy, random_ids, tiny_model

PAGE = random_page(tokens=64, start=64)


def auto(bandwidth=None, prefill_rate=None):
    # what decoding takes is given, so that no test depends on a clock
    seconds = {"lossless": 1e-6, "residual": 1e-5}
    return Auto((Lossless(), Residual(1.0, None, full=64)), bandwidth, prefill_rate, seconds)


@pytest.mark.parametrize(
    "bandwidth, prefill_rate, expected",
    [
        # a slow model on a fast disk, behind a slow network, and a model that is faster than either
        (1e10, 10.0, "lossless"),
        (1e5, 10.0, "residual"),
        (1e5, 1e9, "tokens"),
    ],
)
def test_the_cheapest_codec_is_chosen(bandwidth, prefill_rate, expected):
    codec = auto(bandwidth, prefill_rate)
    key = page_key(IDENTITY.root, PAGE.ids)
    entry = Entry(key, IDENTITY.root, PAGE.ids, PAGE.start, codec.name, 0, 1.0)
    written = record.write(PAGE, codec, CONTEXT, entry)
    assert codec.encode(PAGE, CONTEXT).facts["by"] == expected
    restored = record.read(written.data, key, IDENTITY.root, {codec.name: codec}, CONTEXT, b"")
    assert (len(restored.keys) == 0) == (expected == "tokens")
    if expected == "lossless":
        assert torch.equal(restored.flat(), PAGE.flat())


def test_what_is_not_given_is_measured():
    codec = Auto((Lossless(),))
    # nothing is known of the model: what was computed is kept
    assert codec.encode(PAGE, CONTEXT).facts["by"] == "lossless"
    assert codec._decoding["lossless"] > 0
    assert codec.encode(PAGE, Context(GEOMETRY, None, prefill_seconds=1e-12)).facts["by"] == "tokens"
    assert codec.encode(PAGE, Context(GEOMETRY, None, prefill_seconds=10.0)).facts["by"] == "lossless"
    slow = Context(GEOMETRY, None, prefill_seconds=10.0, bandwidth=1e-3)
    assert codec.encode(PAGE, slow).facts["by"] == "tokens"


@pytest.mark.parametrize("prefill_rate, adopted", [(1e-3, 44), (1e15, 0)])
def test_runs_give_the_tokens_of_a_cold_run(tmp_path, prefill_rate, adopted):
    original, ids = tiny_model("llama"), random_ids(length=45)
    expected = greedy(patch_model(copy.deepcopy(original), None), ids)
    store = PrefixStore(tmp_path, page_size=16)
    model = patch_model(original, Sequential(store=store, codec="auto", prefill_rate=prefill_rate))
    for _ in range(2):
        assert torch.equal(greedy(model, ids), expected)
        store.flush()
    assert store.counts.adopted_tokens == adopted and store.counts.written_pages >= 3
    assert (store.bandwidth > 0) and store.counts.failures == 0


def test_options_are_checked():
    kept = make_codec("auto", page_size=16).kept
    assert [codec.name for codec in kept] == ["lossless"]
    # nothing is lost where loss was not asked for
    assert [codec.name for codec in make_codec("auto", page_size=16, quality=2.0).kept] == ["lossless", "residual"]
    with pytest.raises(ValueError, match="bandwidth must be a positive number"):
        make_codec("auto", page_size=16, bandwidth=0.0)
    with pytest.raises(ValueError, match="belong to the codec 'auto'"):
        make_codec("lossless", page_size=16, prefill_rate=100.0)
    with pytest.raises(PageError, match="not among the codecs"):
        auto().decode(Coded({"by": "magic"}), PAGE.ids, 0, CONTEXT)
