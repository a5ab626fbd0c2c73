"""Other attention, dtypes and places of the weights, and a compiled pass, change nothing but rounding."""

import copy

import pytest
import torch

from hf_kvcache import new_cache, unpatch_model
from hf_kvcache.testing import greedy, random_ids, rms
from tests.generate.models import FULL, every_family, every_method, original, padded_batch, patch, patched, uncached


@every_family
@every_method
def test_eager_attention(family, method):
    model = copy.deepcopy(original(family))
    model.set_attn_implementation("eager")
    ids, mask = padded_batch()
    expected = greedy(model, ids, attention_mask=mask)
    patch(model, method)
    actual = greedy(model, ids, attention_mask=mask)
    if method == "none":
        assert torch.equal(actual, expected)
    assert torch.equal(actual, greedy(patched(family, method), ids, attention_mask=mask))
    assert torch.equal(actual[:, :8], uncached(model, ids, tokens=8, mask=mask))
    unpatch_model(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(family, method, dtype):
    """Decoding errs no more than a full pass in the same precision does."""
    model = copy.deepcopy(original(family)).to(dtype)
    exact = patched(family, method).double()
    ids = random_ids(batch=2, length=24)
    patch(model, method)
    cache = new_cache(model)
    with torch.no_grad():
        truth = exact(ids, use_cache=False).logits
        full = model(ids, use_cache=False).logits
        parts = [model(part, past_key_values=cache).logits for part in ids.split([18, 1, 1, 4], dim=1)]
    assert all(tensor.dtype == dtype for layer in cache.layers for tensor in layer.tensors())
    actual = torch.cat(parts, dim=1)
    assert actual.dtype == dtype
    assert rms(actual - truth) <= 1.5 * rms(full - truth)
    if method == "none":
        unpatched = copy.deepcopy(original(family)).to(dtype)
        with torch.no_grad():
            assert rms(full - truth) <= 1.5 * rms(unpatched(ids).logits - truth)
    assert greedy(model, ids, tokens=6).shape == (2, 6)


@every_family
def test_a_patched_model_can_change_its_dtype(family):
    model = patched(family, "shared").to(torch.bfloat16)
    ids = random_ids(length=12)
    expected = greedy(patch(copy.deepcopy(original(family)).to(torch.bfloat16), "shared"), ids)
    assert torch.equal(greedy(model, ids), expected)
    unpatch_model(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(greedy(model, ids), greedy(copy.deepcopy(original(family)).to(torch.bfloat16), ids))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@every_method
@pytest.mark.parametrize("place", ["cpu_offload", "disk_offload", "dispatch"])
def test_dispatched_weights(family, method, place, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = copy.deepcopy(original(family))
    if place == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif place == "disk_offload":
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    else:
        # one layer on disk, the rest in memory
        names = [name for name, _ in model.model.named_children() if name != "layers"]
        device_map = {f"model.{name}": "cpu" for name in names} | {"lm_head": "cpu"}
        device_map |= {f"model.layers.{index}": "disk" if index == 2 else "cpu" for index in range(4)}
        accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path)
    ids = random_ids(length=13)
    patch(model, method)
    assert torch.equal(greedy(model, ids), greedy(patched(family, method), ids))
    unpatch_model(model)
    assert torch.equal(greedy(model, ids), greedy(original(family), ids))


@pytest.mark.slow
@pytest.mark.parametrize("family", FULL)
@every_method
def test_full_graph_compile_of_an_uncached_pass(family, method):
    model = patched(family, method)
    ids = random_ids(batch=2, length=12)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
