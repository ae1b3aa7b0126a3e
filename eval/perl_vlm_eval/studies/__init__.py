"""The papers' studies, runnable on anybody's task and model. By the word after ``perl-vlm study``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from perl_vlm_eval.studies import ensembles, pe_rlhf, regularizers
from perl_vlm_eval.studies.base import Plan


class Study(NamedTuple):
    """A study, by its settings and its plan."""

    settings: type
    plan: Callable[[Any], Plan]
    about: str


STUDIES: dict[str, Study] = {
    "pe-rlhf": Study(
        pe_rlhf.PeRlhfSettings, pe_rlhf.plan, "LoRA against full tuning, reward models and RL, by rank (2403.10704)"
    ),
    "regularizers": Study(
        regularizers.RegularizerSettings,
        regularizers.plan,
        "every regulariser of PPO, LoRA and full tuning: win rate against exact KL (2309.09055)",
    ),
    "ensembles": Study(
        ensembles.EnsembleSettings,
        ensembles.plan,
        "single, mean, minimum, uncertainty, averaged weights: gold at equal KL",
    ),
}
