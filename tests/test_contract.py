"""The laws of the cache: what every method promises on every family of models. See DESIGN.md, section 8."""

import copy
import io
import random
from dataclasses import dataclass
from functools import cache as memoize
from typing import ClassVar

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hf_kvcache import KVSharer, Method, Offload, SharingPlan, is_patched, new_cache, patch_model, report, unpatch_model
from hf_kvcache.measure import cache_bytes
from hf_kvcache.patches.compat import sliding_windows
from hf_kvcache.testing import (
    FAMILIES,
    greedy,
    greedy_by_forward,
    left_pad,
    live_bytes,
    model_state,
    random_ids,
    sharing_maps,
    tiny_model,
)

SIX_LAYERS = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}

# families of the whole matrix; those with two layer types are deep enough for several consumers of one producer
MATRIX = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {},
    "phi3": {},
    "gemma2": SIX_LAYERS,
    "gemma3_text": SIX_LAYERS,
}
METHODS = ("none", "offload", "adjacent", "distant", "several", "several+offload")

every_family = pytest.mark.parametrize("family", MATRIX)
every_method = pytest.mark.parametrize("method", METHODS)


def matrix(*full: str):
    """Families x methods: all methods for the families `full`, one for the others, the rest marked slow."""
    return pytest.mark.parametrize(
        ("family", "method"),
        [
            pytest.param(family, method, id=f"{family}-{method}", marks=() if everyday else pytest.mark.slow)
            for family in MATRIX
            for method in METHODS
            for everyday in [family in full or method == "several+offload"]
        ],
    )


whole_matrix = matrix("llama", "gemma2")


@memoize
def original(family: str):
    """An unpatched model that all tests share; those that patch take `fresh`."""
    return tiny_model(family, **MATRIX.get(family, {}))


def fresh(family: str):
    return copy.deepcopy(original(family))


def methods_of(model, method: str) -> list[Method] | None:
    """The methods behind a name of `METHODS`, with plans that fit the model."""
    if method == "none":
        return None
    maps = sharing_maps(sliding_windows(model))
    depth = model.config.num_hidden_layers
    return [
        Offload() if part == "offload" else KVSharer(plan=SharingPlan.from_pairs(depth, maps[part]))
        for part in method.split("+")
    ]


def patched(family: str, method: str):
    model = fresh(family)
    return patch_model(model, methods_of(model, method))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def assert_logits_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-4)


def generate(model, ids, tokens=12, **kwargs):
    """Greedy tokens `[B, tokens]`, the logits they were chosen from `[B, tokens, V]`, and the cache."""
    out = model.generate(
        ids,
        **{"attention_mask": torch.ones_like(ids), **kwargs},
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1), out.past_key_values


# law 1: method=None is the unpatched model, token for token


@pytest.mark.parametrize("family", FAMILIES)
def test_no_method_is_the_unpatched_model(family):
    ids = random_ids(batch=2, length=21)
    expected, expected_logits, _ = generate(original(family), ids)
    model = patch_model(fresh(family), method=None)
    actual, actual_logits, _ = generate(model, ids)
    assert torch.equal(actual, expected)
    assert_logits_equal(actual_logits, expected_logits)
    assert_logits_equal(logits(model, ids), logits(original(family), ids))
    assert_logits_equal(logits(model, ids, use_cache=False), logits(original(family), ids))


@every_family
def test_no_method_is_the_unpatched_model_on_padded_rows(family):
    ids, mask = left_pad([random_ids(length=length)[0] for length in (21, 9, 1)])
    expected = greedy(original(family), ids, attention_mask=mask)
    assert torch.equal(greedy(patched(family, "none"), ids, attention_mask=mask), expected)


# law 3: an identity plan shares nothing


@every_family
def test_identity_plan_is_no_sharing(family):
    ids = random_ids(length=17)
    model = fresh(family)
    expected = greedy(model, ids)
    patch_model(model, KVSharer(plan=SharingPlan.identity(model.config.num_hidden_layers)))
    assert torch.equal(greedy(model, ids), expected)
    assert torch.equal(greedy(patch_model(model, "kvsharer", share=0.0), ids), expected)


# laws 4 and 5: where entries rest does not change what is read


