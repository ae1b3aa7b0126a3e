"""Figures of a policy's and its anchor's answers, as they come together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from perl_vlm.errors import PerlVlmError
from perl_vlm.models.roles import REFERENCE
from perl_vlm.stats import wins
from perl_vlm.train.compare import Answer, keys_of, shares_of
from perl_vlm.train.sampling import HELD_OUT, noise, sample
from perl_vlm.train.signals import Stopped
from perl_vlm.train.stage import Stage, spaced
from perl_vlm.types import Example
from perl_vlm_eval import statistics
from perl_vlm_eval.best_of_n import best_of_n, divergence_of_best
from perl_vlm_eval.evaluations.answers import Scorer, distinct, drawn, powers, said_of, scores_of
from perl_vlm_eval.identity import data_hash, group_names, item_keys, thumbnail
from perl_vlm_eval.judges import EndpointJudge
from perl_vlm_eval.metrics.texts import repeated
from perl_vlm_eval.results import Better, Chart, Figure, Findings, Items, Sample, Unit

Array = NDArray[np.float64]

SAMPLES_BY_CHANGE = {"gained": 6, "lost": 4, "same": 2}
Keep = Callable[[str, Stage, "Sequence[str]", "Callable[[], Any]"], Any]
"""``OpenRun.kept``."""
OWN_REWARD = "reward"
"""What the reward is called that the policy was trained to please."""


class Measured:
    """Figures of answers as they come together."""

    def __init__(self, stage: Stage, examples: Sequence[Example], answers: dict[str, list[Answer]], keep: Keep) -> None:
        self.examples, self.answers, self._keep = examples, answers, keep
        self.stage, self.primary = stage, stage.task.primary_metric
        self.groups = group_names(examples)
        self.figures: dict[str, Figure] = {}
        self.values: dict[str, list[float]] = {}
        self.rewarded: list[list[float]] = []
        """What the reward that was trained on gave each side's answers."""
        self.charts: list[Chart] = []
        self.scales: dict[str, str] = {}
        self.warnings: list[str] = []
        self.missing: list[str] = []
        self._judged_by: list[str] = []
        """The figures that hold what judges say."""
        self.last = "policy" if "policy" in answers else "anchor"
        """Whose figures have no prefix: those of the run that is measured."""
        shares = shares_of([one for own in answers.values() for one in own])
        for key in keys_of([one for own in answers.values() for one in own]):
            better: Better | None = "higher" if key == self.primary else None
            self._both(
                key, [self._column(key, label) for label in answers], "share" if key in shares else "number", better
            )
        self._kinds("share" if self.primary in shares else "number")
        self._totals()
        self._writing()

    @contextmanager
    def told(self, what: str) -> Iterator[None]:
        """Let what fails in here be missing, with its cause, and cost nothing else."""
        try:
            yield
        except Stopped:
            raise
        except PerlVlmError as error:
            self.missing.append(f"{what}: {error}")
        except Exception as error:  # a task's, a judge's or a library's own
            self.missing.append(f"{what}: {type(error).__name__}: {error}")

    def scored_by(self, name: str, scorer: Scorer, scale: str) -> None:
        """Scores by a reward, and the win rate by them."""
        columns = scores_of(scorer, self.examples, list(self.answers.values()))
        self._both(name, columns, "number", "higher")
        if name == OWN_REWARD:
            self.rewarded = columns
        else:
            self._judged_by += [f"gain/{name}", f"win_rate/{name}"]
        self.scales[name] = scale
        if len(columns) == 2:
            self._win_rate(name, wins(*columns))
            self.scales[f"win_rate/{name}"] = scale

    def compared_by(self, judge: EndpointJudge) -> None:
        """Wins by someone who compares."""
        if len(self.answers) == 2:
            before, after = ([one.response for one in own] for own in self.answers.values())
            name = judge.name if f"win_rate/{judge.name}" not in self.figures else judge.endpoint.url
            won = np.asarray(judge.compare(self.examples, before, after))
            self._win_rate(name, won)
            self.scales[f"win_rate/{name}"] = judge.identity
            ahead = statistics.difference(1 - won, won, self.groups)
            note = f"share of wins less that of losses; p = {ahead.p:.3g} ({ahead.test})"
            self.figures[f"gain/wins/{name}"] = Figure(ahead, "share", "higher", note)
            self._judged_by += [f"gain/wins/{name}", f"win_rate/{name}"]
            self.warnings += judge.warnings

    def moved(self, examples: Sequence[Example]) -> None:
        """Divergence from the anchor and entropy, exact over the vocabulary at every token of sampled answers."""
        found = self._keep("kl", self.stage, [data_hash(examples)], lambda: _moved(self.stage, examples))
        table, groups = np.asarray(found["rows"], dtype=np.float64), group_names(examples)
        note = "of a sampled answer, exact over the vocabulary"
        self.figures["kl"] = Figure(statistics.mean(table[:, 0], groups), "nats", None, note)
        self.figures["entropy"] = Figure(statistics.mean(table[:, 1], groups), "nats", None, "a token, when sampling")
        self.figures["ended"] = Figure(
            statistics.share(found["ended"], groups), "share", None, "sampled answers that ended by themselves"
        )
        known = {example.id: float(away) for example, away in zip(examples, table[:, 0], strict=True)}
        self.values["kl"] = [known.get(example.id, float("nan")) for example in self.examples]

    def best_of(self, most: int, prompts: int, examples: Sequence[Example], scorers: Mapping[str, Scorer]) -> None:
        """Gold metric of the best of n samples, as the run's own reward or the first judge that scores chooses."""
        if not scorers or not examples:
            raise PerlVlmError("it needs a reward that scores single answers, and examples that are decoded")
        name, scorer = next(iter(scorers.items()))
        asked = spaced(examples, prompts)
        groups, depends = group_names(asked), [data_hash(asked), str(most), name, self.scales[name]]
        series: dict[str, list[tuple[float, float]]] = {}
        kept = {}
        for label in self.answers:
            role = REFERENCE if label == "anchor" else label
            draw = partial(drawn, self.stage, role, asked, most, scorer, self.primary)
            kept[label] = self._keep("best-of", self.stage, [label, *depends], draw)
        for label, draws in kept.items():
            chosen_by, worth = (np.asarray(side, dtype=np.float64).T for side in draws)
            prefix = "" if label == self.last else f"{label}/"
            for n in powers(most):
                measure = statistics.share if self._unit() == "share" else statistics.mean
                # A weighted mean of ones may lie above 1 in its last digit, which is no share.
                found = measure(np.clip(best_of_n(chosen_by, worth, n), worth.min(), worth.max()), groups)
                series.setdefault(f"{label}: {self.primary}", []).append((float(n), found.value))
                note = f"the best of {n} samples by {name}; KL of best-of-n at most {divergence_of_best(n):.2f} nats"
                self.figures[f"{prefix}best_of_{n}"] = Figure(found, self._unit(), "higher", note)
        self.charts.append(
            Chart(f"Best of n by {name}", series, "n", "Unbiased, from all samples; temperature as in training.")
        )

    def findings(self) -> Findings:
        """All of it."""
        heads = [f"gain/{self.primary}", self.primary, f"win_rate/{self.primary}", "kl", OWN_REWARD, *self._judged_by]
        return Findings(
            figures=self.figures,
            headlines=[name for name in heads if name in self.figures],
            items=Items(
                [example.id for example in self.examples],
                item_keys(self.examples),
                self.groups,
                self.values,
                self.scales,
            ),
            charts=self.charts,
            samples=self._samples(),
            warnings=self.warnings,
            missing=self.missing,
            said=said_of(self.examples, self.answers),
        )

    def _column(self, key: str, label: str) -> list[float]:
        return [one.judged.get(key, float("nan")) for one in self.answers[label]]

    def _unit(self) -> Unit:
        return self.figures[self.primary].unit

    def _both(self, name: str, columns: Sequence[Sequence[float]], unit: Unit, better: Better | None) -> None:
        """A figure of each side and their difference, over the items that have it on both."""
        table = np.asarray(columns, dtype=np.float64)
        known = np.flatnonzero(np.isfinite(table).all(axis=0))
        if not known.size:
            return
        groups = [self.groups[place] for place in known]
        measure = statistics.share if unit == "share" else statistics.mean
        for label, column in zip(self.answers, table, strict=True):
            prefix = "" if label == self.last else f"{label}/"
            self.figures[prefix + name] = Figure(measure(column[known], groups), unit, better)
        self.values[name] = table[-1].tolist()
        if len(table) == 2:
            gain = statistics.difference(table[0][known], table[1][known], groups)
            self.figures[f"gain/{name}"] = Figure(gain, unit, better, f"p = {gain.p:.3g} ({gain.test})")

    def _win_rate(self, name: str, won: Array) -> None:
        known = np.flatnonzero(np.isfinite(won))
        if known.size:
            own = statistics.share(won[known], [self.groups[place] for place in known])
            self.figures[f"win_rate/{name}"] = Figure(own, "share", "higher", "against the anchor; ties are halves")
            self.values[f"win_rate/{name}"] = won.tolist()

    def _kinds(self, unit: Unit) -> None:
        """The primary metric by kind, its gain where there is one."""
        if len(self.answers) == 2:
            before, after = (np.asarray(self._column(self.primary, label)) for label in ("anchor", "policy"))
            self._win_rate(self.primary, (np.sign(after - before) + 1) / 2)
        kinds: dict[str, list[int]] = {}
        for place, example in enumerate(self.examples):
            if "kind" in example.metadata:
                kinds.setdefault(str(example.metadata["kind"]), []).append(place)
        measure = statistics.share if unit == "share" else statistics.mean
        table = np.asarray([self._column(self.primary, label) for label in self.answers])
        known = np.isfinite(table).all(axis=0)
        for kind, every in sorted(kinds.items()):
            places = [place for place in every if known[place]]
            if not places:
                continue
            groups = [self.groups[place] for place in places]
            columns = list(table[:, places])
            self.figures[f"{self.primary}/{kind}"] = Figure(measure(columns[-1], groups), unit, "higher")
            if len(columns) == 2:
                gain = statistics.difference(columns[0], columns[1], groups)
                self.figures[f"gain/{self.primary}/{kind}"] = Figure(gain, unit, "higher")

    def _totals(self) -> None:
        """The task's figures of a whole set that are no means of single ones, such as an F1."""
        sides = {
            label: [(example, one.judged) for example, one in zip(self.examples, own, strict=True)]
            for label, own in self.answers.items()
        }
        found = {label: self.stage.task.totals(pairs) for label, pairs in sides.items()}

        def measure(name: str, label: str, places: NDArray[np.int64]) -> float:
            return self.stage.task.totals([sides[label][place] for place in places]).get(name, float("nan"))

        def gain(name: str, places: NDArray[np.int64]) -> float:
            return measure(name, "policy", places) - measure(name, "anchor", places)

        for name in dict.fromkeys(name for own in found.values() for name in own):
            having = [label for label in sides if name in found[label]]
            figures = {
                ("" if label == self.last else f"{label}/") + name: partial(measure, name, label) for label in having
            }
            if having == ["anchor", "policy"]:
                figures[f"gain/{name}"] = partial(gain, name)
            for figure, how in figures.items():
                self.figures[figure] = Figure(statistics.jackknife(how, len(self.examples), self.groups))

    def _writing(self) -> None:
        """Length, diversity and repetition of what was decoded greedily."""
        ends = set(self.stage.roles.backbone.eos_ids)
        lengths: dict[str, list[float]] = {}
        columns: dict[str, list[list[float]]] = {}
        for label, own in self.answers.items():
            decoded = [place for place, one in enumerate(own) if not one.logprobs]
            if not decoded:
                continue
            texts = [own[place].response for place in decoded]
            lengths[label] = [float(len(own[place].tokens)) for place in decoded]
            parts = {
                "response_tokens": lengths[label],
                "ended_greedily": [
                    float(bool(own[place].tokens) and own[place].tokens[-1] in ends) for place in decoded
                ],
                "empty": [float(not text.strip()) for text in texts],
                "repeated": [float(one) for one in repeated(texts)],
            }
            for name, values in parts.items():
                column = np.full(len(own), np.nan)
                column[decoded] = values
                columns.setdefault(name, []).append(column.tolist())
            prefix, groups = "" if label == self.last else f"{label}/", [self.groups[place] for place in decoded]
            for n in (1, 2):
                found = statistics.jackknife(distinct(texts, n), len(texts), groups, within=(0.0, 1.0))
                self.figures[f"{prefix}distinct_{n}"] = Figure(found, note="over all answers together")
        for name, each in columns.items():
            # A task may have a figure of this name itself, such as the tokens of summaries.
            if name not in self.values and len(each) == len(self.answers):
                self._both(name, each, "tokens" if name == "response_tokens" else "share", None)
        if lengths:
            self.charts.append(Chart("Length of the answers", lengths, note="In tokens, the end included."))

    def _samples(self) -> list[Sample]:
        before = self._column(self.primary, "anchor")
        after = self._column(self.primary, self.last)
        found: dict[str, list[int]] = {name: [] for name in SAMPLES_BY_CHANGE}
        for place, (one, other) in enumerate(zip(before, after, strict=True)):
            found["gained" if other > one else "lost" if other < one else "same"].append(place)
        places = [place for name, most in SAMPLES_BY_CHANGE.items() for place in found[name][:most]]
        return [self._sample(place, before[place], after[place]) for place in places]

    def _sample(self, place: int, before: float, after: float) -> Sample:
        example = self.examples[place]
        return Sample(
            prompt=example.messages[-1].text,
            reference=example.reference,
            before=self.answers["anchor"][place].response,
            after=self.answers[self.last][place].response,
            labels=("anchor", self.last),
            before_right=_right(before),
            after_right=_right(after),
            before_score=self.rewarded[0][place] if self.rewarded else None,
            after_score=self.rewarded[-1][place] if self.rewarded else None,
            image=thumbnail(example),
        )


