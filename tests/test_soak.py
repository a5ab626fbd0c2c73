"""Random models x random compositions x random calls, for as long as one likes.

    pytest -m slow tests/test_soak.py                                # an hour
    SOAK_SECONDS=60 SOAK_SEED=7 pytest -m slow tests/test_soak.py    # a minute, from case 7 on
    SOAK_SECONDS=0 SOAK_SEED=7 pytest -m slow tests/test_soak.py     # case 7 alone, as a failure names it

Every attention over a cache is compared with plain softmax attention in float64 over what the cache says that it holds.
On top of it calls that say the same thing in different ways are compared, methods that lose nothing with the unpatched
model, and the model after `unpatch_model` with what it was.

Two ways to read one prompt differ in the last bits of float32, and where a choice or a code is a tie, that turns it. A
case that fails is therefore run once more in float64: of some ten thousand codes in a case it takes only one. Scores
and codes stay in float32 there, so where that fails too, the same composition has to pass with other weights, three
times: a fault does not hang on the last digit of a score. The first may be one in twenty, the second one in a hundred.
The comparison with reference attention has no such excuse.
"""

import copy
import os
import random
import time
from collections import Counter
from functools import cached_property

import pytest
import torch

from hf_kvcache import (
    METHODS,
    HeadImportance,
    KVSharer,
    SharingPlan,
    compress,
    load_cache,
    new_cache,
    patch_model,
    report,
    unpatch_model,
)
from hf_kvcache.layers import KVCacheLayer
from hf_kvcache.testing import FAMILIES, left_pad, live_bytes, model_state, random_ids, sharing_maps, tiny_model

SMALL = {
    "snapkv": {"window": 6},
    "defensivekv": {"window": 6},
    "rkv": {"window": 4},
    "lagkv": {"lag": 8},
    "expected_attention": {"horizon": 8},
    "kvzip": {"instructions": ((5, 6, 7), (8, 9)), "chunk": 16},
}
STEPS = 6
REFUSED = (ValueError, NotImplementedError, TypeError)


class WrongAttention(Exception):
    """An attention over a cache is not that over what the cache says that it holds."""


