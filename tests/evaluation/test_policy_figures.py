"""Scores of both sides' answers, taken together."""

from __future__ import annotations

from collections.abc import Sequence

from perl_vlm.train.compare import Answer
from perl_vlm.types import Example, Message
from perl_vlm_eval.evaluations.answers import scores_of


def test_answers_to_one_prompt_stand_together_and_equal_ones_are_scored_once() -> None:
    examples = [Example(str(place), (Message("user", (f"question {place}",)),)) for place in range(3)]
    before = [Answer(text, [ord(text)], {}) for text in "abc"]
    after = [Answer(text, [ord(text)], {}) for text in "xba"]
    asked: list[tuple[str, str]] = []

    def scorer(examples: Sequence[Example], answers: Sequence[Answer]) -> list[float]:
        asked.extend((example.id, answer.response) for example, answer in zip(examples, answers, strict=True))
        return [100.0 * int(example.id) + answer.tokens[0] for example, answer in zip(examples, answers, strict=True)]

    found = scores_of(scorer, examples, [before, after])
    assert asked == [("0", "a"), ("0", "x"), ("1", "b"), ("2", "c"), ("2", "a")]
    assert found == [[97.0, 198.0, 299.0], [120.0, 198.0, 297.0]]
