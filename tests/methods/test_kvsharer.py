"""KVSharer's search against an independent one, and its promises: order, chains, layer types, warnings, seeds."""

import copy
import itertools
import warnings
from functools import cache as memoize

import pytest
import torch
from transformers import DynamicCache

from hf_kvcache import KVSharer, SharingPlan, new_cache, patch_model, unpatch_model
from hf_kvcache.fingerprint import fingerprint
from hf_kvcache.patches.compat import sliding_windows
from hf_kvcache.spec import LayerKind
from hf_kvcache.testing import greedy, model_state, random_ids, tiny_model

CALIBRATION = random_ids(batch=30, length=64, seed=11)


@memoize
def original(family: str = "llama", layers: int = 6):
    types = {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)} if family == "gemma2" else {}
    return tiny_model(family, num_hidden_layers=layers, **types)


def find_plan(model, **options) -> SharingPlan:
    """The plan that a search in the published order finds on the calibration tokens; leaves the model unpatched."""
    options = {"calibration": CALIBRATION, "heal": False, "order": "dissimilar", **options}
    plan = new_cache(patch_model(model, KVSharer(**options))).spec.sharing
    unpatch_model(model)
    return plan


class Shared(DynamicCache):
    """Hands every layer the keys and values of its source, on an unpatched model, and remembers them."""

    def __init__(self, config, source_layers):
        super().__init__(config=config)
        self.source_layers, self.kv = source_layers, {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.kv[layer_idx] = key_states, value_states
        return self.kv[self.source_layers[layer_idx]]


@torch.no_grad()
def run(model, source_layers):
    """Final hidden states of the calibration batch, and every layer's keys and values, without any of our code."""
    cache = Shared(model.config, source_layers)
    hidden = model.model(CALIBRATION, past_key_values=cache).last_hidden_state
    return hidden, [cache.kv[layer] for layer in range(len(source_layers))]


def distance(kv, i: int, j: int) -> float:
    """1/2 (mean ||K_i - K_j|| + mean ||V_i - V_j||) of the averages over samples, one head and position at a time."""
    total = 0.0
    for part in (0, 1):
        one, other = kv[i][part].double().mean(0), kv[j][part].double().mean(0)
        norms = [(one[h, t] - other[h, t]).norm() for h, t in itertools.product(*map(range, one.shape[:2]))]
        total += float(torch.stack(norms).mean()) / 2
    return total


def resolve(depth: int, pairs) -> list[int]:
    parent = dict(pairs)
    sources = []
    for layer in range(depth):
        while layer in parent:
            layer = parent[layer]
        sources.append(layer)
    return sources


def search(model, pairs, count: int, threshold: float) -> list[int]:
    """Algorithm 1 of the paper, steps 4 and 5, in the plainest way."""
    depth = model.config.num_hidden_layers
    hidden, _ = run(model, list(range(depth)))
    kept: list[tuple[int, int]] = []
    for pair in pairs:
        if len(kept) < count and pair[0] not in dict(kept):
            candidate, _ = run(model, resolve(depth, [*kept, pair]))
            cosines = [torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in zip(hidden, candidate)]
            if torch.stack(cosines).mean() > threshold:
                kept.append(pair)
    return resolve(depth, kept)


@memoize
def ordered_pairs(family: str, reverse: bool) -> list[tuple[int, int]]:
    model = original(family)
    windows = sliding_windows(model)
    _, kv = run(model, list(range(6)))
    pairs = [(j, i) for i, j in itertools.combinations(range(6), 2) if windows[i] == windows[j]]
    return sorted(pairs, key=lambda pair: distance(kv, *pair), reverse=reverse)


@memoize
def median_threshold(family: str) -> float:
    """A threshold that some single pairs pass and others do not."""
    model = original(family)
    hidden, _ = run(model, list(range(6)))
    cosines = []
    for pair in ordered_pairs(family, True):
        candidate, _ = run(model, resolve(6, [pair]))
        cosines.append(float(torch.cosine_similarity(hidden.flatten(1), candidate.flatten(1)).mean()))
    return sorted(cosines)[len(cosines) // 2] - 1e-4


# the search


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("order", ["dissimilar", "similar"])
@pytest.mark.parametrize("selective", [False, True], ids=["first-come", "selective"])
@pytest.mark.filterwarnings("ignore:KVSharer found")
def test_the_search_is_the_papers(family, order, selective):
    threshold = median_threshold(family) if selective else -1.0
    pairs = ordered_pairs(family, order == "dissimilar")
    for share, count in ((0.25, 2), (0.5, 3))[selective:]:  # 1.5 layers round up
        plan = find_plan(original(family), share=share, order=order, threshold=threshold)
        assert list(plan.source_layers) == search(original(family), pairs, count, threshold)


def test_most_dissimilar_pairs_come_first():
    _, kv = run(original(), list(range(6)))
    by_distance = ordered_pairs("llama", True)
    assert distance(kv, *by_distance[0]) > distance(kv, *by_distance[-1])
    assert find_plan(original(), share=1 / 6, threshold=-1.0).source_layers == tuple(resolve(6, by_distance[:1]))
    nearest = resolve(6, by_distance[-1:])
    assert find_plan(original(), share=1 / 6, threshold=-1.0, order="similar").source_layers == tuple(nearest)


@pytest.mark.parametrize(("share", "count"), [(0.1, 1), (0.25, 2), (0.4, 2), (0.5, 3), (0.8, 5), (0.83, 5)])
def test_the_share_of_layers_is_rounded(share, count):
    assert len(find_plan(original(), share=share, threshold=-1.0).consumers) == count


def test_too_small_a_share_searches_nothing():
    """Not even a tokenizer is needed."""
    model = patch_model(copy.deepcopy(original()), "kvsharer", share=0.05)
    assert new_cache(model).spec.sharing.is_identity


@pytest.mark.parametrize("order", ["dissimilar", "similar", "random"])
@pytest.mark.parametrize("seed", range(3))
def test_layer_zero_is_never_replaced_and_chains_are_resolved(order, seed):
    model = tiny_model("llama", seed=seed, num_hidden_layers=6)
    plan = find_plan(model, share=0.8, threshold=-1.0, order=order, seed=seed)
    assert plan.source_layers[0] == 0 and len(plan.consumers) == 5
    assert set(plan.source_layers) == {0}


@pytest.mark.parametrize("order", ["dissimilar", "similar", "random"])
def test_layers_share_within_their_type(order):
    model = original("gemma2")
    windows = sliding_windows(model)
    assert len(set(windows)) == 2
    plan = find_plan(model, share=0.6, threshold=-1.0, order=order)
    assert len(plan.consumers) == 4
    assert all(windows[layer] == windows[source] for layer, source in enumerate(plan.source_layers))


def test_types_bound_how_many_layers_can_share():
    with pytest.warns(UserWarning, match="found 4 of 5 layers"):
        plan = find_plan(original("gemma2"), share=0.8, threshold=-1.0)
    assert set(plan.source_layers) == {0, 1}


def test_too_high_a_threshold_warns_and_keeps_what_was_found():
    with pytest.warns(UserWarning, match="found 0 of 3 layers") as caught:
        plan = find_plan(original(), share=0.5, threshold=1.0)
    assert plan.is_identity
    assert "threshold 1.0" in str(caught[0].message) and "lower the threshold or the share" in str(caught[0].message)
    threshold = median_threshold("llama")
    with pytest.warns(UserWarning, match=r"found [1-4] of 5 layers"):
        plan = find_plan(original(), share=0.8, threshold=threshold)
    assert 1 <= len(plan.consumers) <= 4


def test_a_full_search_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_plan(original(), share=0.5, threshold=-1.0)


def test_the_search_repeats_itself():
    plans = [find_plan(copy.deepcopy(original()), share=0.5, threshold=-1.0).source_layers for _ in range(2)]
    assert plans[0] == plans[1]


def test_the_random_order_follows_its_seed():
    def sources(seed):
        return find_plan(original(), share=0.5, threshold=-1.0, order="random", seed=seed).source_layers

    torch.manual_seed(1)
    first = sources(3)
    torch.manual_seed(2)
    assert sources(3) == first
    assert len({sources(seed) for seed in range(6)}) > 2


def test_random_numbers_of_the_user_are_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    find_plan(original(), share=0.5, order="random", threshold=-1.0)
    assert torch.equal(torch.rand(1), expected)


# what the search leaves behind


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("training", [False, True])
def test_the_search_leaves_the_model_as_it_was(family, training):
    model = copy.deepcopy(original(family)).train(training)
    before = model_state(model)
    find_plan(model, share=0.5, threshold=-1.0)
    before.assert_equal(model_state(model))
    assert model.training == training
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_the_search_sees_the_model_without_dropout():
    model = tiny_model("llama", num_hidden_layers=6, attention_dropout=0.5).train()
    assert (
        find_plan(model, share=0.5, threshold=-1.0).source_layers
        == find_plan(original(), share=0.5, threshold=-1.0).source_layers
    )


def test_a_new_search_on_a_patched_model_sees_the_original():
    model = copy.deepcopy(original())
    expected = find_plan(model, share=0.5, threshold=-1.0).source_layers
    patch_model(model, KVSharer(plan=SharingPlan((0,) * 6)))
    assert find_plan(model, share=0.5, threshold=-1.0).source_layers == expected


def test_a_found_plan_knows_its_model_and_settings():
    plan = find_plan(original(), share=0.5, threshold=-1.0, order="random", seed=4)
    assert plan.fingerprint == fingerprint(original())
    assert plan.settings["share"] == "0.5" and plan.settings["order"] == "random" and plan.settings["seed"] == "4"


def test_a_found_plan_can_be_used_again(tmp_path):
    model = copy.deepcopy(original())
    plan = find_plan(model, share=0.5, threshold=-1.0)
    plan.save(tmp_path / "plan.safetensors")
    ids = random_ids(length=12)
    method = KVSharer(calibration=CALIBRATION, share=0.5, threshold=-1.0, order="dissimilar", heal=False)
    found = greedy(patch_model(model, method), ids)
    assert torch.equal(greedy(patch_model(model, KVSharer(plan=tmp_path / "plan.safetensors")), ids), found)


def test_a_decoder_gives_the_plan_of_its_language_model():
    model = copy.deepcopy(original())
    expected = find_plan(model, share=0.5, threshold=-1.0)
    plan = find_plan(model.model, share=0.5, threshold=-1.0)
    assert plan.source_layers == expected.source_layers and plan.fingerprint == expected.fingerprint


# the KL order


class Scored:
    """A model of which only the healed divergence of its pairs is known."""

    num_layers, fingerprint = 6, ""
    kinds = (LayerKind(None),) * 6

    def __init__(self, divergence):
        self.divergence, self.asked = divergence, []

    def healed_divergence(self, consumer, source):
        self.asked.append((consumer, source))
        return self.divergence[consumer, source]


def test_kl_order_tries_near_pairs_least_divergence_first():
    divergence = {(i, j): float((7 * i + 3 * j) % 11) for i in range(6) for j in range(i)}
    model = Scored(divergence)
    pairs = KVSharer(order="kl").ordered_pairs(model)
    near = [(1, 0), (2, 1), (2, 0), (3, 2), (3, 1), (4, 3), (4, 2), (5, 4), (5, 3)]
    assert sorted(model.asked) == sorted(near)
    assert pairs == sorted(near, key=divergence.__getitem__)


def test_kl_order_makes_chains_only_when_nothing_else_is_left():
    model = original()
    few = find_plan(model, order="kl", share=1 / 3, threshold=-1.0)
    assert len(few.consumers) == 2
    # no pair was kept whose source another kept pair had replaced: sources are near neighbours
    assert all(consumer - few.source_layers[consumer] <= 2 for consumer in few.consumers)
    many = find_plan(model, order="kl", share=5 / 6, threshold=-1.0)
    assert many.source_layers == (0,) * 6
    assert find_plan(model, order="kl", share=1 / 3, threshold=-1.0).source_layers == few.source_layers


def test_kl_order_is_the_default():
    assert KVSharer().order == "kl"


# calibration texts


def encode(text, add_special_tokens=True):
    """One token a character."""
    assert not add_special_tokens
    return {"input_ids": [1 + ord(char) % 96 for char in text]}


@pytest.mark.parametrize("source", ["texts", "file", "shipped"])
def test_calibration_comes_from_texts(source, tmp_path):
    text = "".join(chr(33 + (i * i) % 89) for i in range(30 * 64 + 5))
    file = tmp_path / "calibration.txt"
    file.write_text(text)
    calibration = {"texts": [text[:1000], text], "file": str(file), "shipped": None}[source]
    model = copy.deepcopy(original())
    method = KVSharer(calibration=calibration, share=0.5, threshold=-1.0, heal=False)
    assert len(new_cache(patch_model(model, method, tokenizer=encode)).spec.sharing.consumers) == 3
