"""Policies followed through their checkpoints: what the studies of regularisers and ensembles have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from perl_vlm.config.checks import require
from perl_vlm_eval.studies.base import Part, StudySettings, cell
from perl_vlm_eval.studies.cells import StudyCell


@dataclass(frozen=True)
class Way:
    """One trained policy: its points in the order of training, the anchor first."""

    kl: Sequence[float]
    """In nats, exact."""
    gold: Sequence[float]
    proxy: Sequence[float]
    win_rate: Sequence[float]
    """Against the anchor by the gold metric; a half at the anchor itself."""
    names: Sequence[str]
    share: bool = True
    """Whether gold is a share."""
    verdict: str = ""
    precision: Mapping[str, float] = field(default_factory=dict)
    """Factual precision of ``anchor`` and ``policy``, where it was measured."""

    @property
    def end(self) -> int:
        """The place of the policy that was published: where checkpoints were measured on the way, the best one."""
        return list(self.names).index("policy")

    def gold_at(self, kl: float) -> float:
        """The gold metric at a divergence, between points in a straight line over its square root."""
        order = np.argsort(self.kl, kind="stable")
        away, gold = np.sqrt(np.maximum(np.asarray(self.kl)[order], 0)), np.asarray(self.gold)[order]
        return float(np.interp(kl**0.5, away, gold))


MEASURED = {
    "ppo.steps": "give --steps", "steps": "give --steps", "ppo.save_every": "give --points",
    "ppo.save_total_limit": "it keeps every checkpoint that it measures",
    "ppo.eval_every": "policies are taken as the last round left them, so that all have had as many",
}  # fmt: skip
"""What a study that follows its policies gives its cells itself."""


def rounds(steps: int, points: int) -> dict[str, Any]:
    """Settings of policies that are measured at so many points on the way, and published as the last one left them."""
    return {
        "ppo.steps": steps, "ppo.save_every": steps // points, "ppo.save_total_limit": None, "ppo.eval_every": None,
    }  # fmt: skip


def check_points(steps: int, points: int) -> None:
    """Raises ValueError for points that cannot lie evenly on the way."""
    require(
        1 <= points <= steps and steps % points == 0,
        f"points is {points} and steps {steps}; a policy is measured every steps / points rounds, so points must "
        "divide steps",
    )


def followed(
    settings: StudySettings,
    name: str,
    model: str,
    options: Callable[[int], Mapping[str, Any]],
    limit: int,
    *needs: str,
) -> Part[dict[int, Way]]:
    """Train a policy with every seed, keep its checkpoints, and follow it through them: a ``Way`` by seed.

    Args:
        options: settings of the policy with a seed.
    """
    trained = [
        cell(settings, f"ppo-{name}-s{seed}", "ppo", model, {**options(seed), "seed": seed}, *needs)
        for seed in range(settings.seeds)
    ]
    done = yield trained
    measured = [
        StudyCell(
            f"way-{name}-s{seed}",
            ["eval", "--suite", "way", "--runs", str(done[one.name].folder), "--limit", str(limit)],
            (one.name,),
            wants="hacking",
        )
        for seed, one in enumerate(trained)
    ]
    found = yield measured
    outcomes = [found[one.name] for one in measured]
    return {seed: way_of(one.summary) for seed, one in enumerate(outcomes) if one.done}


def way_of(results: Mapping[str, Any]) -> Way:
    """A way from the results of the suite ``way``."""
    cells = {one["kind"]: one for one in results["cells"] if one["status"] == "done"}
    figures = cells["hacking"]["figures"]
    names = [name.split("/")[1] for name in figures if name.startswith("way/") and name.endswith("/kl")]

    def column(what: str, default: float) -> list[float]:
        return [
            figures[f"way/{name}/{what}"]["estimate"]["value"] if f"way/{name}/{what}" in figures else default
            for name in names
        ]

    precision = {}
    for label, key in (("anchor", "anchor/precision"), ("policy", "precision")):
        known = cells.get("factuality", {}).get("figures", {}).get(key)
        if known is not None:
            precision[label] = known["estimate"]["value"]
    return Way(
        column("kl", 0.0), column("gold", 0.0), column("proxy", 0.0), column("win_rate", 0.5), names,
        figures[f"way/{names[0]}/gold"]["unit"] == "share", cells["hacking"]["verdicts"][0], precision,
    )  # fmt: skip
