"""Statistics of paired comparisons, in numpy alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

_DRAWS_AT_ONCE = 2_000_000
"""Indices drawn in one go; bounds the memory to some 32 MB whatever the sizes."""


def paired_bootstrap(
    a: Sequence[float] | NDArray[np.float64],
    b: Sequence[float] | NDArray[np.float64],
    *,
    resamples: int,
    seed: int,
    groups: Sequence[Hashable] | None = None,
) -> tuple[float, tuple[float, float]]:
    """The mean gain of ``b`` over ``a`` and its 95 % percentile interval.

    The n pairs (a_i, b_i) are drawn n at a time with replacement; the interval runs from the 2.5th to the 97.5th
    percentile of the resampled means of d_i = b_i - a_i. Pairs stay together, so what makes an item hard for both
    cancels out. Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.

    Args:
        a: [n] scores before, in any unit.
        b: [n] scores after, of the same items in the same order.
        resamples: how many resampled means.
        seed: the same seed gives the same interval.
        groups: [n] what each item belongs to (a picture that several questions ask about). Whole groups are drawn then,
            because items of one group err together and an interval that took them for independent would be too narrow.

    Returns:
        ``(mean gain, (low, high))`` in the unit of the scores.

    Raises:
        ValueError: lengths differ (of ``groups`` too) or are 0, a score is not finite, or ``resamples`` is below 1.
    """
    before, after = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if before.ndim != 1 or before.shape != after.shape or not before.size:
        raise ValueError(
            f"paired_bootstrap wants two lists of the same length, at least 1; got {before.shape} and {after.shape}"
        )
    if resamples < 1:
        raise ValueError(f"paired_bootstrap wants at least 1 resample; got {resamples}")
    gains = after - before
    if not np.isfinite(gains).all():
        raise ValueError(f"paired_bootstrap wants finite scores; pair {int(np.argmin(np.isfinite(gains)))} is not")
    if groups is not None and len(groups) != gains.size:
        raise ValueError(f"paired_bootstrap wants a group for each of {gains.size} items; got {len(groups)}")
    places = {group: place for place, group in enumerate(dict.fromkeys(groups or range(gains.size)))}
    member = np.array([places[group] for group in groups or range(gains.size)])
    sums, counts = np.bincount(member, weights=gains), np.bincount(member)
    n = len(places)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    rows = max(1, _DRAWS_AT_ONCE // n)
    for start in range(0, resamples, rows):
        part = means[start : start + rows]
        drawn = generator.integers(n, size=(part.size, n))
        part[:] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(gains.mean()), (float(low), float(high))
