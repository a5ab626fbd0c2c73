"""PyramidKV, HeadKV and AdaKV: budgets by the papers' formulas, exact sums, what is clipped handed on, files."""

import pytest
import torch

from hf_kvcache import SharingPlan, new_cache, patch_model, smollm2, unpatch_model
from hf_kvcache.api import measure_heads
from hf_kvcache.calibration.retrieval_heads import needle_prompts, retrieval_score
from hf_kvcache.eviction import EvictionPolicy, HeadImportance
from hf_kvcache.fingerprint import fingerprint
from hf_kvcache.methods import AdaKV, HeadKV, KVSharer, PyramidKV, Random
from hf_kvcache.testing import random_ids, random_observation, tiny_model

LAYERS = 5


def counts_of_layers(allocator, budget, window=0, layers=LAYERS, readers=None, **fields):
    """Tokens kept by every layer and head, `[layers, H_kv]`; every row of the batch must keep as many."""
    found = []
    readers = readers or tuple((layer,) for layer in range(layers))
    for layer in range(layers):
        observed = random_observation(layer=layer, num_layers=layers, readers=readers, **fields)
        kept, _ = EvictionPolicy(Random(window=window), allocator, budget=budget).keep(observed)
        counts = kept.sum(-1)
        assert torch.equal(counts[:1].expand_as(counts), counts)
        assert bool(kept[..., observed.num_tokens - window :].all())
        found.append(counts[0])
    return torch.stack(found)


def handed_on(shares: list[float], total: int, room: int) -> list[float]:
    """Real-valued shares that sum to `total`, at most `room` each; what one cannot take goes to the others by share."""
    given = [0.0] * len(shares)
    while total - sum(given) > 1e-9:
        open_ = [i for i, have in enumerate(given) if have < room - 1e-12]
        left, weight = total - sum(given), sum(shares[i] for i in open_)
        for i in open_:
            given[i] = min(room, given[i] + left * shares[i] / weight)
    return given


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("budget", [8, 15, 20, 33])
@pytest.mark.parametrize("beta", [1.0, 4.0, 20.0])
def test_pyramidkv_is_linear_over_the_layers_and_sums_exactly(beta, budget, window):
    counts = counts_of_layers(PyramidKV(beta=beta), budget, window)
    assert int(counts.sum()) == budget * LAYERS * 2
    least = (budget - window) / beta
    most = 2 * (budget - window) - least
    if most > 40 - window:
        most = 40 - window
        least = 2 * (budget - window) - most
    for layer in range(LAYERS):
        share = most - layer * (most - least) / (LAYERS - 1)
        assert all(abs(int(count) - window - share) < 1 for count in counts[layer])
    assert counts[:, 0].tolist() == sorted(counts[:, 0].tolist(), reverse=True)


def test_pyramidkv_of_one_layer_is_uniform():
    assert counts_of_layers(PyramidKV(), 10, layers=1).tolist() == [[10, 10]]


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("budget", [8, 20, 37])
@pytest.mark.parametrize("beta", [1.0, 1.2, 5.0])
def test_headkv_splits_by_importance_and_sums_exactly(beta, budget, window):
    values = torch.rand(LAYERS, 6) ** 4
    counts = counts_of_layers(HeadKV(importance=HeadImportance(values), beta=beta), budget, window)
    assert int(counts.sum()) == budget * LAYERS * 2
    importance = [float(values[layer, 3 * head : 3 * head + 3].mean()) for layer in range(LAYERS) for head in range(2)]
    free = budget - window
    pool = int(free / beta)
    shares = [s / sum(importance) * pool * LAYERS * 2 + free - pool for s in importance]
    expected = handed_on(shares, free * LAYERS * 2, 40 - window)
    for count, share in zip(counts.flatten().tolist(), expected, strict=True):
        assert abs(count - window - share) < 1


def test_headkv_averages_over_all_layers_that_read_a_kv_head():
    values = torch.rand(4, 6)
    share = HeadImportance(values).of_kv_heads(((0, 2, 3), (1,)), 2)
    plain = [[float(values[list(layers), 3 * h : 3 * h + 3].mean()) for h in range(2)] for layers in ((0, 2, 3), (1,))]
    torch.testing.assert_close(share, torch.tensor(plain, dtype=torch.float64) / sum(map(sum, plain)))


@pytest.mark.parametrize("order", ["before", "after"])
def test_headkv_knows_the_sharing_whichever_method_comes_first(order):
    importance = HeadImportance(torch.rand(4, 6))
    methods = [KVSharer(plan=SharingPlan.from_pairs(4, [(3, 1)]), heal=False), HeadKV(importance=importance, budget=70)]
    model = patch_model(tiny_model("llama"), methods if order == "after" else methods[::-1])
    cache = new_cache(model)
    with torch.no_grad():
        model(random_ids(length=90), past_key_values=cache)
    counts = torch.tensor([cache.layers[layer].segments[0].lengths[0] for layer in (0, 1, 2)])
    assert int(counts.sum()) == 70 * 6
    share = importance.of_kv_heads(((0,), (1, 3), (2,)), 2)
    room, pool = 26, 5
    expected = handed_on((share * pool * 6 + 1).flatten().tolist(), 6 * 6, room)
    assert all(abs(int(c) - 64 - e) < 1 for c, e in zip(counts.flatten(), expected, strict=True))


