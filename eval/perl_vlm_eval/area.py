"""What each item has to do with the area under a ROC curve, so that two systems can be compared on paired items."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Array = NDArray[np.float64]


def area_by_item(scores: Array, labels: NDArray[np.bool_]) -> Array:
    """Pseudo-values of the area under the ROC curve: their mean is the area, and their spread is that of the area.

    A good item's placement ``V`` is the share of bad ones that score less (ties half), a bad one's the share of good
    ones that score more. ``A + (N / n_side) (V - A)`` counts each side as often as the area's variance does, which then
    is ``var(V_good) / n_good + var(V_bad) / n_bad``. Source: DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44,
    equations 4 to 7; for items in groups Obuchowski 1997, Biometrics 53.

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
    area = values[good].mean()
    found: Array = area + len(scores) / np.where(good, *counts) * (values - area)
    return found
