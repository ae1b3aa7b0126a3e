"""What may be said of a number: intervals, tests of a difference, corrections for many of them, and the words.

Items of one group (the questions about one picture, the turns of one conversation) err together, so groups are what is
drawn, flipped and counted. All intervals are two-sided and of 95 %.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats as distributions

from perl_vlm.stats import Numbers, members, resampled, resampled_means

LEAST = 10
"""Groups that an interval wants: below, resampling says little of what another sample would give."""
RESAMPLES, RESAMPLES_OF_OTHERS, PERMUTATIONS = 10_000, 2_000, 20_000
BLOCKS = 20
"""Of the jackknife."""
_COUNTS_KEPT = 12_000_000
"""Of how often groups were drawn: 96 MB at most, 1,200 groups."""
_SIGNS_AT_ONCE = 2_000_000
"""Signs drawn in one go: 16 MB."""
LEVEL = 0.05
"""Of p-values after Holm's correction, and one minus the coverage of intervals."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and how sure it is."""

    value: float
    low: float | None
    high: float | None
    items: int
    groups: int
    method: str
    """How the interval was made, or why there is none."""


@dataclass(frozen=True)
class Difference(Estimate):
    """A figure of one system less that of another on the same items."""

    p: float | None = None
    """Two-sided, of no difference; None where no test can be made."""
    test: str = ""


def share(hits: Numbers, groups: Sequence[Hashable] | None = None, *, seed: int = 0) -> Estimate:
    """A share, such as an accuracy.

    Items that stand alone and are right or wrong get the exact interval of Clopper and Pearson 1934. Others (half
    points, groups) get the bootstrap's; where every group has the same mean, which a bootstrap takes for certainty,
    the exact one of as many items as there are groups.

    Args:
        hits: [n] in [0, 1].
        groups: [n] what each item belongs to; each for itself when not given.
        seed: of the resampling.

    Raises:
        ValueError: no items, lengths that differ, or a number outside [0, 1].
    """
    given, member, count = _checked(hits, groups)
    if given.min() < 0 or given.max() > 1:
        raise ValueError(f"a share wants numbers from 0 to 1; got {given.min():g} to {given.max():g}")
    alone = count == given.size and bool(np.isin(given, (0.0, 1.0)).all())
    if alone or bool(np.ptp(_group_means(given, member)) < 1e-12):
        value = float(given.mean())
        low, high = clopper_pearson(value * count, count)
        how = "exact (Clopper-Pearson)" + ("" if alone else ", each group counted once")
        return Estimate(value, low, high, given.size, count, how)
    return mean(given, groups, seed=seed)


def mean(values: Numbers, groups: Sequence[Hashable] | None = None, *, seed: int = 0) -> Estimate:
    """A mean, by the bootstrap over groups with the expanded percentile interval of Hesterberg 2015 (What Teachers
    Should Know about the Bootstrap, section 5.3), which is as wide as Student's where groups are few.

    Raises:
        ValueError: no items, lengths that differ, or a number that is not finite.
    """
    given, member, count = _checked(values, groups)
    value = float(given.mean())
    if count < LEAST:
        return Estimate(value, None, None, given.size, count, too_few(count))
    low, high = _expanded(_resampled_means(given, member, count, groups, seed), count)
    return Estimate(value, low, high, given.size, count, f"bootstrap over {_what(groups)}")


def _resampled_means(
    values: Array, member: NDArray[np.int64], count: int, groups: Sequence[Hashable] | None, seed: int
) -> Array:
    """[R] as ``resampled_means``. All figures of one set of items are resampled alike, so the draws are kept."""
    if count * RESAMPLES > _COUNTS_KEPT:
        return resampled_means(values, resamples=RESAMPLES, seed=seed, groups=groups)
    times = _times_drawn(count, RESAMPLES, seed)
    found: Array = times @ np.bincount(member, weights=values) / (times @ np.bincount(member).astype(np.float64))
    return found


@lru_cache(maxsize=1)
def _times_drawn(count: int, resamples: int, seed: int) -> Array:
    """[R, g] how often each group is drawn in each resample."""
    found = np.zeros((resamples, count))
    draws = resampled(count, resamples, seed)
    for start in range(0, resamples, 1_000):
        drawn = np.stack(list(itertools.islice(draws, 1_000)))
        flat = (drawn + count * np.arange(len(drawn))[:, None]).ravel()
        found[start : start + len(drawn)] = np.bincount(flat, minlength=drawn.size).reshape(drawn.shape)
    return found


