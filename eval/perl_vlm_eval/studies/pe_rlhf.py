"""LoRA against full tuning, reward models and RL: the tables of PE-RLHF (2403.10704) on anybody's task and model.

Both arms get the same number of learning rates, of which each takes the one that is best on validation data with the
first seed; then every seed is trained with it, and what is reported is measured on test data. All policies are trained
against one reward for each base, by default the LoRA reward model of the middle rank, so that they differ in nothing
but how they are tuned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, ClassVar

from perl_vlm import registry
from perl_vlm.config.checks import require
from perl_vlm_eval.results import to_json
from perl_vlm_eval.studies.base import (
    Part,
    Plan,
    StudyFindings,
    StudySettings,
    cell,
    even_start,
    measured_on_the_way,
    together,
)
from perl_vlm_eval.studies.cells import Outcome, StudyCell
from perl_vlm_eval.studies.differences import Compared, figures_of, sentences, table_of, tested
from perl_vlm_eval.studies.pe_rlhf_tables import (
    ACCURACIES,
    FULL,
    Arm,
    Results,
    cautions,
    main_table,
    rank_curves,
    rank_tables,
)


@dataclass(frozen=True)
class PeRlhfSettings(StudySettings):
    """Settings of ``pe-rlhf``."""

    ranks: tuple[int, ...] = (1, 4, 8, 16)
    """LoRA ranks, each an arm beside full tuning."""
    rm_lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Learning rates that LoRA reward models are tried with."""
    rm_full_lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """Likewise, full tuning; as many."""
    ppo_lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates that LoRA policies are tried with."""
    ppo_full_lrs: tuple[float, ...] = (1e-5, 3e-5, 1e-4)
    """Likewise, full tuning; as many."""
    reward: str = "learned"
    """What policies are trained against: ``learned`` is the LoRA reward model of the middle rank, anything else as
    ppo.reward_model takes it, such as ``verify``."""

    sets: ClassVar[Mapping[str, str]] = {
        "tuning": "both are its arms", "lora.language_rank": "give --ranks", "lora.vision_rank": "give --ranks",
        "rm.lr": "give --rm_lrs and --rm_full_lrs", "ppo.lr": "give --ppo_lrs and --ppo_full_lrs",
        "lr": "give --rm_lrs, --rm_full_lrs, --ppo_lrs and --ppo_full_lrs", "ppo.reward_model": "give --reward",
        "eval.policy": "it is the policy that the study trains",
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.ranks) and min(self.ranks) >= 1, f"ranks is {self.ranks}; each must be at least 1")
        for one, other in (("rm_lrs", "rm_full_lrs"), ("ppo_lrs", "ppo_full_lrs")):
            counts = len(getattr(self, one)), len(getattr(self, other))
            require(
                counts[0] == counts[1] and counts[0] >= 1,
                f"{one} has {counts[0]} learning rates and {other} {counts[1]}; both arms are searched equally",
            )

    @property
    def arms(self) -> tuple[str, ...]:
        """``full``, then ranks."""
        return (FULL, *(str(rank) for rank in sorted(self.ranks, reverse=True)))

    @property
    def middle(self) -> str:
        """The rank whose reward model all policies are trained against, and which stands for LoRA in Table 1."""
        return str(sorted(self.ranks)[len(self.ranks) // 2])


def plan(settings: PeRlhfSettings) -> Plan:
    """See ``studies.base.Plan``."""
    primary = registry.load(settings.task).primary_metric
    cases = [(model, arm) for model in settings.models for arm in settings.arms]
    rewards = yield from together({case: _reward_models(settings, *case) for case in cases})
    best = {
        model: [run.folder for run in rewards[model, settings.middle].runs if run.done][:1]
        if settings.reward == "learned"
        else [settings.reward]
        for model in settings.models
    }
    trained = yield from together(
        {(model, arm): _policies(settings, model, arm, best[model][0], primary) for model, arm in cases if best[model]}
    )
    policies = {case: trained[case][0] if case in trained else Arm() for case in cases}
    anchors: dict[str, float] = {}
    for (model, _), (_, known) in trained.items():
        for anchor in known:
            anchors.setdefault(model, anchor)
    return _findings(
        Results(
            settings.task,
            settings.models,
            settings.arms,
            settings.middle,
            settings.seeds,
            settings.reward,
            rewards,
            policies,
            anchors,
        ),
        primary,
    )


def _reward_models(settings: PeRlhfSettings, model: str, arm: str) -> Part[Arm]:
    """The reward models of an arm, with their accuracies by seed."""
    lrs = settings.rm_full_lrs if arm == FULL else settings.rm_lrs
    found = yield from _searched(settings, "rm", model, arm, lrs, {})
    known = {seed: _accuracy(run) for seed, run in enumerate(found.runs) if run.done}
    return replace(found, figure={seed: value for seed, value in known.items() if value is not None})


def _policies(
    settings: PeRlhfSettings, model: str, arm: str, reward: str | PurePath, primary: str
) -> Part[tuple[Arm, list[float]]]:
    """The policies of an arm, with their primary metric by seed, and what their anchor has."""
    lrs = settings.ppo_full_lrs if arm == FULL else settings.ppo_lrs
    options = {"ppo.reward_model": reward, **even_start(settings, model)}
    found = yield from _searched(settings, "ppo", model, arm, lrs, options)
    judged = yield from _judged(settings, model, arm, found)
    done = {seed: run for seed, run in judged.items() if run.done}
    figure = {seed: run.metrics[f"policy/{primary}"] for seed, run in done.items()}
    return replace(found, figure=figure), [run.metrics[f"anchor/{primary}"] for run in done.values()]


def _searched(
    settings: PeRlhfSettings, verb: str, model: str, arm: str, lrs: Sequence[float], options: Mapping[str, Any]
) -> Part[Arm]:
    """The trials of an arm, then every seed with the best learning rate."""

    measured = measured_on_the_way(settings, verb, model)

    def one(lr: float, seed: int) -> StudyCell:
        name = f"{verb}-{_plain(model)}-{'full' if arm == FULL else f'r{arm}'}-lr{lr:g}-s{seed}"
        tuning = {"tuning": "full"} if arm == FULL else {"lora.language_rank": arm, "lora.vision_rank": arm}
        return cell(settings, name, verb, model, {**options, **measured, **tuning, f"{verb}.lr": lr, "seed": seed})

    trials = {lr: one(lr, 0) for lr in lrs}
    done = yield list(trials.values())
    keys = {lr: _on_validation(done[trial.name], verb) for lr, trial in trials.items() if done[trial.name].done}
    if not keys:
        return Arm()
    lr = max(keys, key=lambda one: keys[one])
    seeds = [one(lr, seed) for seed in range(settings.seeds)]
    done = yield seeds
    return Arm(lr, [done[each.name] for each in seeds], tried=tuple(lrs))


def _on_validation(run: Outcome, verb: str) -> tuple[float, ...]:
    """What trials are compared by: a reward model's best validation accuracy, then loss; a policy's best mean reward on
    validation prompts. Measurements that are no numbers lose."""
    keys = ("eval/accuracy", "eval/loss") if verb == "rm" else ("eval/scores",)
    found = [[line.get(key) for key in keys] for line in run.log(verb)]
    known = [[float(value) for value in one if value is not None] for one in found if None not in one]
    # Less loss is better.
    return max(((one[0], *(-loss for loss in one[1:])) for one in known), default=(float("-inf"),))


def _judged(settings: PeRlhfSettings, model: str, arm: str, trained: Arm) -> Part[dict[int, Outcome]]:
    """The policies' figures on test data, by seed."""
    cells = {
        seed: cell(
            settings, f"eval-{_plain(model)}-{arm}-s{seed}", "eval", model,
            {"eval.policy": run.folder, "seed": seed, **({"tuning": "full"} if arm == FULL else {})},
        )
        for seed, run in enumerate(trained.runs)
        if run.done
    }  # fmt: skip
    done = yield list(cells.values())
    return {seed: done[each.name] for seed, each in cells.items()}


