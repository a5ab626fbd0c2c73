"""Everything that `generate` and its surroundings do with a cache, on patched models."""

import copy
from functools import cache as memoize

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedTokenizerFast, pipeline

from hf_kvcache import KVCache, KVSharer, Offload, SharingPlan, new_cache, patch_model, unpatch_model
from hf_kvcache.patches.compat import sliding_windows
from hf_kvcache.testing import (
    PAD,
    VOCABULARY,
    greedy,
    greedy_by_forward,
    left_pad,
    live_bytes,
    random_ids,
    rms,
    sharing_maps,
    tiny_model,
)

# seen with 5.14 and 5.17, not with 5.23
OLD = Version(transformers.__version__) < Version("5.20")

FAMILIES = ("llama", "mistral", "gemma2", "phi3")
METHODS = ("none", "shared")
FULL = ("llama", "phi3")

every_family = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("method", METHODS)


@memoize
def original(family: str):
    return tiny_model(family)


def patched(family: str, method: str):
    return patch(copy.deepcopy(original(family)), method)


def patch(model, method: str):
    """Patches with nothing lost, or with as many consumers of one producer as there can be."""
    if method == "none":
        return patch_model(model, method=None)
    pairs = sharing_maps(sliding_windows(model))["several"]
    return patch_model(model, KVSharer(plan=SharingPlan.from_pairs(model.config.num_hidden_layers, pairs)))


