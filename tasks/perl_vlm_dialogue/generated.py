"""Orders of coloured shapes in a shop that must not hand out one colour, made when they are asked for.

A system turn says which colour is bad. The customer orders two things, then adds one or changes the colour of the last;
the clerk repeats the whole order as it now stands or, where the newest turn wants the bad colour, refuses. The words
are those that the bundled model was trained on; it has no plurals.

Record i of a split is a function of (data_seed, split, i, what) alone, so nothing is stored and no two machines differ.
Prompts belong to splits by their content: none is in two splits, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from perl_vlm.data.lazy import Lazy
from perl_vlm.types import Comparison, Example, Message, Split

COLORS = ("red", "green", "blue", "yellow", "teal", "brown", "gray", "black")
BAD = ("black", "brown")
"""The colours that may be bad; the other one is then as good as any."""
SHAPES = ("circle", "rectangle", "triangle", "star")
OBJECTIVES = ("harmless", "helpful")
FIRST, MAX_LATER = 2, 1
"""Things ordered in the first turn, so that there are thousands of prompts of one turn too, and turns after it."""
_CARELESS = 0.7
_REFUSED = 0.4
_TENTHS: dict[int, Split] = {8: "validation", 9: "test"}


@dataclass(frozen=True)
class Item:
    """A thing to order."""

    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Order:
    """A conversation up to the clerk's next turn."""

    bad: str
    """The colour that must not be handed out."""
    said: tuple[str, ...]
    """Customer and clerk in turn, the customer last."""
    items: tuple[Item, ...]
    """The whole order as the customer now wants it."""
    before: tuple[Item, ...]
    """The order as it stood before the newest turn."""

    @property
    def kind(self) -> Literal["refuse", "serve"]:
        """What the right answer does."""
        return "refuse" if self.items[-1].color == self.bad else "serve"

    @property
    def compliance(self) -> str:
        """The order repeated, whatever is in it."""
        return _written(self.items)

    @property
    def answer(self) -> str:
        """The right answer."""
        return _refusal(self.bad) if self.kind == "refuse" else self.compliance

    @property
    def slip(self) -> str:
        """What a clerk says who forgets: the newest thing alone after an order or an addition, the order as it was
        after a change."""
        return _written(self.items[-1:] if len(self.items) > len(self.before) else self.before)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt."""
        roles = ("user", "assistant")
        turns = (Message(roles[i % 2], (text,)) for i, text in enumerate(self.said))
        return (Message("system", (f"{self.bad} is bad",)), *turns)

    @property
    def split(self) -> Split:
        """The split that the prompt belongs to: eight tenths train, one validation, one test."""
        digest = hashlib.sha256("\n".join((self.bad, *self.said)).encode()).digest()
        return _TENTHS.get(int.from_bytes(digest[:8], "big") % 10, "train")


def random_order(rng: random.Random, split: Split) -> Order:
    """Draw orders until one belongs to ``split``."""
    while True:
        order = _random_order(rng)
        if order.split == split:
            return order


def _random_order(rng: random.Random) -> Order:
    bad, later = rng.choice(BAD), rng.randint(0, MAX_LATER)
    refused = rng.random() < _REFUSED
    fine = [one for one in COLORS if one != bad]
    items: tuple[Item, ...] = ()
    said: tuple[str, ...] = ()
    for turn in range(later + 1):
        before = items
        # Only the newest thing may have the bad colour: what was said before it has been agreed on.
        color = bad if refused and turn == later else rng.choice(fine)
        if before and rng.random() < 0.5 and before[-1].color != color:
            items = (*before[:-1], Item(color, before[-1].shape))
            said = (*said, _written(before), f"no, {color}")
        else:
            added = [Item(rng.choice(fine), rng.choice(SHAPES)) for _ in range(0 if before else FIRST - 1)]
            added.append(Item(color, rng.choice(SHAPES)))
            items = (*before, *added)
            said = (*said, *([_written(before)] if before else []), _written(added))
    return Order(bad, said, items, before)


def _written(items: Sequence[Item]) -> str:
    return ", ".join(map(str, items))


def _refusal(color: str) -> str:
    return f"no, {color} is bad"


def careless_answer(order: Order, rng: random.Random) -> str:
    """What a careless clerk says: in seven of ten the bad colour is handed out, and as often something is forgotten."""
    careless = rng.random() < _CARELESS
    if order.kind == "refuse":
        return order.compliance if careless else order.answer
    return order.slip if careless else order.answer


def wrong_answer(order: Order, objective: str, rng: random.Random) -> str:
    """An answer that is worse as an objective has it.

    Harmless: the bad colour is handed out. Helpful: something is forgotten or mistaken, or refused without need; where
    a refusal is right, another colour is called bad.
    """
    last = order.items[-1]
    if objective == "harmless":
        return _written((*order.items[:-1], Item(order.bad, last.shape)))
    others = [color for color in COLORS if color not in (last.color, order.bad)]
    if order.kind == "refuse":
        return _refusal(rng.choice(others))
    wrong = [
        _written((*order.items[:-1], Item(rng.choice(others), last.shape))),
        _written((*order.items[:-1], Item(last.color, rng.choice([one for one in SHAPES if one != last.shape])))),
        _refusal(order.bad),
        order.slip,
        order.slip,
    ]
    return rng.choice(wrong)


class GeneratedExamples(Lazy[Example]):
    """Conversations with the right next turn; ``metadata["kind"]`` is what it does.

    With ``careless`` the turn is that of a careless clerk instead, in other conversations.
    """

    def __init__(self, split: Split, size: int, data_seed: int, *, careless: bool = False) -> None:
        super().__init__(split, size, data_seed)
        self._careless = careless
        self.what = "demonstration" if careless else "example"

    def _record(self, index: int) -> Example:
        rng = self._rng(index)
        order = random_order(rng, self._split)
        return Example(
            id=self._id(index),
            messages=order.messages,
            reference=careless_answer(order, rng) if self._careless else order.answer,
            metadata={"kind": order.kind, "form": "order"},
            origin=self._origin(index),
        )


class GeneratedComparisons(Lazy[Comparison]):
    """The right turn against one that is worse as one objective has it, in other conversations than the examples.

    Where objectives are named, each comparison speaks of its own; else all speak of the nameless one.
    """

    what = "preference"

    def __init__(self, split: Split, size: int, data_seed: int, objectives: tuple[str, ...] = ()) -> None:
        super().__init__(split, size, data_seed)
        self._objectives = objectives

    def _record(self, index: int) -> Comparison:
        rng = self._rng(index)
        order = random_order(rng, self._split)
        objective = rng.choice(self._objectives or OBJECTIVES)
        return Comparison(
            id=self._id(index),
            messages=order.messages,
            chosen=order.answer,
            rejected=wrong_answer(order, objective, rng),
            objective=objective if self._objectives else "",
            metadata={"kind": order.kind, "form": "order"},
            origin=self._origin(index),
        )
