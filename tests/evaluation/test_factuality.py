"""Claims against a source: what the fallback can see, and what a judge is asked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from perl_vlm.errors import PerlVlmError
from perl_vlm.types import Example, Message
from perl_vlm_eval.evaluations.factuality import (
    FactualitySettings,
    Judged,
    Library,
    Offline,
    findings,
    read_texts,
    sentences,
)
from perl_vlm_eval.judges import Endpoint

EXAMPLE = Example("e", (Message("user", ("Who was Ada?",)),))
KNOWN = Library(
    ["Ada Lovelace was born in London in 1815. She wrote about the Analytical Engine.", "Bread is made of flour. " * 60]
)


def test_sentences_and_passages() -> None:
    assert sentences("Ada was born. In 1815! Yes.\nShe wrote notes on engines") == [
        "Ada was born.",
        "She wrote notes on engines",
    ]
    assert len(KNOWN.passages) == 4
    assert "Lovelace" in KNOWN.nearest("Where was Lovelace born?")[0]
    assert KNOWN.nearest("zebra quokka") == []


def test_the_fallback_goes_by_shared_words() -> None:
    found = Offline(0.5).check(
        [EXAMPLE] * 3,
        ["Ada Lovelace was born in London. She was born on the moon of Mars.", "", "No."],
        [KNOWN] * 3,
    )
    assert found == [[True, False], [], []]


class Scripted(Endpoint):
    """An endpoint that says what a function says."""

    def __init__(self, tmp_path: Path, say: Any) -> None:
        super().__init__("openai:http://h/v1#m", tmp_path)
        self.say, self.asked = say, list[str]()

    def ask(self, text: str, images: Any = (), readable: Any = None) -> str:
        self.asked.append(text)
        return self.say(text)


def test_a_judge_splits_and_checks(tmp_path: Path) -> None:
    def say(text: str) -> str:
        if "Split the answer" in text:
            return (
                "NONE" if "[Answer]\nHello" in text else "- Ada was born in 1815.\n- Ada invented bread with flour.\n"
            )
        return "It is there.\nYES" if "1815" in text.split("[Claim]")[1] else "Answer: no"

    endpoint = Scripted(tmp_path, say)
    found = Judged(endpoint).check([EXAMPLE] * 3, ["Two claims.", "Hello there", " "], [KNOWN] * 3)
    assert found == [[True, False], [], []]
    assert sum("[Source]" in text for text in endpoint.asked) == 2
    assert any("born in London" in text for text in endpoint.asked)
    with pytest.raises(PerlVlmError, match="neither YES nor NO of 1 of 1 claims"):
        Judged(Scripted(tmp_path, lambda text: "Ada was born.")).check([EXAMPLE], ["Ada was born."], [KNOWN])


def test_precision_is_over_answers_that_claim_anything() -> None:
    count = 40
    examples = [Example(str(place), (Message("user", (f"{place}?",)),)) for place in range(count)]
    answers = {"anchor": ["x"] * count, "policy": ["y"] * count}
    checked = {
        "anchor": [[True, False]] * count,
        "policy": [[True, True] if place % 2 else [] for place in range(count)],
    }
    found = findings(examples, answers, checked, "by words alone")
    figures = found.figures
    assert figures["anchor/precision"].estimate.value == 0.5
    assert (figures["precision"].estimate.value, figures["precision"].estimate.items) == (1.0, 20)
    assert figures["answers_with_claims"].estimate.value == 0.5
    assert (figures["gain/precision"].estimate.value, figures["gain/precision"].estimate.items) == (0.5, 20)
    assert all(figure.note.endswith("by words alone") for figure in figures.values())
    assert findings(examples, answers, checked, "", "a judge").items.scales == {"precision": "a judge"}
    assert math.isnan(found.items.values["precision"][0])


def test_knowledge_is_read_and_named(tmp_path: Path) -> None:
    good = tmp_path / "known.jsonl"
    good.write_text('{"title": "Ada", "text": "was born."}\n{"text": "Only this."}\n')
    assert read_texts(good) == ["Ada. was born.", "Only this."]
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"body": "x"}) + "\n")
    with pytest.raises(PerlVlmError, match=r"bad\.jsonl row 1 has no `text`"):
        read_texts(bad)
    with pytest.raises(ValueError, match="openai:"):
        FactualitySettings(judge="http://h")