def statistic(
    measure: Callable[[NDArray[np.int64]], float],
    items: int,
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES_OF_OTHERS,
) -> Estimate:
    """Any figure of a set of items, by the bootstrap over groups.

    Args:
        measure: the figure of some items, given their places [m]; NaN where they have none (one class alone), which is
            left out of the resamples.
        items: how many there are.
        groups: as in ``share``.

    Raises:
        ValueError: no items, or a wrong number of groups.
    """
    if items < 1:
        raise ValueError("a statistic wants at least 1 item")
    member = members(groups, items, "statistic")
    count = int(member.max()) + 1
    value = float(measure(np.arange(items)))
    if not math.isfinite(value):
        return Estimate(value, None, None, items, count, "it has no value here: nothing varies")
    if count < LEAST:
        return Estimate(value, None, None, items, count, too_few(count))
    places = [np.flatnonzero(member == group) for group in range(count)]
    drawn = [measure(np.concatenate([places[group] for group in row])) for row in resampled(count, resamples, seed)]
    found = np.asarray(drawn, dtype=np.float64)
    found = found[np.isfinite(found)]
    if not found.size:
        return Estimate(value, None, None, items, count, "no resample has a value")
    low, high = _expanded(found, count)
    return Estimate(value, low, high, items, count, f"bootstrap over {_what(groups)}")