@pytest.mark.parametrize("safeguard", ["mix", "floor"])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.9, 1.0])
def test_adakv_by_a_plain_loop(safeguard, alpha):
    observed, window, budget = random_observation(heads=4, group=1), 6, 15
    policy = EvictionPolicy(Random(window=window), AdaKV(alpha=alpha, safeguard=safeguard), budget=budget)
    kept, _ = policy.keep(observed)
    score, free = Random().score(observed), budget - window
    for row in range(2):
        ranked = sorted(((float(score[row, h, t]), h) for h in range(4) for t in range(40 - window)), reverse=True)
        counts = [0] * 4
        if safeguard == "mix":
            for _, head in ranked[: free * 4]:
                counts[head] += 1
            shares = [(1 - alpha) * hits + alpha * free for hits in counts]
            assert all(abs(int(n) - window - s) < 1 for n, s in zip(kept[row].sum(-1), shares, strict=True))
        else:
            safe = int(alpha * free)
            taken = [0] * 4
            rest = []
            for value, head in ranked:
                if taken[head] < safe:
                    taken[head] += 1
                else:
                    rest.append((value, head))
            for _, head in rest[: free * 4 - sum(taken)]:
                taken[head] += 1
            assert (kept[row].sum(-1) - window).tolist() == taken
        assert int(kept[row].sum()) == budget * 4


def test_head_importance_comes_back_from_its_file(tmp_path):
    model = tiny_model("llama")
    importance = HeadImportance(torch.rand(4, 6), fingerprint(model), {"samples": "3"})
    importance.save(tmp_path / "heads.safetensors")
    loaded = HeadImportance.load(tmp_path / "heads.safetensors")
    assert torch.equal(loaded.values, importance.values) and loaded.settings == {"samples": "3"}
    patch_model(model, "headkv", importance=tmp_path / "heads.safetensors", budget=0.5)
    assert new_cache(model).spec.allocator.importance.fingerprint == importance.fingerprint
    with pytest.raises(ValueError, match="the head importance is of the model"):
        patch_model(tiny_model("llama", seed=1), "headkv", importance=tmp_path / "heads.safetensors")
    with pytest.raises(ValueError, match="expected 'hf_kvcache"):
        SharingPlan.identity(4).save(tmp_path / "plan.safetensors")
        HeadImportance.load(tmp_path / "plan.safetensors")
    with pytest.raises(FileNotFoundError, match="calibrate headkv"):
        patch_model(model, "headkv", importance="absent.safetensors")


def test_an_importance_for_another_depth_or_without_a_tokenizer_is_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="with 3 layers"):
        patch_model(model, HeadKV(importance=HeadImportance(torch.rand(3, 6))))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        patch_model(model, "headkv")
    with pytest.raises(ValueError, match="unpatch_model first"):
        measure_heads(patch_model(model))
    with pytest.raises(ValueError, match="samples must be a positive int, got 0"):
        measure_heads(unpatch_model(model), samples=0)


BAD = [
    (lambda: PyramidKV(beta=0.5), ValueError, "beta must be a number of at least 1, got 0.5"),
    (lambda: HeadKV(beta=0), ValueError, "beta must be a number of at least 1, got 0"),
    (lambda: HeadKV(importance=torch.rand(4, 6)), TypeError, "wrap a tensor"),
    (lambda: HeadImportance(torch.rand(4)), ValueError, "a tensor [layers, query heads]"),
    (lambda: HeadImportance(torch.tensor([[1.0, torch.nan]])), ValueError, "finite"),
    (lambda: HeadImportance(-torch.ones(1, 2)), ValueError, "not negative"),
    (lambda: HeadImportance(torch.zeros(1, 2)), ValueError, "not all zero"),
    (lambda: AdaKV(alpha=2), ValueError, "alpha is a share of the budget"),
    (lambda: AdaKV(safeguard="none"), ValueError, "safeguard must be one of mix, floor"),
]


@pytest.mark.parametrize(("make", "kind", "words"), BAD, ids=[words for _, _, words in BAD])
def test_bad_options_are_refused(make, kind, words):
    with pytest.raises(kind) as error:
        make()
    assert words in str(error.value)


# the measurement


def test_retrieval_score_by_a_plain_loop():
    weights, (first, end) = torch.rand(3, 4, 30).softmax(-1), (7, 12)
    for head in range(3):
        total = 0.0
        for row in weights[head].tolist():
            top = sorted(range(30), key=row.__getitem__, reverse=True)[: end - first]
            total += sum(row[t] for t in top if first <= t < end) / (end - first)
        torch.testing.assert_close(float(retrieval_score(weights, (first, end))[head]), total / 4)


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ([1] if add_special_tokens else []) + [ord(letter) for letter in text]}


def test_needle_prompts_say_where_the_evidence_is():
    class Probe:
        model, tokenizer = None, Letters()

    prompts = needle_prompts(Probe(), 5, 400)
    firsts = [prompt.evidence[0] for prompt in prompts]
    for prompt in prompts:
        text = "".join(map(chr, prompt.ids[1:].tolist()))
        evidence = text[prompt.evidence[0] - 1 : prompt.evidence[1] - 1]
        answer = "".join(map(chr, prompt.answer.tolist()))
        place = evidence.removeprefix(" The access code for ").split(" is")[0]
        assert evidence == f" The access code for {place} is{answer}."
        assert text.endswith(f"The access code for {place} is{answer[:-1]}") and text.count("access code") == 4
        assert prompt.ids[0] == 1 and abs(len(prompt.ids) - 400) < 10
    assert firsts == sorted(firsts) and firsts[0] == 1


@pytest.mark.slow
@pytest.mark.skipif(not smollm2.available(), reason="the package with the small real model is not installed")
def test_a_real_model_has_retrieval_heads():
    model, tokenizer = smollm2.load()
    importance = measure_heads(model, samples=6, length=256, tokenizer=tokenizer)
    again = measure_heads(model, samples=4, length=320, tokenizer=tokenizer)
    assert int(importance.settings["answered"]) >= 3
    top = [set(found.values.flatten().argsort(descending=True)[:20].tolist()) for found in (importance, again)]
    assert len(top[0] & top[1]) >= 10
