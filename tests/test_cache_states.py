"""States that a cache gets into off the main road: early exits, failed forwards, right padding, reuse after beams."""

import copy

import pytest
import torch
from torch import nn

from hf_kvcache import KVSharer, SharingPlan, load_cache, new_cache, patch_model, report
from hf_kvcache.testing import greedy, left_pad, random_ids, tiny_model

SHARED = KVSharer(plan=SharingPlan.from_pairs(4, [(3, 1)]))


def test_an_assistant_may_leave_before_the_last_reader():
    model = patch_model(tiny_model("llama"), SHARED)
    ids = random_ids(length=14)
    expected = greedy(model, ids, tokens=20)
    assert torch.equal(greedy(model, ids, tokens=20, assistant_early_exit=2), expected)


def test_a_forward_that_failed_can_be_cropped_and_repeated():
    model = patch_model(tiny_model("llama"), SHARED)
    ids = random_ids(length=12)
    with torch.no_grad():
        expected = model(ids, use_cache=True).logits
        cache = new_cache(model)

        def fail(*_):
            raise RuntimeError("on the way")

        handle = model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on the way"):
            model(ids, past_key_values=cache)
        handle.remove()
        cache.crop(-12)
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("removed", [1, 3, 6])
def test_crop_of_a_right_padded_prompt(removed):
    """The short row's last tokens are padding: removing them removes none of its own."""
    model = patch_model(tiny_model("llama"))
    short, long = random_ids(length=9, seed=1)[0], random_ids(length=13, seed=2)[0]
    ids = torch.stack([nn.functional.pad(short, (0, 4)), long])
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        cache.crop(-removed)
        kept = 13 - removed
        token, mask = torch.tensor([[5], [6]]), torch.cat([mask[:, :kept], torch.ones(2, 1, dtype=mask.dtype)], 1)
        actual = model(token, attention_mask=mask, past_key_values=cache, position_ids=torch.full((2, 1), kept)).logits
        text, positions = torch.cat([ids[:, :kept], token], 1), torch.arange(kept + 1)[None].expand(2, -1)
        expected = model(text, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_cache_of_beams_can_be_emptied_and_used_for_other_prompts():
    model = patch_model(tiny_model("llama"))
    out = model.generate(random_ids(length=8), num_beams=2, max_new_tokens=4, return_dict_in_generate=True)
    cache = out.past_key_values
    cache.crop(-cache.get_seq_length())
    ids = random_ids(batch=2, length=10, seed=5)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected)
    assert cache.layers[0].segments[0].rows == (0, 1)


@pytest.mark.parametrize("method", [None, "turboquant", "snapkv", SHARED], ids=str)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_a_filled_cache_serves_beams(method, options):
    model = patch_model(tiny_model("llama"), method)
    ids = random_ids(batch=2, length=30)
    with torch.no_grad():
        cache = model(ids[:, :24], use_cache=True).past_key_values
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(options["num_beams"])
    found = greedy(model, ids, past_key_values=cache, **options)
    assert torch.equal(found, greedy(model, ids, past_key_values=repeated, **options))
    assert len(found) == 2 * options.get("num_return_sequences", 1)
    if method is None:
        assert torch.equal(found, greedy(model, ids, **options))


def test_a_filled_cache_serves_several_samples():
    model, ids = patch_model(tiny_model("llama"), "turboquant"), random_ids(length=30)
    with torch.no_grad():
        cache = model(ids[:, :24], use_cache=True).past_key_values
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": True, "top_k": 1}
    found = model.generate(ids, past_key_values=cache, num_return_sequences=3, pad_token_id=0, **options)
    assert found.shape == (3, 34) and (found == found[0]).all()


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "yoco"])
def test_a_cache_of_other_rows_is_refused(family, rows):
    model = patch_model(tiny_model(family), None)
    with torch.no_grad():
        cache = model(random_ids(batch=2, length=9), use_cache=True).past_key_values
        with pytest.raises(ValueError, match=f"holds 2 rows and the input has {rows}"):
            model(random_ids(batch=rows, length=3), past_key_values=cache)
        model(random_ids(batch=2, length=3), past_key_values=cache)
    assert cache.get_seq_length() == 12


