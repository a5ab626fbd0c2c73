"""Log-likelihoods through the cache: the numbers of one plain forward where nothing is lost, in any batch."""

import pytest
import torch

from hf_kvcache import patch_model, unpatch_model
from hf_kvcache.integrations import scoring
from hf_kvcache.integrations.scoring import ScoredText, score_texts
from hf_kvcache.testing import random_ids, tiny_model


def ids(length: int, seed: int) -> tuple[int, ...]:
    return tuple(random_ids(1, length, seed)[0].tolist())


CONTEXT = ids(30, 0)
TEXTS = [
    ScoredText(CONTEXT + ids(6, 1), 30, 31),
    ScoredText(CONTEXT + ids(3, 2), 30, 32),
    ScoredText(ids(23, 3), 15, 18),
    # part of the context is scored too, as in a rolling log-likelihood
    ScoredText(ids(40, 4), 20, 1),
    # no context at all
    ScoredText(ids(5, 5), 0, 1),
    ScoredText(ids(2, 6), 0, 1),
    ScoredText(CONTEXT + ids(9, 7), 30, 31),
]


@torch.no_grad()
def plain(model, text: ScoredText) -> float:
    """One forward over everything."""
    log_probs = model(torch.tensor([text.ids[:-1]])).logits[0].log_softmax(-1)
    return float(sum(log_probs[place - 1, text.ids[place]] for place in range(text.first, len(text.ids))))


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_scores_are_those_of_one_forward_when_nothing_is_lost(family, batch_size):
    model = tiny_model(family)
    expected = [plain(model, text) for text in TEXTS]
    counted = []
    found = score_texts(patch_model(model), TEXTS, batch_size, counted.append)
    assert sum(counted) == len(TEXTS)
    for (score, _), wanted in zip(found, expected, strict=True):
        assert score == pytest.approx(wanted, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("rows", [1, 7])
def test_scores_summed_up_in_slices_are_the_same(monkeypatch, rows):
    model = patch_model(tiny_model("llama"), "knorm", budget=0.5)
    whole = score_texts(model, TEXTS, 2)
    monkeypatch.setattr(scoring, "SLICE", rows)
    for (score, greedy), (expected, expected_greedy) in zip(score_texts(model, TEXTS, 2), whole, strict=True):
        assert score == pytest.approx(expected, rel=1e-6) and greedy == expected_greedy


def test_the_most_likely_continuation_is_recognised():
    model = patch_model(tiny_model("llama"))
    best = model.generate(torch.tensor([CONTEXT]), max_new_tokens=4, do_sample=False, pad_token_id=0)[0].tolist()
    other = [*best[:-1], best[-1] % 90 + 1]
    texts = [ScoredText(tuple(text), 29, 30) for text in (best, other)]
    assert [greedy for _, greedy in score_texts(model, texts)] == [True, False]


@pytest.mark.parametrize("options", [{"method": "knorm", "budget": 0.3}, {"method": "turboquant", "bits": 2}])
def test_a_compressed_cache_is_what_is_scored_and_batches_do_not_matter(options):
    model = tiny_model("llama")
    full = score_texts(patch_model(model), TEXTS)
    patch_model(unpatch_model(model), **options)
    one, again, many = score_texts(model, TEXTS), score_texts(model, TEXTS), score_texts(model, TEXTS, 4)
    assert one == again
    for index, text in enumerate(TEXTS):
        assert many[index][0] == pytest.approx(one[index][0], abs=1e-4)
        changed = abs(one[index][0] - full[index][0]) > 1e-3
        assert changed == (text.context > 0)


@pytest.mark.parametrize(("context", "first"), [(4, 1), (0, 0), (0, 5), (-1, 1)])
def test_a_text_that_cannot_be_scored_is_refused(context, first):
    with pytest.raises(ValueError, match="expected context"):
        ScoredText(ids(5, 0), context, first)
