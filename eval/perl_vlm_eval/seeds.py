"""Runs that differ in their seeds alone: their spread, and whether two ways of making them differ beyond it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats as distributions

from perl_vlm.stats import Numbers
from perl_vlm_eval.results import Better, Cell, Unit
from perl_vlm_eval.statistics import LEVEL, Difference


@dataclass(frozen=True)
class Seeds:
    """A figure over several seeds."""

    mean: float
    spread: float | None
    """Standard deviation, with n - 1; None of a single seed."""
    low: float | None
    high: float | None
    """Student's interval of the mean over seeds."""
    least: float
    most: float
    seeds: int


def over_seeds(values: Numbers) -> Seeds:
    """A figure's mean and spread over runs that differ in their seed alone.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    given = _finite(values)
    count = given.size
    least, most, middle = float(given.min()), float(given.max()), float(given.mean())
    if count == 1:
        return Seeds(middle, None, None, None, least, most, 1)
    spread = float(given.std(ddof=1))
    half = float(distributions.t.ppf(1 - LEVEL / 2, count - 1)) * spread / count**0.5
    return Seeds(middle, spread, middle - half, middle + half, least, most, count)


def paired_over_seeds(before: Numbers, after: Numbers) -> Difference:
    """Mean of ``after`` less mean of ``before`` over runs with the same seeds, with Student's paired interval and test.

    Two seeds are the least that can be tested, and say little.

    Raises:
        ValueError: lengths that differ or are 0, or a value that is not finite.
    """
    one, other = _finite(before), _finite(after)
    if one.shape != other.shape:
        raise ValueError(f"seeds are paired; got {one.size} and {other.size}")
    found = over_seeds(other - one)
    if found.spread is None or found.low is None or found.high is None:
        return Difference(found.mean, None, None, 1, 1, "of one seed nothing is known of its spread")
    if found.spread < 1e-12 and found.mean != 0:
        # Metrics of few items come in steps, which two or three seeds may share by luck.
        return Difference(
            found.mean, None, None, found.seeds, found.seeds, "all seeds differ alike, so their noise is not known"
        )
    t = abs(found.mean) / (found.spread / found.seeds**0.5) if found.spread else 0.0
    p = float(2 * distributions.t.sf(t, found.seeds - 1))
    return Difference(
        found.mean, found.low, found.high, found.seeds, found.seeds, "Student's, over seeds", p, "paired t"
    )


def _finite(values: Numbers) -> NDArray[np.float64]:
    given = np.asarray(values, dtype=np.float64)
    if not given.size or not np.isfinite(given).all():
        raise ValueError(f"figures over seeds want finite numbers, one at least; got {given.tolist()}")
    return given


@dataclass(frozen=True)
class OverSeeds:
    """One headline figure over several runs."""

    what: str
    """The evaluation and the figure."""
    runs: Sequence[str]
    found: Seeds
    unit: Unit
    better: Better | None


def summed_up(cells: Sequence[Cell]) -> list[OverSeeds]:
    """The headline figures of runs of one kin (``runs.kin``) with different seeds, for each evaluation with two or
    more; a seed that is there twice counts once."""
    groups: dict[tuple[str, str, str], dict[int, Cell]] = {}
    for cell in cells:
        if cell.kin and cell.seed is not None and cell.findings.figures:
            groups.setdefault((cell.evaluation, cell.kind, cell.kin), {}).setdefault(cell.seed, cell)
    found = []
    for own in groups.values():
        runs = list(own.values())
        for name in dict.fromkeys(figure for run in runs for figure in run.findings.headlines):
            having = [run for run in runs if name in run.findings.figures]
            values = [run.findings.figures[name].estimate.value for run in having]
            known = [place for place, value in enumerate(values) if math.isfinite(value)]
            if len(known) < 2:
                continue
            figure = having[known[0]].findings.figures[name]
            found.append(
                OverSeeds(
                    f"{having[0].evaluation}: {name}",
                    [having[place].run for place in known],
                    over_seeds([values[place] for place in known]),
                    figure.unit,
                    figure.better,
                )
            )
    return found
