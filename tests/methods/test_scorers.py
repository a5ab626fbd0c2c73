"""The scores against their papers, written as plainly as possible: one row, one head and one token at a time.

What every scorer is held to on the way: shapes, precision, groups of query heads, layers that share, and tokens that
are gone.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_kvcache.methods import (
    H2O,
    METHODS,
    RKV,
    TOVA,
    DefensiveKV,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    LagKV,
    Random,
    SnapKV,
    StreamingLLM,
)
from hf_kvcache.testing import plain_attention, random_observation

CASES = {
    "plain": {},
    "no group": {"group": 1},
    "two layers": {"readings": 2},
    "soft cap": {"softcap": 2.0},
    "all queries": {"queries": 40},
}
GAPS = {"gaps": {"holes": 9, "batch": 3}}


def held(observed, row, head) -> list[int]:
    """The columns in which there is a token."""
    valid = observed.valid
    return [t for t in range(observed.num_tokens) if valid is None or bool(valid[row, head, t])]


def stack(observed, of_head) -> Tensor:
    """`of_head(row, head) -> {column: score}` for all rows and heads, 0 where nothing is said."""
    batch, heads, tokens, _ = observed.key.shape
    out = torch.zeros(batch, heads, tokens, dtype=torch.float64)
    for row in range(batch):
        for head in range(heads):
            for column, score in of_head(row, head).items():
                out[row, head, column] = score
    return out


def assert_scores(observed, method, of_head, skip_last=0):
    """Compares where there is a token, but for the last ones, which are kept anyway."""
    actual, expected = method.score(observed), stack(observed, of_head)
    assert actual.shape == observed.key.shape[:3] and actual.dtype == torch.float32
    there = torch.ones_like(actual, dtype=torch.bool) if observed.valid is None else observed.valid.clone()
    there[..., observed.num_tokens - skip_last :] = False
    torch.testing.assert_close(actual[there].double(), expected[there], rtol=1e-4, atol=1e-6)


def pooled(scores: list[float], kernel: int, pooling: str) -> list[float]:
    """Average over the kernel's length, the edges counting as zeros; maximum over what there is."""
    half = kernel // 2
    if pooling == "none":
        return scores
    if pooling == "max":
        return [max(scores[max(t - half, 0) : t + half + 1]) for t in range(len(scores))]
    return [sum(scores[max(t - half, 0) : t + half + 1]) / kernel for t in range(len(scores))]


@pytest.mark.parametrize("case", CASES | GAPS)
@pytest.mark.parametrize("pooling", ["avg", "max", "none"])
def test_snapkv(case, pooling):
    observed, window = random_observation(**(CASES | GAPS)[case]), 6
    method = SnapKV(window=window, kernel_size=3, pooling=pooling)

    def of_head(row, head):
        free = observed.num_tokens - window
        members = [
            pooled([float(weights[:, t].mean()) for t in range(free)], 3, pooling)
            for weights in plain_attention(observed, row, head, window)
        ]
        return {t: sum(member[t] for member in members) / len(members) for t in range(free)}

    assert_scores(observed, method, of_head, skip_last=window)


@pytest.mark.parametrize("case", CASES | GAPS)
def test_defensivekv(case):
    observed, window = random_observation(**(CASES | GAPS)[case]), 6

    def of_head(row, head):
        columns = [t for t in held(observed, row, head) if t < observed.num_tokens - window]
        worst = dict.fromkeys(columns, 0.0)
        for member in plain_attention(observed, row, head, window):
            for query in member:
                weights = [float(query[t]) for t in columns]
                smooth = pooled(weights, 5, "avg")
                for t, weight in zip(columns, smooth, strict=True):
                    worst[t] = max(worst[t], weight * sum(weights) / sum(smooth))
        prior = sum(worst.values()) / len(worst)
        return {t: max(weight, prior + weight / 1000) for t, weight in worst.items()}

    assert_scores(observed, DefensiveKV(window=window), of_head, skip_last=window)


@pytest.mark.parametrize("case", CASES | GAPS)
def test_h2o(case):
    observed = random_observation(**(CASES | GAPS)[case])

    def of_head(row, head):
        total = dict.fromkeys(held(observed, row, head), 0.0)
        members = plain_attention(observed, row, head)
        for weights in members:
            for query in weights:
                for t in total:
                    total[t] += float(query[t]) / len(members)
        return total

    assert_scores(observed, H2O(), of_head)


