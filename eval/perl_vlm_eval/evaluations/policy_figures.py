"""Figures of a policy's and its anchor's answers, as they come together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from perl_vlm_eval.identity import group_names, item_keys, thumbnail
from perl_vlm_eval.judges import EndpointJudge
from perl_vlm_eval.logs import asked
from perl_vlm_eval.metrics.texts import ngrams, repeated
from perl_vlm_eval.results import Better, Chart, Figure, Findings, Items, Sample, Unit

Array = NDArray[np.float64]

SAMPLES_BY_CHANGE = {"gained": 6, "lost": 4, "same": 2}
OWN_REWARD = "reward"
"""What the reward is called that the policy was trained to please."""

Scorer = Callable[[Sequence[Example], Sequence[Answer]], "list[float]"]
"""Scores single answers."""


class Measured:
    """Figures of answers as they come together."""

    def __init__(self, stage: Stage, examples: Sequence[Example], answers: dict[str, list[Answer]]) -> None:
        self.examples, self.answers = examples, answers
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
        self.last = "policy" if "policy" in answers else "anchor"
        """Whose figures have no prefix: those of the run that is measured."""
        shares = shares_of([one for own in answers.values() for one in own])
        for key in keys_of([one for own in answers.values() for one in own]):
            better: Better | None = "higher" if key == self.primary else None
            self._both(
                key, [self._column(key, label) for label in answers], "share" if key in shares else "number", better
            )
        self._kinds("share" if self.primary in shares else "number")
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

    def scored_by(self, name: str, scorer: Scorer, scale: str) -> None:
        """Scores by a reward, and the win rate by them."""
        columns = _scores(scorer, self.examples, list(self.answers.values()))
        self._both(name, columns, "number", "higher")
        if name == OWN_REWARD:
            self.rewarded = columns
        self.scales[name] = scale
        if len(columns) == 2:
            self._win_rate(name, wins(*columns))
            self.scales[f"win_rate/{name}"] = scale

    def compared_by(self, judge: EndpointJudge) -> None:
        """Wins by someone who compares."""
        if len(self.answers) == 2:
            before, after = ([one.response for one in own] for own in self.answers.values())
            name = judge.name if f"win_rate/{judge.name}" not in self.figures else judge.endpoint.url
            self._win_rate(name, np.asarray(judge.compare(self.examples, before, after)))
            self.warnings += judge.warnings

    @torch.no_grad()
    def moved(self, examples: Sequence[Example]) -> None:
        """Divergence from the anchor and entropy, exact over the vocabulary at every token of sampled answers."""
        stage, config, rows = self.stage, self.stage.config.ppo, list[torch.Tensor]()
        ended: list[float] = []
        for block in stage.blocks(len(examples), stage.config.eval.batch_size):
            rollout = sample(stage, "policy", [examples[place] for place in block], noise(stage, HELD_OUT, block))
            mask = rollout.sequences.response_mask
            out = stage.roles.logprobs(
                "policy", rollout.sequences, temperature=config.temperature, min_new_tokens=config.min_new_tokens,
                divergence="reverse_kl",
            )  # fmt: skip
            assert out.divergence is not None  # asked for
            parts = ((out.divergence * mask).sum(1), (out.entropy * mask).sum(1) / mask.sum(1), mask.sum(1))
            rows.append(torch.stack([part.float() for part in parts], dim=1))
            ended += rollout.ended.float().tolist()
        table, groups = stage.gathered(torch.cat(rows), len(examples)).double().numpy(), group_names(examples)
        note = "of a sampled answer, exact over the vocabulary"
        self.figures["kl"] = Figure(statistics.mean(table[:, 0], groups), "nats", None, note)
        self.figures["entropy"] = Figure(statistics.mean(table[:, 1], groups), "nats", None, "a token, when sampling")
        self.figures["ended"] = Figure(
            statistics.share(ended, groups), "share", None, "sampled answers that ended by themselves"
        )

    def best_of(self, most: int, prompts: int, examples: Sequence[Example], scorers: Mapping[str, Scorer]) -> None:
        """Gold metric of the best of n samples, as the run's own reward or the first judge that scores chooses."""
        if not scorers or not examples:
            raise PerlVlmError("it needs a reward that scores single answers, and examples that are decoded")
        name, scorer = next(iter(scorers.items()))
        asked = spaced(examples, prompts)
        groups, sizes = group_names(asked), _powers(most)
        series: dict[str, list[tuple[float, float]]] = {}
        for label in self.answers:
            role = REFERENCE if label == "anchor" else "policy"
            chosen_by, worth = _drawn(self.stage, role, asked, most, scorer, self.primary)
            for n in sizes:
                found = statistics.mean(best_of_n(chosen_by, worth, n), groups)
                series.setdefault(f"{label}: {self.primary}", []).append((float(n), found.value))
                if n == sizes[-1]:
                    note = (
                        f"the best of {n} samples by {name}; KL of best-of-n at most {divergence_of_best(n):.2f} nats"
                    )
                    prefix = "" if label == self.last else f"{label}/"
                    self.figures[f"{prefix}best_of_{n}"] = Figure(found, self._unit(), "higher", note)
        self.charts.append(
            Chart(f"Best of n by {name}", series, "n", "Unbiased, from all samples; temperature as in training.")
        )

    def findings(self) -> Findings:
        """All of it."""
        heads = [f"gain/{self.primary}", self.primary, f"win_rate/{self.primary}", "kl", OWN_REWARD]
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

    def _writing(self) -> None:
        """Length, diversity and repetition of what was decoded greedily."""
        ends = set(self.stage.roles.backbone.eos_ids)
        lengths: dict[str, list[float]] = {}
        for label, own in self.answers.items():
            prefix = "" if label == self.last else f"{label}/"
            decoded = [place for place, one in enumerate(own) if not one.logprobs]
            if not decoded:
                continue
            groups = [self.groups[place] for place in decoded]
            texts = [own[place].response for place in decoded]
            lengths[label] = [float(len(own[place].tokens)) for place in decoded]
            whole = [float(bool(own[place].tokens) and own[place].tokens[-1] in ends) for place in decoded]
            figures = {
                "response_tokens": Figure(statistics.mean(lengths[label], groups), "tokens"),
                "ended_greedily": Figure(statistics.share(whole, groups), "share"),
                "empty": Figure(statistics.share([float(not text.strip()) for text in texts], groups), "share"),
                "repeated": Figure(
                    statistics.share([float(one) for one in repeated(texts)], groups), "share", None,
                    "answers that another prompt got too",
                ),
            }  # fmt: skip
            for n in (1, 2):
                found = statistics.jackknife(_distinct(texts, n), len(texts), groups, within=(0.0, 1.0))
                figures[f"distinct_{n}"] = Figure(found, note="over all answers together")
            self.figures |= {prefix + name: figure for name, figure in figures.items()}
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


