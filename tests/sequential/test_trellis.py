"""Trellis coded quantisation: the best of all sequences, at the error of a uniform step in fewer bits."""

import itertools

import numpy as np
import pytest

from hf_kvcache.sequential import rounding, trellis


def rule(codes):
    """The grids of one sequence of codes, word for word as the module's head has it."""
    grid = []
    for place in range(len(codes)):
        before = [grid[place - back] if place >= back else 0 for back in (1, 3)]
        grid.append(before[0] ^ before[1] ^ (codes[place - 2] & 1 if place >= 2 else 0))
    return grid


def points(codes):
    return codes + trellis.grids(codes) / 2


def entropy(codes):
    share = np.unique(codes, return_counts=True)[1] / codes.size
    return -float((share * np.log2(share)).sum())


@pytest.mark.parametrize("length", [1, 2, 3, 4, 40])
def test_grids_follow_the_rule(length):
    codes = np.random.default_rng(0).integers(-9, 10, (7, length)).astype(np.int32)
    assert trellis.grids(codes).tolist() == [rule(row) for row in codes.tolist()]


@pytest.mark.parametrize("price", [0.0, 0.2])
def test_no_other_sequence_costs_less(price):
    numbers = np.random.default_rng(1).normal(size=(5, 7)).astype(np.float32)
    found = points(trellis.quantise(numbers, np.full(5, price, np.float32)))
    every = points(np.array(list(itertools.product(range(-3, 4), repeat=7)), dtype=np.int32))
    for row, chosen in zip(numbers, found, strict=True):
        cost = ((row - every) ** 2 + price * np.abs(every)).sum(1).min()
        assert ((row - chosen) ** 2 + price * np.abs(chosen)).sum() == pytest.approx(cost, abs=1e-5)


@pytest.mark.parametrize("law", ["normal", "laplace"])
def test_a_number_takes_a_sixth_of_a_bit_less_at_the_same_error(law):
    numbers = getattr(np.random.default_rng(2), law)(size=(256, 400)).astype(np.float32) * 4
    uniform = np.round(numbers)
    codes = trellis.quantise(numbers / np.float32(trellis.GAIN), np.zeros(256, np.float32))
    error = np.square(numbers - trellis.GAIN * points(codes)).mean()
    assert error < 1.015 * np.square(numbers - uniform).mean()
    # log2(GAIN) is 0.18
    assert entropy(codes) < entropy(uniform) - 0.16


def test_a_price_makes_codes_smaller():
    numbers = np.random.default_rng(3).normal(size=(64, 300)).astype(np.float32)
    sizes = [np.abs(points(trellis.quantise(numbers, np.full(64, price, np.float32)))).mean() for price in (0, 0.1, 1)]
    assert sizes[0] > 1.02 * sizes[1] > 1.1 * sizes[2]


@pytest.mark.parametrize("size", [1e4, 1e7, 1e8])
def test_numbers_without_a_last_bit_do_not_lead_others_astray(size):
    numbers = np.random.default_rng(4).normal(size=(3, 50)).astype(np.float32) * 5
    numbers[:, ::7] *= np.float32(size)
    missed = np.abs(points(trellis.quantise(numbers, np.zeros(3, np.float32))) - numbers)
    assert missed[np.abs(numbers) < 50].max() <= 1.01
    assert (missed <= np.maximum(1.01, 2.0**-22 * np.abs(numbers))).all()


def test_rows_of_every_size_come_back():
    choose = np.random.default_rng(5)
    sizes = 2.0 ** np.linspace(-9, 20, 400)[:, None]
    components = (choose.laplace(size=(400, 64)) * sizes).astype(np.float32)
    components[:3] = 0
    found = rounding.decode(rounding.encode(components), components.shape)
    missed = np.abs(found - components)
    assert found.dtype == np.float32 and not found[:3].any()
    assert (missed <= 1.15 * trellis.GAIN + 1e-6 * np.abs(components)).all()
    # where no number is zero, the error of a uniform step
    assert np.square(missed[150:300]).mean() == pytest.approx(1 / 12, rel=0.05)


def test_the_largest_numbers_come_back():
    components = np.full((2, 9), 1e30, np.float32)
    components[1] *= -1
    found = rounding.decode(rounding.encode(components), components.shape)
    np.testing.assert_allclose(found, np.clip(components, -rounding.FAR * trellis.GAIN, rounding.FAR * trellis.GAIN))