def jackknife(
    measure: Callable[[NDArray[np.int64]], float],
    items: int,
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """A figure that resampling would distort, since it counts what is said twice (distinct words) or adds up errors of
    small bins: by the grouped jackknife, which leaves blocks of groups out and never takes one twice.

    ``se^2 = (b - 1) / b sum_j (theta_(-j) - mean)^2`` over b blocks, and Student's t with b - 1. Source: Tukey 1958;
    Efron and Tibshirani 1993, chapter 11.

    Args and errors: as of ``statistic``; the interval is cut to what lies ``within`` the figure's range.
    """
    if items < 1:
        raise ValueError("a statistic wants at least 1 item")
    member = members(groups, items, "jackknife")
    count, value = int(member.max()) + 1, float(measure(np.arange(items)))
    if count < LEAST:
        return Estimate(value, None, None, items, count, too_few(count))
    blocks = min(BLOCKS, count)
    block = np.random.default_rng(seed).permutation(np.arange(count) % blocks)[member]
    left = np.asarray([measure(np.flatnonzero(block != one)) for one in range(blocks)], dtype=np.float64)
    left = left[np.isfinite(left)]
    if len(left) < 2 or not np.isfinite(value):
        return Estimate(value, None, None, items, count, "too few parts of it have a value")
    error = float(((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum()) ** 0.5)
    half = float(distributions.t.ppf(1 - LEVEL / 2, len(left) - 1)) * error
    low, high = max(value - half, within[0]), min(value + half, within[1])
    return Estimate(value, low, high, items, count, f"jackknife over {_what(groups)}")


def difference(
    before: Numbers, after: Numbers, groups: Sequence[Hashable] | None = None, *, seed: int = 0
) -> Difference:
    """Mean of ``after`` less mean of ``before`` over the same items, its interval, and a test of there being none.

    The interval is the paired bootstrap's. The test is McNemar's, exact, where both are right or wrong and items stand
    alone; otherwise the signs of the groups' sums are flipped (a paired permutation test, exact for few groups).
    McNemar 1947, Psychometrika 12; Fisher 1935, The Design of Experiments, section 21.

    Raises:
        ValueError: no items, lengths that differ, or a number that is not finite.
    """
    one, member, count = _checked(before, groups)
    other, _, _ = _checked(after, groups)
    if one.shape != other.shape:
        raise ValueError(f"a difference wants the same items; got {one.size} and {other.size}")
    gain = other - one
    found = mean(gain, groups, seed=seed)
    binary = bool(np.isin(one, (0.0, 1.0)).all() and np.isin(other, (0.0, 1.0)).all())
    if binary and count == one.size:
        p, test = mcnemar(int((gain > 0).sum()), int((gain < 0).sum())), "McNemar, exact"
    else:
        p, test = flip_signs(np.bincount(member, weights=gain).tolist(), seed=seed), "paired permutation"
    return Difference(found.value, found.low, found.high, found.items, found.groups, found.method, p, test)


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p-value of items that changed from wrong to right and from right to wrong; 1 where none
    did."""
    if gained + lost == 0:
        return 1.0
    return float(distributions.binomtest(gained, gained + lost, 0.5).pvalue)


def flip_signs(sums: Numbers, *, seed: int = 0) -> float:
    """Two-sided p-value of the groups' sums [g] being as likely positive as negative, by flipping their signs.

    ``p = P(|sum_g s_g d_g| >= |sum_g d_g|)`` over all 2^g ways to choose signs s, where these are no more than are
    drawn otherwise; else over random ones, the given one counted among them (Phipson and Smyth 2010), so that it is
    never 0.
    """
    given = np.asarray(sums, dtype=np.float64)
    given = given[given != 0]  # a flip does nothing to them
    # Sums of the same numbers in another order differ in their last digits.
    reached = abs(given.sum()) - 1e-9 * np.abs(given).sum()
    if given.size <= math.log2(PERMUTATIONS):
        places = np.arange(2**given.size, dtype=np.uint32)[:, None] >> np.arange(given.size, dtype=np.uint32)
        return float((_flipped(given, places & 1) >= reached).mean())
    draw, hits, left = np.random.default_rng(seed), 0, PERMUTATIONS
    while left:
        rows = min(left, max(1, _SIGNS_AT_ONCE // given.size))
        count = rows * given.size
        bits = np.unpackbits(np.frombuffer(draw.bytes(-(-count // 8)), dtype=np.uint8), count=count)
        hits += int((_flipped(given, bits.reshape(rows, -1)) >= reached).sum())
        left -= rows
    return (hits + 1) / (PERMUTATIONS + 1)


def _flipped(sums: Array, bits: NDArray[Any]) -> Array:
    """[P] the size of the total where the signs that have a bit, [P, g], are flipped."""
    total: Array = np.abs(sums.sum() - 2 * (bits @ sums))
    return total


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number, so that the chance of any false alarm among them stays below the level.

    ``p'_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))`` of the m values in ascending order. Holm 1979, Scandinavian
    Journal of Statistics 6.
    """
    ordered = sorted(p_values, key=lambda name: p_values[name])
    found: dict[str, float] = {}
    so_far = 0.0
    for place, name in enumerate(ordered):
        so_far = max(so_far, min(1.0, (len(ordered) - place) * p_values[name]))
        found[name] = so_far
    return {name: found[name] for name in p_values}


def in_words(found: Difference, p: float | None, *, higher_is_better: bool | None = None) -> str:
    """What a difference comes to.

    Args:
        p: its p-value, corrected where it is one of several.
        higher_is_better: None where neither is better.
    """
    if p is None or found.low is None or found.high is None:
        return f"cannot be told: {found.method}" if found.low is None else "cannot be told"
    if p > LEVEL or found.low <= 0 <= found.high:
        return "within noise"
    if higher_is_better is None:
        return "higher" if found.value > 0 else "lower"
    return "better" if (found.value > 0) == higher_is_better else "worse"


def too_few(groups: int) -> str:
    """Why there is no interval."""
    return f"too few for an interval: {groups} independent item{'' if groups == 1 else 's'}, at least {LEAST} wanted"


def clopper_pearson(hits: float, count: int) -> tuple[float, float]:
    """The exact interval of ``hits`` of ``count``, as quantiles of beta distributions, which take halves too."""
    low = 0.0 if hits <= 0 else float(distributions.beta.ppf(LEVEL / 2, hits, count - hits + 1))
    high = 1.0 if hits >= count else float(distributions.beta.ppf(1 - LEVEL / 2, hits + 1, count - hits))
    return low, high


def _expanded(found: Array, count: int) -> tuple[float, float]:
    quantile = float(distributions.t.ppf(LEVEL / 2, count - 1)) * (count / (count - 1)) ** 0.5
    tail = 100 * float(distributions.norm.cdf(quantile))
    low, high = np.percentile(found, (tail, 100 - tail))
    return float(low), float(high)


def _group_means(values: Array, member: NDArray[np.int64]) -> Array:
    return np.bincount(member, weights=values) / np.bincount(member)


def _what(groups: Any) -> str:
    return "items" if groups is None else "groups"


def _checked(values: Numbers, groups: Sequence[Hashable] | None) -> tuple[Array, NDArray[np.int64], int]:
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1 or not given.size or not np.isfinite(given).all():
        raise ValueError(f"a figure wants a list of at least 1 finite number; got shape {given.shape}")
    member = members(groups, given.size, "a figure")
    return given, member, int(member.max()) + 1
