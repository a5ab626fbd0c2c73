"""Law 8: a prefix hit gives the tokens of a cold run, whatever is composed, and what cannot be reused is not."""

import copy
import pickle
import warnings
from dataclasses import replace
from functools import cache as memoize

import numpy as np
import pytest
import torch

from hf_kvcache import (
    H2O,
    AdaKV,
    CriticalKV,
    KVSharer,
    KVzip,
    Offload,
    Sequential,
    SharingPlan,
    SnapKV,
    TurboQuant,
    compress,
    new_cache,
    patch_model,
    report,
    unpatch_model,
)
from hf_kvcache.patches.compat import sliding_windows
from hf_kvcache.sequential.session import PromptSession
from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.testing import greedy, left_pad, live_bytes, model_state, random_ids, sharing_maps, tiny_model

PAGE = 8
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi3", "gemma2", "gemma3_text")
COMPOSITIONS = (
    "none",
    "turboquant",
    "sharer+turboquant+offload",
    "snapkv",
    "h2o",
    "kvzip+turboquant",
    "sharer+snapkv+adakv+criticalkv+turboquant+offload",
)
EVERYTHING = COMPOSITIONS[-1]
two_families = pytest.mark.parametrize("family", ["llama", "gemma3_text"])


def matrix(families, everyday):
    """Families x compositions; those not of every day are marked slow."""
    return pytest.mark.parametrize(
        ("family", "name"),
        [
            pytest.param(family, name, id=f"{family}-{name}", marks=() if everyday(family, name) else pytest.mark.slow)
            for family in families
            for name in COMPOSITIONS
        ],
    )


whole_matrix = matrix(FAMILIES, lambda family, name: name == EVERYTHING or family == "llama")
small_matrix = matrix(
    ("llama", "gemma3_text"),
    lambda family, name: (
        (family, name) == ("gemma3_text", EVERYTHING)
        or (family == "llama" and name in ("none", "h2o", "kvzip+turboquant"))
    ),
)


@memoize
def original(family):
    return tiny_model(family)


def methods(model, name):
    depth = model.config.num_hidden_layers
    parts = {
        "sharer": KVSharer(plan=SharingPlan.from_pairs(depth, sharing_maps(sliding_windows(model))["adjacent"][:1])),
        "snapkv": SnapKV(window=4, budget=16),
        "h2o": H2O(budget=16),
        "kvzip": KVzip(instructions=((5, 6, 7), (8, 9)), chunk=16, budget=16),
        "adakv": AdaKV(),
        "criticalkv": CriticalKV(),
        "turboquant": TurboQuant(bits=8),
        "offload": Offload(),
    }
    return [] if name == "none" else [parts[part] for part in name.split("+")]


def cold(family, name="none"):
    model = copy.deepcopy(original(family))
    return patch_model(model, methods(model, name))


def stored(family, store, name="none", **options):
    model = copy.deepcopy(original(family))
    return patch_model(model, [*methods(model, name), Sequential(store=store, **options)])