@torch.no_grad()
def _moved(stage: Stage, examples: Sequence[Example]) -> dict[str, list[Any]]:
    """``rows``: of a sampled answer to each example its divergence and mean entropy a token, in nats; ``ended``."""
    config, rows, ended = stage.config.ppo, list[torch.Tensor](), list[float]()
    for block in stage.blocks(len(examples), stage.config.eval.batch_size):
        rollout = sample(stage, "policy", [examples[place] for place in block], noise(stage, HELD_OUT, block))
        mask = rollout.sequences.response_mask
        out = stage.roles.logprobs(
            "policy", rollout.sequences, temperature=config.temperature, min_new_tokens=config.min_new_tokens,
            divergence="reverse_kl",
        )  # fmt: skip
        assert out.divergence is not None  # asked for
        parts = ((out.divergence * mask).sum(1), (out.entropy * mask).sum(1) / mask.sum(1))
        rows.append(torch.stack([part.float() for part in parts], dim=1))
        ended += rollout.ended.float().tolist()
    return {"rows": stage.gathered(torch.cat(rows), len(examples)).double().tolist(), "ended": ended}


def _right(judged: float) -> bool | None:
    """One that is right in part is neither right nor wrong."""
    return True if judged >= 1.0 else False if judged <= 0.0 else None