def test_checkpointed_training_with_a_cache_passed_still_shares():
    model = patch_model(tiny_model("llama"), SHARED)
    ids = random_ids(length=12)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    actual = model(ids, past_key_values=new_cache(model)).logits
    torch.testing.assert_close(actual, expected)


def test_healed_originals_ask_for_no_gradient_while_patched():
    model = tiny_model("llama")
    healed = {"layers.3.self_attn.o_proj": torch.randn(48, 48)}
    patch_model(model, KVSharer(plan=SharingPlan((0, 1, 2, 1), healed)))
    loss = model(random_ids(length=8), use_cache=False).logits.sum()
    loss.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_a_cache_saved_in_mid_prompt_seals_it_after_loading(tmp_path):
    model = patch_model(tiny_model("llama"))
    ids = random_ids(length=20)
    cache = new_cache(model)
    cache.expect(20)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        loaded = load_cache(model, tmp_path / "cache.safetensors")
        model(ids[:, 8:], past_key_values=loaded)
    assert loaded.layers[0].segments[0].seen == 20


def test_a_cache_of_another_dtype_is_refused(tmp_path):
    model = patch_model(tiny_model("llama"))
    with torch.no_grad():
        model(random_ids(), use_cache=True).past_key_values.save(tmp_path / "cache.safetensors")
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"in torch\.float32, this one is in torch\.bfloat16"):
        load_cache(model, tmp_path / "cache.safetensors")


def test_methods_may_be_applied_in_inference_mode():
    model = tiny_model("llama")
    with torch.inference_mode():
        patch_model(model, "kvsharer", calibration=random_ids(batch=30, length=64), threshold=-1.0)
        out = greedy(model, random_ids(length=8))
    assert out.shape == (1, 12)


def test_a_left_padded_prompt_is_still_cropped_at_its_end():
    model = patch_model(tiny_model("llama"))
    ids, mask = left_pad([random_ids(length=6)[0], random_ids(length=10, seed=3)[0]])
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    cache.crop(-2)
    assert cache.layers[0].segments[0].lengths == ((4, 4), (8, 8))


def test_tokens_behind_a_sliding_window_copy_it_seldom():
    """A copy of the window for every token would cost as much as attention over it."""
    model = patch_model(tiny_model("mistral", sliding_window=128))
    tokens, moves, place = random_ids(length=300), 0, None
    with torch.no_grad():
        whole = model(tokens).logits
        cache = model(tokens[:, :140], use_cache=True).past_key_values
        for step in range(140, 300):
            logits = model(tokens[:, step : step + 1], past_key_values=cache).logits
            torch.testing.assert_close(logits[:, 0], whole[:, step], rtol=1e-3, atol=1e-4)
            held = cache.layers[0].tensors()
            assert sum(tensor.untyped_storage().nbytes() for tensor in held) == report(cache).layers[0].bytes
            assert report(cache).layers[0].bytes <= 1.25 * report(cache).layers[0].full_bytes
            moves, place = moves + (held[0].data_ptr() != place), held[0].data_ptr()
    assert moves <= 160 // 16 + 1


@pytest.mark.parametrize("crop", [False, True])
def test_later_tokens_do_not_disturb_a_gradient_through_a_window(crop):
    model = patch_model(tiny_model("mistral", sliding_window=128))
    cache = new_cache(model)
    first = model(random_ids(length=20), past_key_values=cache).logits
    second = model(random_ids(length=3), past_key_values=cache).logits
    if crop:
        cache.crop(-2)
    with torch.no_grad():
        model(random_ids(length=1), past_key_values=cache)
    first.sum().backward()
    # what it reads of the first is a constant
    with pytest.raises(RuntimeError, match="has no gradient"):
        second.sum().backward()