@torch.no_grad()
def reference_attention(layer, call):
    """Softmax attention in float64 over the decoded segments and the tail: `[B, H_kv, M, D]`."""
    query = call.folded_query(layer.tail.key.shape[1]).double()
    mask = call.folded_mask(query.shape[2] // call.length, layer.tail.length)
    sealed = [(segment.dense(), segment.rows) for segment in layer.segments]
    out = torch.empty_like(query)
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            parts = [dense[rows[row]][head] for dense, rows in sealed]
            parts.append((layer.tail.key[row, head], layer.tail.value[row, head]))
            key, value = (torch.cat([part[which].double() for part in parts]) for which in (0, 1))
            scores = query[row, head] @ key.T * call.scale
            if call.softcap:
                scores = call.softcap * (scores / call.softcap).tanh()
            if mask is not None:
                own = mask[min(row, len(mask) - 1), 0]
                scores[:, len(key) - layer.tail.length :].masked_fill_(~own, -torch.inf)
            out[row, head] = scores.softmax(-1) @ value
    return out


@pytest.fixture(autouse=True)
def checked_attention(monkeypatch):
    """Compares every attention over a cache with the reference; counts them."""
    attend, count = KVCacheLayer._attend_parts, Counter()

    def checked(layer, call):
        found = attend(layer, call)
        expected = call.unfolded(reference_attention(layer, call).to(found.dtype))
        finite = torch.isfinite(expected)
        error, size = (found - expected)[finite].abs().max(), expected[finite].abs().max()
        # padded queries attend to nothing and mean nothing
        if not bool(error <= 1e-4 * size + 1e-6):
            raise WrongAttention(f"layer {call.layer}, {call.length} queries: off by {error:.3g} of {size:.3g}")
        count["attentions"] += 1
        return found

    monkeypatch.setattr(KVCacheLayer, "_attend_parts", checked)
    return count


class Case:
    """A model, a composition and prompts, all from one number; with a `draw` of other weights."""

    def __init__(self, seed, dtype, folder, draw=0):
        self.rng, self.folder = random.Random(seed), folder
        rng = self.rng
        self.family = rng.choice(FAMILIES)
        queries, heads = rng.choice([(6, 2), (4, 4), (4, 1), (8, 2)])
        shape = {"num_attention_heads": queries, "num_key_value_heads": heads, "hidden_size": 8 * queries}
        self.plain = tiny_model(self.family, seed=seed % 1000 + 1000 * draw, **shape).to(dtype)
        if dtype == torch.float64:
            # the grouped product of experts is for less
            self.plain.set_experts_implementation("eager")
        self.model = copy.deepcopy(self.plain)
        self.methods = self._methods()
        self.ids = random_ids(batch=rng.choice([1, 1, 2, 3]), length=rng.randint(30, 80), seed=seed)

    def __str__(self):
        methods = ", ".join(map(repr, self.methods)) or "none"
        return f"{self.family}, ids {list(self.ids.shape)}, {methods}"

    def _methods(self):
        rng, config = self.rng, self.plain.config
        depth, found = config.num_hidden_layers, []
        if rng.random() < 0.3:
            pairs = rng.choice(list(sharing_maps(self.plain).values()))
            found.append(KVSharer(plan=SharingPlan.from_pairs(depth, pairs)))
        if rng.random() < 0.7:
            found += self._eviction()
        codec = rng.choice([None, None, "turboquant", "turboquant", "uniform", "fp8"])
        if codec:
            options = {"residual_length": rng.choice([0, 0, 5]), "block_size": rng.choice([0, 4, 128])}
            if codec != "fp8":
                options["bits"] = rng.choice([2, 3, 4, 8] if codec == "turboquant" else [2, 3, 4])
            if codec == "turboquant" and rng.random() < 0.3:
                # the published form has no 8 bits
                options |= {"mode": "paper", "variant": rng.choice(["mse", "prod"]), "bits": min(options["bits"], 4)}
            found.append(METHODS[codec](**options))
        if rng.random() < 0.2:
            found.append(METHODS["offload"]())
        if rng.random() < 0.15:
            found.append(METHODS["sequential"](store=str(self.folder / "pages")))
        rng.shuffle(found)
        return found

    def _eviction(self):
        rng, config = self.rng, self.plain.config
        scorer = METHODS[rng.choice(sorted(name for name, method in METHODS.items() if method.slot == "scorer"))]
        options = {**SMALL.get(scorer.name, {}), "budget": rng.choice([16, 24, 0.3, 0.6, 1.0])}
        if scorer.while_decoding:
            options["every"] = rng.choice([None, None, 1, 4])
        found = [scorer(**options)]
        allocator = rng.choice([None, None, "adakv", "pyramidkv", "headkv"])
        if allocator:
            heads = torch.rand(
                config.num_hidden_layers, config.num_attention_heads, generator=torch.Generator().manual_seed(1)
            )
            measured = {"importance": HeadImportance(heads)} if allocator == "headkv" else {}
            found.append(METHODS[allocator](**measured))
        if rng.random() < 0.3:
            found.append(METHODS["criticalkv"]())
        return found

    @cached_property
    def spec(self):
        return new_cache(self.model).spec

    @property
    def lossless(self):
        """Whether nothing is shared, dropped or rounded."""
        spec = self.spec
        return spec.eviction is None and not spec.sharing.consumers and not any(codec.lossy for codec in spec.codecs)


@torch.no_grad()
def ahead(model, ids, cache, steps=STEPS, **options):
    """Greedy decoding by plain forwards: logits `[B, steps, V]`."""
    found = []
    for _ in range(steps):
        found.append(model(ids, past_key_values=cache, use_cache=True, **options).logits[:, -1])
        ids = found[-1].argmax(-1, keepdim=True)
    return torch.stack(found, 1)


def generated(model, ids, **options):
    """Greedy decoding by `generate`: logits `[B, steps, V]`, and all that it returns."""
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": STEPS, **options}
    out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **given)
    return torch.stack(out.logits, 1), out


def assert_same(one, other):
    """Logits agree until the tokens that they say part, which they may only where two are as likely."""
    alike = torch.ones(len(one), dtype=torch.bool)
    for mine, theirs in zip(one.unbind(1), other.unbind(1), strict=True):
        # transformers gives the scores of a generation in float32 whatever the model is in
        torch.testing.assert_close(mine[alike], theirs[alike], rtol=1e-3, atol=1e-3, check_dtype=False)
        alike &= mine.argmax(-1) == theirs.argmax(-1)


