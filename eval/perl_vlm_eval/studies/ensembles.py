"""Ensembles of LoRA reward models: one member, the mean, the minimum, mean less doubt, averaged weights; what each is
worth at the same divergence from the anchor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, ClassVar

import numpy as np

from perl_vlm.config.checks import require
from perl_vlm.report.html import Curve, Table
from perl_vlm_eval.seeds import over_seeds
from perl_vlm_eval.studies.base import Part, Plan, StudyFindings, StudySettings, cell, even_start, spread, together
from perl_vlm_eval.studies.differences import BySeed, Compared, figures_of, sentences, table_of, tested
from perl_vlm_eval.studies.ways import MEASURED, Way, check_points, followed, rounds

Start = Mapping[str, str]
SINGLE = "single"
COMBINATIONS = (SINGLE, "mean", "min", "uncertainty", "weight_average")


@dataclass(frozen=True)
class EnsembleSettings(StudySettings):
    """Settings of ``ensembles``."""

    members: int = 3
    """Reward models of the ensemble."""
    combinations: tuple[str, ...] = COMBINATIONS
    """single (one member, another with every seed), and what ppo.ensemble takes."""
    steps: int = 40
    """PPO rounds of every arm."""
    points: int = 5
    """At how many of them, evenly, a policy is measured."""
    limit: int = 512
    """At most this many held-out prompts."""

    sets: ClassVar[Mapping[str, str]] = {
        "ppo.reward_model": "it is the ensemble that the study trains", "ppo.ensemble": "give --combinations",
        "rm.members": "give --members", **MEASURED,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        odd = [one for one in self.combinations if one not in COMBINATIONS]
        require(not odd, f"{', '.join(odd)} is no combination; there are {', '.join(COMBINATIONS)}")
        require(self.members >= 2, f"members is {self.members}; an ensemble has at least 2")
        check_points(self.steps, self.points)


def plan(settings: EnsembleSettings) -> Plan:
    """See ``studies.base.Plan``."""
    rewards = {
        model: cell(settings, f"rm-{PurePath(model).name}", "rm", model, {"rm.members": settings.members, "seed": 0})
        for model in settings.models
    }
    trained = yield list(rewards.values())
    arms: dict[tuple[str, str], Part[dict[int, Way]]] = {}
    for model in settings.models:
        reward, start = rewards[model].name, even_start(settings, model)
        folder = trained[reward].folder
        for how in settings.combinations:

            def options(seed: int, how: str = how, folder: Path = folder, start: Start = start) -> dict[str, Any]:
                # A single model is another member with every seed, so that none of them is the luck of the comparison.
                single = folder / "members" / str(seed % settings.members)
                return {
                    "ppo.reward_model": single if how == SINGLE else folder,
                    "ppo.ensemble": "mean" if how == SINGLE else how,
                    **rounds(settings.steps, settings.points), **start,
                }  # fmt: skip

            name = f"{PurePath(model).name}-{how}"
            arms[model, how] = followed(settings, name, model, options, settings.limit, reward)
    return _findings(settings, (yield from together(arms)))


def _findings(settings: EnsembleSettings, ways: Mapping[tuple[str, str], Mapping[int, Way]]) -> StudyFindings:
    rows, figures, curves = [], dict[str, Any](), []
    comparisons: list[Compared] = []
    share = all(way.share for own in ways.values() for way in own.values())
    for model in settings.models:
        own = {how: ways[model, how] for how in settings.combinations if ways[model, how]}
        figures |= {f"{model}/{how}": {str(seed): vars(way) for seed, way in each.items()} for how, each in own.items()}
        # As far as every arm went: beyond, one would be held against a guess.
        matched = min((max(way.kl) for each in own.values() for way in each.values()), default=0.0)
        at: dict[str, BySeed] = {
            how: {seed: way.gold_at(matched) for seed, way in each.items()} for how, each in own.items()
        }
        for how in settings.combinations:
            rows.append((f"{PurePath(model).name}, {how}", *_row(list(own.get(how, {}).values()), at.get(how))))
        if own:
            grid = np.linspace(0, matched**0.5, 9) ** 2
            series = {
                how: [(float(kl) ** 0.5, float(np.mean([way.gold_at(kl) for way in each.values()]))) for kl in grid]
                for how, each in own.items()
            }
            title = f"{PurePath(model).name}: gold at matched KL"
            curves.append(Curve(title, "square root of the exact KL, in nats", series, "Means over seeds."))
        if SINGLE in settings.combinations:
            what = f"{model}, gold at a KL of {matched:.2f} nats"
            comparisons += [
                Compared(what, "a single reward model", how, at.get(SINGLE, {}), at.get(how, {}), share)
                for how in settings.combinations
                if how != SINGLE
            ]
    compared = tested(comparisons)
    header = ("arm", "gold at matched KL", "best gold on the way", "gold at the end", "KL at the end", "seeds")
    note = (
        f"Mean and standard deviation over seeds{', gold in percent' if share else ''}, on held-out prompts. The "
        "matched KL is as far as every arm of a base went; between measured points gold is taken along straight lines "
        "over the KL's square root. Best on the way is the best of several points, by luck too. The ensemble is "
        "trained once; seeds are of the policies, and a single reward model is another member with each."
    )
    tables = [Table("Ensembles of reward models", header, rows, note), table_of(compared)]
    return StudyFindings(tables, curves, sentences(compared), {"arms": figures, "differences": figures_of(compared)})


def _row(ways: Sequence[Way], matched: BySeed | None) -> tuple[str, ...]:
    if not ways or not matched:
        return ("-",) * 4 + ("0",)
    scale = 100.0 if all(way.share for way in ways) else 1.0
    columns = (
        over_seeds(list(matched.values())), over_seeds([max(way.gold) for way in ways]),
        over_seeds([way.gold[way.end] for way in ways]),
    )  # fmt: skip
    kl = over_seeds([way.kl[way.end] for way in ways])
    return (*(spread(one, scale) for one in columns), spread(kl, 1.0), str(len(ways)))