def uncached(model, ids, tokens=12, mask=None):
    """Greedy tokens by full passes without a cache: the reference for a shared model."""
    mask = torch.ones_like(ids) if mask is None else mask
    text = ids
    for _ in range(tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(text, attention_mask=mask, position_ids=positions, use_cache=False).logits
        text = torch.cat([text, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return text[:, ids.shape[1] :]


def padded_batch():
    return left_pad([random_ids(length=length, seed=length)[0] for length in (17, 9)])


# decoding strategies


@every_family
@every_method
def test_greedy_of_a_padded_batch_is_without_a_cache(family, method):
    model = patched(family, method)
    ids, mask = padded_batch()
    assert torch.equal(greedy(model, ids, tokens=12, attention_mask=mask), uncached(model, ids, mask=mask))


@every_family
@every_method
def test_sampling_with_a_seed_repeats_itself(family, method):
    model = patched(family, method)
    ids, mask = padded_batch()

    def sample(some_model):
        torch.manual_seed(5)
        return greedy(some_model, ids, attention_mask=mask, do_sample=True, temperature=0.8, top_k=20)

    assert torch.equal(sample(model), sample(model))
    if method == "none":
        assert torch.equal(sample(model), sample(original(family)))


@every_family
@every_method
def test_returned_sequences_are_samples_of_one_prompt(family, method):
    model = patched(family, method)
    ids, mask = padded_batch()

    def sample(rows, row_mask, **kwargs):
        torch.manual_seed(5)
        return greedy(model, rows, attention_mask=row_mask, do_sample=True, **kwargs)

    actual = sample(ids, mask, num_return_sequences=3)
    assert torch.equal(actual, sample(ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)))
    assert len(actual.unique(dim=0)) > 2
    if method == "none":
        torch.manual_seed(5)
        expected = greedy(original(family), ids, attention_mask=mask, do_sample=True, num_return_sequences=3)
        assert torch.equal(actual, expected)


@every_family
@pytest.mark.parametrize("padded", [False, True], ids=["one-length", "left-padded"])
def test_beam_search_is_the_unpatched_one(family, padded):
    ids, mask = padded_batch() if padded else (random_ids(batch=2, length=13), None)
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"attention_mask": mask, "num_beams": 4, "num_return_sequences": 2}
    assert torch.equal(greedy(patched(family, "none"), ids, **options), greedy(original(family), ids, **options))


@every_family
def test_beam_search_on_shared_layers_is_without_a_cache(family):
    model = patched(family, "shared")
    ids, mask = padded_batch()
    options = {"tokens": 8, "attention_mask": mask, "num_beams": 3, "num_return_sequences": 3}
    assert torch.equal(greedy(model, ids, **options), greedy(model, ids, use_cache=False, **options))


@pytest.mark.parametrize("family", FULL)
@every_method
def test_beam_sampling_runs(family, method):
    model = patched(family, method)
    ids, mask = padded_batch()
    torch.manual_seed(1)
    out = greedy(model, ids, attention_mask=mask, num_beams=3, do_sample=True)
    assert out.shape == (2, 12)


@pytest.mark.parametrize("family", FULL)
@pytest.mark.parametrize(("beams", "sequences"), [(4, 1), (4, 4), (1, 5)])
def test_a_prompt_is_held_once_for_all_beams(family, beams, sequences):
    model = patched(family, "none")
    ids = random_ids(batch=2, length=200)
    cache = new_cache(model)
    greedy(
        model,
        ids,
        tokens=3,
        num_beams=beams,
        num_return_sequences=sequences,
        do_sample=beams == 1,
        past_key_values=cache,
    )
    copies = max(beams, sequences)
    assert cache.batch_size == 2 * copies
    one_prompt = 4 * 2 * 2 * 8 * 4 * 200  # layers, K and V, KV heads, head dimension, float32, tokens
    tail = sum(live_bytes(layer.tail) for layer in cache.layers)
    assert live_bytes(cache) - tail == 2 * one_prompt
    assert tail < 2 * one_prompt


# assisted decoding: the first forward holds the prompt and a draft, and what is rejected is cropped


@every_family
@every_method
def test_prompt_lookup_is_greedy(family, method):
    model = patched(family, method)
    ids = random_ids(length=6).repeat(1, 4)  # repetitions make drafts
    expected = greedy(model, ids, tokens=24)
    for drafts in (1, 10):
        assert torch.equal(greedy(model, ids, tokens=24, prompt_lookup_num_tokens=drafts), expected)


def skip_if_upstream_fails(assistant):
    """transformers 5.17 cannot use an assistant with sliding layers, with or without a patch."""
    if OLD and any(sliding_windows(assistant)):
        pytest.skip("this release of transformers has no assistants with sliding layers")


@every_family
@every_method
@pytest.mark.parametrize("assistant_method", ["unpatched", "shared"])
def test_a_small_assistant_does_not_change_the_tokens(family, method, assistant_method):
    model = patched(family, method)
    assistant = tiny_model(family, seed=2)
    if assistant_method == "unpatched":
        skip_if_upstream_fails(assistant)
    else:
        patch(assistant, assistant_method)
    ids = random_ids(length=14)
    expected = greedy(model, ids, tokens=20)
    assert torch.equal(greedy(model, ids, tokens=20, assistant_model=assistant), expected)


@every_family
@every_method
@pytest.mark.parametrize("twin_is_patched", [True, False], ids=["patched", "unpatched"])
def test_an_assistant_with_the_same_weights_does_not_change_the_tokens(family, method, twin_is_patched):
    """Its drafts are good, so that long ones are accepted, some of them at once with the prompt."""
    model = patched(family, method)
    twin = copy.deepcopy(model)
    if not twin_is_patched:
        skip_if_upstream_fails(unpatch_model(twin))
    ids = random_ids(length=14)
    expected = greedy(model, ids, tokens=24)
    assert torch.equal(greedy(model, ids, tokens=24, assistant_model=twin), expected)


@every_family
def test_a_patched_assistant_helps_an_unpatched_model(family):
    model = original(family)
    ids = random_ids(length=14)
    expected = greedy(model, ids, tokens=20)
    for method in METHODS:
        assistant = patched(family, method)
        assert torch.equal(greedy(model, ids, tokens=20, assistant_model=assistant), expected)


# other ways to bring a prompt


@every_family
@every_method
def test_embeddings_in_the_place_of_ids(family, method):
    model = patched(family, method)
    ids, mask = padded_batch()
    embeddings = model.get_input_embeddings()(ids).detach()
    out = model.generate(
        inputs_embeds=embeddings, attention_mask=mask, do_sample=False, max_new_tokens=12, min_new_tokens=12
    )
    assert torch.equal(out, greedy(model, ids, tokens=12, attention_mask=mask))


@every_family
@every_method
def test_embeddings_without_a_mask(family, method):
    model = patched(family, method)
    ids = random_ids(batch=2, length=13)
    embeddings = model.get_input_embeddings()(ids).detach()
    out = model.generate(inputs_embeds=embeddings, do_sample=False, max_new_tokens=12, min_new_tokens=12)
    assert torch.equal(out, greedy(model, ids, tokens=12))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@every_method
def test_a_prompt_without_a_mask(family, method):
    model = patched(family, method)
    ids = random_ids(length=13)
    assert torch.equal(greedy(model, ids, attention_mask=None), greedy(model, ids))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@every_method
def test_a_prompt_of_one_token(family, method):
    model = patched(family, method)
    ids = random_ids(batch=2, length=1)
    assert torch.equal(greedy(model, ids, tokens=12), uncached(model, ids))


@every_method
@pytest.mark.skipif(OLD, reason="this release of transformers keeps phi3's cache when its rotary factors change")
def test_phi3_may_start_its_cache_anew(method):
    """Where its rotary factors change, phi3 drops the cache and brings the whole text again."""
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [3.0] * 4, "short_factor": [1.0] * 4}
    model = tiny_model("phi3", original_max_position_embeddings=18, rope_parameters=factors)
    ids = random_ids(batch=2, length=12)
    expected = greedy(model, ids)
    patch(model, method)
    actual = greedy(model, ids)
    if method == "none":
        assert torch.equal(actual, expected)
    text = torch.cat([ids, actual], dim=1)
    with torch.no_grad():
        full = model(text, use_cache=False).logits[:, -5:-1]
    assert torch.equal(full.argmax(-1), actual[:, -4:])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@every_method
