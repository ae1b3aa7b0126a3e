"""Reward models on held-out preferences: how often they are right, how sure they may be, and what they look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from perl_vlm.config.checks import require
from perl_vlm.errors import PerlVlmError
from perl_vlm.train.reward_report import BLINDINGS, without_sight
from perl_vlm.train.scoring import Feedback, FeedbackScores, score_feedback
from perl_vlm.types import Comparison, Rating
from perl_vlm_eval import statistics
from perl_vlm_eval.area import area
from perl_vlm_eval.evaluations.base import Evaluation
from perl_vlm_eval.identity import Record, basis, group_names, item_keys, thumbnail
from perl_vlm_eval.logs import asked
from perl_vlm_eval.metrics.calibration import bins_of, calibration_error, noise_floor
from perl_vlm_eval.opened import OpenRun
from perl_vlm_eval.results import Chart, Figure, Findings, Items, Sample

Array = NDArray[np.float64]
Blinded = tuple[Sequence[int], FeedbackScores]
"""The places of the records whose pictures could be taken away in one way, and how they were scored then."""

MAX_SLICES = 24
"""Values of one metadata key that are slices; with more of them it is rather an id."""
SAMPLES_BY_SIDE = 6


@dataclass(frozen=True)
class RewardModelSettings:
    """Settings of ``reward_model``."""

    split: Literal["train", "validation", "test"] = "test"
    """Of the preferences."""
    limit: int = 2048
    """At most this many, from all over the set."""
    blind: bool = True
    """Whether those with pictures are scored again with pictures made blank, shuffled and swapped."""
    slices: tuple[str, ...] = ("kind", "source", "subset", "category")
    """Metadata keys by whose values accuracy is told."""
    bins: int = 10
    """Of the reliability diagram, with equally many items each."""

    def __post_init__(self) -> None:
        require(self.limit >= 2, f"limit is {self.limit}; it must be at least 2")
        require(self.bins >= 2, f"bins is {self.bins}; it must be at least 2")


class RewardModels(Evaluation):
    """``reward_model``: an rm run on its task's own preferences."""

    kind = "reward_model"
    Settings = RewardModelSettings
    needs = ("rm",)
    settings: RewardModelSettings

    def records(self, opened: OpenRun) -> Sequence[Record]:
        """The preferences of the split."""
        return basis(opened.task, opened.task.preferences(self.settings.split), self.settings.limit)

    def measure(self, opened: OpenRun) -> Findings:
        """Raises PerlVlmError where the split has no preferences."""
        stage, names = opened.stage, opened.reward_names
        records: list[Feedback] = stage.some(stage.preferences(self.settings.split), self.settings.limit)
        if not records:
            raise PerlVlmError(f"task {opened.task.name} has no {self.settings.split} preferences to measure it on")
        found = score_feedback(stage, names, records)
        blinded: dict[str, Blinded] = {}
        seeing = [record for record in records if record.images] if self.settings.blind else []
        places = {record.id: place for place, record in enumerate(records)}
        for how in BLINDINGS if seeing else ():
            changed = without_sight(seeing, how)
            if changed:
                blinded[how] = [places[record.id] for record in changed], score_feedback(stage, names, changed)
        return findings(records, found, blinded, self.settings, pairs=opened.task.reward_head().kind == "pairs")


def findings(
    records: Sequence[Feedback],
    found: FeedbackScores,
    blinded: Mapping[str, Blinded],
    settings: RewardModelSettings,
    *,
    pairs: bool,
) -> Findings:
    """All figures of scored records.

    Args:
        blinded: by what was done to the pictures.
        pairs: whether records are comparisons.
    """
    groups, right = group_names(records), found.correct.double().numpy()
    odds = found.raw.double().numpy()
    name = "pair_accuracy" if pairs else "label_accuracy"
    figures = {name: Figure(statistics.share(right, groups), "share", "higher")}
    labels = np.array([isinstance(record, Rating) and record.label for record in records])
    ranked: dict[str, list[float]] = {}
    if not pairs:
        areas, ranked = _against_majority(records, found.logits.double().numpy(), labels, groups)
        figures |= areas
    confident, outcome = _confidence(odds, labels, pairs)
    figures |= _calibration(confident, outcome, groups, settings.bins)
    figures |= _lengths(found, groups, pairs)
    figures |= _grounding(right, blinded, groups)
    alone = len({record.objective for record in records}) == 1
    for how, (places, without) in blinded.items():
        together = [groups[place] for place in places]
        figures |= _blindly(how, without, labels[list(places)], together, settings.bins, alone)
    figures |= _ensemble(odds, right, groups)
    figures |= _slices(name, records, right, groups, settings.slices)
    sides = ("right", "wrong")
    own = odds.mean(axis=1)
    margins = own if pairs else np.where(labels, own, -own)
    charts = [
        _reliability(confident, outcome, settings.bins),
        Chart(
            "Margins" if pairs else "Log-odds of the true label",
            {side: margins[places].tolist() for side, places in zip(sides, (right > 0.5, right <= 0.5), strict=True)},
            note="Above zero the reward model is right; in nats.",
        ),
    ]
    if blinded:
        series = {"as it is": margins.tolist()}
        for how, (places, without) in blinded.items():
            blind = without.raw.double().numpy().mean(axis=1)
            series[how] = (blind if pairs else np.where(labels[list(places)], blind, -blind)).tolist()
        charts.append(Chart("Margins by what was done to the pictures", series, note="Of the same records; in nats."))
    return Findings(
        figures=figures,
        headlines=[one for one in (name, "auc", "ece", "gain_from_pictures_blank") if one in figures],
        items=Items(
            [one.id for one in records], item_keys(records), groups, {name: right.tolist(), **ranked},
            labels=dict.fromkeys(ranked, labels.astype(float).tolist()),
        ),
        charts=charts,
        samples=_samples(records, found, margins),
        said=[_said(record, own) for record, own in zip(records, found.scores.tolist(), strict=True)],
    )  # fmt: skip


