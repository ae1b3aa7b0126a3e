"""Tables 1, 2 and 3 of PE-RLHF (2403.10704) from finished cells, and what must be said beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from perl_vlm.report.html import Curve, Table
from perl_vlm_eval.seeds import Seeds, over_seeds
from perl_vlm_eval.studies.base import spread
from perl_vlm_eval.studies.cells import Outcome, bare_bytes
from perl_vlm_eval.studies.differences import BySeed
from perl_vlm_eval.studies.published_figures import MAIN, MAIN_COLUMNS, POLICY_RANKS, REWARD_RANKS

FULL = "full"
CHANCE = 0.5
"""Of telling which response of a pair is better."""
ACCURACIES = ("reward_model/pair_accuracy", "reward_model/label_accuracy")


@dataclass(frozen=True)
class Arm:
    """One way of tuning one base, trained with its best learning rate."""

    lr: float | None = None
    """None where no trial was finished."""
    runs: Sequence[Outcome] = ()
    """One for each seed, holes too."""
    figure: BySeed = field(default_factory=dict)
    """By seed: a reward model's accuracy, or what the task says of a policy."""
    tried: Sequence[float] = ()
    """Learning rates that it was chosen from."""

    @property
    def seeds(self) -> Seeds | None:
        """The figure over seeds; None where no run is finished."""
        return over_seeds(list(self.figure.values())) if self.figure else None


@dataclass(frozen=True)
class Results:
    """What the tables are made of. Arms by model and way of tuning."""

    task: str
    models: Sequence[str]
    arms: Sequence[str]
    """``full``, then ranks."""
    middle: str
    """The rank that stands for LoRA in Table 1."""
    seeds: int
    reward: str
    """What policies were trained against."""
    rewards: Mapping[tuple[str, str], Arm]
    policies: Mapping[tuple[str, str], Arm]
    anchors: Mapping[str, float]
    """What the task says of a model's anchor."""

    @property
    def share(self) -> bool:
        """Whether the task's metric is one: all that it came to lies in [0, 1]."""
        values = [value for arm in self.policies.values() for value in arm.figure.values()]
        return all(0 <= value <= 1 for value in (*values, *self.anchors.values()))

    def gold(self, arm: Arm) -> str:
        """The task's metric over seeds."""
        return spread(arm.seeds, 100.0 if self.share else 1.0)

    def title(self, model: str) -> str:
        return f"{self.task}, {PurePath(model).name}"


def main_table(found: Results) -> Table:
    """Table 1's rows, ours in the first columns, the paper's in the others."""
    ours: dict[str, list[str]] = {name: [] for name in MAIN}
    for model in found.models:
        lora, full = found.rewards[model, found.middle], found.rewards[model, FULL]
        ours["RM accuracy, full"].append(spread(full.seeds))
        ours["RM accuracy, LoRA"].append(spread(lora.seeds))
        _costs(ours, "RM", lora, full, "rm")
        lora, full = found.policies[model, found.middle], found.policies[model, FULL]
        ours["RL, full"].append(found.gold(full))
        ours["RL, LoRA"].append(found.gold(lora))
        _costs(ours, "RL", lora, full, "ppo")
    rows = [
        (name, *ours[name], *(_paper(name, theirs.get(column)) for column in MAIN_COLUMNS))
        for name, theirs in MAIN.items()
    ]
    note = (
        f"LoRA is rank {found.middle}, policies' reward is {found.reward}; ours is mean and standard deviation over "
        f"{found.seeds} seeds, the paper's one run (its LoRA the best of several ranks) on other models and data. "
        "Memory is the peak beyond the bare process on a CPU, what torch allocated on a GPU; speed is of training "
        "steps, sampling included in RL and measurements on the way not, and means little where cells ran beside one "
        "another on one device."
    )
    header = ("", *map(found.title, found.models), *(f"paper: {one}" for one in MAIN_COLUMNS))
    return Table("Table 1: LoRA against full tuning", header, rows, note)


def rank_tables(found: Results) -> list[Table]:
    """Tables 2 and 3."""
    accuracies = {model: [spread(found.rewards[model, arm].seeds) for arm in found.arms] for model in found.models}
    gold = {model: [found.gold(found.policies[model, arm]) for arm in found.arms] for model in found.models}
    scale = 100.0 if found.share else 1.0
    for model, cells in gold.items():
        cells.append(f"{scale * found.anchors[model]:.1f}" if model in found.anchors else "-")
    unit = "Percent" if found.share else "In the task's own unit, the paper's in percent"
    return [
        _by_rank(found, "Table 2: reward models, accuracy by rank", accuracies, found.arms, REWARD_RANKS, "Percent"),
        _by_rank(
            found, "Table 3: policies, the task's metric by rank", gold, (*found.arms, "anchor"), POLICY_RANKS, unit
        ),
    ]  # fmt: skip