def call_generate(case):
    found, _ = generated(case.model, case.ids)
    assert_same(found, ahead(case.model, case.ids, new_cache(case.model)))
    if case.lossless:
        assert_same(found, generated(case.plain, case.ids)[0])


def call_padded(case):
    # rows have one tail: where the window is a share, what a short row lets go of stays dense in none of them
    shortest = 35 if any(isinstance(getattr(method, "window", 0), float) for method in case.methods) else 20
    rows = [random_ids(length=case.rng.randint(shortest, 50), seed=seed)[0] for seed in range(3)]
    ids, mask = left_pad(rows)
    together, _ = generated(case.model, ids, attention_mask=mask)
    for index, row in enumerate(rows):
        assert_same(together[index : index + 1], generated(case.model, row[None])[0])


def call_chunks(case):
    chunk = case.rng.randint(1, 40)
    assert_same(generated(case.model, case.ids)[0], generated(case.model, case.ids, prefill_chunk_size=chunk)[0])


@torch.no_grad()
def call_beams(case):
    beams = 3
    _, out = generated(case.model, case.ids, num_beams=beams, num_return_sequences=beams, output_scores=True)
    # what the beams scored, had each been fed on its own
    ids = case.ids.repeat_interleave(beams, 0)
    cache = new_cache(case.model)
    cache.expect(ids.shape[1], beams)
    total, new = 0, ids
    for step in range(STEPS):
        logits = case.model(new, past_key_values=cache).logits[:, -1]
        new = out.sequences[:, ids.shape[1] + step, None]
        total = total + logits.log_softmax(-1).gather(-1, new)[:, 0]
    torch.testing.assert_close(out.sequences_scores, total / STEPS, rtol=1e-3, atol=1e-3, check_dtype=False)
    if case.lossless:
        expected = case.plain.generate(
            case.ids, attention_mask=torch.ones_like(case.ids), num_beams=beams, do_sample=False, max_new_tokens=STEPS
        )
        assert torch.equal(out.sequences[::beams], expected)


def call_assisted(case):
    ids = case.ids[:1]
    assistant = tiny_model("llama", seed=3).to(case.plain.dtype)
    policy, shared = case.spec.eviction, case.spec.sharing.consumers
    lossy = any(codec.lossy for codec in case.spec.codecs)
    try:
        found, _ = generated(case.model, ids, assistant_model=assistant)
    except NotImplementedError as error:
        judged = policy is not None and (policy.deferred or policy.every)
        assert judged or (shared and (policy is not None or lossy)), error
        return
    # where a codec encodes blocks while decoding, drafts see a block dense that tokens which come alone see encoded
    if not any(codec.lossy and codec.block for codec in case.spec.codecs):
        assert_same(found, generated(case.model, ids)[0])


@torch.no_grad()
def call_crop(case):
    cache = compress(case.model, case.ids)
    try:
        cache.activate_past_recording()
    except NotImplementedError:
        return
    more = random_ids(batch=len(case.ids), length=case.rng.randint(1, 6), seed=5)
    ids = random_ids(batch=len(case.ids), length=2, seed=6)
    expected = ahead(case.model, ids, copy.deepcopy(cache))
    case.model(more, past_key_values=cache)
    cache.crop(-more.shape[1])
    assert cache.get_seq_length() == case.ids.shape[1]
    assert_same(ahead(case.model, ids, cache), expected)


@torch.no_grad()
def call_second_turn(case):
    _, first = generated(case.model, case.ids)
    turn = random_ids(batch=len(case.ids), length=case.rng.randint(1, 9), seed=7)
    found, _ = generated(case.model, torch.cat([first.sequences, turn], 1), past_key_values=first.past_key_values)
    cache, new = new_cache(case.model), case.ids
    for step in range(STEPS):
        case.model(new, past_key_values=cache)
        new = first.sequences[:, case.ids.shape[1] + step, None]
    assert_same(found, ahead(case.model, torch.cat([new, turn], 1), cache))