def _against_majority(
    records: Sequence[Feedback], logits: Array, labels: NDArray[np.bool_], groups: Sequence[str]
) -> tuple[dict[str, Figure], dict[str, list[float]]]:
    """AUC, and the accuracy of the more frequent label, for each objective alone: the logits of two are on scales of
    their own. Also what the records are ranked by, NaN for those of other objectives."""
    figures, ranked = dict[str, Figure](), dict[str, list[float]]()
    objectives = list(dict.fromkeys(record.objective for record in records))
    for objective in objectives:
        here = np.array([record.objective == objective for record in records])
        places = np.flatnonzero(here).tolist()
        own, together = labels[places], [groups[place] for place in places]
        name = f"/objective={objective}" if len(objectives) > 1 else ""
        if 0 < own.sum() < len(own):
            figures[f"auc{name}"] = Figure(area(logits[places], own, together), "number", "higher")
            ranked[f"auc{name}"] = np.where(here, logits, np.nan).tolist()
        constant = (own == (own.mean() >= 0.5)).astype(float)
        figures[f"majority_accuracy{name}"] = Figure(statistics.share(constant, together), "share")
    return figures, ranked


def _confidence(odds: Array, labels: NDArray[np.bool_], pairs: bool) -> tuple[Array, Array]:
    """[n] how probable the model holds what it says, members averaged, and whether it is so. A pair is told as the
    better-scored response being better, since which of two is written first is nobody's prediction."""
    chance = (1 / (1 + np.exp(-np.clip(odds, -60, 60)))).mean(axis=1)
    if not pairs:
        return chance, labels.astype(float)
    return np.maximum(chance, 1 - chance), np.where(chance == 0.5, 0.5, (chance > 0.5).astype(float))


def _calibration(confident: Array, outcome: Array, groups: Sequence[str], bins: int) -> dict[str, Figure]:
    def measure(places: NDArray[np.int64]) -> float:
        return calibration_error(confident[places], outcome[places], bins)

    floor = noise_floor(confident, bins)
    note = f"a perfectly calibrated model of these confidences shows up to {100 * floor:.1f} % on as many items"
    found = statistics.jackknife(measure, len(outcome), groups, within=(0.0, 1.0))
    if found.low is not None and found.value <= floor:  # what perfect calibration shows too
        found = replace(found, low=0.0)
    return {"ece": Figure(found, "share", "lower", note)}


def _lengths(found: FeedbackScores, groups: Sequence[str], pairs: bool) -> dict[str, Figure]:
    scores, lengths = found.scores.double().numpy(), found.lengths.double().numpy()

    def overall(places: NDArray[np.int64]) -> float:
        return _correlation(scores[places].ravel(), lengths[places].ravel())

    figures = {"score_length_correlation": Figure(statistics.statistic(overall, len(scores), groups))}
    if pairs:
        margin, longer = scores[:, 0] - scores[:, 1], lengths[:, 0] - lengths[:, 1]

        # A pair's order is the label's, which may like length itself: as the scores go, either way round.
        def within(places: NDArray[np.int64]) -> float:
            both = np.r_[margin[places], -margin[places]], np.r_[longer[places], -longer[places]]
            return _correlation(*both)

        figures["margin_length_correlation"] = Figure(
            statistics.statistic(within, len(margin), groups), note="of score and length within a prompt"
        )
    return figures


