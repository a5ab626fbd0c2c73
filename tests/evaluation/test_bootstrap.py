"""Intervals resample contexts, and resample all arms together."""

import pytest
import torch

from hf_kvcache.evaluation import bootstrap


def difference(one, other):
    return one - other


def test_value_is_the_mean_over_all_answers():
    assert bootstrap([[1.0, 0.0, 1.0], [0.0]]).value == pytest.approx(0.5)
    assert bootstrap([[True], [False]], [[True], [True]], statistic=difference).value == pytest.approx(-0.5)


def test_interval_holds_the_value_and_is_equal_for_equal_seeds():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, 3, generator=generator).tolist()
    found = bootstrap(values)
    assert found.low < found.value < found.high
    assert found == bootstrap(values) and found != bootstrap(values, seed=1)
    # the interval of a mean of 40 contexts of 3 independent answers
    assert found.high - found.low == pytest.approx(2 * 1.96 / 120**0.5, rel=0.3)


def test_answers_of_one_context_do_not_narrow_the_interval():
    values = [[float(index % 2)] for index in range(20)]
    repeated = [value * 10 for value in values]
    assert bootstrap(values) == pytest.approx(bootstrap(repeated))


def test_a_paired_difference_is_free_of_the_contexts():
    generator = torch.Generator().manual_seed(0)
    hard = torch.randn(30, generator=generator)
    one, other = [[float(h)] for h in hard], [[float(h) - 0.1] for h in hard]
    found = bootstrap(one, other, statistic=difference)
    assert found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arms", "options", "message"),
    [
        ([[[1.0]], [[1.0], [1.0]]], {}, "same contexts"),
        ([[]], {}, "same contexts"),
        ([], {}, "same contexts"),
        ([[[1.0], []]], {}, "at least one value"),
        ([[[1.0]]], {"level": 95}, "level must be"),
    ],
)
def test_a_mistake_is_explained(arms, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(*arms, **options)