def _findings(found: Results, primary: str) -> StudyFindings:
    compared = tested(
        [
            Compared(f"{model}, {what}", "full tuning", f"LoRA of rank {arm}", arms[model, FULL].figure,
                     arms[model, arm].figure, share)
            for model in found.models
            for what, arms, share in (
                ("reward models' accuracy", found.rewards, True), (f"policies' {primary}", found.policies, found.share)
            )
            for arm in found.arms
            if arm != FULL
        ]
    )  # fmt: skip
    arms = {
        "/".join(key): {
            name: {"lr": arm.lr, "by_seed": to_json(arm.figure), **(vars(arm.seeds) if arm.seeds else {})}
            for name, arm in (("reward_model", reward), ("policy", found.policies[key]))
        }
        for key, reward in found.rewards.items()
    }
    figures = {"arms": arms, "anchors": dict(found.anchors), "differences": figures_of(compared)}
    tables = [main_table(found), *rank_tables(found), table_of(compared)]
    return StudyFindings(tables, rank_curves(found), [*sentences(compared), *cautions(found)], figures)


def _accuracy(run: Outcome) -> float | None:
    """None where there were no preferences to measure on."""
    return next((run.metrics[name] for name in ACCURACIES if name in run.metrics), None)


def _plain(model: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in PurePath(model).name)