@every_family
@pytest.mark.parametrize("method", ["none", "several"])
def test_host_store_is_device_store(family, method):
    ids, mask = left_pad([random_ids(length=length)[0] for length in (21, 8)])
    stored_here, expected, _ = generate(patched(family, method), ids, attention_mask=mask)
    elsewhere = "offload" if method == "none" else f"{method}+offload"
    stored_there, actual, _ = generate(patched(family, elsewhere), ids, attention_mask=mask)
    assert torch.equal(stored_there, stored_here)
    assert torch.equal(actual, expected)


# law 9: a left-padded row is the same row alone


@whole_matrix
def test_padded_row_is_the_row_alone(family, method):
    model = patched(family, method)
    rows = [random_ids(length=length, seed=length)[0] for length in (23, 11, 3)]
    ids, mask = left_pad(rows)
    batch, batch_logits, _ = generate(model, ids, tokens=8, attention_mask=mask)
    for index, row in enumerate(rows):
        alone, alone_logits, _ = generate(model, row[None], tokens=8)
        assert torch.equal(batch[index], alone[0])
        assert_logits_equal(batch_logits[index], alone_logits[0])


# law 10: chunked, one-shot and token-by-token prefill agree


@whole_matrix
def test_prefill_may_come_in_pieces(family, method):
    model = patched(family, method)
    ids, mask = left_pad([random_ids(length=length, seed=length)[0] for length in (19, 12)])
    expected, expected_logits, cache = generate(model, ids, tokens=8, attention_mask=mask)
    for chunk in (1, 8):
        actual, actual_logits, chunked = generate(model, ids, tokens=8, attention_mask=mask, prefill_chunk_size=chunk)
        assert torch.equal(actual, expected), f"chunks of {chunk}"
        assert_logits_equal(actual_logits, expected_logits)
        assert [layer.seen for layer in chunked.layers] == [layer.seen for layer in cache.layers]
        sealed = [sum(segment.seen for segment in getattr(layer, "segments", [])) for layer in chunked.layers]
        assert sealed == [sum(segment.seen for segment in getattr(layer, "segments", [])) for layer in cache.layers]


@every_family
@pytest.mark.parametrize("pieces", [(19,), (1,) * 19, (1, 9, 9), (12, 1, 1, 5)], ids=len)
def test_forwards_over_pieces_of_a_text_agree(family, pieces):
    ids = random_ids(batch=2, length=19)
    model = patched(family, "several")
    expected = logits(model, ids, use_cache=False)
    cache = new_cache(model)
    parts = [logits(model, part, past_key_values=cache) for part in ids.split(pieces, dim=1)]
    assert_logits_equal(torch.cat(parts, dim=1), expected)


# law 11: reported bytes are those of the live storages, and they fall as promised


@whole_matrix
def test_reported_bytes_are_the_live_storages(family, method):
    model = patched(family, method)
    cache = new_cache(model)
    for ids in (random_ids(batch=2, length=23), random_ids(batch=2, length=1), random_ids(batch=2, length=40)):
        logits(model, ids, past_key_values=cache)
        assert report(cache).bytes == live_bytes(cache) > 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "phi3"])
@every_method
def test_bytes_fall_with_the_share_of_consumers(family, method):
    ids = random_ids(batch=2, length=50)
    model = patched(family, method)
    with torch.no_grad():
        cache = model(ids).past_key_values
        full = live_bytes(original(family)(ids).past_key_values)
    layers, consumers = model.config.num_hidden_layers, len(cache.spec.sharing.consumers)
    assert full == 2 * layers * 2 * 2 * 50 * 8 * 4  # K and V, layers, rows, KV heads, tokens, head dimension, float32
    assert live_bytes(cache) == (1 - consumers / layers) * full
    assert report(cache).full_bytes == full
    assert report(cache).ratio == pytest.approx(layers / (layers - consumers))


@every_family
def test_consumers_hold_nothing(family):
    model = patched(family, "several")
    with torch.no_grad():
        cache = model(random_ids(length=30)).past_key_values
    for layer, measured in zip(cache.layers, report(cache).layers, strict=True):
        assert (measured.bytes == 0) == (measured.source != measured.layer)
        assert bool(layer.tensors()) == (measured.source == measured.layer)


def test_padding_is_not_kept():
    model = patched("llama", "none")
    ids, mask = left_pad([random_ids(length=length)[0] for length in (40, 10)])
    with torch.no_grad():
        cache = model(ids, attention_mask=mask).past_key_values
    position = 4
    assert cache_bytes(cache) == 4 * 2 * (40 + 10) * (2 * 8 * 4 + position)


