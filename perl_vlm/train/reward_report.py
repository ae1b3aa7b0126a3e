"""What a trained reward model is worth on held-out preferences, and what its judgement rests on."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from perl_vlm.data.images import BlankImage, ShuffledImage, content_key
from perl_vlm.stats import auc, wins
from perl_vlm.train.figures import ONE_GROUP, Figures, group_of, shown
from perl_vlm.train.log import SampleLog
from perl_vlm.train.scoring import Feedback, FeedbackScores, score_feedback
from perl_vlm.train.stage import Stage
from perl_vlm.types import Comparison, Rating

SAMPLES = 32
BLINDINGS = ("blank", "shuffled", "swapped")
"""What is done to pictures to see whether the reward model looks at them."""
PREFIX = "reward_model/"


def evaluate_reward_model(stage: Stage, names: Sequence[str], step: int = 0) -> Figures:
    """Held-out accuracy, for labels AUC too, for each objective and member where there are several; what judges that
    look at nothing but lengths or class sizes reach; accuracy with pictures blanked, shuffled or swapped; and the
    reward's liking for length. docs/evaluation.md says what each figure is.

    ``step`` is the one that the logged samples are from.
    """
    split = stage.config.eval.split
    records: list[Feedback] = stage.some(stage.preferences(split), stage.config.rm.eval_pairs)
    figures = Figures(stage.config)
    if not records:
        stage.warn(f"there are no {split} preferences to measure the reward model on")
        return figures
    head = stage.task.reward_head()
    name = "pair_accuracy" if head.kind == "pairs" else "label_accuracy"
    found = score_feedback(stage, names, records)
    _log_samples(stage, records, found, step)
    right, groups = found.correct.double().numpy(), [group_of(record) for record in records]
    figures.mean(f"{PREFIX}{name}", right, groups)
    if len(set(groups)) < 2:
        stage.warn(f"nothing can be said of how certain the reward model's figures are: {ONE_GROUP}")
    figures[f"{PREFIX}length_correlation"] = _correlation(found.scores.flatten(), found.lengths.flatten())
    figures[f"{PREFIX}held_out"] = float(len(records))
    objectives = {objective: _places(records, objective) for objective in head.objectives}
    objectives = {objective: places for objective, places in objectives.items() if places}
    several = len(head.objectives) > 1
    if several:
        for objective, places in objectives.items():
            figures.mean(f"{PREFIX}{name}/{objective}", right[places], [groups[place] for place in places])
    if len(names) > 1:
        for member, hits in zip(names, found.members.mean(dim=0).tolist(), strict=True):
            figures[f"{PREFIX}{name}/{member}"] = hits
    if head.kind == "pairs":
        _against_length(stage, figures, found, objectives, right, groups)
    else:
        labels = np.array([isinstance(record, Rating) and record.label for record in records])
        _against_majority(figures, labels, objectives, right, groups, several)
        _areas(stage, figures, found, labels, objectives, groups, several)
    if any(record.images for record in records):
        for how in BLINDINGS:
            changed = without_sight(records, how)
            if changed:
                blind = score_feedback(stage, names, changed).correct
                figures[f"{PREFIX}{name}_{how}_images"] = blind.mean().item()
    return figures


def brief(metrics: Mapping[str, float], ci95: Mapping[str, Sequence[float]]) -> str:
    """The main figures of a reward model in one line for the terminal; empty where nothing was measured."""
    titles = {
        "auc": "AUC",
        "pair_accuracy": "pair accuracy",
        "label_accuracy": "label accuracy",
        "majority_rate": "majority class",
        "length_accuracy": "length alone",
        "length_auc": "AUC of length alone",
        "pair_accuracy_blank_images": "without pictures",
        "label_accuracy_blank_images": "without pictures",
    }
    parts = []
    for key, title in titles.items():
        of_objectives = [name for name in metrics if name.startswith(f"{PREFIX}{key}/")] if "auc" in key else []
        for name in [PREFIX + key, *of_objectives]:
            if name in metrics:
                objective = name.removeprefix(PREFIX + key).replace("/", " of ", 1)
                interval = ci95.get(name) if key in ("auc", "pair_accuracy", "label_accuracy") else None
                parts.append(f"{title}{objective} {shown(metrics[name], 'auc' not in key, interval)}")
    return ", ".join(parts)


def _against_length(
    stage: Stage,
    figures: Figures,
    found: FeedbackScores,
    objectives: Mapping[str, Sequence[int]],
    right: NDArray[np.float64],
    groups: Sequence[Hashable],
) -> None:
    """The accuracy of preferring the longer response, or the shorter one where the training preferences say so, and the
    reward model's gain over it."""
    longer = (found.lengths[:, 0] - found.lengths[:, 1]).double().numpy()
    for objective, liking in _length_likings(stage).items():
        longer[objectives.get(objective, [])] *= liking
    alone = wins(np.zeros_like(longer), longer)
    figures.mean(f"{PREFIX}length_accuracy", alone, groups)
    figures.gain(f"{PREFIX}gain_over_length", alone, right, groups)


