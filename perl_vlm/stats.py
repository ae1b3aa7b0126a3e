"""Statistics of evaluations, in numpy alone: means, win rates and AUC with bootstrap intervals.

Every interval here is a 95 % percentile interval of the bootstrap over groups: whole groups (all records of one prompt
or picture) are drawn with replacement, because items of one group err together and an interval that took them for
independent would be too narrow. Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; for
groups, Davison & Hinkley 1997, Bootstrap Methods and their Application, section 3.8.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
"""Lower and upper end."""
Numbers = Sequence[float] | NDArray[np.float64]
Labels = Sequence[bool] | NDArray[np.bool_]

_DRAWS_AT_ONCE = 2_000_000
"""Indices drawn in one go, which bounds the memory whatever the sizes: some 32 MB for means, 100 MB for areas."""


def paired_bootstrap(
    a: Numbers, b: Numbers, *, resamples: int, seed: int, groups: Sequence[Hashable] | None = None
) -> tuple[float, Interval]:
    """The mean gain of ``b`` over ``a`` and its 95 % percentile interval.

    The n pairs (a_i, b_i) are drawn n at a time with replacement; the interval runs from the 2.5th to the 97.5th
    percentile of the resampled means of d_i = b_i - a_i. Pairs stay together, so what makes an item hard for both
    cancels out.

    Args:
        a: [n] scores before, in any unit.
        b: [n] scores after, of the same items in the same order.
        resamples: how many resampled means.
        seed: the same seed gives the same interval.
        groups: [n] what each item belongs to (a picture that several questions ask about); drawn as wholes.

    Returns:
        ``(mean gain, (low, high))`` in the unit of the scores.

    Raises:
        ValueError: lengths differ (of ``groups`` too) or are 0, a score is not finite, or ``resamples`` is below 1.
    """
    before, after = _pair(a, b, "paired_bootstrap")
    return bootstrap_mean(after - before, resamples=resamples, seed=seed, groups=groups)


def bootstrap_mean(
    values: Numbers, *, resamples: int, seed: int, groups: Sequence[Hashable] | None = None
) -> tuple[float, Interval]:
    """The mean of ``values`` and its 95 % percentile interval: an accuracy's, where the values are 0 or 1.

    Where all values are equal the interval has no width, however few there are; see docs/evaluation.md.

    Args:
        values: [n] in any unit.
        resamples, seed, groups: as in ``paired_bootstrap``.

    Raises:
        ValueError: as ``paired_bootstrap``.
    """
    given = _checked(values, "bootstrap_mean")
    return float(given.mean()), _middle(resampled_means(given, resamples=resamples, seed=seed, groups=groups))


def resampled_means(
    values: Numbers, *, resamples: int, seed: int, groups: Sequence[Hashable] | None = None
) -> NDArray[np.float64]:
    """[resamples] the means behind ``bootstrap_mean``'s interval. Arguments and errors are its own."""
    given = _checked(values, "resampled_means")
    member = members(groups, given.size, "resampled_means")
    sums, counts = np.bincount(member, weights=given), np.bincount(member)
    means = [sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1) for drawn in _draws(len(counts), resamples, seed)]
    return np.concatenate(means)


def wins(a: Numbers, b: Numbers) -> NDArray[np.float64]:
    """[n] 1 where ``b`` is higher than ``a``, 0 where it is lower, a half where they are equal. Its mean is a win rate.

    Raises:
        ValueError: lengths differ or are 0, or a score is not finite.
    """
    before, after = _pair(a, b, "wins")
    return (np.sign(after - before) + 1) / 2


def auc(scores: Numbers, labels: Labels) -> float:
    """The area under the ROC curve, exactly: the share of (good, bad) pairs whose good one scores higher, a tie being
    half of one.

    Source: Mann & Whitney 1947 (as U over the number of pairs); Hanley & McNeil 1982, Radiology 143.

    Args:
        scores: [n] in any unit; only their order matters.
        labels: [n] true for good.

    Raises:
        ValueError: lengths differ or are 0, a score is not finite, or all labels are the same.
    """
    given, good = _labelled(scores, labels, "auc")
    return float(_Ranking(given, good).areas(np.ones((1, given.size)))[0])