def test_a_window_does_not_keep_the_prompt_alive():
    model = patched("mistral", "none")
    with torch.no_grad():
        short, long = (model(random_ids(length=length)).past_key_values for length in (20, 200))
    assert live_bytes(short) == live_bytes(long)


# law 12: the tokens seen drive positions


@whole_matrix
def test_forwards_without_positions_are_generate(family, method):
    model = patched(family, method)
    ids = random_ids(batch=2, length=15)
    expected = greedy(model, ids, tokens=12)
    assert torch.equal(greedy_by_forward(model, ids, tokens=12), expected)
    cache = new_cache(model)
    assert torch.equal(greedy_by_forward(model, ids, tokens=12, cache=cache), expected)
    assert cache.get_seq_length() == 15 + 11
    assert all(layer.get_seq_length() == 15 + 11 for layer in cache.layers)


# law 13: unpatch_model restores everything; other instances never change


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_restores_the_model(family):
    model = fresh(family)
    before = model_state(model)
    for method in ("none", "several+offload"):
        assert patch_model(model, methods_of(model, method)) is model
        assert is_patched(model)
        greedy(model, random_ids(length=9), tokens=3)
        assert unpatch_model(model) is model
        assert not is_patched(model)
        before.assert_equal(model_state(model))
    unpatch_model(model)
    before.assert_equal(model_state(model))


@every_family
def test_state_dict_of_a_patched_model_is_the_original(family):
    model = fresh(family)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    patch_model(model, methods_of(model, "several"))
    actual = model.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())
    assert model.load_state_dict(expected) is not None


@every_family
def test_save_pretrained_writes_the_original(family, tmp_path):
    model = patched(family, "several")
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.config._attn_implementation == original(family).config._attn_implementation
    ids = random_ids(length=11)
    assert torch.equal(greedy(loaded, ids), greedy(original(family), ids))


@every_family
def test_loading_weights_into_a_patched_model_reaches_the_original(family):
    other = tiny_model(family, seed=1, **MATRIX[family])
    model = patched(family, "several")
    model.load_state_dict(other.state_dict())
    unpatch_model(model)
    ids = random_ids(length=11)
    assert torch.equal(greedy(model, ids), greedy(other, ids))


@every_family
def test_models_of_one_config_object_are_independent(family):
    config = copy.deepcopy(original(family).config)
    first, second = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    assert first.config is second.config
    before = model_state(second)
    patch_model(first, methods_of(first, "several"))
    greedy(first, random_ids(length=9), tokens=3)
    before.assert_equal(model_state(second))
    unpatch_model(first)
    before.assert_equal(model_state(second))
    assert first.config is second.config is config


def test_patching_leaves_other_models_attention_alone():
    ids = random_ids(length=12)
    bystander = tiny_model("llama", seed=3)
    expected = greedy(bystander, ids)
    shared = patched("llama", "several")
    greedy(shared, ids)
    assert torch.equal(greedy(bystander, ids), expected)
    assert AutoConfig.for_model("llama")._attn_implementation is None


@every_family
def test_deepcopy_of_a_patched_model_is_independent(family):
    ids = random_ids(length=13)
    model = fresh(family)
    before = model_state(model)
    patch_model(model, methods_of(model, "several+offload"))
    expected = greedy(model, ids)
    twin = copy.deepcopy(model)
    assert is_patched(twin)
    assert torch.equal(greedy(twin, ids), expected)

    # the copy runs on its own weights, its own projections included
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5)
    assert torch.equal(greedy(twin, ids), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-2)

    unpatch_model(twin)
    assert not is_patched(twin) and is_patched(model)
    assert torch.equal(greedy(twin, ids), greedy(original(family), ids))
    assert twin.config is not model.config
    assert torch.equal(greedy(model, ids), expected)
    unpatch_model(model)
    before.assert_equal(model_state(model))


@every_family
def test_pickle_of_a_patched_model_works(family):
    ids = random_ids(length=13)
    model = patched(family, "several+offload")
    expected = greedy(model, ids)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert is_patched(loaded)
    assert torch.equal(greedy(loaded, ids), expected)
    assert torch.equal(greedy(unpatch_model(loaded), ids), greedy(original(family), ids))


