"""On tiny models a padded row keeps what it keeps alone, and bytes follow the budget, while decoding too."""

import pytest
import torch

from hf_kvcache import new_cache, patch_model
from hf_kvcache.methods import (
    H2O,
    RKV,
    TOVA,
    CriticalKV,
    DefensiveKV,
    KeyDiff,
    Knorm,
    Random,
    SnapKV,
    StreamingLLM,
    Uniform,
)
from hf_kvcache.testing import left_pad, live_bytes, random_ids, tiny_model
from tests.eviction.triples import DECODING, TRIPLES, methods_of


@torch.no_grad()
def prefilled(model, ids, **kwargs):
    cache = new_cache(model)
    model(ids, past_key_values=cache, **kwargs)
    return cache


def held(cache, row: int, length: int):
    """For every layer and head the places of the tokens kept, counted from the end of the prompt, and their keys."""
    for layer in cache.layers:
        segment = layer.segments[0]
        stored = segment.rows[row]
        positions, runs = segment.positions(), segment.layout.owners
        for head, (key, _) in enumerate(segment.dense()[stored]):
            run = stored * segment.layout.heads + head
            yield sorted((positions[runs == run] - length).tolist()), key


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("triple", TRIPLES, ids="+".join)
def test_a_row_alone_is_the_row_in_a_padded_batch(triple, family):
    sliding = {"layer_types": ["full_attention"] * 4} if family == "gemma3_text" else {}
    model = patch_model(tiny_model(family, **sliding), methods_of(triple, budget=18))
    rows = [random_ids(length=length, seed=length)[0] for length in (40, 27, 16)]
    ids, mask = left_pad(rows)
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    together = prefilled(model, ids, attention_mask=mask, position_ids=position_ids)
    for row, own in enumerate(rows):
        alone = prefilled(model, own[None])
        for (places, key), (expected, expected_key) in zip(
            held(together, row, 40), held(alone, 0, len(own)), strict=True
        ):
            assert places == expected and min(places) >= -len(own)
            torch.testing.assert_close(key, expected_key, rtol=1e-4, atol=1e-4)


def test_a_residual_holds_nothing_that_a_short_row_has_dropped():
    # the window of H2O is a share of what a row keeps: 25 tokens of the long row, 5 of the short one
    model = patch_model(tiny_model("llama"), [H2O(budget=0.25), Uniform(bits=8, residual_length=32)])
    rows = [random_ids(length=length, seed=length)[0] for length in (200, 40)]
    ids, mask = left_pad(rows)
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    together = prefilled(model, ids, attention_mask=mask, position_ids=position_ids)
    alone = prefilled(model, rows[1][None])
    for layer, own in zip(together.layers, alone.layers, strict=True):
        assert layer.tail.length == own.tail.length == 5
        assert layer.segments[0].lengths == ((45, 45), (5, 5)) and own.segments[0].lengths == ((5, 5),)
    mask, following = torch.cat([mask, mask.new_ones(2, 1)], dim=1), torch.tensor([[5], [5]])
    with torch.no_grad():
        found = model(following, past_key_values=together, attention_mask=mask, position_ids=mask.sum(-1)[:, None] - 1)
        expected = model(following[1:], past_key_values=alone)
    torch.testing.assert_close(found.logits[1:], expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("triple", TRIPLES, ids="+".join)
def test_bytes_fall_with_the_budget(triple):
    model = patch_model(tiny_model("llama"), methods_of(triple, budget=0.25))
    ids = random_ids(length=160)
    full = live_bytes(prefilled(patch_model(tiny_model("llama")), ids).layers)
    # an entry of these tiny heads costs 64 bytes and 4 for its place
    assert live_bytes(prefilled(model, ids).layers) <= 0.25 * full * 68 / 64 + 4096


@pytest.mark.parametrize("scorer", DECODING)
@pytest.mark.parametrize(
    "others", [("uniform", "top-k"), ("adakv", "criticalkv"), ("pyramidkv", "top-k")], ids="+".join
)
def test_memory_is_bounded_while_decoding(scorer, others):
    budget, every = 20, 8
    model = patch_model(tiny_model("llama"), methods_of((scorer, *others), budget=budget, every=every))
    cache = prefilled(model, random_ids(batch=2, length=30))
    for step in range(60):
        with torch.no_grad():
            model(torch.full((2, 1), 3 + step % 7), past_key_values=cache)
        entries = [torch.tensor(layer.segments[0].lengths).sum(-1) + layer.tail.length * 2 for layer in cache.layers]
        assert bool((torch.stack(entries).sum(0) <= (budget + every) * 2 * 4).all())
        assert all(len(layer.segments) == 1 and layer.tail.length < every for layer in cache.layers)
    assert cache.get_seq_length() == 90
    assert all(q.shape[2] <= 90 for layer in cache.layers for q in layer.evictor.queries.values())


@torch.no_grad()
def read_in_turn(model, parts):
    """Reads one part `(ids, mask)` after the other.

    Returns:
        logits `[B, parts, V]` of every part's last column, and the places that each layer and head keeps of the last
        row, padding not counted.
    """
    cache, found, mask = new_cache(model), [], torch.zeros(len(parts[0][0]), 0, dtype=torch.long)
    for ids, there in parts:
        mask = torch.cat([mask, there], dim=1)
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        positions = places[:, -ids.shape[1] :]
        found.append(model(ids, past_key_values=cache, attention_mask=mask, position_ids=positions).logits[:, -1])
    kept = []
    for layer in cache.layers:
        segment = layer.segments[0]
        for head in range(2):
            run = segment.rows[-1] * segment.layout.heads + head
            columns = segment.positions()[segment.layout.owners == run]
            kept.append(sorted(places[-1, columns].tolist()))
    return torch.stack(found, dim=1), kept


@pytest.mark.parametrize("padding", ["before the prompt", "behind the prompt", "before the second turn"])
@pytest.mark.parametrize("selector", ["top-k", "criticalkv"])
@pytest.mark.parametrize(
    "scorer",
    [
        SnapKV(budget=24, window=16, every=8),
        DefensiveKV(budget=24, window=16, every=8),
        RKV(budget=24, window=16, every=8),
        H2O(budget=16, every=8),
        TOVA(budget=16, every=8),
        Random(budget=24, every=8),
        StreamingLLM(budget=0.4, every=3),
        Knorm(budget=24, every=8),
        KeyDiff(budget=24, every=8),
    ],
    ids=lambda method: method.name,
)
def test_padding_anywhere_changes_nothing_while_decoding(scorer, selector, padding):
    model = patch_model(tiny_model("llama"), [scorer, CriticalKV()] if selector == "criticalkv" else scorer)
    lengths = [(40, 40), (20, 14)] if padding == "before the second turn" else [(40, 33)]
    turns = [[random_ids(length=n, seed=seed + n)[0] for seed, n in enumerate(of_rows)] for of_rows in lengths]
    if padding == "behind the prompt":
        together = [tuple(part.flip(1) for part in left_pad([row.flip(0) for row in rows])) for rows in turns]
    else:
        together = [left_pad(rows) for rows in turns]
    own = [rows[1][None] for rows in turns]
    for step in range(12):
        together.append((torch.full((2, 1), 3 + step), torch.ones(2, 1, dtype=torch.long)))
        own.append(torch.full((1, 1), 3 + step))
    logits, kept = read_in_turn(model, together)
    expected, alone = read_in_turn(model, [(ids, torch.ones_like(ids)) for ids in own])
    assert kept == alone
    torch.testing.assert_close(logits[1, -12:], expected[0, -12:], rtol=1e-4, atol=1e-3)