def test_without_a_cache(family, method):
    model = patched(family, method)
    ids, mask = padded_batch()
    expected = greedy(model, ids, tokens=8, attention_mask=mask)
    assert torch.equal(greedy(model, ids, tokens=8, attention_mask=mask, use_cache=False), expected)


@every_family
@every_method
def test_the_base_decoder_can_be_patched(family, method):
    model = copy.deepcopy(original(family))
    ids = random_ids(batch=2, length=15)
    assert patch(model.model, method) is model.model
    with torch.no_grad():
        full = model.model(ids, use_cache=False).last_hidden_state
        cache = new_cache(model.model)
        parts = [model.model(part, past_key_values=cache).last_hidden_state for part in ids.split([11, 1, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-4, atol=1e-4)
    unpatch_model(model.model)
    assert torch.equal(greedy(model, ids), greedy(original(family), ids))


@every_family
@every_method
def test_text_generation_pipeline(family, method):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": PAD, **{f"w{index}": index for index in range(1, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", padding_side="left")
    model = patched(family, method)
    prompts = ["w5 w9 w3 w80 w7 w7 w12 w31 w2 w2 w60", "w44 w3"]
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    for batch_size in (1, 2):
        results = generator(
            prompts,
            max_new_tokens=10,
            do_sample=False,
            suppress_tokens=[PAD],  # text leaves it out
            return_full_text=False,
            batch_size=batch_size,
        )
        for prompt, (result,) in zip(prompts, results, strict=True):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            tokens = greedy(model, ids, tokens=10, suppress_tokens=[PAD])[0]
            assert result["generated_text"].split() == [f"w{token}" for token in tokens.tolist()]


# the cache as an object


@every_family
@every_method
def test_a_cache_can_be_passed_in(family, method):
    model = patched(family, method)
    ids, mask = padded_batch()
    expected = greedy(model, ids, attention_mask=mask)
    cache = new_cache(model)
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=12,
        past_key_values=cache,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences[:, ids.shape[1] :], expected)
    assert out.past_key_values is cache
    assert cache.get_seq_length() == ids.shape[1] + 11


@every_family
@every_method
@pytest.mark.parametrize("form", ["all-ids", "new-ids"])
def test_second_turn_continues_the_text(family, method, form):
    model = patched(family, method)
    ids, mask = padded_batch()
    cache = new_cache(model)
    first = greedy(model, ids, tokens=7, attention_mask=mask, past_key_values=cache)
    question = random_ids(batch=2, length=5, seed=9)
    text = torch.cat([ids, first, question], dim=1)
    text_mask = torch.cat([mask, torch.ones_like(first), torch.ones_like(question)], dim=1)
    expected = uncached(model, text, tokens=10, mask=text_mask)
    # the last token that was chosen has not been through the model yet
    new = text if form == "all-ids" else text[:, cache.get_seq_length() :]
    second = greedy(model, new, tokens=10, attention_mask=text_mask, past_key_values=cache)
    assert torch.equal(second, expected)
    assert cache.get_seq_length() == text.shape[1] + 9


