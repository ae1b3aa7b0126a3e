"""The unbiased estimator against all sets that could be drawn."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from perl_vlm_eval.best_of_n import best_of_n, divergence_of_best


def by_hand(rewards: np.ndarray, worth: np.ndarray, n: int) -> float:
    """The mean over all sets of n, ties drawn at random."""
    found = []
    for places in combinations(range(len(rewards)), n):
        own = list(places)
        best = [place for place in own if rewards[place] == rewards[own].max()]
        found.append(worth[best].mean())
    return float(np.mean(found))


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_against_every_set(n: int) -> None:
    draw = np.random.default_rng(0)
    rewards, worth = draw.normal(size=(4, 6)), draw.normal(size=(4, 6))
    expected = [by_hand(*row, n) for row in zip(rewards, worth, strict=True)]
    assert best_of_n(rewards, worth, n) == pytest.approx(expected)


def test_limits() -> None:
    rewards, worth = np.array([[0.1, 0.9, 0.5]]), np.array([[3.0, 1.0, 2.0]])
    assert best_of_n(rewards, worth, 1) == pytest.approx([2.0]), "one of one is the mean"
    assert best_of_n(rewards, worth, 3) == pytest.approx([1.0]), "the best of all is known"
    assert divergence_of_best(1) == 0


def test_a_reward_that_knows_nothing_chooses_at_random() -> None:
    worth = np.array([[1.0, 0.0, 0.0, 1.0, 1.0]])
    for n in (1, 2, 5):
        assert best_of_n(np.zeros((1, 5)), worth, n) == pytest.approx([0.6])


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(ValueError, match="n = 4"):
        best_of_n(np.zeros((1, 3)), np.zeros((1, 3)), 4)
    with pytest.raises(ValueError, match=r"\[P, N\]"):
        best_of_n(np.zeros((1, 3)), np.zeros((2, 3)), 1)
