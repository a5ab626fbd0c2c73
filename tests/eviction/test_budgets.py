"""On single observations every scorer, allocator and selector keeps to its budget exactly, and what must stay stays."""

import pytest
import torch

from hf_kvcache import patch_model
from hf_kvcache.eviction import EvictionPolicy, TopK
from hf_kvcache.eviction.roles import largest_remainder
from hf_kvcache.methods import AdaKV, CriticalKV, HeadKV, SnapKV, StreamingLLM
from hf_kvcache.testing import tiny_model
from tests.eviction.triples import DECODING, LENGTH, TRIPLES, build, layers_of, observe


@pytest.mark.parametrize("budget", [12, 25, 39, 0.4, 0.03, 0.01])
@pytest.mark.parametrize("triple", TRIPLES, ids="+".join)
def test_budgets_are_exact_and_window_and_sinks_stay(triple, budget):
    scorer, allocator, selector = map(build, triple)
    policy = EvictionPolicy(scorer, allocator, selector, budget)
    tokens, sinks, window = policy.limits(LENGTH)
    assert tokens == budget if isinstance(budget, int) else tokens == max(int(budget * LENGTH), sinks + window, 1)
    total = 0
    for _, kept in layers_of(policy):
        by_row = kept.sum((1, 2))
        assert torch.equal(by_row[:1].expand_as(by_row), by_row)
        assert bool(kept[..., :sinks].all()) and bool(kept[..., LENGTH - window :].all())
        if triple[1] not in ("pyramidkv", "headkv"):
            assert int(by_row[0]) == tokens * 2
        total += int(by_row[0])
    assert total == tokens * 2 * 4


@pytest.mark.parametrize("budget", [LENGTH, LENGTH + 9, 1.0])
@pytest.mark.parametrize("triple", TRIPLES, ids="+".join)
def test_a_budget_of_the_whole_length_keeps_everything(triple, budget):
    scorer, allocator, selector = map(build, triple)
    policy = EvictionPolicy(scorer, allocator, selector, budget)
    assert all(bool(kept.all()) for _, kept in layers_of(policy))


@pytest.mark.parametrize("scorer", DECODING)
@pytest.mark.parametrize("others", [("uniform", "top-k"), ("adakv", "criticalkv")], ids="+".join)
def test_what_is_not_there_is_never_kept(scorer, others):
    policy = EvictionPolicy(build(scorer), *map(build, others), budget=20, every=4)
    for observed, kept in layers_of(policy, holes=6, batch=3):
        assert not bool((kept & ~observed.valid).any())
        for row, (held, there) in enumerate(zip(kept.sum(-1), observed.valid.sum(-1), strict=True)):
            assert int(held.sum()) == min(40, int(there.sum())), row


@pytest.mark.parametrize(
    "host", [SnapKV(window=6), build("knorm"), build("keydiff"), build("h2o")], ids=lambda m: m.name
)
@pytest.mark.parametrize("allocator", ["uniform", "adakv"])
def test_criticalkv_with_one_stage_is_its_host(host, allocator):
    plain = EvictionPolicy(host, build(allocator), TopK(), 20)
    staged = EvictionPolicy(host, build(allocator), CriticalKV(first_stage=1.0), 20)
    for (_, one), (_, other) in zip(layers_of(plain), layers_of(staged), strict=True):
        assert torch.equal(one, other)


def test_scores_that_are_not_finite_drop_nothing_and_say_where():
    observed = observe()
    observed.key[0, 0, 3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"'keydiff' gave a score that is not finite in layer 0"):
        EvictionPolicy(build("keydiff"), budget=10).keep(observed)


def test_a_budget_within_what_is_always_kept_is_refused():
    with pytest.raises(ValueError, match="must exceed the tokens that 'snapkv' always keeps: 0 first and 64 last"):
        EvictionPolicy(SnapKV(), budget=64)
    with pytest.raises(ValueError, match="must exceed the tokens that 'streamingllm' always keeps: 4 first and 0 last"):
        EvictionPolicy(StreamingLLM(), budget=4)
    with pytest.raises(ValueError, match="which 'lagkv' is not defined for"):
        EvictionPolicy(build("lagkv"), budget=20, every=4)


def test_headkv_and_adakv_cannot_both_allocate():
    with pytest.raises(ValueError, match="'adakv' sets the slot 'allocator', but 'headkv' already did"):
        patch_model(tiny_model("llama"), [build("headkv"), AdaKV()])
    assert isinstance(build("headkv"), HeadKV)


def test_largest_remainder_is_exact_and_within_its_limits():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        parts = int(torch.randint(1, 9, (), generator=generator))
        share = torch.rand(3, parts, generator=generator) ** 3
        limit = torch.randint(0, 20, (3, parts), generator=generator)
        total = int(torch.randint(0, 60, (), generator=generator))
        given = largest_remainder(share, total, limit)
        assert bool((given >= 0).all()) and bool((given <= limit).all())
        assert torch.equal(given.sum(-1), limit.sum(-1).clamp(max=total))