def test_h2o_adds_to_what_it_remembers():
    observed, method = random_observation(), H2O()
    fresh = method.score(observed)
    earlier = torch.rand(fresh.shape)
    again = random_observation(carried={"attention_received": earlier})
    torch.testing.assert_close(method.score(again), fresh + earlier)
    assert torch.equal(method.remember(again, fresh)["attention_received"], fresh)


@pytest.mark.parametrize("case", CASES)
def test_tova(case):
    observed = random_observation(**CASES[case])

    def of_head(row, _):
        weights = [member[-1] for head in range(2) for member in plain_attention(observed, row, head, 1)]
        return {t: float(sum(member[t] for member in weights)) / len(weights) for t in range(observed.num_tokens)}

    assert_scores(observed, TOVA(), of_head)


def test_tova_brings_heads_together_by_position():
    observed = random_observation(**GAPS["gaps"])

    def of_head(row, head):
        total: dict[int, float] = {}
        for other in range(2):
            members = plain_attention(observed, row, other, 1)
            for t in held(observed, row, other):
                place = int(observed.positions[row, other, t])
                total[place] = total.get(place, 0.0) + sum(float(m[-1, t]) for m in members) / len(members) / 2
        return {t: total[int(observed.positions[row, head, t])] for t in held(observed, row, head)}

    assert_scores(observed, TOVA(), of_head)


@pytest.mark.parametrize("case", ["plain", "gaps"])
def test_knorm(case):
    observed = random_observation(**(CASES | GAPS)[case])
    assert_scores(
        observed,
        Knorm(),
        lambda row, head: {
            t: -math.sqrt(sum(float(x) ** 2 for x in observed.key[row, head, t])) for t in held(observed, row, head)
        },
    )


@pytest.mark.parametrize("case", ["plain", "gaps"])
def test_keydiff(case):
    observed = random_observation(**(CASES | GAPS)[case])

    def of_head(row, head):
        keys = {t: observed.key[row, head, t].double() for t in held(observed, row, head)}
        anchor = sum(key / key.norm() for key in keys.values()) / len(keys)
        return {t: -float(key @ anchor / key.norm() / anchor.norm()) for t, key in keys.items()}

    assert_scores(observed, KeyDiff(), of_head)


@pytest.mark.parametrize("case", ["plain", "gaps"])
def test_streamingllm_prefers_the_more_recent(case):
    observed = random_observation(**(CASES | GAPS)[case])
    columns = torch.arange(observed.num_tokens).expand(observed.key.shape[:3])
    places = columns if observed.positions is None else observed.positions
    assert_scores(observed, StreamingLLM(), lambda row, head: dict(enumerate(places[row, head].tolist())))
    assert StreamingLLM().sinks == 4


@pytest.mark.parametrize("tokens", [40, 41, 47])
def test_lagkv(tokens):
    observed, sinks, lag = random_observation(tokens=tokens), 4, 6
    partitions = (tokens - sinks) // lag

    def of_partition(states, p) -> Tensor:
        part = states[sinks + p * lag : sinks + (p + 1) * lag].double()
        reference = states[sinks + (p + 1) * lag : sinks + (p + 2) * lag].double()
        low, high = reference.min(0).values, reference.max(0).values
        return torch.stack([((x - low) / (high - low)).std() for x in part]).softmax(0)

    def of_head(row, head):
        ranks = {}
        for p in range(partitions - 1):
            both = of_partition(observed.key[row, head], p) + of_partition(observed.value[row, head], p)
            for rank, t in enumerate(sorted(range(lag), key=both.tolist().__getitem__)):
                ranks[sinks + p * lag + t] = rank
        return ranks

    score = LagKV(sinks=sinks, lag=lag).score(observed)
    expected = stack(observed, of_head)
    judged = slice(sinks, sinks + (partitions - 1) * lag)
    assert torch.equal((score[..., judged] * lag).floor(), expected[..., judged].float())
    # the last partition and what follows come first, the most recent before all
    rest = score[..., judged.stop :]
    assert bool((rest > score[..., judged].max()).all()) and bool((rest.diff(dim=-1) > 0).all())


def test_lagkv_of_a_short_prompt_is_recency():
    assert bool((LagKV(lag=20).score(random_observation(tokens=43)).diff(dim=-1) > 0).all())


