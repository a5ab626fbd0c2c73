"""Scores through a cache are those of one forward over the whole text, and the cache stays as it was."""

import pytest
import torch
from transformers import DynamicCache

from hf_kvcache import patch_model
from hf_kvcache.evaluation import Task, context_ids, filled_cache, natural, recall, score_answers, score_answers_aware
from hf_kvcache.measure import continuation, kl_divergence, top1_agreement
from hf_kvcache.testing import VOCABULARY, random_ids, tiny_model

TASK = Task("toy", "a context of some length, " * 4, (("what?", " this"), ("and then?", " that, it says")))


def characters(text, add_special_tokens=True):
    assert not add_special_tokens, "the protocol feeds raw text"
    return {"input_ids": [1 + ord(letter) % (VOCABULARY - 1) for letter in text]}


@pytest.fixture(params=["dynamic", "ours"])
def model(request):
    model = tiny_model("llama")
    return patch_model(model) if request.param == "ours" else model


def expected(question, answer):
    """NLL and arg-max of the answer by one forward without a cache."""
    model = tiny_model("llama")
    ids = context_ids(model, characters, TASK.context + question + answer)
    with torch.no_grad():
        log_probs = model(ids).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
    targets = ids[0, -len(answer) :]
    return -log_probs.gather(-1, targets[:, None]).mean().item(), bool((log_probs.argmax(-1) == targets).all())


def assert_as_expected(answers):
    assert len(answers) == len(TASK.questions)
    for scored, (question, answer) in zip(answers, TASK.questions, strict=True):
        nll, exact = expected(question, answer)
        assert scored.nll == pytest.approx(nll, abs=1e-4) and scored.exact == exact


def test_answers_are_scored_through_a_copy(model):
    cache = filled_cache(model, context_ids(model, characters, TASK.context))
    before = cache.get_seq_length()
    assert_as_expected(score_answers(model, characters, cache, TASK))
    assert cache.get_seq_length() == before
    assert score_answers(model, characters, cache, TASK) == score_answers(model, characters, cache, TASK)


def test_aware_answers_equal_the_others_where_nothing_is_compressed(model):
    assert_as_expected(score_answers_aware(model, characters, TASK))


def test_an_answer_that_the_model_gives_itself_is_exact(model):
    ids = context_ids(model, characters, TASK.context)
    out = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :].tolist()

    def with_own_answer(text, add_special_tokens=True):
        return (
            {"input_ids": out[1:]}
            if text == "own"
            else {"input_ids": out[:1]}
            if text == "first"
            else characters(text, add_special_tokens)
        )

    task = Task("own", TASK.context, (("first", "own"),))
    (answer,) = score_answers(model, with_own_answer, filled_cache(model, ids), task)
    assert answer.exact


def test_positions_are_true_for_a_cache_that_has_lost_tokens():
    model = tiny_model("llama")
    ids = context_ids(model, characters, TASK.context)
    seen = []
    hook = model.model.register_forward_pre_hook(lambda *a: seen.append(a[2]["position_ids"]), with_kwargs=True)
    cache = filled_cache(model, ids)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]
    score_answers(model, characters, cache, TASK)
    hook.remove()
    assert all(int(positions[0, 0]) == ids.shape[1] for positions in seen[1:])


def test_recall_repeats_the_middle_of_the_prefix(model):
    ids = random_ids(length=200)
    cache = filled_cache(model, ids)
    whole = torch.cat([ids, context_ids(model, characters, "\n\n"), ids[:, 36:164]], dim=1)
    with torch.no_grad():
        log_probs = tiny_model("llama")(whole).logits[0, -113:-1].log_softmax(-1)
    nll = -log_probs.gather(-1, whole[0, -112:, None]).mean().item()
    assert recall(model, characters, cache, ids) == pytest.approx(nll, abs=1e-4)
    assert cache.get_seq_length() == 200
    with pytest.raises(ValueError, match="at least 128 tokens, got 100"):
        recall(model, characters, cache, ids[:, :100])


def test_natural_equals_the_continuation_of_measure(model):
    ids = random_ids(length=60)
    cache = filled_cache(model, ids[:, :40])
    own, full = natural(model, cache, ids, 40), continuation(tiny_model("llama"), ids, 40)
    assert own.log_probs.shape == (19, VOCABULARY) and torch.equal(own.targets, ids[0, 41:])
    assert abs(kl_divergence(full, own)) < 1e-5 and top1_agreement(full, own) == 1
    assert cache.get_seq_length() == 40


def test_a_foreign_cache_is_scored_too():
    model = tiny_model("qwen2")
    ids = context_ids(model, characters, TASK.context)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert score_answers(model, characters, cache, TASK) == score_answers(
        model, characters, filled_cache(model, ids), TASK
    )
