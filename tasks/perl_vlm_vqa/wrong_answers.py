r"""Wrong answers for questions that come with right ones alone: drawn by the record, so the same at every load.

Where answers are as skewed as people's (of "is there ..." most are yes), a wrong one must not be told by being rare. Of
questions of one sort, let p(a) be the share that a is the answer to. One with the answer a gets the wrong answer b by

.. math:: P(b \mid a) = \frac{p(b)}{1 - p(a)}, \quad b \ne a

and its pair is kept with a probability in proportion to 1 - p(a). What is left has a over b as often as b over a: p(a)
p(b), so that nothing but the picture tells which is right.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence

from perl_vlm.types import Comparison, Example
from perl_vlm_vqa.scoring import vqa_normalise

_FEW = 64
"""Of more answers than these, wrong ones are not listed: one is drawn, again where it happens to be right."""


class Pool:
    """Answers that can be mistaken for one another, each as often as it was given."""

    def __init__(self, answers: Sequence[str]) -> None:
        self._answers = answers
        self._given = Counter(answers)
        self._compared = Counter(map(vqa_normalise, answers))
        self.largest_wrong_share = 1 - min(self._compared.values()) / len(answers) if answers else 0.0
        """That of the rarest answer."""

    def wrong_share(self, right: Collection[str]) -> float:
        """The share of the pool that is none of the right answers, which are normalised."""
        return 1 - sum(self._compared[answer] for answer in right) / len(self._answers) if self._answers else 0.0

    def draw(self, right: Collection[str], rng: random.Random) -> str | None:
        """One that is none of the right answers; None where there is none."""
        if len(self._answers) > _FEW:
            drawn = (rng.choice(self._answers) for _ in range(_FEW))
            found = next((answer for answer in drawn if vqa_normalise(answer) not in right), None)
            if found is not None:
                return found
            # Nearly all are right, so that different ones are few.
            wrong = {answer: count for answer, count in self._given.items() if vqa_normalise(answer) not in right}
            return rng.choices(list(wrong), list(wrong.values()))[0] if wrong else None
        listed = [answer for answer in self._answers if vqa_normalise(answer) not in right]
        return rng.choice(listed) if listed else None


def right_answers(example: Example) -> set[str]:
    """What the reference and the annotators say, normalised."""
    return {vqa_normalise(answer) for answer in (example.reference or "", *example.metadata.get("answers", ()))}


def to_comparison(example: Example, pool: Pool, seed: int) -> Comparison | None:
    """The answer against one of ``pool`` that no annotator gave; None where there is none."""
    rejected = pool.draw(right_answers(example), random.Random(f"{seed}-{example.id}-wrong"))
    if rejected is None:
        return None
    return Comparison(
        id=f"{example.id} preference",
        messages=example.messages,
        chosen=example.reference or "",
        rejected=rejected,
        images=example.images,
        metadata={"kind": example.metadata["kind"]},
        origin=example.origin,
    )


def is_kept(example: Example, pool: Pool, seed: int) -> bool:
    """Whether a question's pair is among those that are kept; the module's docstring says why not all are."""
    drawn = random.Random(f"{seed}-{example.id}-kept").random()
    return drawn * pool.largest_wrong_share < pool.wrong_share(right_answers(example))
