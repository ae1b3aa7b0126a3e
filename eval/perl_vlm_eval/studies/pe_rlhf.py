"""LoRA against full tuning, reward models and RL: the tables of PE-RLHF (2403.10704) on anybody's task and model.

Both arms get the same number of learning rates, of which each takes the one that is best on validation data with the
first seed; then every seed is trained with it, and what is reported is measured on test data. All policies are trained
against one reward model for each base, the LoRA one of the middle rank, so that they differ in nothing but how they are
tuned.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from perl_vlm import registry
from perl_vlm.config.checks import require
from perl_vlm.report.html import Table
from perl_vlm_eval.statistics import Seeds, over_seeds
from perl_vlm_eval.studies.base import Plan, StudyFindings, StudySettings, cell, even_start, measured_on_the_way, spread
from perl_vlm_eval.studies.cells import Outcome, StudyCell, bare_bytes
from perl_vlm_eval.studies.published_figures import MAIN, MAIN_COLUMNS, POLICY_RANKS, REWARD_RANKS

FULL = "full"
CHANCE = 0.5
"""Of telling which response of a pair is better."""
_ACCURACIES = ("reward_model/pair_accuracy", "reward_model/label_accuracy")


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


@dataclass(frozen=True)
class _Arm:
    """One way of tuning one base, trained with its best learning rate."""

    lr: float | None
    """None where no trial was finished."""
    runs: Sequence[Outcome]
    """One for each seed."""


def plan(settings: PeRlhfSettings) -> Plan:
    """See ``studies.base.Plan``."""
    primary = registry.load(settings.task).primary_metric
    rewards: dict[tuple[str, str], _Arm] = {}
    policies: dict[tuple[str, str], _Arm] = {}
    anchors: dict[str, list[float]] = {}
    judged: dict[tuple[str, str], list[Outcome]] = {}
    for model in settings.models:
        for arm in settings.arms:
            lrs = settings.rm_full_lrs if arm == FULL else settings.rm_lrs
            rewards[model, arm] = yield from _searched(settings, "rm", model, arm, lrs, {})
        best = rewards[model, settings.middle].runs
        reward = next((run for run in best if run.done), None)
        for arm in settings.arms:
            if reward is None:
                policies[model, arm], judged[model, arm] = _Arm(None, ()), []
                continue
            lrs = settings.ppo_full_lrs if arm == FULL else settings.ppo_lrs
            options = {"ppo.reward_model": reward.folder, **even_start(settings, model)}
            policies[model, arm] = yield from _searched(settings, "ppo", model, arm, lrs, options)
            judged[model, arm] = yield from _judged(settings, model, arm, policies[model, arm])
        anchors[model] = [
            run.metrics[f"anchor/{primary}"] for arm in settings.arms for run in judged[model, arm] if run.done
        ][:1]
    return _findings(settings, primary, rewards, policies, judged, anchors)


def _searched(
    settings: PeRlhfSettings, verb: str, model: str, arm: str, lrs: Sequence[float], options: Mapping[str, Any]
) -> Generator[Sequence[StudyCell], Mapping[str, Outcome], _Arm]:
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
        return _Arm(None, ())
    lr = max(keys, key=lambda one: keys[one])
    seeds = [one(lr, seed) for seed in range(settings.seeds)]
    done = yield seeds
    return _Arm(lr, [done[each.name] for each in seeds])


def _on_validation(run: Outcome, verb: str) -> tuple[float, ...]:
    """What trials are compared by: a reward model's best validation accuracy, then loss; a policy's best mean reward on
    validation prompts. Measurements that are no numbers lose."""
    keys = ("eval/accuracy", "eval/loss") if verb == "rm" else ("eval/scores",)
    found = [[line.get(key) for key in keys] for line in run.log(verb)]
    known = [[float(value) for value in one if value is not None] for one in found if None not in one]
    # Less loss is better.
    return max(((one[0], *(-loss for loss in one[1:])) for one in known), default=(float("-inf"),))


def _judged(
    settings: PeRlhfSettings, model: str, arm: str, trained: _Arm
) -> Generator[Sequence[StudyCell], Mapping[str, Outcome], list[Outcome]]:
    cells = [
        cell(
            settings, f"eval-{_plain(model)}-{arm}-s{seed}", "eval", model,
            {"eval.policy": run.folder, "seed": seed, **({"tuning": "full"} if arm == FULL else {})},
        )
        for seed, run in enumerate(trained.runs)
        if run.done
    ]  # fmt: skip
    done = yield cells
    return [done[each.name] for each in cells]


def _findings(
    settings: PeRlhfSettings,
    primary: str,
    rewards: Mapping[tuple[str, str], _Arm],
    policies: Mapping[tuple[str, str], _Arm],
    judged: Mapping[tuple[str, str], Sequence[Outcome]],
    anchors: Mapping[str, Sequence[float]],
) -> StudyFindings:
    figures: dict[str, Any] = {}
    reward_table: dict[tuple[str, str], Seeds | None] = {}
    policy_table: dict[tuple[str, str], Seeds | None] = {}
    for model in settings.models:
        for arm in settings.arms:
            trained = rewards[model, arm]
            accuracies = [_accuracy(run) for run in trained.runs if run.done]
            reward_table[model, arm] = _summed([value for value in accuracies if value is not None])
            known = [run.metrics[f"policy/{primary}"] for run in judged[model, arm] if run.done]
            policy_table[model, arm] = _summed(known)
            figures[f"{model}/{arm}"] = {
                "reward_model": {"lr": trained.lr, **_plain_seeds(reward_table[model, arm])},
                "policy": {"lr": policies[model, arm].lr, **_plain_seeds(policy_table[model, arm])},
            }
    tables = [
        _main(settings, reward_table, policy_table, rewards, policies),
        _by_rank("Table 2: reward models, accuracy by rank", settings, reward_table, REWARD_RANKS, {}),
        _by_rank("Table 3: policies, the task's metric by rank", settings, policy_table, POLICY_RANKS, anchors),
    ]
    verdicts = _verdicts(settings, reward_table, policy_table)
    verdicts += _cautions(settings, rewards, reward_table, policy_table, anchors)
    return StudyFindings(tables, (), verdicts, figures)


def _main(
    settings: PeRlhfSettings,
    reward_table: Mapping[tuple[str, str], Seeds | None],
    policy_table: Mapping[tuple[str, str], Seeds | None],
    rewards: Mapping[tuple[str, str], _Arm],
    policies: Mapping[tuple[str, str], _Arm],
) -> Table:
    """Table 1's rows, ours in the first columns, the paper's in the others."""
    middle = settings.middle
    ours: dict[str, list[str]] = {name: [] for name in MAIN}
    for model in settings.models:
        for kind, table, arms, title in (
            ("RM", reward_table, rewards, "RM accuracy"), ("RL", policy_table, policies, "RL"),
        ):  # fmt: skip
            ours[f"{title}, full"].append(spread(table[model, FULL]))
            ours[f"{title}, LoRA"].append(spread(table[model, middle]))
            stage = "rm" if kind == "RM" else "ppo"
            memory, speed = _ratios(arms[model, middle], arms[model, FULL], stage)
            ours[f"{kind} memory, LoRA / full"].append("-" if memory is None else f"{100 * memory:.0f} %")
            ours[f"{kind} speed, LoRA / full"].append("-" if speed is None else f"{speed:.2f}x")
    rows = [
        (name, *ours[name], *(_paper(name, theirs.get(column)) for column in MAIN_COLUMNS))
        for name, theirs in MAIN.items()
    ]
    header = ("", *(f"{settings.task}, {PurePath(model).name}" for model in settings.models))
    note = (
        f"LoRA is rank {middle}; ours is mean and standard deviation over {settings.seeds} seeds, the paper's one run "
        "(its LoRA the best of several ranks) on other models and data. Memory is the peak beyond the bare process on "
        "a CPU, what torch allocated on a GPU; speed is of training steps, sampling included in RL."
    )
    return Table("Table 1: LoRA against full tuning", (*header, *(f"paper: {one}" for one in MAIN_COLUMNS)), rows, note)


def _by_rank(
    title: str,
    settings: PeRlhfSettings,
    table: Mapping[tuple[str, str], Seeds | None],
    published: Mapping[str, Mapping[str, float]],
    anchors: Mapping[str, Sequence[float]],
) -> Table:
    names = [*settings.arms, *(["anchor"] if anchors else [])]
    rows = []
    for model in settings.models:
        own = [spread(table[model, arm]) for arm in settings.arms]
        if anchors:
            own.append(f"{100 * anchors[model][0]:.1f}" if anchors[model] else "-")
        rows.append((f"{settings.task}, {PurePath(model).name}", *own))
    rows += [
        (f"paper: {column}", *(f"{values[name]:g}" if name in values else "-" for name in names))
        for column, values in published.items()
    ]
    header = ("", *(name if name in (FULL, "anchor") else f"rank {name}" for name in names))
    return Table(title, header, rows, f"Percent; mean and standard deviation over {settings.seeds} seeds.")


def _verdicts(
    settings: PeRlhfSettings,
    reward_table: Mapping[tuple[str, str], Seeds | None],
    policy_table: Mapping[tuple[str, str], Seeds | None],
) -> list[str]:
    """LoRA of the middle rank against full tuning, in words: apart only where their intervals over seeds are."""
    said = []
    for model in settings.models:
        for what, table in (("reward models", reward_table), ("policies", policy_table)):
            lora, full = table[model, settings.middle], table[model, FULL]
            if lora is None or full is None or None in (lora.low, lora.high, full.low, full.high):
                said.append(f"{model}, {what}: too few finished runs to tell LoRA from full tuning.")
                continue
            apart = lora.low > full.high or full.low > lora.high  # type: ignore[operator]
            words = "within the noise of the seeds" if not apart else "better" if lora.mean > full.mean else "worse"
            said.append(
                f"{model}, {what}: LoRA {spread(lora)} against {spread(full)} of full tuning over {lora.seeds} seeds: "
                f"{words}."
            )
    return said


def _cautions(
    settings: PeRlhfSettings,
    rewards: Mapping[tuple[str, str], _Arm],
    reward_table: Mapping[tuple[str, str], Seeds | None],
    policy_table: Mapping[tuple[str, str], Seeds | None],
    anchors: Mapping[str, Sequence[float]],
) -> list[str]:
    """What makes a comparison of arms say little: a reward that knows nothing, policies that it made worse."""
    said = []
    for model in settings.models:
        reward = reward_table[model, settings.middle]
        pairs = any(_ACCURACIES[0] in run.metrics for run in rewards[model, settings.middle].runs)
        if pairs and reward is not None and (reward.low is None or reward.low <= CHANCE):
            said.append(
                f"{model}: the reward models of rank {settings.middle} ({spread(reward)}) are not shown to be above "
                "chance, so what policies reach says little of how they are tuned; train reward models longer."
            )
        known = {arm: policy_table[model, arm] for arm in settings.arms}
        worse = [
            arm for arm, own in known.items() if own is not None and anchors[model] and own.mean < anchors[model][0]
        ]
        if worse:
            said.append(f"{model}: policies are below their anchor in {', '.join(worse)}.")
    return said


def _accuracy(run: Outcome) -> float | None:
    """None where there were no preferences to measure on."""
    return next((run.metrics[name] for name in _ACCURACIES if name in run.metrics), None)


def _ratios(lora: _Arm, full: _Arm, stage: str) -> tuple[float | None, float | None]:
    """LoRA's peak memory as a share of full tuning's, and how many times as fast its steps are."""
    sides = [[run for run in arm.runs if run.done] for arm in (lora, full)]
    if not all(sides):
        return None, None
    peaks = [[run.summary.get("peak_memory_bytes") for run in runs] for runs in sides]
    times = [[run.step_seconds(stage) for run in runs] for runs in sides]
    bare = bare_bytes()
    own = [[None if peak is None else peak - bare for peak in side] for side in peaks]
    return _ratio(own[0], own[1]), _ratio(times[1], times[0])


def _ratio(above: Sequence[float | None], below: Sequence[float | None]) -> float | None:
    known = [sorted(value for value in side if value) for side in (above, below)]
    if not all(known):
        return None
    return known[0][len(known[0]) // 2] / known[1][len(known[1]) // 2]


def _summed(values: Sequence[float]) -> Seeds | None:
    return over_seeds(values) if values else None


def _plain_seeds(found: Seeds | None) -> dict[str, Any]:
    return {} if found is None else vars(found)


def _paper(name: str, value: float | None) -> str:
    return "-" if value is None else f"{value:g}x" if "speed" in name else f"{value:g} %"


def _plain(model: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in PurePath(model).name)