def said_of(examples: Sequence[Example], answers: Mapping[str, Sequence[Answer]]) -> list[dict[str, Any]]:
    """[n] what was asked, and what each side answered and what the task makes of that."""
    return [
        {
            **asked(example), "reference": example.reference,
            **{label: {"response": own[place].response, **own[place].judged} for label, own in answers.items()},
        }
        for place, example in enumerate(examples)
    ]  # fmt: skip


def _distinct(texts: Sequence[str], n: int) -> Callable[[NDArray[np.int64]], float]:
    """Distinct n-grams of some of the texts, which are cut once."""
    known: dict[tuple[str, ...], int] = {}
    cut = [np.array([known.setdefault(gram, len(known)) for gram in ngrams(text, n)], dtype=np.int64) for text in texts]

    def measure(places: NDArray[np.int64]) -> float:
        grams = np.concatenate([cut[place] for place in places]) if len(places) else np.zeros(0)
        return len(np.unique(grams)) / len(grams) if len(grams) else float("nan")

    return measure


def _right(judged: float) -> bool | None:
    """One that is right in part is neither right nor wrong."""
    return True if judged >= 1.0 else False if judged <= 0.0 else None


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... and the most."""
    return sorted({*(2**k for k in range(most.bit_length()) if 2**k <= most), most})


@torch.no_grad()
def _drawn(
    stage: Stage, role: str, examples: Sequence[Example], count: int, scorer: Scorer, primary: str
) -> tuple[Array, Array]:
    """[P, N] scores and judgements by the task of N samples to each prompt."""
    draws: list[list[Answer]] = []
    for draw in range(count):
        own: list[Answer] = []
        for block in stage.blocks(len(examples), stage.config.eval.batch_size):
            part = [examples[place] for place in block]
            rollout = sample(stage, role, part, noise(stage, HELD_OUT, block, turn=draw + 1))
            width, mask = rollout.sequences.prompt_width, rollout.sequences.response_mask
            rows = rollout.sequences.input_ids[:, width:]
            for row, (example, text) in enumerate(zip(part, rollout.texts, strict=True)):
                judged = stage.task.evaluate(example, text)
                own.append(Answer(text, rows[row][mask[row]].tolist(), judged))
        draws.append(own)
    worth = [[one.judged[primary] for one in own] for own in draws]
    return np.asarray(_scores(scorer, examples, draws)).T, np.asarray(worth).T


def _scores(scorer: Scorer, examples: Sequence[Example], sides: Sequence[Sequence[Answer]]) -> list[list[float]]:
    """[S][n] scores of S answers to each example. They stand beside each other, so that the prompt is read once, and
    equal ones are scored once: they have equal scores to the last digit."""
    asked: list[Example] = []
    given: list[Answer] = []
    rows: dict[tuple[int, tuple[int, ...]], int] = {}
    for place, example in enumerate(examples):
        for side in sides:
            key = place, tuple(side[place].tokens)
            if key not in rows:
                rows[key] = len(given)
                asked.append(example)
                given.append(side[place])
    found = scorer(asked, given)
    return [[found[rows[place, tuple(one.tokens)]] for place, one in enumerate(side)] for side in sides]
