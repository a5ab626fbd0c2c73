"""A prompt may come as ids or embeddings, with any mask or none, through `generate`, a pipeline or the bare decoder."""

import copy

import pytest
import torch
from transformers import PreTrainedTokenizerFast, pipeline

from hf_kvcache import new_cache, unpatch_model
from hf_kvcache.testing import PAD, VOCABULARY, greedy, random_ids, tiny_model
from tests.generate.models import OLD, every_family, every_method, original, padded_batch, patch, patched, uncached


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