def _against_majority(
    figures: Figures,
    labels: NDArray[np.bool_],
    objectives: Mapping[str, Sequence[int]],
    right: NDArray[np.float64],
    groups: Sequence[Hashable],
    several: bool,
) -> None:
    """How many labels are good, how often giving an objective's more frequent one is right, and the gain over that."""
    figures[f"{PREFIX}base_rate"] = labels.mean().item()
    constant = np.empty(len(labels))
    for objective, places in objectives.items():
        own = labels[places]
        constant[places] = own == (own.mean() >= 0.5)
        if several:
            figures[f"{PREFIX}base_rate/{objective}"] = own.mean().item()
            figures[f"{PREFIX}majority_rate/{objective}"] = constant[places].mean().item()
    figures[f"{PREFIX}majority_rate"] = constant.mean().item()
    figures.gain(f"{PREFIX}gain_over_majority", constant, right, groups)


def _areas(
    stage: Stage,
    figures: Figures,
    found: FeedbackScores,
    labels: NDArray[np.bool_],
    objectives: Mapping[str, Sequence[int]],
    groups: Sequence[Hashable],
    several: bool,
) -> None:
    """AUC of the logits, and of lengths in the direction that the training labels show; for each objective alone, since
    the logits of two are on scales of their own."""
    likings = _length_likings(stage)
    for objective, places in objectives.items():
        own, together = labels[places], [groups[place] for place in places]
        name = f"/{objective}" if several else ""
        if own.all() or not own.any():
            which = f" of {objective}" if several else ""
            stage.warn(f"all {len(places)} held-out labels{which} are alike: there is no AUC")
            continue
        figures.auc(f"{PREFIX}auc{name}", found.logits[places].double().numpy(), own, together)
        lengths = likings.get(objective, 1.0) * found.lengths[places, 0].double().numpy()
        figures.auc(f"{PREFIX}length_auc{name}", lengths, own, together)


def _length_likings(stage: Stage) -> dict[str, float]:
    """For each objective 1.0 where better responses are rather the longer ones, else -1.0, by training preferences: at
    most ``rm.eval_pairs`` of them, from all over the set."""
    records: list[Feedback] = stage.some(stage.preferences("train"), stage.config.rm.eval_pairs)

    def tokens(text: str, record: Feedback) -> int:
        return len(stage.renderer.response_ids(text, record.origin))

    likings = {}
    for objective in stage.task.reward_head().objectives:
        own = [records[place] for place in _places(records, objective)]
        pairs = [one for one in own if isinstance(one, Comparison)]
        rated = [one for one in own if isinstance(one, Rating)]
        leaning = sum(np.sign(tokens(one.chosen, one) - tokens(one.rejected, one)) for one in pairs)
        labels = [one.label for one in rated]
        if len(set(labels)) == 2:
            leaning = auc([tokens(one.response, one) for one in rated], labels) - 0.5
        likings[objective] = -1.0 if leaning < 0 else 1.0
    return likings


def _places(records: Sequence[Feedback], objective: str) -> list[int]:
    return [place for place, record in enumerate(records) if record.objective == objective]


def _log_samples(stage: Stage, records: Sequence[Feedback], found: FeedbackScores, step: int) -> None:
    """The first held-out records with their scores, into samples.jsonl."""
    lines = []
    for record, scores, right in zip(records[:SAMPLES], found.scores.tolist(), found.correct.tolist(), strict=False):
        line: dict[str, object] = {"id": record.id, "prompt": record.messages[-1].text, "right": right}
        if isinstance(record, Comparison):
            line |= {"chosen": record.chosen, "chosen_score": scores[0]}
            line |= {"rejected": record.rejected, "rejected_score": scores[1]}
        else:
            line |= {"response": record.response, "score": scores[0], "label": record.label}
        if record.objective:
            line["objective"] = record.objective
        lines.append(line)
    log = SampleLog(stage.run.samples, stage=stage.name)
    log.log(step, lines)
    log.close()


def without_sight(records: Sequence[Feedback], how: str) -> list[Feedback]:
    """The same records with each picture made gray (``blank``), its tiles laid out anew (``shuffled``), or taken from
    another record (``swapped``). A record that no other one could lend a different picture is left out of the last."""
    if how != "swapped":
        blinded = BlankImage if how == "blank" else ShuffledImage
        return [replace(record, images=tuple(blinded(source) for source in record.images)) for record in records]
    changed: list[Feedback] = []
    keys = [tuple(map(content_key, record.images)) for record in records]
    for place, record in enumerate(records):
        # Neighbouring records often share a picture, so the search begins half the set away.
        others = ((place + len(records) // 2 + offset) % len(records) for offset in range(len(records)))
        fitting = (other for other in others if len(keys[other]) == len(keys[place]))
        donor = next((other for other in fitting if keys[other] != keys[place]), None)
        if donor is not None:
            changed.append(replace(record, images=records[donor].images))
    return changed


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = (a.square().sum() * b.square().sum()).sqrt().item()
    return (a * b).sum().item() / scale if scale > 0 else 0.0
