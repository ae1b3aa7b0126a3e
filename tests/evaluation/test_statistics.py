"""Intervals cover, tests keep their level, and what cannot be told is told so."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats

from perl_vlm_eval import statistics
from perl_vlm_eval.area import area
from perl_vlm_eval.evaluations.reward_models import _calibration
from perl_vlm_eval.metrics.calibration import calibration_error
from perl_vlm_eval.seeds import over_seeds, paired_over_seeds
from perl_vlm_eval.statistics import (
    difference,
    flip_signs,
    holm,
    in_words,
    jackknife,
    mcnemar,
    mean,
    share,
    statistic,
)


def covered(low: float | None, high: float | None, truth: float) -> bool:
    assert low is not None
    assert high is not None
    return low <= truth <= high


@pytest.mark.parametrize("count", [12, 60])
def test_a_mean_s_interval_covers_the_truth(count: int) -> None:
    draw = np.random.default_rng(0)
    hits = 0
    for trial in range(400):
        found = mean(draw.normal(3, 2, count), seed=trial)
        hits += covered(found.low, found.high, 3)
    assert 0.925 <= hits / 400 <= 0.98


@pytest.mark.parametrize("groups", [None, [place // 3 for place in range(60)]])
def test_draws_that_are_kept_are_the_same_draws(groups: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).normal(size=60)
    kept = mean(values, groups, seed=3)
    monkeypatch.setattr(statistics, "_COUNTS_KEPT", 0)
    drawn = mean(values, groups, seed=3)
    assert (kept.low, kept.high) == (pytest.approx(drawn.low), pytest.approx(drawn.high))


def test_groups_that_err_together_widen_the_interval_as_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 2_000)
    draw, hits, naive = np.random.default_rng(1), 0, 0
    for trial in range(300):
        shift = draw.normal(0, 1, 30)
        values = (shift[:, None] + draw.normal(0, 0.3, (30, 8))).ravel()
        found = mean(values, list(np.repeat(np.arange(30), 8)), seed=trial)
        alone = mean(values, seed=trial)
        hits += covered(found.low, found.high, 0)
        naive += covered(alone.low, alone.high, 0)
    assert 0.92 <= hits / 300 <= 0.985
    assert naive / 300 < 0.7, "taking them for independent would claim too much"


def test_shares_are_exact_where_items_stand_alone() -> None:
    found = share([1.0] * 7 + [0.0] * 3)
    # Clopper and Pearson for 7 of 10, as in any table.
    assert (found.low, found.high) == pytest.approx((0.3475, 0.9333), abs=1e-4)
    assert "exact" in found.method
    draw = np.random.default_rng(2)
    hits = sum(covered(one.low, one.high, 0.9) for one in (share((draw.random(40) < 0.9) * 1.0) for _ in range(500)))
    assert hits / 500 >= 0.94


def test_twenty_of_twenty_is_no_certainty() -> None:
    alone = share([1.0] * 20)
    assert alone.low == pytest.approx(0.025 ** (1 / 20), abs=1e-6)
    assert alone.high == 1.0
    together = share([1.0] * 200, [place // 10 for place in range(200)])
    assert (together.low, together.groups) == (pytest.approx(alone.low), 20)
    assert "group" in together.method


def test_half_points_and_groups_go_by_the_bootstrap() -> None:
    draw = np.random.default_rng(3)
    found = share(draw.choice([0.0, 0.5, 1.0], 50))
    assert "bootstrap" in found.method
    assert found.low is not None
    always = share([1.0, 0.0] * 20, [place // 2 for place in range(40)])
    assert covered(always.low, always.high, 0.5), "one right and one wrong of every picture"
    ties = share([0.5] * 30)
    assert (ties.low, ties.high) == (pytest.approx(0.31, abs=0.02), pytest.approx(0.69, abs=0.02))
    with pytest.raises(ValueError, match="0 to 1"):
        share([0.5, 1.5])


def test_too_few_items_have_no_interval() -> None:
    found = mean([1.0, 2.0, 4.0])
    assert (found.value, found.low, found.high) == (pytest.approx(7 / 3), None, None)
    assert found.method == "too few for an interval: 3 independent items, at least 10 wanted"
    one_group = mean(np.arange(50.0), ["a"] * 50)
    assert one_group.low is None
    gain = difference([0.0, 1.0], [1.0, 2.0])
    assert in_words(gain, gain.p).startswith("cannot be told: too few")


def test_any_statistic_of_items() -> None:
    draw = np.random.default_rng(4)
    values = draw.normal(0, 1, 80)
    found = statistic(lambda places: float(np.median(values[places])), 80)
    assert found.value == pytest.approx(np.median(values))
    assert covered(found.low, found.high, found.value)
    nothing = statistic(lambda places: math.nan, 20)
    assert (nothing.low, nothing.method) == (None, "it has no value here: nothing varies")
    rarely = statistic(lambda places: 1.0 if len(set(places)) == 20 else math.nan, 20)
    assert (rarely.low, rarely.method) == (None, "no resample has a value")


def test_what_resampling_would_distort_goes_by_the_jackknife() -> None:
    draw = np.random.default_rng(8)
    spread = [jackknife(lambda at, own=own: float(own[at].mean()), 60) for own in draw.normal(2, 1, (300, 60))]
    assert 0.92 <= sum(covered(one.low, one.high, 2) for one in spread) / 300 <= 0.98
    words = draw.integers(0, 400, 200)
    found = jackknife(lambda at: len(np.unique(words[at])) / len(at), 200)
    assert covered(found.low, found.high, found.value)
    resampled = statistic(lambda at: len(np.unique(words[at])) / len(at), 200)
    assert resampled.high is not None
    assert resampled.high < found.value, "a resample says everything twice"
    assert jackknife(lambda at: 1.0, 5).low is None


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(0, 0, 1.0), (5, 0, 2 / 32), (3, 3, 1.0), (8, 1, 2 * (1 + 9) / 512)],
)
def test_mcnemar_by_hand(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p)
    assert mcnemar(lost, gained) == pytest.approx(p)


def test_flipping_signs_against_every_flip() -> None:
    sums = [3.0, -1.0, 2.0, 2.5, 0.0, 1.0]
    known = [value for value in sums if value]
    total = sum(known)
    signed = itertools.product((1, -1), repeat=5)
    flips = [sum(sign * value for sign, value in zip(signs, known, strict=True)) for signs in signed]
    p = 2 * sum(one >= total - 1e-9 for one in flips) / len(flips)
    assert flip_signs(sums) == pytest.approx(min(1.0, p))
    assert flip_signs([0.0, 0.0]) == 1.0


@pytest.mark.parametrize("batch", [37, 2_000_000])
def test_flipping_some_signs_against_scipy(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_SIGNS_AT_ONCE", batch)
    sums = np.random.default_rng(11).normal(0.25, 1, size=60)
    other = scipy.stats.permutation_test(
        (sums, np.zeros_like(sums)), lambda x, y, axis: (x - y).sum(axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=20_000, rng=np.random.default_rng(1),
    )  # fmt: skip
    assert 0.02 < other.pvalue < 0.5
    assert flip_signs(sums) == pytest.approx(other.pvalue, rel=0.1)
    assert flip_signs(np.ones(60)) == pytest.approx(1 / 20_001), "never 0"
    assert flip_signs(np.ones(14)) == 2 / 2**14, "of few groups every flip is counted"


@pytest.mark.parametrize("binary", [True, False])
def test_differences_of_no_difference_keep_their_level(binary: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PERMUTATIONS", 1_000)
    monkeypatch.setattr(statistics, "RESAMPLES", 100)
    draw, alarms = np.random.default_rng(5), 0
    for trial in range(200):
        before, after = draw.random((2, 40))
        if binary:
            before, after = (before < 0.6) * 1.0, (after < 0.6) * 1.0
        found = difference(before, after, seed=trial)
        assert found.p is not None
        alarms += found.p <= 0.05
    assert alarms / 200 <= 0.09


def test_a_real_difference_is_found_and_paired() -> None:
    draw = np.random.default_rng(6)
    before = draw.normal(0, 5, 60)
    found = difference(before, before + draw.normal(0.5, 0.5, 60))
    assert found.p is not None
    assert found.p < 0.001, "the items' own spread cancels out"
    assert in_words(found, found.p, higher_is_better=True) == "better"
    assert in_words(found, found.p, higher_is_better=False) == "worse"
    assert in_words(found, 0.2) == "within noise"
    assert in_words(found, found.p) == "higher"


def test_groups_are_flipped_as_wholes() -> None:
    gain = np.repeat([1.0, 1.0, 1.0, -1.0] * 3, 20)
    alone = difference(np.zeros(240), gain)
    together = difference(np.zeros(240), gain, list(np.repeat(np.arange(12), 20)))
    assert alone.p is not None
    assert together.p is not None
    assert alone.p < 1e-3 < 0.05 < together.p


def test_holm_by_hand_and_by_simulation() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5})
    assert found == pytest.approx({"a": 0.04, "b": 0.09, "c": 0.09, "d": 0.5})
    assert list(found) == ["a", "b", "c", "d"]
    draw = np.random.default_rng(7)
    alarms = sum(min(holm(dict(enumerate_names(draw.random(10)))).values()) <= 0.05 for _ in range(600))
    assert 0.02 <= alarms / 600 <= 0.08, "of all families of ten true nulls"
    assert holm({}) == {}


def enumerate_names(values: np.ndarray) -> list[tuple[str, float]]:
    return [(str(place), float(value)) for place, value in enumerate(values)]


def test_arms_over_seeds_are_paired() -> None:
    before = [0.5, 0.6, 0.7, 0.55]
    after = [0.52, 0.63, 0.71, 0.58]
    found, other = paired_over_seeds(before, after), scipy.stats.ttest_rel(after, before)
    assert found.p == pytest.approx(other.pvalue)
    ends = other.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(ends.low), pytest.approx(ends.high))
    assert paired_over_seeds([0.5], [0.6]).p is None
    assert paired_over_seeds([0.5, 0.6], [0.5, 0.6]).p == 1.0
    alike = paired_over_seeds([0.60, 0.70], [0.62, 0.72])
    assert (alike.value, alike.p, alike.low) == (pytest.approx(0.02), None, None), "no spread is no certainty"
    assert in_words(alike, alike.p).startswith("cannot be told: all seeds differ alike")
    with pytest.raises(ValueError, match="seeds are paired"):
        paired_over_seeds([0.5, 0.6], [0.5])


def test_arms_that_do_not_differ_keep_their_level() -> None:
    draw = np.random.default_rng(9)
    alarms = [paired_over_seeds(*draw.normal(0, 1, (2, 3))).p <= 0.05 for _ in range(1_000)]  # type: ignore[operator]
    assert 0.03 < np.mean(alarms) < 0.07


@pytest.mark.parametrize("off", [0.0, 0.15])
def test_calibration_errors_are_covered(off: float) -> None:
    """Of a calibrated model the interval reaches 0; of another it holds what very many items show."""
    draw, hits = np.random.default_rng(4), 0

    def outcomes(confident: Any) -> Any:
        return (draw.random(len(confident)) < confident - off * (confident - 0.5)) * 1.0

    many = draw.uniform(0.5, 1, 200_000)
    truth = calibration_error(many, outcomes(many)) if off else 0.0
    for _ in range(60):
        confident = draw.uniform(0.5, 1, 800)
        found = _calibration(confident, outcomes(confident), [str(place) for place in range(800)], 10)["ece"].estimate
        hits += covered(found.low, found.high, truth)
    assert hits / 60 >= 0.88


def test_an_area_s_interval_covers_it() -> None:
    draw, hits = np.random.default_rng(8), 0
    for _ in range(60):
        labels = draw.random(120) < 0.5
        scores = draw.normal(labels * 1.0, 1)  # the area is that of a normal at 1 / sqrt(2)
        found = area(scores, labels, [str(place) for place in range(120)])
        hits += covered(found.low, found.high, scipy.stats.norm.cdf(1 / 2**0.5))
    assert hits / 60 >= 0.88


def test_seeds_are_summed_up_with_their_spread() -> None:
    found = over_seeds([0.80, 0.84, 0.88])
    assert (found.mean, found.spread, found.seeds) == (pytest.approx(0.84), pytest.approx(0.04), 3)
    assert (found.least, found.most) == (0.80, 0.88)
    half = 4.3027 * 0.04 / 3**0.5
    assert (found.low, found.high) == (pytest.approx(0.84 - half, abs=1e-4), pytest.approx(0.84 + half, abs=1e-4))
    assert over_seeds([0.5]).low is None


def test_lists_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        mean([1.0, math.nan])
    with pytest.raises(ValueError, match="at least 1"):
        share([])
    with pytest.raises(ValueError, match="same items"):
        difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="group"):
        mean([1.0, 2.0], ["a"])
    assert statistics.LEAST == 10