def bootstrap_auc(
    scores: Numbers,
    labels: Labels,
    *,
    resamples: int,
    seed: int,
    groups: Sequence[Hashable] | None = None,
) -> tuple[float, Interval]:
    """``auc`` and its 95 % percentile interval. A resample that drew labels of one kind alone has no area and is left
    out; where all are like that, the interval is (0, 1), which says nothing.

    Args:
        scores, labels: as in ``auc``.
        resamples, seed, groups: as in ``paired_bootstrap``.

    Raises:
        ValueError: as ``auc`` and ``paired_bootstrap``.
    """
    given, good = _labelled(scores, labels, "bootstrap_auc")
    member = members(groups, given.size, "bootstrap_auc")
    ranking, count = _Ranking(given, good), int(member.max()) + 1
    areas = []
    for drawn in _draws(count, resamples, seed, width=given.size):
        rows = len(drawn)
        # How often each group was drawn, for all resamples at once.
        flat = (drawn + count * np.arange(rows)[:, None]).ravel()
        times = np.bincount(flat, minlength=rows * count).reshape(rows, count)
        areas.append(ranking.areas(times[:, member]))
    found = np.concatenate(areas)
    found = found[np.isfinite(found)]
    return auc(given, good), _middle(found) if found.size else (0.0, 1.0)


class _Ranking:
    """Labelled scores in ascending order, for areas under many weightings of them."""

    def __init__(self, scores: NDArray[np.float64], good: NDArray[np.bool_]) -> None:
        self.order = np.argsort(scores, kind="stable")
        ranked = scores[self.order]
        self.good = good[self.order]
        self.starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
        """Where each run of equal scores begins."""

    def areas(self, weights: NDArray[np.float64] | NDArray[np.int64]) -> NDArray[np.float64]:
        """[R, n] -> [R]: AUC where item i counts weights[r, i] times; NaN where one class has no weight."""
        own = weights[:, self.order].astype(np.float64)
        good = np.add.reduceat(own * self.good, self.starts, axis=1)
        bad = np.add.reduceat(own * ~self.good, self.starts, axis=1)
        below = bad.cumsum(axis=1) - bad
        pairs = good.sum(axis=1) * bad.sum(axis=1)
        won = (good * (below + bad / 2)).sum(axis=1)
        return np.divide(won, pairs, out=np.full(len(own), np.nan), where=pairs > 0)


def _draws(count: int, resamples: int, seed: int, width: int | None = None) -> Iterator[NDArray[np.int64]]:
    """[rows, count] indices drawn from ``count`` groups, as many rows at a time as memory allows."""
    if resamples < 1:
        raise ValueError(f"a bootstrap wants at least 1 resample; got {resamples}")
    generator = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // max(count, width or 0))
    for start in range(0, resamples, rows):
        yield generator.integers(count, size=(min(rows, resamples - start), count))


def resampled(count: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """``resamples`` rows [count] of places drawn from ``count`` groups with replacement.

    Raises:
        ValueError: ``resamples`` is below 1.
    """
    for drawn in _draws(count, resamples, seed):
        yield from drawn


def _middle(found: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)


def members(groups: Sequence[Hashable] | None, size: int, who: str) -> NDArray[np.int64]:
    """[n] the number of each item's group, from 0; each item is one for itself where there are none.

    Raises:
        ValueError: there is not one group for each item; ``who`` wants them.
    """
    if groups is None:
        return np.arange(size)
    if len(groups) != size:
        raise ValueError(f"{who} wants a group for each of {size} items; got {len(groups)}")
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    return np.array([places[group] for group in groups])


def _pair(a: Numbers, b: Numbers, who: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    before, after = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if before.ndim != 1 or before.shape != after.shape or not before.size:
        raise ValueError(f"{who} wants two lists of the same length, at least 1; got {before.shape} and {after.shape}")
    finite = np.isfinite(before) & np.isfinite(after)
    if not finite.all():
        raise ValueError(f"{who} wants finite scores; pair {int(np.argmin(finite))} is not")
    return before, after


def _checked(values: Numbers, who: str) -> NDArray[np.float64]:
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1 or not given.size:
        raise ValueError(f"{who} wants a list of at least 1 number; got {given.shape}")
    if not np.isfinite(given).all():
        raise ValueError(f"{who} wants finite numbers; number {int(np.argmin(np.isfinite(given)))} is not")
    return given


def _labelled(scores: Numbers, labels: Labels, who: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    given, good = _checked(scores, who), np.asarray(labels, dtype=bool)
    if good.shape != given.shape:
        raise ValueError(f"{who} wants a label for each of {given.size} scores; got {good.shape}")
    if good.all() or not good.any():
        raise ValueError(f"{who} wants labels of both kinds; all {good.size} are {'good' if good.all() else 'bad'}")
    return given, good
