"""Factual precision in the manner of FActScore (Min et al. 2023, 2305.14251): how many of an answer's claims a source
of knowledge supports.

With a judge (an OpenAI-compatible endpoint) the answer is split into claims and each is checked against the passages
nearest to it. Without one, sentences stand for claims and the share of their word pairs that stand in one passage for
support: a fallback that sees words and no meaning, and is called so wherever its figure is shown.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from perl_vlm.config.checks import require
from perl_vlm.data.sources import LoadedRows, open_source
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.roles import REFERENCE
from perl_vlm.types import Example
from perl_vlm_eval import statistics
from perl_vlm_eval.evaluations.base import Evaluation
from perl_vlm_eval.identity import Record, examples_of, group_names, item_keys
from perl_vlm_eval.judges import NONSENSE, Endpoint, dialogue, instructions, is_endpoint, last_line, template
from perl_vlm_eval.logs import asked
from perl_vlm_eval.metrics.texts import overlap, words
from perl_vlm_eval.opened import OpenRun
from perl_vlm_eval.results import Figure, Findings, Items, Sample

PROMPT, REFERENCES = "prompt", "reference"
OFFLINE = "offline fallback: the share of a sentence's word pairs that stand in one passage; it sees no meaning"
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_PASSAGE_WORDS = 120
_PASSAGES = 4


@dataclass(frozen=True)
class FactualitySettings:
    """Settings of ``factuality``."""

    knowledge: str = PROMPT
    """What claims are held against: ``prompt`` (each example's own, as in summaries), ``reference``, or a file or
    folder of texts (rows with ``text``, or ``title`` and ``text``)."""
    judge: str = ""
    """``openai:URL#MODEL``; the offline fallback when not given."""
    split: Literal["train", "validation", "test"] = "test"
    """Of the examples."""
    limit: int = 500
    """At most this many, from all over the set."""
    threshold: float = 0.5
    """Of the offline fallback: the share of word pairs from which on a sentence counts as supported."""

    def __post_init__(self) -> None:
        require(self.limit >= 1, f"limit is {self.limit}; it must be at least 1")
        require(0 < self.threshold <= 1, f"threshold is {self.threshold}; it must lie in (0, 1]")
        require(
            not self.judge or is_endpoint(self.judge), f"judge is {self.judge!r}; write openai:http://HOST/v1#MODEL"
        )


class Factuality(Evaluation):
    """``factuality``: the claims of a policy's answers beside those of its anchor."""

    kind = "factuality"
    Settings = FactualitySettings
    needs = ("ppo", "sft")
    settings: FactualitySettings

    def records(self, opened: OpenRun) -> Sequence[Record]:
        """The examples of the split."""
        return examples_of(opened.task, self.settings.split, self.settings.limit)

    def depends_on(self, opened: OpenRun) -> str:
        """The texts of the knowledge source, and what the judge is told."""
        return "\n".join([*self._texts, instructions("claims"), instructions("supported")])

    @cached_property
    def _texts(self) -> list[str]:
        given = self.settings.knowledge
        return [] if given in (PROMPT, REFERENCES) else read_texts(Path(given))

    def measure(self, opened: OpenRun) -> Findings:
        """Raises PerlVlmError where examples have no knowledge to be held against, or the judge fails."""
        stage, settings = opened.stage, self.settings
        examples = [one for one in stage.some_examples(settings.split, settings.limit) if not one.choices]
        if settings.knowledge == REFERENCES:
            examples = [one for one in examples if one.reference]
        if not examples:
            raise PerlVlmError(f"task {opened.task.name} has no {settings.split} examples to hold claims of against")
        library = Library(self._texts) if self._texts else None
        checker: Checker = Offline(settings.threshold)
        if settings.judge:
            checker = Judged(Endpoint(settings.judge, opened.judgements, stop=stage.stop.raise_if_requested))
        sides = {"anchor": REFERENCE} | ({} if opened.policy is None else {"policy": opened.policy})
        answers = {
            label: [one.response for one in opened.answers(stage, role, examples)] for label, role in sides.items()
        }

        def knowledge(example: Example) -> Library:
            if library is not None:
                return library
            return Library([dialogue(example) if settings.knowledge == PROMPT else str(example.reference)])

        known = [knowledge(example) for example in examples]
        checked = {label: checker.check(examples, said, known) for label, said in answers.items()}
        how = [settings.judge or settings.threshold, settings.knowledge, self.depends_on(opened)]
        instrument = hashlib.sha256(json.dumps(how).encode()).hexdigest()[:16]
        found = findings(examples, answers, checked, "" if settings.judge else OFFLINE, instrument)
        return replace(found, warnings=[*found.warnings, *checker.warnings])


def findings(
    examples: Sequence[Example],
    answers: dict[str, list[str]],
    checked: dict[str, list[list[bool]]],
    note: str,
    instrument: str = "",
) -> Findings:
    """Precision of each side over the answers that claim anything, and their difference where both do.

    Args:
        checked: by side, of each answer which of its claims are supported.
        note: how claims were checked, where that must be said.
        instrument: what tells whether two runs' claims were checked alike.
    """
    groups = group_names(examples)
    precision = {
        label: np.array([float(np.mean(claims)) if claims else math.nan for claims in own])
        for label, own in checked.items()
    }
    last = "policy" if "policy" in checked else "anchor"
    figures: dict[str, Figure] = {}
    for label, own in precision.items():
        prefix = "" if label == last else f"{label}/"
        known = np.flatnonzero(np.isfinite(own))
        if known.size:
            found = statistics.share(own[known], [groups[place] for place in known])
            figures[f"{prefix}precision"] = Figure(found, "share", "higher")
        claiming = [float(bool(claims)) for claims in checked[label]]
        figures[f"{prefix}answers_with_claims"] = Figure(statistics.share(claiming, groups), "share")
        counts = [float(len(claims)) for claims in checked[label]]
        figures[f"{prefix}claims"] = Figure(statistics.mean(counts, groups), note="an answer")
    if len(precision) == 2:
        both = np.flatnonzero(np.isfinite(precision["anchor"]) & np.isfinite(precision["policy"]))
        if both.size:
            together = [groups[place] for place in both]
            gain = statistics.difference(precision["anchor"][both], precision["policy"][both], together)
            figures["gain/precision"] = Figure(gain, "share", "higher", f"p = {gain.p:.3g} ({gain.test})")
    order = np.argsort(np.nan_to_num(precision[last], nan=2.0), kind="stable")[:6]
    samples = [
        Sample(
            prompt=examples[place].messages[-1].text[:2000], reference=examples[place].reference,
            before=answers["anchor"][place], after=answers[last][place], labels=("anchor", last),
            after_score=None if math.isnan(precision[last][place]) else float(precision[last][place]),
        )
        for place in order
    ]  # fmt: skip
    heads = [name for name in ("gain/precision", "precision", "answers_with_claims") if name in figures]
    if note:
        figures = {name: replace(own, note="; ".join(filter(None, (own.note, note)))) for name, own in figures.items()}
    items = Items(
        [one.id for one in examples], item_keys(examples), groups, {"precision": precision[last].tolist()},
        {"precision": instrument},
    )  # fmt: skip
    said = [
        {
            **asked(example), "reference": example.reference,
            **{
                label: {"response": own[place], "supported": checked[label][place]} for label, own in answers.items()
            },
        }
        for place, example in enumerate(examples)
    ]  # fmt: skip
    return Findings(figures, heads, items, samples=samples, warnings=[note] if note else [], said=said)


class Library:
    """Texts in passages of some hundred words, found by the words they share with a claim, rare ones first."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.passages = [passage for text in texts for passage in _passages(text)]
        self._counts = [Counter(words(passage)) for passage in self.passages]
        seen = Counter(word for counts in self._counts for word in counts)
        self._rarity = {word: math.log(1 + len(self.passages) / count) for word, count in seen.items()}

    def nearest(self, claim: str, count: int = _PASSAGES) -> list[str]:
        """The passages that share most with a claim, the best first."""
        own = set(words(claim))
        scores = [sum(self._rarity[word] for word in own if word in counts) for counts in self._counts]
        order = sorted(range(len(scores)), key=lambda place: -scores[place])
        return [self.passages[place] for place in order[:count] if scores[place] > 0]


class Checker:
    """Says of each answer which of its claims are supported."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def check(self, examples: Sequence[Example], answers: Sequence[str], known: Sequence[Library]) -> list[list[bool]]:
        """[n] a list for each answer, empty where it claims nothing."""
        raise NotImplementedError


class Offline(Checker):
    """Sentences for claims, shared word pairs for support."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def check(self, examples: Sequence[Example], answers: Sequence[str], known: Sequence[Library]) -> list[list[bool]]:
        """As of ``Checker``."""
        return [
            [
                max((overlap(claim, passage) for passage in library.nearest(claim)), default=0.0) >= self.threshold
                for claim in sentences(answer)
            ]
            for answer, library in zip(answers, known, strict=True)
        ]


class Judged(Checker):
    """Claims split and checked by an endpoint. Claims of which it says neither yes nor no count as unsupported and are
    told; raises PerlVlmError where it fails for good, or where they are too many."""

    def __init__(self, endpoint: Endpoint, requests: int = 8) -> None:
        super().__init__()
        self.endpoint, self.requests = endpoint, requests
        self._split = template("claims", ("prompt", "answer"))
        self._supported = template("supported", ("source", "claim"))

    def check(self, examples: Sequence[Example], answers: Sequence[str], known: Sequence[Library]) -> list[list[bool]]:
        """As of ``Checker``."""
        with ThreadPoolExecutor(self.requests) as pool:
            told = list(pool.map(self._answer, examples, answers, known))
        unread, count = sum(own.count(None) for own in told), sum(map(len, told))
        if unread > NONSENSE * count:
            raise PerlVlmError(
                f"the judge {self.endpoint.model} said neither YES nor NO of {unread} of {count} claims, where a last "
                "line of one of them was asked for; take a judge that follows instructions"
            )
        if unread:
            self.warnings.append(f"the judge said neither yes nor no of {unread} of {count} claims: unsupported")
        return [[bool(one) for one in own] for own in told]

    def _answer(self, example: Example, answer: str, library: Library) -> list[bool | None]:
        if not answer.strip():
            return []
        text = self._split(prompt=dialogue(example), answer=answer)
        claims = _claims(self.endpoint.ask(text, example.images, lambda said: bool(_claims(said))))
        if not claims:
            return [None]  # it says NONE of an answer that claims nothing
        if [claim.strip(".").upper() for claim in claims] == ["NONE"]:
            return []
        return [self._claim(claim, library) for claim in claims]

    def _claim(self, claim: str, library: Library) -> bool | None:
        """None where the judge says neither."""
        passages = library.nearest(claim)
        if not passages:
            return False
        text = self._supported(source="\n\n".join(passages), claim=claim)
        return _yes(self.endpoint.ask(text, (), lambda said: _yes(said) is not None))


def _claims(said: str) -> list[str]:
    return [line.strip(" -*\t") for line in said.splitlines() if line.strip(" -*\t")]


def _yes(said: str) -> bool | None:
    return {"YES": True, "NO": False}.get(last_line(said).strip("*.() ").upper())


def sentences(text: str) -> list[str]:
    """The sentences of a text that have at least three words."""
    return [part.strip() for part in _SENTENCE.split(text) if sum(word.isalnum() for word in words(part)) >= 3]


def read_texts(path: Path) -> list[str]:
    """The texts of a knowledge source. Raises PerlVlmError where it has none."""
    opened = open_source("local", str(path))
    found = []
    for name in sorted(opened.tables, key=str):
        table = opened.tables[name]()
        for row, origin in (LoadedRows(table, range(len(table)), opened.root)[place] for place in range(len(table))):
            if not isinstance(row.get("text"), str):
                raise PerlVlmError(
                    f"{origin} has no `text`; a knowledge source has rows with `text`, or `title` and `text`"
                )
            found.append(f"{row['title']}. {row['text']}" if row.get("title") else row["text"])
    if not found:
        raise PerlVlmError(f"the knowledge source {path} is empty")
    return found


def _passages(text: str) -> list[str]:
    parts = text.split()
    return [" ".join(parts[start : start + _PASSAGE_WORDS]) for start in range(0, len(parts), _PASSAGE_WORDS)]
