"""Runs held against one another on the items they share, and what survives the number of tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from perl_vlm_eval import statistics
from perl_vlm_eval.area import difference_of_areas
from perl_vlm_eval.results import Better, Cell, Unit
from perl_vlm_eval.statistics import Difference


@dataclass(frozen=True)
class Test:
    """A difference that somebody might believe in."""

    what: str
    """The evaluation and the figure."""
    a: str
    """Of which run, or ``anchor``."""
    b: str
    """The other; the difference is ``b`` less ``a``."""
    estimate: Difference
    unit: Unit
    better: Better | None
    family: str
    """``main`` for headline figures, ``further`` for all others: looked for, and so corrected apart."""
    p_holm: float | None = None
    """The p-value after Holm's correction over all tests of the same family."""
    words: str = ""
    """``better``, ``worse``, ``higher``, ``lower``, ``within noise``, or why it cannot be told."""

    __test__ = False  # no test case of pytest's


def differences_of(cells: Sequence[Cell]) -> list[Test]:
    """Every difference within a cell (a policy and its anchor) and between runs that were measured alike, p-values
    corrected."""
    done = [cell for cell in cells if cell.findings.figures]
    found = [*_within(done), *_between(done)]
    corrected: dict[int, float] = {}
    for family in ("main", "further"):
        own = {str(place): one.estimate.p for place, one in enumerate(found) if one.family == family}
        known = {place: p for place, p in own.items() if p is not None}
        corrected |= {int(place): p for place, p in statistics.holm(known).items()}
    return [_told(one, corrected.get(place)) for place, one in enumerate(found)]


def _told(test: Test, p: float | None) -> Test:
    better = None if test.better is None else test.better == "higher"
    return replace(test, p_holm=p, words=statistics.in_words(test.estimate, p, higher_is_better=better))


def _within(cells: Sequence[Cell]) -> Iterator[Test]:
    for cell in cells:
        for name, figure in cell.findings.figures.items():
            if isinstance(figure.estimate, Difference):
                family = "main" if name in cell.findings.headlines else "further"
                what = f"{cell.evaluation}: {name.removeprefix('gain/')}"
                yield Test(what, _before(name), cell.run, figure.estimate, figure.unit, figure.better, family)


def _before(name: str) -> str:
    """What a difference of that name starts from."""
    if name.startswith("gain_from_pictures"):
        return "without pictures"
    return "best point" if name == "fall_of_gold" else "anchor"


def _between(cells: Sequence[Cell]) -> Iterator[Test]:
    for one, other in _alike(cells):
        items, theirs = one.findings.items, other.findings.items
        for figure in items.values:
            # Rewards of two runs are on scales of their own unless it is one reward.
            if figure in theirs.values and items.scales.get(figure) == theirs.scales.get(figure):
                yield from _pair(figure, one, other)


def apart(cells: Sequence[Cell]) -> list[str]:
    """Which runs were measured by one evaluation and are not compared, since no item of theirs is the same."""
    return [
        f"{one.evaluation}: {one.run} and {other.run} were measured on different items, so they are not compared"
        for one, other in _alike([cell for cell in cells if cell.findings.items.keys])
        if not set(one.findings.items.keys) & set(other.findings.items.keys)
    ]


def sentences(tests: Sequence[Test]) -> list[str]:
    """The main differences in words, by their corrected p-values."""
    said = {
        "better": "{b} is better than {a}", "worse": "{b} is worse than {a}", "higher": "{b} is higher than {a}",
        "lower": "{b} is lower than {a}", "within noise": "whether {b} differs from {a} is within noise",
    }  # fmt: skip
    found = []
    for test in tests:
        if test.family == "main" and test.p_holm is not None:
            words = said.get(test.words, "{b} against {a}: " + test.words).format(a=test.a, b=test.b)
            size = f"{test.estimate.items:,} items, p = {test.p_holm:.2g} after Holm"
            found.append(f"{test.what}: {words} ({size}).")
    return found


def _alike(cells: Sequence[Cell]) -> Iterator[tuple[Cell, Cell]]:
    """Pairs of runs under one evaluation."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.evaluation, cell.kind), []).append(cell)
    for own in groups.values():
        yield from combinations(own, 2)


def _pair(figure: str, one: Cell, other: Cell) -> Iterator[Test]:
    sides = [_by_key(cell, figure) for cell in (one, other)]
    shared = [key for key in sides[0] if key in sides[1]]
    if not shared:
        return
    own = one.findings.items
    groups = dict(zip(own.keys, own.groups, strict=True))
    before, after = ([side[key] for key in shared] for side in sides)
    together = [groups[key] for key in shared]
    found: Difference | None
    if figure in own.labels:
        label = dict(zip(own.keys, own.labels[figure], strict=True))
        good = np.array([label[key] > 0.5 for key in shared])
        found = difference_of_areas(np.asarray(before), np.asarray(after), good, together)
    else:
        found = statistics.difference(before, after, together)
    if found is None:
        return
    known = one.findings.figures.get(figure)
    family = "main" if figure in one.findings.headlines else "further"
    unit: Unit = known.unit if known else "number"
    what = f"{one.evaluation}: {figure}"
    yield Test(what, one.run, other.run, found, unit, known.better if known else None, family)


def _by_key(cell: Cell, figure: str) -> Mapping[str, float]:
    items = cell.findings.items
    pairs = zip(items.keys, items.values[figure], strict=True)
    return {key: value for key, value in pairs if np.isfinite(value)}