# law 14: orthogonal methods commute, conflicting ones are refused by name


@dataclass(frozen=True)
class FirstLayerOnly(Method):
    """A third-party method: every layer reads the KV of the first."""

    name: ClassVar[str] = "first-layer-only"
    slot: ClassVar[str] = "sharing"
    paper: ClassVar[str] = "-"

    def apply(self, spec, model):
        return spec.fill("sharing", SharingPlan((0,) * spec.num_layers), by=self.name)


@every_family
def test_orthogonal_methods_commute(family):
    ids = random_ids(length=13)
    model = fresh(family)
    sharing, offload = methods_of(model, "several+offload")
    one = greedy(patch_model(model, [sharing, offload]), ids)
    spec = new_cache(model).spec
    other = greedy(patch_model(model, [offload, sharing]), ids)
    assert torch.equal(one, other)
    for slot in ("sharing", "codecs", "store"):
        assert getattr(new_cache(model).spec, slot) == getattr(spec, slot), slot


@pytest.mark.parametrize("order", [1, -1], ids=["first", "second"])
def test_a_conflict_names_both_methods(order):
    model = fresh("llama")
    methods = [methods_of(model, "several")[0], FirstLayerOnly()][::order]
    with pytest.raises(ValueError, match="sharing") as error:
        patch_model(model, methods)
    assert "'kvsharer'" in str(error.value) and "'first-layer-only'" in str(error.value)
    assert not is_patched(model)


def test_a_third_party_method_needs_no_registration():
    ids = random_ids(length=13)
    model = patch_model(fresh("llama"), [FirstLayerOnly(), "offload"])
    cache = model(ids).past_key_values
    assert cache.spec.sharing.source_layers == (0, 0, 0, 0)
    assert report(cache).ratio == pytest.approx(4.0)


# law 17: cached generation under any sharing map is one uncached full pass


class SharedReference(DynamicCache):
    """An independent statement of sharing for one forward of an unpatched model: hand out the source's KV."""

    def __init__(self, config, source_layers):
        super().__init__(config=config)
        self.source_layers, self.handed_out = source_layers, {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.handed_out[layer_idx] = key_states, value_states
        return self.handed_out[self.source_layers[layer_idx]]


def random_plan(windows, seed: int) -> SharingPlan:
    """A random map within layer types; chains come up and resolve."""
    choose = random.Random(seed)
    pairs = []
    for consumer in range(1, len(windows)):
        sources = [source for source in range(consumer) if windows[source] == windows[consumer]]
        if sources and choose.random() < 0.6:
            pairs.append((consumer, choose.choice(sources)))
    return SharingPlan.from_pairs(len(windows), pairs)


def assert_cached_is_full_pass(family: str, plan: SharingPlan):
    model = patch_model(fresh(family), KVSharer(plan=plan))
    prompt = random_ids(batch=2, length=14)
    tokens, cached, _ = generate(model, prompt, tokens=10)
    text = torch.cat([prompt, tokens], dim=1)
    with torch.no_grad():
        reference = SharedReference(original(family).config, plan.source_layers)
        full = original(family)(text, past_key_values=reference).logits
    assert_logits_equal(cached, full[:, 13:-1])
    assert_logits_equal(logits(model, text), full)
    assert_logits_equal(logits(model, text, use_cache=False), full)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_cached_generation_is_one_full_pass(family, seed):
    windows = sliding_windows(original(family))
    assert_cached_is_full_pass(family, random_plan(windows, seed=FAMILIES.index(family) + 100 * seed))


@every_family
@pytest.mark.parametrize("method", ["adjacent", "distant", "several"])
def test_cached_generation_is_one_full_pass_for_named_maps(family, method):
    assert_cached_is_full_pass(family, methods_of(original(family), method)[0].plan)


@pytest.mark.parametrize("seed", range(6))
def test_sharing_changes_the_result(seed):
    """Without this the laws above could hold for a sharing that does nothing."""
    model = fresh("llama")
    plan = random_plan(sliding_windows(model), seed)
    ids = random_ids(length=14)
    shared = logits(patch_model(model, KVSharer(plan=plan)), ids)
    same = torch.allclose(shared, logits(original("llama"), ids), atol=1e-2)
    assert same == plan.is_identity
