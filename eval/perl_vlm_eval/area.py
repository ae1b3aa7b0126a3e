"""Areas under ROC curves: their intervals, and two systems' areas on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from perl_vlm.stats import auc
from perl_vlm_eval import statistics
from perl_vlm_eval.statistics import LEAST, Difference, Estimate

Array = NDArray[np.float64]
Labels = NDArray[np.bool_]


def area(scores: Array, labels: Labels, groups: Sequence[str]) -> Estimate:
    """The area under the ROC curve, by the bootstrap over groups.

    It is as sure as its rarer label is: there is no interval where fewer than ``LEAST`` groups hold one of the two. An
    area of 1, which every resample repeats, has the exact interval of as many hits as the rarer label has groups.

    Args:
        scores: [n] in any unit.
        labels: [n] true for good; both kinds must be there.
        groups: [n] what each item belongs to.
    """
    value, rarer = auc(scores, labels), _rarer(labels, groups)
    if rarer < LEAST:
        return Estimate(value, None, None, len(scores), len(set(groups)), _too_few(rarer))

    def measure(places: NDArray[np.int64]) -> float:
        own = labels[places]
        return auc(scores[places], own) if 0 < own.sum() < len(own) else float("nan")

    found = statistics.statistic(measure, len(labels), groups)
    if found.low is not None and found.low == found.high:
        low, high = statistics.clopper_pearson(value * rarer, rarer)
        found = replace(found, low=low, high=high, method="exact (Clopper-Pearson), the rarer label's groups counted")
    return found


def difference_of_areas(before: Array, after: Array, labels: Labels, groups: Sequence[str]) -> Difference | None:
    """The area under one system's ROC curve less that under another's, with the test of DeLong, DeLong and
    Clarke-Pearson 1988 (Biometrics 44) for items in groups (Obuchowski 1997, Biometrics 53), its normal law exchanged
    for flipped signs. The two systems' scores may be in different units.

    Args:
        before, after: [n] scores of the same items.
        labels: [n] true for good.
        groups: [n] what each item belongs to.

    Returns:
        None where all labels are the same.
    """
    if not 0 < labels.sum() < len(labels):
        return None
    found = statistics.difference(area_by_item(before, labels), area_by_item(after, labels), groups)
    rarer = _rarer(labels, groups)
    return found if rarer >= LEAST else replace(found, low=None, high=None, p=None, test="", method=_too_few(rarer))


def area_by_item(scores: Array, labels: Labels) -> Array:
    """Pseudo-values of the area under the ROC curve: their mean is the area, and their spread is that of the area.

    A good item's placement ``V`` is the share of bad ones that score less (ties half), a bad one's the share of good
    ones that score more. ``A + (N / n_side) (V - A)`` counts each side as often as the area's variance does, which then
    is ``var(V_good) / n_good + var(V_bad) / n_bad``. Source: DeLong et al. 1988, equations 4 to 7.

    Args:
        scores: [N] in any unit; only their order matters.
        labels: [N] true for good; both kinds must be there.

    Returns:
        [N], some outside [0, 1].

    Raises:
        ValueError: all labels are the same.
    """
    good = labels.astype(bool)
    counts = int(good.sum()), int((~good).sum())
    if not all(counts):
        raise ValueError("an area wants labels of both kinds")
    below = rankdata(scores)
    values = np.empty(len(scores))
    values[good] = (below[good] - rankdata(scores[good])) / counts[1]
    values[~good] = 1 - (below[~good] - rankdata(scores[~good])) / counts[0]
    mean = values[good].mean()
    found: Array = mean + len(scores) / np.where(good, *counts) * (values - mean)
    return found


def _rarer(labels: Labels, groups: Sequence[str]) -> int:
    """How many groups hold the label that fewer hold."""
    return min(len({group for group, own in zip(groups, labels, strict=True) if own == kind}) for kind in (True, False))


def _too_few(rarer: int) -> str:
    ending = "" if rarer == 1 else "s"
    return f"too few for an interval: {rarer} independent item{ending} of the rarer label, at least {LEAST} wanted"
