"""What can be said of a set of answers by looking at them alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Words and signs of punctuation, in lower case."""
    return _WORD.findall(text.lower())


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The n-grams of a text's words, in order."""
    own = words(text)
    return list(zip(*(own[start:] for start in range(n)), strict=False))


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams of some texts together: 1 where nothing is said twice; NaN where there are
    none. It falls with the amount of text, so that only sets of about equal size compare.

    Source: Li et al. 2016 (1510.03055).
    """
    counted = Counter(gram for text in texts for gram in ngrams(text, n))
    total = sum(counted.values())
    return len(counted) / total if total else float("nan")


def repeated(texts: Sequence[str]) -> list[bool]:
    """[n] of each text whether another one of the set says the same, spaces and case aside."""
    plain = [" ".join(text.lower().split()) for text in texts]
    counted = Counter(plain)
    return [counted[text] > 1 for text in plain]


def overlap(claim: str, source: str, n: int = 2) -> float:
    """The share of a claim's n-grams that stand in a source too; of its words where it is shorter than n."""
    n = max(1, min(n, len(words(claim))))
    own = ngrams(claim, n)
    if not own:
        return 0.0
    known = set(ngrams(source, n))
    return sum(gram in known for gram in own) / len(own)