@every_family
@every_method
def test_a_copied_cache_continues_twice(family, method):
    model = patched(family, method)
    ids = random_ids(batch=2, length=16)
    with torch.no_grad():
        cache = model(ids).past_key_values
        model(random_ids(batch=2, length=3, seed=4), past_key_values=cache)
    text = torch.cat([ids, random_ids(batch=2, length=3, seed=4)], dim=1)
    for seed in (1, 2):
        twin = copy.deepcopy(cache)
        more = torch.cat([text, random_ids(batch=2, length=4, seed=seed)], dim=1)
        assert torch.equal(greedy(model, more, tokens=8, past_key_values=twin), uncached(model, more, tokens=8))
        assert twin.get_seq_length() == 30 and cache.get_seq_length() == 19


@pytest.mark.parametrize("family", FULL)
@every_method
def test_copies_share_what_is_sealed(family, method):
    model = patched(family, method)
    with torch.no_grad():
        cache = model(random_ids(length=300)).past_key_values
        twins = [copy.deepcopy(cache) for _ in range(4)]
        assert live_bytes([cache, *twins]) == live_bytes(cache)
        for seed, twin in enumerate(twins):
            model(random_ids(length=1, seed=seed), past_key_values=twin)
    assert live_bytes([cache, *twins]) < 2 * live_bytes(cache)


@pytest.mark.parametrize(
    ("family", "removed"),
    [
        # a window keeps the past of one forward only
        *((family, removed) for family in FULL for removed in (0, 1, 4, 9, 15)),
        *((family, removed) for family in ("mistral", "gemma2") for removed in (0, 1, 4)),
    ],
)
@every_method
def test_crop_forgets_the_last_tokens(family, method, removed):
    """12 tokens are sealed and 4 are in the tail."""
    model = patched(family, method)
    ids = random_ids(batch=2, length=16)
    cache = new_cache(model)
    if family not in FULL:
        cache.activate_past_recording()  # transformers' condition for cropping a window
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        cache.crop(0)
        model(ids[:, 12:], past_key_values=cache)
        cache.crop(-removed)
        assert cache.get_seq_length() == 16 - removed
        again = random_ids(batch=2, length=6, seed=7)
        actual = model(again, past_key_values=cache).logits
        text = torch.cat([ids[:, : 16 - removed], again], dim=1)
        expected = model(text, use_cache=False).logits[:, -6:]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FULL)
