"""What runs write: the prompts of `generate`, turn after turn, each page once and whole, and nothing kept beyond it."""

import itertools

import pytest
import torch

from hf_kvcache import new_cache
from hf_kvcache.fingerprint import model_digest
from hf_kvcache.patches import prefix
from hf_kvcache.sequential import session
from hf_kvcache.sequential.session import PromptSession
from hf_kvcache.testing import greedy, random_ids
from tests.sequential.hits.compositions import PAGE, adopted, cold, prompts, stored


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


def test_a_failed_forward_stores_nothing(store, monkeypatch):
    model = stored("llama", store)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.model.layers[2].mlp, "forward", fail)
        greedy(model, prompts()[0])
    store.flush()
    assert not list(store.entries())
    assert torch.equal(greedy(model, prompts()[0]), greedy(cold("llama"), prompts()[0]))


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


@pytest.mark.parametrize("known", [0, 40, 160])
def test_a_prompt_in_chunks_asks_for_every_page_once(known, store, monkeypatch):
    ids, model = random_ids(length=160), stored("llama", store)
    if known:
        greedy(model, ids[:, :known], tokens=2)
        store.flush()
    asked, digests = [], []
    contains, nearest = store.backend.contains, store.backend.nearest
    monkeypatch.setattr(store.backend, "contains", lambda *a: asked.append(a) or contains(*a))
    monkeypatch.setattr(store.backend, "nearest", lambda *a: asked.append(a) or nearest(*a))
    monkeypatch.setattr(prefix, "model_digest", lambda decoder: digests.append(1) or model_digest(decoder))
    flushed = PromptSession._submit
    monkeypatch.setattr(PromptSession, "_submit", lambda self: (asked.append("end"), flushed(self)))
    assert torch.equal(greedy(model, ids, tokens=4, prefill_chunk_size=16), greedy(cold("llama"), ids, tokens=4))
    store.flush()
    # ten chunks: a page that is not there and what might be a part of it each, beside those that are there
    assert asked.index("end") <= known // PAGE + 10 * 3
    assert 1 <= len(digests) <= 2
    assert len(list(store.entries())) == 20


def test_weights_that_change_between_chunks_are_noticed_before_anything_is_written(store):
    ids, model = prompts()[0], stored("llama", store)
    cache = new_cache(model)
    cache.expect(45)
    with torch.no_grad():
        model.model(input_ids=ids[:, :20], past_key_values=cache)
        model.model.layers[1].mlp.down_proj.weight.data.mul_(1.01)
        for part in (ids[:, 20:30], ids[:, 30:]):
            model.model(input_ids=part, past_key_values=cache)
    store.flush()
    assert not list(store.entries())


def test_pages_behind_a_hit_cost_what_others_do(store, monkeypatch):
    """Every forward takes a second on this clock, so the sixteen tokens behind a hit seem slow ones."""
    times = itertools.count()
    monkeypatch.setattr(session, "now", lambda devices: float(next(times)))
    model, ids = stored("llama", store), random_ids(length=200)
    greedy(model, ids[:, :24], tokens=2)
    store.flush()
    assert {entry.seconds for entry in store.entries()} == {0.0}
    greedy(model, ids[:, :184], tokens=2)
    store.flush()
    greedy(model, ids, tokens=2)
    store.flush()
    seconds = {entry.start: entry.seconds / len(entry.ids) for entry in store.entries()}
    assert seconds[184] == seconds[192] == seconds[176] == pytest.approx(1 / (184 - 23), rel=0.01)
