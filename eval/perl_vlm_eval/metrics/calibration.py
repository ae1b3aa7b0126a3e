"""Calibration: whether what is said to be probable is as often so."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_SIMULATED = 400


def bins_of(probabilities: Array, outcomes: Array, bins: int) -> list[tuple[float, float, int]]:
    """(mean probability, mean outcome, items) of bins with equally many items, from the least probable up; fewer bins
    where there are fewer items.

    Args:
        probabilities: [n] in [0, 1].
        outcomes: [n] in [0, 1].
        bins: at least 1.
    """
    order = np.argsort(probabilities, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return [(float(probabilities[part].mean()), float(outcomes[part].mean()), len(part)) for part in parts]


def calibration_error(probabilities: Array, outcomes: Array, bins: int = 10) -> float:
    """The expected calibration error, ``sum_b n_b / n |mean outcome_b - mean probability_b|``, over bins with equally
    many items.

    Source: Naeini, Cooper and Hauskrecht 2015 (AAAI), with the equal-mass bins of Nixon et al. 2019 (1904.01685).
    """
    found = bins_of(probabilities, outcomes, bins)
    return sum(count * abs(came - said) for said, came, count in found) / len(probabilities)


def noise_floor(probabilities: Array, bins: int = 10, *, seed: int = 0) -> float:
    """The calibration error that a perfectly calibrated model of these probabilities stays under in 95 of 100 samples
    of this size: the error is above zero by chance alone.

    Source: consistency resampling, Bröcker and Smith 2007, Weather and Forecasting 22.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.random((_SIMULATED, len(probabilities))) < probabilities
    return float(np.quantile([calibration_error(probabilities, row.astype(float), bins) for row in drawn], 0.95))