@every_method
def test_crop_of_everything_leaves_an_empty_cache(family, method):
    model = patched(family, method)
    ids = random_ids(batch=2, length=10)
    with torch.no_grad():
        cache = model(ids).past_key_values
        cache.crop(-10)
        assert cache.get_seq_length() == 0
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FULL)
@pytest.mark.parametrize("removed", [2, 9])
def test_crop_of_a_padded_batch(family, removed):
    model = patched(family, "shared")
    rows = [random_ids(length=length, seed=length)[0] for length in (14, 8)]
    ids, mask = left_pad(rows)
    nexts = random_ids(batch=2, length=1, seed=5)
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).past_key_values
        cache.crop(-removed)
        mask = torch.cat([mask[:, :-removed], torch.ones_like(nexts)], dim=1)
        positions = mask.sum(-1, keepdim=True) - 1
        actual = model(nexts, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        for index, row in enumerate(rows):
            text = torch.cat([row[:-removed], nexts[index]])[None]
            expected = model(text, use_cache=False).logits[:, -1]
            torch.testing.assert_close(actual[index], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_crop_takes_what_to_remove_or_what_to_keep(family):
    """Newer releases of transformers pass the first, a negative number; 5.14 at times the second, a positive one."""
    removed, kept = (patched(family, "none")(random_ids(length=6)).past_key_values for _ in range(2))
    removed.crop(-2)
    kept.crop(4)
    assert removed.get_seq_length() == kept.get_seq_length() == 4
    kept.crop(9)
    assert kept.get_seq_length() == 4


@every_family
@every_method
def test_reset_empties_a_cache(family, method):
    model = patched(family, method)
    cache = new_cache(model)
    ids = random_ids(batch=2, length=12)
    first = greedy(model, ids, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(greedy(model, ids, past_key_values=cache), first)


@every_family
@every_method
def test_rows_can_be_repeated_and_selected(family, method):
    model = patched(family, method)
    ids = random_ids(batch=3, length=14)
    nexts = random_ids(batch=6, length=5, seed=3)
    rows = torch.tensor([4, 0, 5, 1])  # of the repeated batch
    with torch.no_grad():
        cache = model(ids).past_key_values
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 6
        repeated = model(nexts[:, :3], past_key_values=cache).logits
        cache.batch_select_indices(rows)
        assert cache.batch_size == 4
        selected = model(nexts[rows, 3:], past_key_values=cache).logits
        text = torch.cat([ids.repeat_interleave(2, 0), nexts], dim=1)
        expected = model(text, use_cache=False).logits
    torch.testing.assert_close(repeated, expected[:, 14:17], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(selected, expected[rows, 17:], rtol=1e-4, atol=1e-4)


@every_family
@every_method
def test_rows_can_be_reordered(family, method):
    model = patched(family, method)
    ids, nexts = random_ids(batch=3, length=14), random_ids(batch=3, length=4, seed=3)
    order = torch.tensor([2, 2, 0])
    with torch.no_grad():
        cache = model(ids).past_key_values
        model(nexts[:, :2], past_key_values=cache)
        cache.reorder_cache(order)
        actual = model(nexts[:, 2:], past_key_values=cache).logits
        text = torch.cat([ids[order], nexts[order, :2], nexts[:, 2:]], dim=1)
        expected = model(text, use_cache=False).logits[:, -2:]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@every_family
@every_method
def test_two_sessions_on_one_model(family, method):
    model = patched(family, method)
    prompts = [random_ids(length=length, seed=length) for length in (15, 11)]
    expected = [greedy(model, ids, tokens=8) for ids in prompts]
    caches = [new_cache(model), new_cache(model)]
    texts: list[list[torch.Tensor]] = [[], []]
    feeds = list(prompts)
    for _ in range(8):
        for session in (0, 1):
            feeds[session] = greedy_by_forward(model, feeds[session], tokens=1, cache=caches[session])
            texts[session].append(feeds[session])
    assert [torch.cat(text, dim=1).tolist() for text in texts] == [tokens.tolist() for tokens in expected]


@every_family
def test_two_models_with_different_methods(family):
    ids = random_ids(length=12)
    models = [patched(family, method) for method in METHODS]
    alone = [uncached(model, ids) for model in models]
    for _ in range(2):
        for model, expected in zip(models, alone, strict=True):
            assert torch.equal(greedy(model, ids, tokens=12), expected)


def test_the_cache_of_a_plain_forward_is_ours():
    model = patched("llama", "none")
    ids = random_ids(length=5)
    assert isinstance(model(ids).past_key_values, KVCache)
    assert isinstance(model(ids, use_cache=True).past_key_values, KVCache)
    assert model(ids, use_cache=False).past_key_values is None
    out = model(ids, use_cache=True, return_dict=False)
    assert isinstance(out[1], KVCache)


@every_family
@every_method
def test_beams_with_a_chunked_prefill(family, method):
    model = patched(family, method)
    ids, mask = padded_batch()
    options = {"tokens": 6, "attention_mask": mask, "num_beams": 3}
    assert torch.equal(greedy(model, ids, prefill_chunk_size=5, **options), greedy(model, ids, **options))


@every_family
@every_method
def test_a_cache_of_inference_mode_can_be_used_outside(family, method):
    model = patched(family, method)
    ids = random_ids(batch=2, length=16)
    with torch.inference_mode():
        cache = model(ids[:, :11]).past_key_values
        model(ids[:, 11:13], past_key_values=cache)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 13:]
        actual = model(ids[:, 13:], past_key_values=cache).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@every_family
@every_method
def test_a_cache_made_with_gradients_can_be_copied(family, method):
    model = patched(family, method)
    cache = model(random_ids(batch=2, length=16)).past_key_values
    model(random_ids(batch=2, length=1), past_key_values=cache)
    twin = copy.deepcopy(cache)
    assert twin.get_seq_length() == 17
    assert not any(tensor.requires_grad for layer in cache.layers for tensor in layer.tensors())


@every_family
@pytest.mark.parametrize("where", ["right", "middle"])
def test_padding_need_not_be_on_the_left(family, where):
    """A plain forward may be given any 2-D mask, in the first forward or in a later one."""
    model, reference = patched(family, "none"), original(family)
    ids = random_ids(batch=2, length=18)
    mask = torch.ones_like(ids)
    mask[1, slice(9, 12) if where == "right" else slice(13, 15)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, expected_cache = new_cache(model), None
    start = 0
    with torch.no_grad():
        for end in (12, 16, 17, 18):
            new = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end], "use_cache": True}
            actual = model(ids[:, start:end], past_key_values=cache, **new).logits
            out = reference(ids[:, start:end], past_key_values=expected_cache, **new)
            expected, expected_cache = out.logits, out.past_key_values
            real = mask[:, start:end].bool()
            torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)
            start = end


# other attention, dtypes and places


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


# training

# the newer name of the same switch came after the oldest supported release
quiet_checkpointing = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*:FutureWarning")


def gradients(model, ids, **kwargs):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False, **kwargs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@every_family
def test_gradients_of_an_unshared_model_are_the_unpatched_ones(family):
    ids = random_ids(batch=2, length=14)
    expected = gradients(copy.deepcopy(original(family)).train(), ids)
    actual = gradients(patched(family, "none").train(), ids)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@quiet_checkpointing
@every_family
def test_gradients_with_checkpointing_are_those_without(family):
    ids = random_ids(batch=2, length=14)
    model = patched(family, "shared").train()
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    actual = gradients(model, ids)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@quiet_checkpointing
@every_family
def test_reentrant_checkpointing_is_refused_for_shared_layers(family):
    model = patched(family, "shared").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    ids = random_ids(length=14)
    with pytest.raises(NotImplementedError, match="use_reentrant") as error:
        model(ids, labels=ids)
    assert "wrong gradients" in str(error.value) and "gradient_checkpointing_enable" in str(error.value)
    model.gradient_checkpointing_disable()
    model(ids, labels=ids, use_cache=False).loss.backward()


@every_family
def test_a_training_step_through_shared_layers_lowers_the_loss(family):
    model = patched(family, "shared").train()
    ids = random_ids(batch=4, length=16)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    consumers = new_cache(model).spec.sharing.consumers
    unpatch_model(model)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    for layer in range(4):
        if family == "phi3":
            rows = model.model.layers[layer].self_attn.qkv_proj.weight[48:]
            moved = not torch.equal(rows, before[f"model.layers.{layer}.self_attn.qkv_proj.weight"][48:])
        else:
            moved = f"model.layers.{layer}.self_attn.k_proj.weight" in changed
        assert moved == (layer not in consumers)
    assert all(parameter.requires_grad for parameter in model.parameters())


@every_family
def test_what_was_frozen_stays_frozen(family):
    model = copy.deepcopy(original(family))
    model.requires_grad_(False)
    last = model.model.layers[-1].self_attn
    names = ["qkv_proj"] if family == "phi3" else ["k_proj", "v_proj"]
    for name in names[1:]:
        getattr(last, name).requires_grad_(True)
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    patch(model, "shared")
    unpatch_model(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected


@every_family
@every_method
def test_a_cached_prefill_has_the_same_gradient_as_none(family, method):
    """The prompt of one forward is attended with gradient, whether or not it is cached afterwards."""
    model = patched(family, method)
    ids = random_ids(batch=2, length=14)
    expected = gradients(model, ids)
    model.zero_grad()
    model(ids, labels=ids, use_cache=True).loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FULL)
@every_method
@pytest.mark.parametrize("new", [1, 3])
def test_gradient_through_a_cached_continuation_is_refused(family, method, new):
    model = patched(family, method)
    cache = model(random_ids(length=10)).past_key_values
    out = model(random_ids(length=new, seed=1), past_key_values=cache)
    with pytest.raises(RuntimeError, match="has no gradient") as error:
        out.logits.sum().backward()
    assert "use_cache=False" in str(error.value)


@every_method
def test_offloaded_cache_of_a_model_in_training_mode(method):
    """Dropout aside, a model in training mode decodes as in evaluation mode."""
    model = copy.deepcopy(original("llama"))
    methods = [Offload()] if method == "none" else [Offload(), KVSharer(plan=SharingPlan((0, 0, 2, 2)))]
    patch_model(model, methods)
    ids = random_ids(length=12)
    expected = greedy(model, ids)
    assert torch.equal(greedy(model.train(), ids), expected)