def plain_rotation(vector: Tensor, position: int) -> Tensor:
    """RoPE of base 100, half-split."""
    half = len(vector) // 2
    out = vector.clone()
    for i in range(half):
        angle = position * 100.0 ** (-i / half)
        out[i] = vector[i] * math.cos(angle) - vector[i + half] * math.sin(angle)
        out[i + half] = vector[i + half] * math.cos(angle) + vector[i] * math.sin(angle)
    return out


class Rotate:
    """`plain_rotation` as a method is given it."""

    def __call__(self, vectors, positions, inverse=False):
        sign = -1 if inverse else 1
        flat = vectors.float().reshape(-1, *vectors.shape[-2:])
        turned = [plain_rotation(v, sign * int(p)) for rows in flat for v, p in zip(rows, positions, strict=True)]
        return torch.stack(turned).view(vectors.shape)

    def mean(self, positions):
        unit = torch.eye(8)
        return torch.stack([torch.stack([plain_rotation(v, int(p)) for v in unit]) for p in positions]).mean(0)


@pytest.mark.parametrize("options", [{}, {"covariance": False}, {"value_norm": False}, {"epsilon": 0.0}], ids=str)
@pytest.mark.parametrize("readings", [1, 2])
def test_expected_attention(options, readings):
    method = ExpectedAttention(sinks=2, horizon=9, **options)
    observed = random_observation(tokens=16, queries=16, readings=readings)
    observed = replace(observed, readings=[replace(reading, rotate=Rotate()) for reading in observed.readings])
    # large, as those of real sinks, so that what is not taken out of the softmax would take most of it
    observed.key[:, :, :2] *= 4

    def of_head(row, head):
        weights = []
        for reading in observed.readings:
            for member in range(3 * head, 3 * head + 3):
                queries = [plain_rotation(reading.query[row, member, t].double(), -t) for t in range(2, 16)]
                mean = sum(queries) / len(queries)
                covariance = sum(torch.outer(q - mean, q - mean) for q in queries) / len(queries)
                unit = torch.eye(8, dtype=torch.float64)
                # columns are the images of the unit vectors
                rotation = sum(torch.stack([plain_rotation(e, p) for e in unit], dim=1) for p in range(16, 25)) / 9
                mean, covariance = rotation @ mean, rotation @ covariance @ rotation.T
                z = [0.0, 0.0]
                for key in observed.key[row, head, 2:].double():
                    logit = mean @ key / math.sqrt(8)
                    if method.covariance:
                        logit = logit + key @ covariance @ key / (2 * 8)
                    z.append(math.exp(logit))
                weights.append([value / sum(z) for value in z])
        expected = {t: sum(member[t] for member in weights) / len(weights) for t in range(16)}
        if not method.weighs_values:
            return expected
        norms = observed.value[row, head].double().norm(dim=-1)
        return {t: (score + method.epsilon) * float(norms[t]) for t, score in expected.items()}

    assert_scores(observed, method, of_head)


def test_expected_attention_says_what_it_lacks():
    with pytest.raises(ValueError, match="rotary embedding"):
        ExpectedAttention().score(random_observation())


@pytest.mark.parametrize("case", CASES | GAPS)
@pytest.mark.parametrize("mix", [0.1, 1.0])
def test_rkv(case, mix):
    observed, window = random_observation(**(CASES | GAPS)[case]), 5
    method = RKV(window=window, kernel_size=3, mix=mix)
    free = observed.num_tokens - window

    def importance(row, head) -> list[float]:
        columns = [t for t in held(observed, row, head) if t < free]
        heads = observed.key.shape[1]
        total = [0.0] * free
        for w in range(-window, 0):
            logits = {}
            for t in columns:
                of_group = []
                for reading in observed.readings:
                    group = reading.query.shape[1] // heads
                    for member in range(head * group, (head + 1) * group):
                        dot = float(reading.query[row, member, w].double() @ observed.key[row, head, t].double())
                        dot *= observed.scale
                        of_group.append(
                            observed.softcap * math.tanh(dot / observed.softcap) if observed.softcap else dot
                        )
                logits[t] = max(of_group)
            denominator = sum(math.exp(logit) for logit in logits.values())
            for t, logit in logits.items():
                total[t] += math.exp(logit) / denominator / window
        return pooled(total, 3, "max")

    def redundancy(row, head) -> dict[int, float]:
        columns = held(observed, row, head)
        keys = {t: observed.key[row, head, t].double() for t in columns}
        mean = dict.fromkeys(columns, 0.0)
        for i in columns:
            similar = {j: float(keys[i] @ keys[j] / keys[i].norm() / keys[j].norm()) for j in columns if j != i}
            above = [j for j, cosine in similar.items() if cosine > 0.5]
            if above:
                similar[max(above)] = 0.0
            for j, cosine in similar.items():
                mean[j] += cosine / len(columns)
        denominator = sum(math.exp(value) for value in mean.values())
        return {j: math.exp(value) / denominator for j, value in mean.items()}

    def of_head(row, head):
        worth, said = importance(row, head), redundancy(row, head)
        return {t: mix * worth[t] - (1 - mix) * said[t] for t in said if t < free}

    assert_scores(observed, method, of_head, skip_last=window)


