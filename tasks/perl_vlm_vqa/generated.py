"""Records about generated scenes, made when they are asked for.

Record i of a split is a function of (data_seed, split, i, what) alone, so nothing is stored and no two machines differ.
Scenes belong to splits by their content (see ``scenes``): no picture is in two splits, whatever the seeds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar, overload

from perl_vlm.types import Comparison, Example, ImageSlot, Message, Split
from perl_vlm_vqa.scenes import Question, ask, random_scene

Record = TypeVar("Record")


class _Lazy(Sequence[Record], Generic[Record]):
    """A sequence whose items are made at each access."""

    what: str

    def __init__(self, split: Split, size: int, data_seed: int, kinds: tuple[str, ...]) -> None:
        self._split, self._size, self._data_seed, self._kinds = split, size, data_seed, kinds

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return [self._record(i) for i in range(*index.indices(self._size))]
        position = index + self._size if index < 0 else index
        if not 0 <= position < self._size:
            raise IndexError(f"record {index} of {self._size} ({self.what}, {self._split})")
        return self._record(position)

    def __iter__(self) -> Iterator[Record]:
        return (self._record(i) for i in range(self._size))

    def _question(self, index: int) -> Question:
        rng = random.Random(f"{self._data_seed}-{self._split}-{index}-{self.what}")
        kind = rng.choice(self._kinds)
        return ask(random_scene(rng, self._split), rng, kind)

    def _id(self, index: int) -> str:
        return f"generated-{self._data_seed}-{self._split}-{self.what}-{index}"

    def _record(self, index: int) -> Record:
        raise NotImplementedError


class GeneratedExamples(_Lazy[Example]):
    """Questions with their right answers; ``metadata["kind"]`` is the kind of question."""

    what = "example"

    def _record(self, index: int) -> Example:
        question = self._question(index)
        return Example(
            id=self._id(index),
            messages=prompt(question.text),
            images=(question.scene,),
            reference=question.answer,
            metadata={"kind": question.kind},
            origin=f"generated {self._split} example {index}",
        )


class GeneratedComparisons(_Lazy[Comparison]):
    """The right answer against a plausible wrong one, about other scenes than the examples."""

    what = "preference"

    def _record(self, index: int) -> Comparison:
        question = self._question(index)
        return Comparison(
            id=self._id(index),
            messages=prompt(question.text),
            chosen=question.answer,
            rejected=question.wrong,
            images=(question.scene,),
            metadata={"kind": question.kind},
            origin=f"generated {self._split} preference {index}",
        )


def prompt(question: str) -> tuple[Message, ...]:
    """One user turn: the picture, then the question."""
    return (Message("user", (ImageSlot(), question)),)