def _grounding(right: Array, blinded: Mapping[str, Blinded], groups: Sequence[str]) -> dict[str, Figure]:
    """Accuracy without sight, what sight adds on the same records, and of those that sight could be taken from in every
    way the share that is right without it all the same."""
    figures: dict[str, Figure] = {}
    blindly, times = np.ones(len(right)), np.zeros(len(right))
    for how, (places, found) in blinded.items():
        without = found.correct.double().numpy()
        own, together = right[list(places)], [groups[place] for place in places]
        figures[f"accuracy_{how}_pictures"] = Figure(statistics.share(without, together), "share")
        gain = statistics.difference(without, own, together)
        figures[f"gain_from_pictures_{how}"] = Figure(gain, "share", "higher", f"p = {gain.p:.3g} ({gain.test})")
        blindly[list(places)] *= without == 1
        times[list(places)] += 1
    every = np.flatnonzero(times == len(blinded)) if blinded else np.zeros(0, dtype=np.int64)
    if every.size:
        found_blind = statistics.share(blindly[every], [groups[int(place)] for place in every])
        note = f"right with pictures {', '.join(blinded)} alike"
        figures["solvable_blind"] = Figure(found_blind, "share", None, note)
    return figures


def _blindly(
    how: str, found: FeedbackScores, labels: NDArray[np.bool_], groups: Sequence[str], bins: int, alone: bool
) -> dict[str, Figure]:
    """Calibration without sight, and of labels the AUC where there is one objective ``alone``."""
    pairs = found.scores.shape[1] == 2
    figures = _calibration(*_confidence(found.raw.double().numpy(), labels, pairs), groups, bins)
    if alone and not pairs and 0 < labels.sum() < len(labels):
        figures["auc"] = Figure(area(found.logits.double().numpy(), labels, groups))
    return {f"{name}_{how}_pictures": figure for name, figure in figures.items()}


def _ensemble(odds: Array, right: Array, groups: Sequence[str]) -> dict[str, Figure]:
    """How far members disagree, and whether they do so rather where the ensemble errs."""
    if odds.shape[1] < 2:
        return {}
    apart = (1 / (1 + np.exp(-np.clip(odds, -60, 60)))).std(axis=1, ddof=1)
    figures = {"disagreement": Figure(statistics.mean(apart, groups), note="standard deviation of the probability")}
    wrong = right < 0.5
    if 0 < wrong.sum() < len(wrong):
        figures["error_foreseen"] = Figure(
            area(apart, wrong, groups), better="higher", note="AUC of disagreement for an error; 0.5 foresees nothing"
        )
    return figures


def _slices(
    name: str, records: Sequence[Feedback], right: Array, groups: Sequence[str], keys: Sequence[str]
) -> dict[str, Figure]:
    figures = {}
    for key in (*keys, "objective"):
        values: dict[str, list[int]] = {}
        for place, record in enumerate(records):
            value = record.objective if key == "objective" else record.metadata.get(key)
            if value not in (None, ""):
                values.setdefault(str(value), []).append(place)
        if not 1 < len(values) <= MAX_SLICES:
            continue
        for value, places in sorted(values.items()):
            own = statistics.share(right[places], [groups[place] for place in places])
            figures[f"{name}/{key}={value}"] = Figure(own, "share", "higher")
    return figures


def _reliability(confident: Array, outcome: Array, bins: int) -> Chart:
    points = [(float(said), float(came)) for said, came, _ in bins_of(confident, outcome, bins)]
    low = min(0.5, *(said for said, _ in points))
    return Chart(
        "Reliability",
        {"this model": points, "perfect": [(low, low), (1.0, 1.0)]},
        x="probability that it gave",
        note="How often what it held that probable was so.",
    )


def _correlation(a: Array, b: Array) -> float:
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _said(record: Feedback, scores: Sequence[float]) -> dict[str, Any]:
    """A preference and its scores, as a line of the log."""
    if isinstance(record, Comparison):
        return {
            **asked(record), "chosen": {"response": record.chosen, "score": scores[0]},
            "rejected": {"response": record.rejected, "score": scores[1]},
        }  # fmt: skip
    return {**asked(record), "response": {"response": record.response, "score": scores[0]}, "label": record.label}


def _samples(records: Sequence[Feedback], found: FeedbackScores, margins: Array) -> list[Sample]:
    """The surest mistakes, then the closest calls."""
    order = np.argsort(margins, kind="stable")
    mistakes = [int(place) for place in order if margins[place] < 0][:SAMPLES_BY_SIDE]
    close = [int(place) for place in np.argsort(np.abs(margins), kind="stable") if place not in mistakes]
    return [_sample(records[place], found.scores[place].tolist()) for place in mistakes + close[:SAMPLES_BY_SIDE]]


def _sample(record: Feedback, scores: Sequence[float]) -> Sample:
    shared: dict[str, Any] = {"prompt": record.messages[-1].text, "reference": None, "image": thumbnail(record)}
    if isinstance(record, Comparison):
        return Sample(
            before=record.rejected, after=record.chosen, labels=("rejected", "chosen"), before_score=scores[1],
            after_score=scores[0], **shared,
        )  # fmt: skip
    label = "labelled good" if record.label else "labelled bad"
    return Sample(before="", after=record.response, labels=("", label), after_score=scores[0], **shared)
