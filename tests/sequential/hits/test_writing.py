"""What runs write: the prompts of `generate`, turn after turn, each page once and whole, and nothing kept beyond it."""

import pytest
import torch

from hf_kvcache import new_cache
from hf_kvcache.sequential.session import PromptSession
from hf_kvcache.testing import greedy, random_ids
from tests.sequential.hits.compositions import adopted, cold, prompts, stored


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