def test_random_is_a_number_of_seed_layer_head_and_place():
    observed = random_observation()
    state = torch.random.get_rng_state()
    score = Random().score(observed)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(Random().score(observed), score)
    assert not torch.equal(Random(seed=1).score(observed), score)
    assert not torch.equal(Random().score(random_observation(layer=1, num_layers=2)), score)
    assert torch.equal(score[0], score[1]) and not torch.equal(score[:, 0], score[:, 1])
    # a shorter sequence has the same numbers, and so has what is left of it
    assert torch.equal(Random().score(random_observation(tokens=30)), score[..., :30])
    gaps = random_observation(holes=8)
    longer = Random().score(random_observation(tokens=60))
    assert torch.equal(Random().score(gaps), longer.gather(2, gaps.positions))


BAD = [
    (SnapKV, {"window": 0}, "window is a number of tokens, at least 1, got 0"),
    (SnapKV, {"kernel_size": 4}, "kernel_size must be an odd number of tokens"),
    (SnapKV, {"pooling": "median"}, "pooling must be one of avg, max, none"),
    (DefensiveKV, {"pooling": "median"}, "pooling must be one of avg, max, none"),
    (StreamingLLM, {"sinks": -1}, "sinks is a number of tokens, at least 0, got -1"),
    (StreamingLLM, {"sinks": 1.5}, "sinks is a number of tokens, at least 0, got 1.5"),
    (Knorm, {"window": 0.5}, "window is a number of tokens, at least 0, got 0.5"),
    (KeyDiff, {"budget": 0}, "an int budget is a number of tokens, at least 1"),
    (TOVA, {"budget": 1.5}, "a float budget is a share of the tokens"),
    (TOVA, {"every": 0}, "every is a number of tokens, at least 1"),
    (H2O, {"window": 1.0}, "a float window is a share of the budget"),
    (H2O, {"window": -1}, "window is a number of tokens, at least 0, got -1"),
    (LagKV, {"lag": 1}, "lag is a number of tokens, at least 2, got 1"),
    (ExpectedAttention, {"horizon": 0}, "horizon is a number of tokens, at least 1, got 0"),
    (ExpectedAttention, {"epsilon": -0.1}, "epsilon must be at least 0, got -0.1"),
    (RKV, {"mix": 2}, "mix is a share"),
    (RKV, {"threshold": 3}, "threshold is a cosine similarity"),
    (RKV, {"window": 0}, "window is a number of tokens, at least 1, got 0"),
    (Random, {"seed": -1}, "seed must be an int of at least 0, got -1"),
    (Random, {"seed": 0.5}, "seed must be an int of at least 0, got 0.5"),
]


@pytest.mark.parametrize(("method", "options", "words"), BAD, ids=lambda part: getattr(part, "name", str(part)))
def test_bad_options_are_refused(method, options, words):
    with pytest.raises(ValueError) as error:
        method(**options)
    assert words in str(error.value)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.slot == "scorer"])
def test_scores_of_bfloat16_are_float32_and_finite(name):
    observed = random_observation(queries=40, tokens=40)
    readings = [replace(reading, query=reading.query.bfloat16(), rotate=Rotate()) for reading in observed.readings]
    observed = replace(observed, key=observed.key.bfloat16(), value=observed.value.bfloat16(), readings=readings)
    observed = replace(observed, replayed=torch.rand(observed.key.shape[:-1]))
    score = METHODS[name]().score(observed)
    assert score.dtype == torch.float32 and bool(torch.isfinite(score).all())
