"""What a policy's figures are made of: scores of several answers to each prompt, samples drawn for best-of-n, words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from perl_vlm.train.compare import Answer
from perl_vlm.train.sampling import HELD_OUT, noise, sample
from perl_vlm.train.stage import Stage
from perl_vlm.types import Example
from perl_vlm_eval.logs import asked
from perl_vlm_eval.metrics.texts import ngrams

Scorer = Callable[[Sequence[Example], Sequence[Answer]], "list[float]"]
"""Scores single answers."""


def said_of(examples: Sequence[Example], answers: Mapping[str, Sequence[Answer]]) -> list[dict[str, Any]]:
    """[n] what was asked, and what each side answered and what the task makes of that."""
    return [
        {
            **asked(example), "reference": example.reference,
            **{label: {"response": own[place].response, **own[place].judged} for label, own in answers.items()},
        }
        for place, example in enumerate(examples)
    ]  # fmt: skip


def distinct(texts: Sequence[str], n: int) -> Callable[[NDArray[np.int64]], float]:
    """Distinct n-grams of some of the texts, which are cut once."""
    known: dict[tuple[str, ...], int] = {}
    cut = [np.array([known.setdefault(gram, len(known)) for gram in ngrams(text, n)], dtype=np.int64) for text in texts]

    def measure(places: NDArray[np.int64]) -> float:
        grams = np.concatenate([cut[place] for place in places]) if len(places) else np.zeros(0)
        return len(np.unique(grams)) / len(grams) if len(grams) else float("nan")

    return measure


def powers(most: int) -> list[int]:
    """1, 2, 4, ... and the most."""
    return sorted({*(2**k for k in range(most.bit_length()) if 2**k <= most), most})


@torch.no_grad()
def drawn(
    stage: Stage, role: str, examples: Sequence[Example], count: int, scorer: Scorer, primary: str
) -> tuple[list[list[float]], list[list[float]]]:
    """[N][P] scores and judgements by the task of N samples to each of P prompts."""
    draws: list[list[Answer]] = []
    for draw in range(count):
        own: list[Answer] = []
        for block in stage.blocks(len(examples), stage.config.eval.batch_size):
            part = [examples[place] for place in block]
            rollout = sample(stage, role, part, noise(stage, HELD_OUT, block, turn=draw + 1))
            width, mask = rollout.sequences.prompt_width, rollout.sequences.response_mask
            rows = rollout.sequences.input_ids[:, width:]
            for row, (example, text) in enumerate(zip(part, rollout.texts, strict=True)):
                own.append(Answer(text, rows[row][mask[row]].tolist(), stage.task.evaluate(example, text)))
        draws.append(own)
    return scores_of(scorer, examples, draws), [[one.judged[primary] for one in own] for own in draws]


def scores_of(scorer: Scorer, examples: Sequence[Example], sides: Sequence[Sequence[Answer]]) -> list[list[float]]:
    """[S][n] scores of S answers to each example. They stand beside each other, so that the prompt is read once, and
    equal ones are scored once: they have equal scores to the last digit."""
    prompts: list[Example] = []
    given: list[Answer] = []
    rows: dict[tuple[int, tuple[int, ...]], int] = {}
    for place, example in enumerate(examples):
        for side in sides:
            key = place, tuple(side[place].tokens)
            if key not in rows:
                rows[key] = len(given)
                prompts.append(example)
                given.append(side[place])
    found = scorer(prompts, given)
    return [[found[rows[place, tuple(one.tokens)]] for place, one in enumerate(side)] for side in sides]
