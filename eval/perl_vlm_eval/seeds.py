"""Runs that differ in their seeds alone, summarised together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from perl_vlm_eval import statistics
from perl_vlm_eval.results import Better, Cell, Unit
from perl_vlm_eval.statistics import Seeds


@dataclass(frozen=True)
class OverSeeds:
    """One headline figure over several runs."""

    what: str
    """The evaluation and the figure."""
    runs: Sequence[str]
    found: Seeds
    unit: Unit
    better: Better | None


def over_seeds(cells: Sequence[Cell]) -> list[OverSeeds]:
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
                    statistics.over_seeds([values[place] for place in known]),
                    figure.unit,
                    figure.better,
                )
            )
    return found