@pytest.fixture
def store(tmp_path):
    """A store whose failures are errors here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with PrefixStore(tmp_path / "store", page_size=PAGE) as opened:
            yield opened
            opened.flush()
            assert opened.counts.failures == opened.counts.damaged_pages == 0


def prompts():
    """Three prompts that begin alike: the second forks in the middle of a page, the third is a part of the first."""
    first = random_ids(length=45)
    return first, torch.cat([first[:, :37], random_ids(length=12, seed=4)], dim=1), first[:, :30]


@whole_matrix
def test_a_hit_gives_the_tokens_of_a_cold_run(family, name, store):
    reference, model = cold(family, name), stored(family, store, name)
    for ids in prompts() * 2:
        assert torch.equal(greedy(model, ids), greedy(reference, ids))
        store.flush()
    # h2o looks at every query of the prompt, so nothing may be skipped
    expected = 0 if "h2o" in name else 37 + 30 - 2 + 45 + 49 + 30 - 3
    window = 4 if "snapkv" in name else 1
    assert store.counts.adopted_tokens >= expected - 5 * window
    # pages of eight tokens: 45, the rest of 49 behind four shared ones, nothing of what is known
    assert sorted(len(entry.ids) for entry in store.entries()) == sorted([8] * 5 + [5] + [8] * 2 + [1] + [6])


@small_matrix
def test_one_store_serves_all_compositions_of_one_plan(family, name, store):
    ids = prompts()[0]
    plan = "sharer" if "sharer" in name else "none"
    greedy(stored(family, store, plan), ids)
    store.flush()
    model = stored(family, store, name)
    assert torch.equal(greedy(model, ids), greedy(cold(family, name), ids))
    store.flush()
    assert store.counts.written_pages == 6


@small_matrix
def test_rows_of_a_batch_hit_as_far_as_all_do(family, name, store):
    reference, model = cold(family, name), stored(family, store, name)
    first, second, part = prompts()
    greedy(model, first)
    store.flush()
    ids, mask = left_pad([first[0], second[0], part[0]])
    expected = greedy(reference, ids, attention_mask=mask)
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected)
    store.flush()
    before = store.counts.adopted_tokens
    assert before > 0 or name == "h2o"
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected)
    ids, mask = left_pad([first[0], random_ids(length=20, seed=77)[0]])
    assert torch.equal(greedy(model, ids, attention_mask=mask), greedy(reference, ids, attention_mask=mask))


@small_matrix
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 10}], ids=["beams", "chunks"])
def test_hits_with_options_of_generate(family, name, options, store):
    reference, model = cold(family, name), stored(family, store, name)
    for ids in prompts() * 2:
        assert torch.equal(greedy(model, ids, **options), greedy(reference, ids, **options))
        store.flush()
    assert store.counts.adopted_tokens or name == "h2o"


@two_families
@pytest.mark.parametrize("name", ["none", "turboquant", "snapkv"])
def test_hits_with_assisted_decoding(family, name, store):
    reference, model = cold(family, name), stored(family, store, name)
    ids = torch.cat([prompts()[0]] * 2, dim=1)
    expected = greedy(reference, ids)
    for _ in range(2):
        assert torch.equal(greedy(model, ids, prompt_lookup_num_tokens=3), expected)
        store.flush()
    assert store.counts.adopted_tokens > 0


@small_matrix
def test_a_context_is_read_from_the_store(family, name, store):
    reference, model = cold(family, name), stored(family, store, name)
    context = prompts()[0]
    full = torch.cat([context, random_ids(length=3, seed=9)], dim=1)
    expected = greedy(reference, full, past_key_values=compress(reference, context))
    for chunk in (0, 11):
        assert torch.equal(greedy(model, full, past_key_values=compress(model, context, chunk=chunk)), expected)
        store.flush()
    cache = compress(model, context)
    assert report(cache).bytes == live_bytes(cache)
    assert torch.equal(greedy(model, full, past_key_values=copy.deepcopy(cache)), expected)
    assert torch.equal(greedy(model, full, past_key_values=cache), expected)


@two_families
def test_a_cold_run_is_bit_equal_and_a_hit_nearly(family, store):
    """In float32 on one machine, tokens read in two parts differ from those read at once by rounding only."""
    ids = prompts()[0]
    reference, model = cold(family), stored(family, store)

    def logits(patched):
        out = patched.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
        return torch.stack(out.logits)

    expected = logits(reference)
    assert torch.equal(logits(model), expected)
    store.flush()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=2e-4)


def adopted(model, store, ids, **kwargs):
    """Tokens that a run adopts, when the store has all of them from another run."""
    before = store.counts.adopted_tokens
    greedy(model, ids, tokens=2, **kwargs)
    store.flush()
    return store.counts.adopted_tokens - before


def test_pages_are_never_another_models(store):
    ids = prompts()[0]
    model = stored("llama", store)
    assert adopted(model, store, ids) == 0
    assert adopted(model, store, ids) == 44
    assert adopted(stored("qwen2", store), store, ids) == 0
    other = patch_model(tiny_model("llama", seed=1), Sequential(store=store))
    assert adopted(other, store, ids) == 0
    half = patch_model(tiny_model("llama").to(torch.bfloat16), Sequential(store=store))
    assert adopted(half, store, ids) == 0
    assert adopted(half, store, ids) == 44
    # another plan computes other keys behind the first layer that it changes
    assert adopted(stored("llama", store, "sharer"), store, ids) == 0
    assert adopted(stored("llama", store, codec="tokens"), store, ids) == 0


@pytest.mark.parametrize("place", ["model.layers.1.mlp.down_proj.weight", "model.layers.3.self_attn.q_proj.weight"])
@pytest.mark.parametrize(
    "way", [lambda weight: weight.mul_(1.01), lambda weight: weight.data.mul_(1.01)], ids=["", "data"]
)
def test_training_forgets_the_pages(place, way, store):
    ids, model = prompts()[0], stored("llama", store)
    adopted(model, store, ids)
    assert adopted(model, store, ids) == 44
    with torch.no_grad():
        way(model.get_parameter(place))
    assert adopted(model, store, ids) == 0
    assert adopted(model, store, ids) == 44


def test_adapters_have_pages_of_their_own(store):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    model = patch_model(peft.get_peft_model(tiny_model("llama"), config).eval(), Sequential(store=store))
    ids = prompts()[0]
    assert adopted(model, store, ids) == 0
    assert adopted(model, store, ids) == 44
    with model.disable_adapter():
        assert adopted(model, store, ids) == 0
    assert adopted(model, store, ids) == 44


def test_what_cannot_be_reused_soundly_is_computed(store):
    ids, model = prompts()[0], stored("llama", store)
    adopted(model, store, ids)
    reference = cold("llama")
    embeds = model.get_input_embeddings()(ids)
    for given in ({"inputs_embeds": embeds}, {"input_ids": ids, "position_ids": torch.arange(45)[None] + 3}):
        before = store.counts.adopted_tokens
        actual, expected = (
            m.generate(**given, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
            for m in (model, reference)
        )
        assert torch.equal(actual, expected)
        assert store.counts.adopted_tokens == before
    before = store.counts.adopted_tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compress(model, ids)
    assert store.counts.adopted_tokens == before
    right = torch.ones_like(ids)
    right[:, -5:] = 0
    assert adopted(model, store, ids, attention_mask=right) == 0
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    dynamic_model = patch_model(tiny_model("llama", rope_parameters=dynamic), Sequential(store=store))
    assert adopted(dynamic_model, store, ids) == adopted(dynamic_model, store, ids) == 0


def test_a_plain_forward_neither_reads_nor_writes(store):
    ids, model = prompts()[0], stored("llama", store)
    with torch.no_grad():
        whole = model(ids).logits
        cache = new_cache(model)
        model(ids[:, :20], past_key_values=cache)
    store.flush()
    assert whole.shape[1] == 45 and not list(store.entries())
    adopted(model, store, ids)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole)


def test_later_turns_are_stored_too(store):
    """The second turn brings the whole conversation; what the first one read is there."""
    model, reference = stored("llama", store), cold("llama")
    first = random_ids(length=40)
    reply = greedy(model, first)
    second = torch.cat([first, reply, random_ids(length=9, seed=3)], dim=1)
    store.flush()
    assert torch.equal(greedy(model, second), greedy(reference, second))
    assert store.counts.adopted_tokens == 40


def test_a_failed_forward_stores_nothing(store):
    model = stored("llama", store)

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        greedy(model, prompts()[0])
    handle.remove()
    store.flush()
    assert not list(store.entries())
    assert torch.equal(greedy(model, prompts()[0]), greedy(cold("llama"), prompts()[0]))


def test_a_patched_model_pickles_copies_and_is_restored(store):
    model = copy.deepcopy(original("llama"))
    before = model_state(model)
    patch_model(model, Sequential(store=store))
    ids = prompts()[0]
    expected = greedy(model, ids)
    store.flush()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(greedy(other, ids), expected)
    assert store.counts.adopted_tokens == 44
    before.assert_equal(model_state(unpatch_model(model)))


def test_a_cache_copied_in_the_middle_of_a_prompt_goes_on(store):
    model, reference, ids = stored("llama", store), cold("llama"), prompts()[0]
    cache = new_cache(model)
    cache.expect(45)
    with torch.no_grad():
        model.model(input_ids=ids[:, :20], past_key_values=cache)
        copied = copy.deepcopy(cache)
        for held in (cache, copied):
            model.model(input_ids=ids[:, 20:], past_key_values=held)
    store.flush()
    full = torch.cat([ids, random_ids(length=2, seed=8)], dim=1)
    expected = greedy(reference, full)
    assert torch.equal(greedy(model, full, past_key_values=cache), expected)
    assert torch.equal(greedy(model, full, past_key_values=copied), expected)
    assert sum(len(entry.ids) for entry in store.entries()) == 45


def test_tokens_pages_are_recognised_and_computed_again(store):
    model, reference, ids = stored("llama", store, codec="tokens"), cold("llama"), prompts()[0]
    for _ in range(2):
        assert torch.equal(greedy(model, ids), greedy(reference, ids))
        store.flush()
    assert store.counts.written_pages == 6 and store.counts.adopted_tokens == 0
    entries = list(store.entries())
    assert {entry.codec for entry in entries} == {"tokens"}
    assert np.array_equal(np.concatenate([e.ids for e in sorted(entries, key=lambda e: e.start)]), ids[0].numpy())


def test_a_page_of_other_tokens_is_not_adopted(store, monkeypatch):
    """Where what finds pages says that a fork shares more than it does."""
    model, reference = stored("llama", store), cold("llama")
    first, second, _ = prompts()
    greedy(model, first)
    store.flush()
    found = PrefixStore.match

    def lie(self, identity, ids):
        return [replace(match, length=min(PAGE, len(ids) - match.start)) for match in found(self, identity, ids)]

    monkeypatch.setattr(PrefixStore, "match", lie)
    assert torch.equal(greedy(model, second), greedy(reference, second))
    assert store.counts.adopted_tokens == 32


def kept_columns(model, ids, monkeypatch):
    """Of every prompt, the columns whose keys and values a session holds when the prompt is complete."""
    kept = []
    submit = PromptSession._submit

    def note(self):
        pieces = next(iter(self._pieces.parts.values()), [])
        kept.append([(first, key.shape[2], key.untyped_storage().nbytes() // key.nbytes) for first, key, _ in pieces])
        submit(self)

    with monkeypatch.context() as patch:
        patch.setattr(PromptSession, "_submit", note)
        greedy(model, ids, tokens=2)
    return kept


def test_a_hit_keeps_only_what_it_will_write(store, monkeypatch):
    model = stored("llama", store)
    first, second, part = prompts()
    # a view of the prompt's own keys, whole
    assert [(place, count) for place, count, _ in kept_columns(model, first, monkeypatch)[0]] == [(0, 45)]
    store.flush()
    # the fork's page begins at 32: five columns of it adopted, twelve computed
    assert kept_columns(model, second, monkeypatch) == [[(32, 5, 1), (37, 12, 1)]]
    store.flush()
    assert kept_columns(model, part, monkeypatch) == [[(24, 5, 1), (29, 1, 1)]]
    # h2o adopts nothing, and still only writes what is new
    assert kept_columns(stored("llama", store, "h2o"), second, monkeypatch) == [[(48, 1, 1)]]
    assert kept_columns(model, first[:, :40], monkeypatch) == [[]]
    store.flush()
    for ids in (first, second, part):
        assert adopted(model, store, ids) == ids.shape[1] - 1


def test_pages_that_go_between_chunks_are_not_written_in_part(store, monkeypatch):
    """What was not kept cannot be stored when the store loses it in the middle of a prompt."""
    model, reference, ids = stored("llama", store), cold("llama"), prompts()[0]
    greedy(model, ids)
    store.flush()
    look_up, calls = PromptSession._look_up, []

    def lose(self):
        if calls:
            for entry in list(store.entries()):
                store.backend.delete(entry.key, entry.parent)
        calls.append(1)
        look_up(self)

    monkeypatch.setattr(PromptSession, "_look_up", lose)
    assert torch.equal(greedy(model, ids, prefill_chunk_size=20), greedy(reference, ids))
    store.flush()
    assert len(calls) > 1 and list(store.entries()) == []


def test_options_are_checked(tmp_path):
    with pytest.raises(ValueError, match="give store="):
        patch_model(copy.deepcopy(original("llama")), "sequential")
    with pytest.raises(ValueError, match="codec must be one of"):
        patch_model(copy.deepcopy(original("llama")), "sequential", store=tmp_path, codec="zip")
    with pytest.raises(TypeError, match="a folder, a URL or a PrefixStore"):
        patch_model(copy.deepcopy(original("llama")), "sequential", store=3)
    with pytest.raises(ValueError, match="'sequential' already did"):
        patch_model(copy.deepcopy(original("llama")), [Sequential(store=tmp_path), Sequential(store=tmp_path)])
