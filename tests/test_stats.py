"""The paired bootstrap against hand-worked cases, the normal limit and a slow loop."""

from __future__ import annotations

import numpy as np
import pytest

from perl_vlm import stats
from perl_vlm.stats import paired_bootstrap


def test_a_constant_gain_has_an_interval_of_width_zero():
    before = [0.0, 1.0, 5.0, -2.0]
    gain, (low, high) = paired_bootstrap(before, [value + 0.25 for value in before], resamples=50, seed=0)
    assert (gain, low, high) == (0.25, 0.25, 0.25)


def test_the_sign_is_after_minus_before():
    gain, (low, high) = paired_bootstrap([1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0], resamples=500, seed=1)
    assert gain == -0.5
    assert low <= -0.5 <= high <= 0.0


def test_the_interval_nears_the_normal_one():
    rng = np.random.default_rng(5)
    before = rng.normal(size=4000)
    after = before + rng.normal(0.1, 0.5, size=4000)
    gain, (low, high) = paired_bootstrap(before, after, resamples=4000, seed=2)
    half = 1.96 * (after - before).std() / np.sqrt(4000)
    assert low == pytest.approx(gain - half, abs=0.1 * half)
    assert high == pytest.approx(gain + half, abs=0.1 * half)


def test_it_equals_a_slow_loop_over_the_same_draws(monkeypatch: pytest.MonkeyPatch):
    before, after = np.array([0.0, 1.0, 0.0, 1.0, 1.0]), np.array([1.0, 1.0, 0.0, 0.0, 1.0])
    monkeypatch.setattr(stats, "_DRAWS_AT_ONCE", 15)  # three resamples at a time, so that 10 need four goes
    rng, means = np.random.default_rng(9), []
    for rows in (3, 3, 3, 1):
        for draw in rng.integers(5, size=(rows, 5)):
            means.append(sum(after[i] - before[i] for i in draw) / 5)
    _, interval = paired_bootstrap(before, after, resamples=10, seed=9)
    assert interval == pytest.approx((np.percentile(means, 2.5), np.percentile(means, 97.5)))


def test_what_is_common_to_both_cancels_out():
    rng = np.random.default_rng(3)
    hardness = rng.normal(0, 100, size=200)
    _, (low, high) = paired_bootstrap(hardness, hardness + 1 + rng.normal(0, 0.1, 200), resamples=500, seed=0)
    assert 0.9 < low < high < 1.1


def test_the_seed_decides():
    before, after = np.zeros(100), np.random.default_rng(0).normal(size=100)
    first, again, other = (paired_bootstrap(before, after, resamples=100, seed=seed)[1] for seed in (4, 4, 5))
    assert first == again != other


@pytest.mark.parametrize(
    ("a", "b", "resamples", "text"),
    [
        ([1.0], [1.0, 2.0], 10, "same length"),
        ([], [], 10, "at least 1"),
        ([1.0], [1.0], 0, "at least 1 resample"),
        ([1.0, 1.0], [1.0, float("nan")], 10, "pair 1 is not"),
    ],
)
def test_bad_input_is_named(a: list[float], b: list[float], resamples: int, text: str):
    with pytest.raises(ValueError, match=text):
        paired_bootstrap(a, b, resamples=resamples, seed=0)


def test_items_of_one_group_are_drawn_together() -> None:
    """Ten copies of every item carry no more information: with groups the interval stays as wide as without copies."""
    rng = np.random.default_rng(0)
    before, after = rng.random(60), rng.random(60) + 0.1
    _, single = paired_bootstrap(before, after, resamples=4000, seed=1)
    groups = [place for place in range(60) for _ in range(10)]
    _, grouped = paired_bootstrap(before.repeat(10), after.repeat(10), resamples=4000, seed=1, groups=groups)
    _, naive = paired_bootstrap(before.repeat(10), after.repeat(10), resamples=4000, seed=1)
    assert grouped == pytest.approx(single, abs=1e-9)
    assert naive[1] - naive[0] < 0.5 * (grouped[1] - grouped[0])
    with pytest.raises(ValueError, match="a group for each of 60 items; got 3"):
        paired_bootstrap(before, after, resamples=10, seed=0, groups=[1, 2, 3])
