"""What arms of a study differ by over seeds, with one correction for all that was compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from perl_vlm.report.html import Table
from perl_vlm_eval.seeds import over_seeds, paired_over_seeds
from perl_vlm_eval.statistics import Difference, holm, in_words
from perl_vlm_eval.studies.base import spread

BySeed = Mapping[int, float]
"""A figure of one arm, by the seed of the run."""
ALL_IN_WORDS = 6
"""Comparisons that are all told in words; of more of them those that are beyond the noise, and the number of others."""


@dataclass(frozen=True)
class Compared:
    """Two arms by one figure."""

    what: str
    """The figure, and of which model."""
    a: str
    b: str
    before: BySeed
    """Of ``a``."""
    after: BySeed
    """Of ``b``."""
    share: bool = True
    """Whether the figure is one, and written in percent."""
    higher_is_better: bool | None = True
    found: Difference | None = None
    """``b`` less ``a`` over the seeds that both have; None where they share none."""
    p_holm: float | None = None

    @property
    def scale(self) -> float:
        return 100.0 if self.share else 1.0

    @property
    def words(self) -> str:
        """``better``, ``worse``, ``higher``, ``lower``, ``within noise``, or why it cannot be told."""
        if self.found is None:
            return "cannot be told: too few finished runs"
        return in_words(self.found, self.p_holm, higher_is_better=self.higher_is_better)

    @property
    def sentence(self) -> str:
        """The same for a reader."""
        if self.found is None or self.p_holm is None:
            return f"{self.what}: {self.b} against {self.a}: {self.words}."
        one, other = (
            spread(over_seeds([side[seed] for seed in self.seeds]), self.scale) for side in (self.before, self.after)
        )
        words = "within the noise of the seeds" if self.words == "within noise" else self.words
        return (
            f"{self.what}: {self.b} {other} against {one} of {self.a} over {len(self.seeds)} seeds: {words} "
            f"(p = {self.p_holm:.2g} after Holm)."
        )

    @property
    def seeds(self) -> list[int]:
        """Those of which both arms have a finished run."""
        return sorted(self.before.keys() & self.after.keys())


def tested(given: Sequence[Compared]) -> list[Compared]:
    """The same with their differences and corrected p-values."""
    found = [
        replace(one, found=paired_over_seeds([one.before[s] for s in one.seeds], [one.after[s] for s in one.seeds]))
        if one.seeds
        else one
        for one in given
    ]
    p = {str(place): one.found.p for place, one in enumerate(found) if one.found and one.found.p is not None}
    corrected = holm(p)
    return [replace(one, p_holm=corrected.get(str(place))) for place, one in enumerate(found)]


def table_of(found: Sequence[Compared]) -> Table:
    """All comparisons."""
    rows = []
    for one in found:
        value = "-" if one.found is None else _number(one, "value")
        known = one.found is not None and one.found.low is not None
        ends = f"[{_number(one, 'low')}, {_number(one, 'high')}]" if known else "-"
        p = "-" if one.p_holm is None else f"{one.p_holm:.2g}"
        rows.append((one.what, f"{one.b} less {one.a}", value, ends, p, one.words))
    note = (
        "Mean over the seeds that both arms have, Student's paired interval, its test with Holm's correction over this "
        "table. Shares in points."
    )
    header = ("figure", "difference of", "difference", "95 %", "p (Holm)", "verdict")
    return Table("Differences over seeds", header, rows, note)


def sentences(found: Sequence[Compared]) -> list[str]:
    """What is beyond the noise, and how much is not; of few comparisons all."""
    if len(found) <= ALL_IN_WORDS:
        return [one.sentence for one in found]
    told = [one for one in found if one.words in ("better", "worse", "higher", "lower")]
    noise, rest = sum(one.words == "within noise" for one in found), []
    if noise:
        rest.append(f"{noise} of {len(found)} differences are within the noise of the seeds.")
    left = len(found) - len(told) - noise
    if left:
        rest.append(f"{left} of {len(found)} differences cannot be told: too few seeds, or none that spread.")
    return [*(one.sentence for one in told), *rest]


def figures_of(found: Sequence[Compared]) -> list[dict[str, Any]]:
    """For ``study.json``."""
    return [
        {
            "what": one.what, "a": one.a, "b": one.b, "estimate": None if one.found is None else vars(one.found),
            "p_holm": one.p_holm, "words": one.words,
        }
        for one in found
    ]  # fmt: skip


def _number(one: Compared, name: str) -> str:
    return f"{one.scale * getattr(one.found, name):+.{1 if one.share else 2}f}"