def call_saved(case):
    cache = compress(case.model, case.ids)
    ids = random_ids(batch=len(case.ids), length=2, seed=6)
    ahead(case.model, ids, cache, case.rng.randint(1, 5))
    cache.save(case.folder / "cache.safetensors")
    expected = ahead(case.model, ids, cache)
    assert_same(ahead(case.model, ids, load_cache(case.model, case.folder / "cache.safetensors")), expected)


def call_rows(case):
    cache = compress(case.model, case.ids)
    ids = random_ids(batch=len(case.ids), length=2, seed=6)
    ahead(case.model, ids, cache, 3)
    # a block that copies of a row encode has not the base of their common prompt
    steps = 1 if any(codec.lossy and codec.block for codec in case.spec.codecs) else STEPS
    expected = ahead(case.model, ids, copy.deepcopy(cache), steps)
    cache.batch_repeat_interleave(2)
    order = [case.rng.randrange(2 * len(ids)) for _ in range(4)]
    cache.reorder_cache(torch.tensor(order + list(range(4, 2 * len(ids)))))
    kept = [row // 2 for row in order]
    cache.batch_select_indices(torch.arange(4) if len(ids) > 1 else torch.arange(2))
    kept = kept if len(ids) > 1 else kept[:2]
    assert_same(ahead(case.model, ids[kept], cache, steps), expected[kept])


def call_copies(case):
    cache = compress(case.model, case.ids)
    ids = [random_ids(batch=len(case.ids), length=2, seed=seed) for seed in (6, 7)]
    expected = [ahead(case.model, one, copy.deepcopy(cache)) for one in ids]
    for one, answer in zip(ids, expected, strict=True):
        assert_same(ahead(case.model, one, copy.deepcopy(cache)), answer)
    importance = [method.importance for method in case.methods if method.name == "headkv"]
    assert report(cache).bytes == live_bytes(cache) - sum(live_bytes(measured) for measured in importance)


CALLS = [value for name, value in sorted(globals().items()) if name.startswith("call_")]


def run(seed, dtype, folder, refusals, doing, draw=0):
    """One case: patch, some calls, unpatch; `doing` says how far it got."""
    case = Case(seed, dtype, folder, draw)
    before = model_state(case.model)
    try:
        patch_model(case.model, case.methods or None)
    except REFUSED as error:
        assert len(str(error)) > 20, repr(error)
        refusals[f"{type(error).__name__}: {error}"[:90]] += 1
    else:
        for call in case.rng.sample(CALLS, 4):
            doing.append(f"case {seed} in {dtype}, {call.__name__}: {case}")
            call(case)
        unpatch_model(case.model)
    model_state(case.model).assert_equal(before)


def folder_for(tmp_path, seed):
    """A new folder."""
    folder = tmp_path / f"{seed}-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    return folder


@pytest.mark.slow
def test_soak(tmp_path, checked_attention):
    seconds, first = float(os.environ.get("SOAK_SECONDS", 3600)), int(os.environ.get("SOAK_SEED", 0))
    refusals, rounded, ties, seed, end = Counter(), [], [], first, time.monotonic() + seconds
    while seed == first or time.monotonic() < end:
        doing = []
        try:
            try:
                run(seed, torch.float32, folder_for(tmp_path, seed), refusals, doing)
            except AssertionError as error:
                rounded.append((doing[-1:], str(error)[:300]))
                try:
                    run(seed, torch.float64, folder_for(tmp_path, seed), Counter(), doing)
                except AssertionError:
                    ties.append(rounded.pop())
                    for draw in (1, 2, 3):
                        run(seed, torch.float64, folder_for(tmp_path, seed), Counter(), doing, draw)
        except Exception as error:
            raise AssertionError(f"SOAK_SECONDS=0 SOAK_SEED={seed} repeats it; {doing[-1:]}") from error
        seed += 1
    cases = seed - first
    print(
        f"{cases} cases, {checked_attention['attentions']} attentions, {len(rounded)} rounded otherwise, {len(ties)} "
        f"ties, refused: {refusals}"
    )
    assert len(rounded) <= 1 + cases // 20, rounded
    assert len(ties) <= 1 + cases // 100, ties
    assert sum(refusals.values()) <= cases / 4, refusals