def rank_curves(found: Results) -> list[Curve]:
    """Both by rank, with full tuning and the anchor as levels."""
    curves = []
    ranks = sorted(int(arm) for arm in found.arms if arm != FULL)
    for model in found.models if len(ranks) > 1 else ():
        for what, arms in (("reward models' accuracy", found.rewards), ("policies' metric", found.policies)):
            known = {arm: arms[model, arm].seeds for arm in found.arms}
            series = {"LoRA": [(math.log2(rank), own.mean) for rank in ranks if (own := known[str(rank)])]}
            full = known[FULL]
            levels = {"full tuning": None if full is None else full.mean}
            if arms is found.policies:
                levels["anchor"] = found.anchors.get(model)
            ends = math.log2(ranks[0]), math.log2(ranks[-1])
            series |= {name: [(at, level) for at in ends] for name, level in levels.items() if level is not None}
            title = f"{found.title(model)}: {what} by rank"
            curves.append(Curve(title, "binary logarithm of the rank", series, "Means over seeds."))
    return curves


def cautions(found: Results) -> list[str]:
    """What makes a comparison of arms say little: a reward that knows nothing, policies that it made worse."""
    said = []
    for model in found.models:
        reward = found.rewards[model, found.middle]
        pairs = any(ACCURACIES[0] in run.metrics for run in reward.runs)
        learned = found.reward == "learned"
        if learned and pairs and reward.seeds is not None and (reward.seeds.low is None or reward.seeds.low <= CHANCE):
            said.append(
                f"{model}: the reward models of rank {found.middle} ({spread(reward.seeds)}) are not shown to be above "
                "chance, so what policies reach says little of how they are tuned; train reward models longer."
            )
        known = {arm: found.policies[model, arm].seeds for arm in found.arms}
        worse = [
            arm
            for arm, own in known.items()
            if own is not None
            and model in found.anchors
            and (own.mean if own.high is None else own.high) < found.anchors[model]
        ]
        if worse:
            said.append(f"{model}: policies are below their anchor in {', '.join(worse)}.")
        said += _edges(found, model)
    return said


def _edges(found: Results, model: str) -> list[str]:
    """Learning rates that were the last of those tried: whether the next would have been better is not known."""
    told = [
        f"{what} {arm} ({own.lr:g}, the {'largest' if own.lr == max(own.tried) else 'smallest'} of {len(own.tried)})"
        for what, arms in (("reward model", found.rewards), ("policy", found.policies))
        for arm in found.arms
        if (own := arms[model, arm]).lr is not None
        and len(own.tried) > 1
        and own.lr in (min(own.tried), max(own.tried))
    ]
    text = f"{model}: learning rates at the edge of what was tried, so that a wider search may do better: "
    return [text + f"{', '.join(told)}."] if told else []


def _by_rank(
    found: Results,
    title: str,
    ours: Mapping[str, Sequence[str]],
    names: Sequence[str],
    published: Mapping[str, Mapping[str, float]],
    unit: str,
) -> Table:
    rows = [(found.title(model), *ours[model]) for model in found.models]
    rows += [
        (f"paper: {column}", *(f"{values[name]:g}" if name in values else "-" for name in names))
        for column, values in published.items()
    ]
    header = ("", *(name if name in (FULL, "anchor") else f"rank {name}" for name in names))
    return Table(title, header, rows, f"{unit}; mean and standard deviation over {found.seeds} seeds.")


def _costs(ours: Mapping[str, list[str]], kind: str, lora: Arm, full: Arm, stage: str) -> None:
    memory, speed = _ratios(lora, full, stage)
    ours[f"{kind} memory, LoRA / full"].append("-" if memory is None else f"{100 * memory:.0f} %")
    ours[f"{kind} speed, LoRA / full"].append("-" if speed is None else f"{speed:.2f}x")


def _ratios(lora: Arm, full: Arm, stage: str) -> tuple[float | None, float | None]:
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


def _paper(name: str, value: float | None) -> str:
    return "-" if value is None else f"{value:g}x" if "speed" in name else f"{value:g} %"
