"""Decoding in steps of a fixed shape: the same tokens, nothing that a graph could not replay, and clear refusals."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_kvcache import TurboQuant, compile_decode, is_patched, new_cache, patch_model, unpatch_model
from hf_kvcache.kernels.code_attention import unpack
from hf_kvcache.patches import compiled
from hf_kvcache.patches.attach import attached
from hf_kvcache.testing import FAMILIES, greedy, greedy_by_forward, left_pad, random_ids, tiny_model

TOKENS = 30
# a flush after every 16 tokens: several recordings in one generation
BLOCKS = TurboQuant(residual_length=8, block_size=16)


class Tape(TorchDispatchMode):
    """Records operators with the very tensors that they were given, as a CUDA graph does with their addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert func is not torch.ops.aten._local_scalar_dense.default, "a graph cannot read a number back to the host"
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if old is not new and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [item for item in result if isinstance(item, torch.Tensor)] if isinstance(result, (tuple, list)) else []


def tape(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """In place of `capture_graph`."""
    run()
    recorder = Tape()
    with recorder:
        output = run()
    return recorder.replay, output


@pytest.fixture(params=["computed", "replayed"])
def recorder(request, monkeypatch):
    """With and without something that records."""
    if request.param == "replayed":
        monkeypatch.setattr(compiled, "capture_for", lambda device: tape)
    return request.param


def steps_of(model) -> compiled.CompiledDecode:
    return attached(model).compiled


@pytest.mark.parametrize(
    "method,options",
    [
        (None, {}),
        ("turboquant", {}),
        (BLOCKS, {}),
        ("uniform", {"bits": 4}),
        ("adakv+turboquant", {"budget": 0.5}),
        ("keydiff", {"budget": 0.5}),
        ("snapkv", {"budget": 0.5}),
    ],
    ids=str,
)
def test_the_same_tokens(recorder, method, options):
    rows = [random_ids(1, n, seed=n)[0] for n in (24, 17)]
    ids, mask = left_pad(rows)
    model = patch_model(tiny_model("llama"), method, **options)
    expected = greedy(model, ids, TOKENS, attention_mask=mask)
    compile_decode(model)
    assert torch.equal(greedy(model, ids, TOKENS, attention_mask=mask), expected)
    steps = steps_of(model)
    assert steps.replayed > TOKENS / 2
    assert (steps.recorded > 0) == (recorder == "replayed")


# by default those that differ in how they call attention: packed projections, norms of queries, experts, scales
QUICK = {"phi3", "qwen3", "mixtral", "granite", "gemma2"}


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_the_same_tokens_in_every_family(monkeypatch, family):
    monkeypatch.setattr(compiled, "capture_for", lambda device: tape)
    model, ids = patch_model(tiny_model(family), "turboquant"), random_ids(batch=2)
    expected = greedy(model, ids)
    try:
        compile_decode(model)
    except NotImplementedError as error:
        assert "sliding windows" in str(error)
        assert any(window for window in attached(model).spec.sliding_windows)
        return
    assert torch.equal(greedy(model, ids), expected)
    assert steps_of(model).replayed >= 10


def test_logits_of_plain_forwards(recorder):
    """Without position ids, and without a mask."""
    model, ids = patch_model(tiny_model("llama"), BLOCKS), random_ids(batch=2)
    expected = greedy_by_forward(model, ids, TOKENS)
    compile_decode(model)
    assert torch.equal(greedy_by_forward(model, ids, TOKENS), expected)
    assert steps_of(model).replayed > TOKENS / 2


def test_logits_and_counts(recorder):
    model, ids = patch_model(tiny_model("llama"), "turboquant"), random_ids(batch=2)
    plain, fixed = new_cache(model), new_cache(model)
    token = random_ids(batch=2, length=1, seed=5)
    with torch.no_grad():
        model(ids, past_key_values=plain)
        wanted = [model(token, past_key_values=plain).logits for _ in range(5)]
        compile_decode(model)
        model(ids, past_key_values=fixed)
        found = [model(token, past_key_values=fixed) for _ in range(5)]
    for output, logits in zip(found, wanted, strict=True):
        torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)
        assert output.past_key_values is fixed
    assert fixed.get_seq_length() == plain.get_seq_length()
    for ours, theirs in zip(fixed.layers, plain.layers, strict=True):
        torch.testing.assert_close(ours.tail.key, theirs.tail.key, rtol=1e-5, atol=1e-5)


