"""What the best of n samples is worth, without bias, from N of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

Array = NDArray[np.float64]


def best_of_n(chosen_by: Array, worth: Array, n: int) -> Array:
    """The expected worth of the sample that a reward would choose among n, over all sets of n of the N drawn.

    With the N samples in ascending order of the reward, the i-th (from 1) is the best of ``C(i-1, n-1)`` of the
    ``C(N, n)`` sets, so the mean over all of them is ``sum_i C(i-1, n-1) / C(N, n) worth_(i)``: unbiased, with less
    variance than cutting the N into N/n sets. Samples with equal rewards are chosen among at random.

    Source: the estimator of Nakano et al. 2021 (2112.09332), appendix I.

    Args:
        chosen_by: [P, N] rewards of N samples for each of P prompts.
        worth: [P, N] what each is worth, such as the gold metric.
        n: 1 to N.

    Returns:
        [P].

    Raises:
        ValueError: shapes differ, or n is not within 1 and N.
    """
    rewards, given = np.asarray(chosen_by, dtype=np.float64), np.asarray(worth, dtype=np.float64)
    if rewards.ndim != 2 or rewards.shape != given.shape:
        raise ValueError(f"best_of_n wants rewards and worths [P, N]; got {rewards.shape} and {given.shape}")
    total = rewards.shape[1]
    if not 1 <= n <= total:
        raise ValueError(f"the best of n = {n} cannot be told from {total} samples")
    order = np.argsort(rewards, axis=1, kind="stable")
    ranked, values = np.take_along_axis(rewards, order, 1), np.take_along_axis(given, order, 1)
    return np.stack([_leveled(row, own) for row, own in zip(ranked, values, strict=True)]) @ _weights(total, n)


def divergence_of_best(n: int) -> float:
    """An upper bound, in nats, of the KL of best-of-n from what it samples from: ``log n - (n - 1) / n``.

    Source: Stiennon et al. 2020 (2009.01325), appendix G.3; a bound by Beirami et al. 2024 (2401.01879).
    """
    return float(np.log(n) - (n - 1) / n)


def _weights(total: int, n: int) -> Array:
    place = np.arange(1, total + 1)
    below = np.maximum(place - n, 0)  # where the place is too low for a set of n, the weight is zero
    logs = gammaln(place) - gammaln(n) - gammaln(below + 1)
    logs -= gammaln(total + 1) - gammaln(n + 1) - gammaln(total - n + 1)
    return np.where(place >= n, np.exp(logs), 0.0)


def _leveled(rewards: Array, worth: Array) -> Array:
    """[N] worths in the order of rewards, those of equal rewards being their mean."""
    _, which = np.unique(rewards, return_inverse=True)
    return (np.bincount(which, weights=worth) / np.bincount(which))[which]
