"""Generation under autocast, where queries and keys come in another dtype than values, and where it begins or ends."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_kvcache import compile_decode, patch_model
from hf_kvcache.codecs import turboquant
from hf_kvcache.patches.attach import attached
from hf_kvcache.testing import greedy, live_tensors, random_ids, rms, tiny_model
from tests.generate.models import original
from tests.methods.yoco import shake

IDS = random_ids(batch=2, length=21)
METHODS = pytest.mark.parametrize(
    ("method", "options"),
    [
        (None, {}),
        ("turboquant", {"bits": 8}),
        ("snapkv", {"budget": 0.5, "window": 4}),
        ("yoco", {}),
        ("yoco++", {}),
    ],
)


def autocast(on=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def patched(method, **options):
    return shake(patch_model(copy.deepcopy(original("llama")), method, **options))


@torch.no_grad()
def steps(model, first, then, tokens=6):
    """The logits of a prompt, and of the tokens and the few at once that follow it, with autocast where it is said."""
    with autocast(first):
        out = model(IDS)
    found, cache = [out.logits], out.past_key_values
    for step in range(tokens):
        with autocast(then):
            length = 4 if step == tokens - 1 else 1
            found.append(model(random_ids(2, length, seed=step), past_key_values=cache).logits)
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_nothing_lost_errs_as_the_unpatched_model(family, attention):
    model = copy.deepcopy(original(family))
    model.set_attn_implementation(attention)
    full, low = (steps(model, on, on) for on in (False, True))
    for exact, plain, own in zip(full, low, steps(patch_model(model, None), True, True), strict=True):
        assert own.dtype == plain.dtype == torch.bfloat16
        assert rms(own - exact) < 2 * rms(plain - exact)


@METHODS
def test_steps_err_as_bfloat16_does(method, options):
    """Against the same steps in float32, about as much as those of the unpatched model."""
    plain, model = original("llama"), patched(method, **options)
    honest = [rms(a - b) for a, b in zip(steps(plain, True, True), steps(plain, False, False), strict=True)]
    with autocast():
        assert greedy(model, IDS).shape == (2, 12)
    for low, full, error in zip(steps(model, True, True), steps(model, False, False), honest, strict=True):
        assert low.dtype == torch.bfloat16
        # a method that chooses tokens may choose others
        assert rms(low - full) < 4 * error or method == "snapkv"


@METHODS
@pytest.mark.parametrize("first", [True, False])
def test_autocast_may_begin_and_end_between_two_tokens(method, options, first):
    plain, model = original("llama"), patched(method, **options)
    honest = [rms(a - b) for a, b in zip(steps(plain, True, True), steps(plain, False, False), strict=True)]
    for mixed, full, error in zip(steps(model, first, not first), steps(model, False, False), honest, strict=True):
        assert rms(mixed - full) < 4 * error or method == "snapkv"


def test_the_cache_holds_what_attention_is_given():
    model = patched(None)
    with torch.no_grad(), autocast():
        cache = model(IDS).past_key_values
        model(IDS[:, :1], past_key_values=cache)
    assert {tensor.dtype for tensor in live_tensors(cache)} == {torch.bfloat16}


def test_products_of_the_cache_are_not_rounded(monkeypatch):
    def exact(function):
        def wrapped(*args, **kwargs):
            assert not torch.is_autocast_enabled("cpu")
            called.add(function.__name__)
            return function(*args, **kwargs)

        return wrapped

    called = set()
    for name in ("encode_entries", "code_attention"):
        monkeypatch.setattr(turboquant, name, exact(getattr(turboquant, name)))
    with autocast():
        greedy(patched("turboquant"), IDS)
    assert called == {"encode_entries", "code_attention"}


@pytest.mark.parametrize("method", [None, "yoco++"])
def test_a_model_trained_in_bfloat16_generates(method, tmp_path):
    """accelerate leaves the model's forward in autocast."""
    rows = [dict.fromkeys(("input_ids", "labels"), random_ids(length=12, seed=seed)[0]) for seed in range(2)]
    arguments = TrainingArguments(tmp_path, max_steps=1, bf16=True, report_to=[], use_cpu=True, save_strategy="no")
    model = patched(method)
    Trainer(model, arguments, train_dataset=rows).train()
    model.eval()
    chosen = greedy(model, IDS)
    assert torch.equal(greedy(model, IDS), chosen)


def test_no_step_is_recorded_with_weights_that_autocast_has_cast():
    """They are gone when it ends, and a recording would read where they were."""
    model = compile_decode(patch_model(tiny_model("llama"), None))
    with autocast():
        chosen = greedy(model, IDS)
        assert attached(model).compiled.replayed == 0
        assert torch.equal(greedy(patch_model(tiny_model("llama"), None), IDS), chosen)
    greedy(model, IDS)
    assert attached(model).compiled.replayed > 0
