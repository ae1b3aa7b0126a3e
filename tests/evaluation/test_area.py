"""Areas under ROC curves, compared by what each item has to do with them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from perl_vlm.stats import auc
from perl_vlm_eval import statistics
from perl_vlm_eval.area import area, area_by_item, difference_of_areas
from perl_vlm_eval.comparing import differences_of
from perl_vlm_eval.results import Cell, Figure, Findings, Items
from perl_vlm_eval.statistics import difference


def delong(scores: np.ndarray, other: np.ndarray, labels: np.ndarray) -> float:
    """The z of the difference of two areas, from pairs of items alone."""
    placements = []
    for own in (scores, other):
        wins = np.sign(own[labels][:, None] - own[~labels][None]) / 2 + 0.5
        placements.append((wins.mean(1), wins.mean(0)))
    (good, bad), (their_good, their_bad) = placements
    error = (their_good - good).var(ddof=1) / len(good) + (their_bad - bad).var(ddof=1) / len(bad)
    return float((their_good.mean() - good.mean()) / error**0.5)


def test_the_mean_of_the_items_is_the_area() -> None:
    draw = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        labels = draw.random(80) < share
        scores = np.round(draw.normal(labels * 1.0, 1), 1)  # some are ties
        assert area_by_item(scores, labels).mean() == pytest.approx(auc(scores, labels), abs=1e-12)
    assert area_by_item(np.array([3.0, 1.0, 2.0]), np.array([True, False, False])).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="both kinds"):
        area_by_item(np.arange(3.0), np.ones(3, dtype=bool))


def test_the_spread_of_the_items_is_delong_s() -> None:
    draw = np.random.default_rng(1)
    labels = draw.random(400) < 0.2
    scores, other = draw.normal(labels * 1.0, 1), draw.normal(labels * 1.4, 1)
    change = area_by_item(other, labels) - area_by_item(scores, labels)
    z = change.mean() / (change.std(ddof=1) / 20)
    assert z == pytest.approx(delong(scores, other, labels), rel=0.02)
    found = difference(area_by_item(scores, labels), area_by_item(other, labels))
    assert found.p == pytest.approx(2 * scipy.stats.norm.sf(abs(z)), rel=0.25)


def test_equal_rankings_are_told_apart_as_seldom_as_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PERMUTATIONS", 1_000)
    monkeypatch.setattr(statistics, "RESAMPLES", 100)
    draw, alarms = np.random.default_rng(2), 0
    for trial in range(200):
        labels = np.arange(80) < 16
        shared = draw.normal(labels * 1.0, 1)
        # The second is on a scale of its own.
        one, other = shared + draw.normal(0, 1, 80), 100 * (shared + draw.normal(0, 1, 80)) - 7
        found = difference(area_by_item(one, labels), area_by_item(other, labels), seed=trial)
        assert found.p is not None
        alarms += found.p <= 0.05
    assert 1 <= alarms <= 20


def test_reward_models_are_compared_by_their_areas() -> None:
    draw = np.random.default_rng(3)
    labels = draw.random(200) < 0.5
    keys = [str(place) for place in range(200)]

    weak, strong = draw.normal(labels * 0.3, 1), draw.normal(labels * 2.0, 5) * 30

    def cell(run: str, scores: np.ndarray, rows: slice) -> Cell:
        found, names = Figure(area(scores[rows], labels[rows], keys[rows]), "number", "higher"), keys[rows]
        marks = {"auc": labels[rows].astype(float).tolist()}
        items = Items(names, names, names, {"auc": scores[rows].tolist()}, labels=marks)
        return Cell("rm", "reward_model", run, run, "done", "", 0.0, Findings({"auc": found}, ["auc"], items))

    every = slice(None)
    (test,) = differences_of([cell("weak", weak, every), cell("strong", draw.normal(labels * 2.0, 1) * 30, every)])
    assert (test.what, test.family, test.words) == ("rm: auc", "main", "better")
    # Of one run measured on few and on many items nothing differs on those that both have.
    (test,) = differences_of([cell("few", strong, slice(0, 90)), cell("many", strong, every)])
    assert (test.estimate.value, test.estimate.items) == (0.0, 90)
    here = differences_of([cell("few", weak, slice(0, 90)), cell("many", strong, slice(40, None))])[0].estimate
    shared = slice(40, 90)
    assert here.value == pytest.approx(auc(strong[shared], labels[shared]) - auc(weak[shared], labels[shared]))


def test_a_rare_label_makes_an_area_as_unsure_as_it_is_rare() -> None:
    draw = np.random.default_rng(4)
    labels, groups = np.arange(1000) < 999, [str(place) for place in range(1000)]
    one, other = draw.normal(size=(2, 1000))
    found, apart = area(one, labels, groups), difference_of_areas(one, other, labels, groups)
    assert (found.low, found.items) == (None, 1000)
    assert "1 independent item of the rarer label" in found.method
    assert apart is not None
    assert (apart.low, apart.p) == (None, None)
    assert statistics.in_words(apart, apart.p).startswith("cannot be told: too few")
    assert difference_of_areas(one, other, np.ones(1000, dtype=bool), groups) is None


def test_a_whole_area_is_no_certainty() -> None:
    labels = np.arange(40) < 20
    found = area(labels * 1.0, labels, [str(place) for place in range(40)])
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025 ** (1 / 20)), "20 of 20"
