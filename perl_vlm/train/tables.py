"""The report's headline and tables, from figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from perl_vlm.report.html import Table
from perl_vlm.train.compare import JUDGE, kinds_of
from perl_vlm.train.evaluate import Evaluation
from perl_vlm.train.figures import ONE_GROUP, shown
from perl_vlm.train.reward_report import PREFIX
from perl_vlm.train.stage import Stage

Row = tuple[str, str, str]
_COUNTS = ("held_out", "best_step")


def headline(stage: Stage, summary: Mapping[str, Any], evaluation: Evaluation | None) -> list[Row]:
    """(label, value, explanation) of the few figures that matter most."""
    primary, metrics, ci95 = stage.task.primary_metric, summary["metrics"], summary["ci95"]
    share, rows = _is_share(primary, evaluation), list[Row]()
    if f"gain/{primary}" in metrics:
        value = shown(metrics[f"gain/{primary}"], share, gain=True)
        ends = ci95.get(f"gain/{primary}")
        how = f"no interval: {ONE_GROUP}" if ends is None else f"{_interval(ends, share)}, paired bootstrap"
        rows.append((f"Gain in {primary}", value, how))
    for key, label in ((f"anchor/{primary}", "Anchor"), (f"policy/{primary}", "Policy")):
        if key in metrics:
            explained = f"{primary}, {_how(evaluation)}, {metrics['eval/examples']:,.0f} examples"
            rows.append((label, shown(metrics[key], share), explained))
    for key, label in ((primary, "Wins"), (JUDGE, "Wins by the judge")):
        name = f"win_rate/{key}"
        if name in metrics:
            explained = "answers better than the anchor's, ties half"
            explained += f"; {_interval(ci95[name], True, gain=False)}" if name in ci95 else ""
            rows.append((label, shown(metrics[name], True), explained))
    rows += _of_reward_model(metrics, ci95)
    if "policy/kl" in metrics:
        rows.append(("KL to the anchor", f"{metrics['policy/kl']:.3f} nats", "a response, exact over the vocabulary"))
    return rows


def tables(stage: Stage, summary: Mapping[str, Any], evaluation: Evaluation | None) -> list[Table]:
    """Every judgement of anchor and policy, the primary one by kind, and all that is known of the reward model."""
    metrics, ci95 = summary["metrics"], summary["ci95"]
    found = []
    if evaluation is not None:
        found.append(_judgements(metrics, ci95, evaluation))
        found.append(_by_kind(stage.task.primary_metric, metrics, ci95, evaluation))
    measured = {key: value for key, value in metrics.items() if key.startswith(PREFIX)}
    rows = [
        (
            key.removeprefix(PREFIX),
            f"{value:,.0f}" if key.removeprefix(PREFIX).startswith(_COUNTS) else f"{value:.3f}",
            " to ".join(f"{end:.3f}" for end in ci95[key]) if key in ci95 else "",
        )
        for key, value in measured.items()
    ]
    note = "On preferences that it was not trained on; intervals by bootstrap over prompts or pictures."
    found.append(Table("Reward model", ("figure", "value", "95 % interval"), rows, note))
    return [table for table in found if table.rows]


def _judgements(metrics: Mapping[str, float], ci95: Mapping[str, Sequence[float]], evaluation: Evaluation) -> Table:
    keys = [key.removeprefix("anchor/") for key in metrics if key.startswith("anchor/")]
    kinds = kinds_of(evaluation.examples)
    keys = [key for key in keys if not any(key.endswith(f"/{kind}") for kind in kinds)]
    rows = [_row(key, key, metrics, ci95, key in evaluation.shares) for key in keys]
    note = f"The judge is {evaluation.judge}." if evaluation.judge else ""
    return Table("Judgements", ("figure", "anchor", "policy", "gain", "95 % interval"), rows, note)


def _by_kind(
    primary: str, metrics: Mapping[str, float], ci95: Mapping[str, Sequence[float]], evaluation: Evaluation
) -> Table:
    share = primary in evaluation.shares
    rows = []
    for kind, places in kinds_of(evaluation.examples).items():
        if f"anchor/{primary}/{kind}" in metrics:
            name, *figures = _row(kind, f"{primary}/{kind}", metrics, ci95, share)
            rows.append((name, f"{len(places):,}", *figures))
    header = ("kind", "examples", "anchor", "policy", "gain", "95 % interval")
    return Table(f"{primary} by kind", header, rows, "Many kinds have many chances: one of them may gain by luck.")


def _row(
    name: str, key: str, metrics: Mapping[str, float], ci95: Mapping[str, Sequence[float]], share: bool
) -> tuple[str, ...]:
    anchor, policy = (
        shown(metrics[which], share) if which in metrics else "" for which in (f"anchor/{key}", f"policy/{key}")
    )
    gain = f"gain/{key}"
    difference = shown(metrics[gain], share, gain=True) if gain in metrics else ""
    return name, anchor, policy, difference, _ends(ci95[gain], share) if gain in ci95 else ""


def _of_reward_model(metrics: Mapping[str, float], ci95: Mapping[str, Sequence[float]]) -> list[Row]:
    rows = []
    for name, title in (("auc", "AUC"), ("pair_accuracy", "pair accuracy"), ("label_accuracy", "label accuracy")):
        key, share = PREFIX + name, name != "auc"
        if key not in metrics:
            continue
        parts = [f"{title}, held out"]
        if key in ci95:
            parts.append(_interval(ci95[key], share, gain=False))
        baselines = {
            "length_auc": "length alone" if name == "auc" else "",
            "length_accuracy": "length alone",
            "majority_rate": "always the more frequent label" if name == "label_accuracy" else "",
            f"{name}_blank_images": "with the picture blanked",
        }
        for baseline, said in baselines.items():
            if said and PREFIX + baseline in metrics:
                parts.append(f"{shown(metrics[PREFIX + baseline], share)} {said}")
        rows.append(("Reward model", shown(metrics[key], share), "; ".join(parts)))
    return rows


def _is_share(key: str, evaluation: Evaluation | None) -> bool:
    return evaluation is not None and key in evaluation.shares


def _how(evaluation: Evaluation | None) -> str:
    chosen = [bool(example.choices) for example in evaluation.examples] if evaluation is not None else []
    return "by log-prob" if chosen and all(chosen) else "greedy or by log-prob" if any(chosen) else "greedy"


def _interval(ends: Sequence[float], share: bool, *, gain: bool = True) -> str:
    return f"95 % interval {_ends(ends, share, gain=gain)}"


def _ends(ends: Sequence[float], share: bool, *, gain: bool = True) -> str:
    low, high = (f"{100 * end if share else end:{'+' if gain else ''}{'.1f' if share else '.3g'}}" for end in ends)
    return f"{low} to {high}"