def test_tokens_that_were_cropped_are_not_seen(recorder):
    model, ids = compile_decode(patch_model(tiny_model("llama"), None)), random_ids()
    cache = new_cache(model)
    first, second = random_ids(length=4, seed=1), random_ids(length=3, seed=2)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for token in first.split(1, dim=1):
            model(token, past_key_values=cache)
        cache.crop(-3)
        for token in second.split(1, dim=1):
            last = model(token, past_key_values=cache).logits
        whole = torch.cat([ids, first[:, :1], second], dim=1)
        expected = model(whole, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)


def test_beams_several_caches_and_unusual_calls_run_as_before(recorder):
    model, ids = patch_model(tiny_model("llama"), "turboquant"), random_ids(batch=2)
    beams = greedy(model, ids, num_beams=3)
    compile_decode(model)
    assert torch.equal(greedy(model, ids, num_beams=3), beams)
    one, two = new_cache(model), new_cache(model)
    token = random_ids(batch=2, length=1, seed=3)
    with torch.no_grad():
        for cache in (one, two):
            model(ids, past_key_values=cache)
        found = [model(token, past_key_values=cache).logits for _ in range(4) for cache in (one, two)]
        for a, b in zip(found[::2], found[1::2], strict=True):
            torch.testing.assert_close(a, b)
        states = model(token, past_key_values=one, output_hidden_states=True).hidden_states
    assert states is not None
    # a gradient is refused or computed as ever, never lost in a step
    before = steps_of(model).replayed
    model(ids, use_cache=False).logits.sum().backward()
    assert steps_of(model).replayed == before


def test_a_cache_is_let_go(recorder):
    import gc
    import weakref

    model, ids = compile_decode(patch_model(tiny_model("llama"), None)), random_ids()
    cache = new_cache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None and not steps_of(model).steps


def test_undone_by_unpatching():
    model = tiny_model("llama")
    forward = model.forward
    compile_decode(patch_model(model, None))
    assert model.forward is not forward
    patch_model(model, "turboquant")
    assert steps_of(model) is None and "forward" not in model.__dict__
    compile_decode(model)
    unpatch_model(model)
    assert "forward" not in model.__dict__ and not is_patched(model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_steps_of_its_own(duplicate):
    model, ids = compile_decode(patch_model(tiny_model("llama"), None)), random_ids()
    expected = greedy(model, ids)
    done = steps_of(model).replayed
    copied = duplicate(model)
    assert torch.equal(greedy(copied, ids), expected)
    assert steps_of(copied).replayed > done and steps_of(model).replayed == done
    assert steps_of(copied).model is copied


def test_what_has_no_fixed_shape_is_refused():
    with pytest.raises(ValueError, match="not patched; call patch_model first"):
        compile_decode(tiny_model("llama"))
    for family, method, options, reason in (
        ("mistral", None, {}, "sliding windows"),
        ("llama", "h2o", {"budget": 0.5, "every": 4}, "eviction while decoding"),
        ("llama", "offload", {}, "not on the device"),
    ):
        model = patch_model(tiny_model(family), method, **options)
        with pytest.raises(NotImplementedError, match=f"compile_decode needs steps of a fixed shape .*{reason}"):
            compile_decode(model)
        assert "forward" not in model.__dict__


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_depend_on_the_length_are_refused(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    model = patch_model(tiny_model("llama", rope_parameters=rope), None)
    with pytest.raises(NotImplementedError, match=f"RoPE of the type {kind}"):
        compile_decode(model)
    assert "forward" not in model.__dict__


def test_codes_are_unpacked_without_asking_the_device():
    codes = torch.zeros(8, 16, dtype=torch.uint8, device="meta")
    assert unpack(codes, 4).shape == (8, 32)


def test_a_model_that_moved_records_where_it_is(monkeypatch):
    model, devices = compile_decode(patch_model(tiny_model("llama"), None)), []
    # as it would be had the model been compiled elsewhere
    steps_of(model).device = torch.device("meta")
    monkeypatch.setattr(compiled, "capture_for", devices.append)
    greedy(model, random_ids())
    assert devices and set(devices) == {torch.device("cpu")}


@pytest.mark.gpu
@pytest.mark.parametrize("method", [None, "turboquant", "adakv+turboquant"])
def test_the_same_tokens_by_graphs(method):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    options = {"budget": 0.5} if method and "adakv" in method else {}
    model, ids = tiny_model("llama", head_dim=32).cuda(), random_ids(batch=2, length=40).cuda()
    patch_model(model, method, **options)
    expected = greedy(model, ids, 80)
    compile_decode(model)
    assert torch.equal(greedy(model, ids, 80), expected)
    assert steps_of(model).recorded and steps_of(model).replayed > 40
