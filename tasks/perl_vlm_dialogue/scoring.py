"""How near an answer comes to the reference: token F1 for texts, the name and the arguments for calls."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping

from perl_vlm_dialogue.actions import Action, Call, Say, Value

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces (Rajpurkar et al. 2016, SQuAD)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words that two texts share, after ``normalise`` (Rajpurkar et al. 2016). Where a text has no words
    left, 1 if the other has none either."""
    given, wanted = normalise(answer).split(), normalise(reference).split()
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted))


def match_action(given: Action | None, wanted: Action) -> float:
    """How well one action does for another, in [0, 1].

    A text is worth its token F1, a call of the right API the F1 of its name and arguments (``call_f1``). A text for a
    call, a call for a text, another API and what could not be parsed (None) are worth 0.
    """
    if isinstance(given, Say) and isinstance(wanted, Say):
        return token_f1(given.text, wanted.text)
    if isinstance(given, Call) and isinstance(wanted, Call) and given.name == wanted.name:
        return call_f1(given.arguments, wanted.arguments)
    return 0.0


def call_f1(given: Mapping[str, Value], wanted: Mapping[str, Value]) -> float:
    """F1 of two calls of one API: its name, which is right, and the arguments, each of which is worth the token F1 of
    the best one left that has its name.

    Members of a list count as arguments of the list's name, in any order, each as the words of all its values.
    """
    left: dict[str, list[str]] = {}
    for name, text in _leaves(given):
        left.setdefault(name, []).append(text)
    total = sum(map(len, left.values()))
    leaves = list(_leaves(wanted))
    credit, rest = 1.0, list[tuple[str, str]]()
    for name, text in leaves:  # what is the same goes first, so that the order of a list does not matter
        same = next((other for other in left.get(name, []) if normalise(other) == normalise(text)), None)
        if same is None:
            rest.append((name, text))
        else:
            left[name].remove(same)
            credit += 1.0
    for name, text in rest:
        best = max(left.get(name, []), key=lambda other: token_f1(other, text), default=None)
        if best is not None:
            left[name].remove(best)
            credit += token_f1(best, text)
    return 2 * credit / (total + 1 + len(leaves) + 1)


def same_action(given: Action | None, wanted: Action) -> bool:
    """Whether two actions are the same after ``normalise``."""
    if isinstance(given, Say) and isinstance(wanted, Say):
        return normalise(given.text) == normalise(wanted.text)
    if isinstance(given, Call) and isinstance(wanted, Call):
        sides = (sorted((name, normalise(text)) for name, text in _leaves(one.arguments)) for one in (given, wanted))
        return given.name == wanted.name and next(sides) == next(sides)
    return False


def _leaves(values: Mapping[str, Value], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        path = f"{above}{name}"
        if isinstance(value, str):
            yield path, value
        elif isinstance(value, Mapping):
            yield from _leaves(value, f"{path}.")
        else:
            yield from ((path, _words(item)) for item in value)


def _words(value: Value) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return " ".join(_words(value[name]) for name in sorted(value))
    return " ".join(map(_words, value))
