"""Reddit TL;DR: human comparisons of summaries, and the filtered posts with their authors' own summaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perl_vlm.data.adapters import Row
from perl_vlm.data.columns import require
from perl_vlm.data.messages import check_text, show
from perl_vlm.errors import Absent, BadRecord
from perl_vlm.types import Comparison, Example, Message, Split
from perl_vlm_summarization.documents import Document, DocumentSource, cut, field

_HUMAN = "ref"
"""What the comparisons call the policy that wrote the author's own summary."""


@dataclass(frozen=True)
class Compared:
    """One comparison, before it becomes a Comparison or part of an Example."""

    id: str
    messages: tuple[Message, ...]
    kind: str
    chosen: str
    rejected: str
    human: str | None
    """The author's own summary, where it is one of the two."""
    origin: str


class Comparisons(DocumentSource):
    """``openai/summarize_from_feedback``, configuration ``comparisons``: ``info`` of {id, post, title, subreddit, site,
    article}, ``summaries`` of two {text, policy, note}, ``choice`` 0 or 1, ``worker``, ``batch``, ``split``, ``extra``.

    A comparison of news articles (CNN/Daily Mail, in the validation part) has ``article`` in place of ``post``.
    """

    def document_text(self, row: Row) -> Any:
        info = row.get("info")
        return (info.get("post") or info.get("article")) if isinstance(info, Mapping) else None

    def preferences(self, split: Split) -> Sequence[Comparison]:
        return [
            Comparison(
                id=one.id,
                messages=one.messages,
                chosen=one.chosen,
                rejected=one.rejected,
                metadata={"kind": one.kind},
                origin=one.origin,
            )
            for one in self._read(split)
        ]

    def examples(self, split: Split) -> Sequence[Example]:
        """Each document once. Its reference is the author's own summary where any comparison shows it, else the summary
        preferred in the first."""
        first: dict[tuple[Message, ...], Compared] = {}
        human: dict[tuple[Message, ...], str] = {}
        for one in self._read(split):
            first.setdefault(one.messages, one)
            if one.human is not None:
                human.setdefault(one.messages, one.human)
        return [
            Example(
                id=one.id,
                messages=messages,
                reference=human.get(messages, one.chosen),
                metadata={"kind": one.kind},
                origin=one.origin,
            )
            for messages, one in first.items()
        ]

    def _read(self, split: Split) -> list[Compared]:
        # Rows of the same number, whichever sort of record is asked for: errors are told once, under one name.
        return self.kept(split, "comparisons", self._convert)

    def _convert(self, row: Row, origin: str) -> Compared | None:
        require(row, ["info", "summaries", "choice"], origin)
        info = _mapping(row["info"], "info", origin)
        kind = "post" if info.get("post") else "article"
        if kind == "article" and info.get("article") and not self.config.articles:
            return None
        texts, policies = _summaries(row["summaries"], origin)
        choice = row["choice"]
        if isinstance(choice, bool) or not isinstance(choice, int) or choice not in (0, 1):
            raise BadRecord(origin, f"column `choice` holds {show(choice)}", "It is 0 or 1, the better of the two")
        if texts[0] == texts[1]:
            raise BadRecord(origin, "both summaries are the same text", "Remove the record: it prefers nothing")
        document = _document(info, kind, "info", origin, self.config.max_document_chars)
        return Compared(
            id=origin,
            messages=document.prompt(self.style("tldr")),
            kind=kind,
            chosen=texts[choice],
            rejected=texts[1 - choice],
            human=next((text for text, policy in zip(texts, policies, strict=True) if policy == _HUMAN), None),
            origin=origin,
        )


class Posts(DocumentSource):
    """Posts with their authors' own summaries, ``{id, subreddit, title, post, summary}``: the prompts and references of
    the TL;DR comparisons (``vwxyzjn/summarize_from_feedback_tldr_3_filtered``)."""

    def document_text(self, row: Row) -> Any:
        return row.get("post")

    def examples(self, split: Split) -> Sequence[Example]:
        return self.kept(split, "examples", self._convert)

    def preferences(self, split: Split) -> Sequence[Comparison]:
        raise no_preferences(self.config.place, "posts")

    def _convert(self, row: Row, origin: str) -> Example:
        require(row, ["post", "summary"], origin)
        document = _document(row, "post", "", origin, self.config.max_document_chars)
        name = row.get("id")
        return Example(
            id=origin if name is None else check_text(str(name), "id", origin),
            messages=document.prompt(self.style("tldr")),
            reference=field(row, "summary", origin),
            metadata={"kind": "post"},
            origin=origin,
        )


def no_preferences(place: str, what: str) -> Absent:
    """The error for preferences of a set that has none."""
    return Absent(
        f"{place} holds {what} and no preferences, so it cannot train a reward model. Train "
        "one on TL;DR (perl-vlm summarization rm --config rm) and name its run here: --ppo.reward_model RUN_FOLDER."
    )


def _document(info: Row, kind: Any, column: str, origin: str, limit: int) -> Document:
    path = f"{column}.{kind}" if column else kind
    if info.get(kind) is None:
        raise BadRecord(origin, f"`{path}` is missing or empty", "Every record has the text that is summarized")
    text = cut(field(info, kind, origin), limit)
    title, subreddit = (check_text(info.get(name) or "", name, origin).strip() for name in ("title", "subreddit"))
    return Document(text, kind, title, subreddit)


def _summaries(value: Any, origin: str) -> tuple[tuple[str, str], tuple[Any, Any]]:
    """The two texts and the policies that wrote them."""
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
    if items is None or len(items) != 2:
        found = show(value) if items is None else f"{len(items)} of them"
        problem = f"column `summaries` should hold two summaries and holds {found}"
        raise BadRecord(origin, problem, "A comparison has two sides; remove a record that has one")
    one, other = (_mapping(item, "summaries", origin) for item in items)
    for item in (one, other):
        require(item, ["text"], f"{origin}, summaries")
    texts = field(one, "text", origin), field(other, "text", origin)
    return texts, (one.get("policy"), other.get("policy"))


def _mapping(value: Any, column: str, origin: str) -> Row:
    if not isinstance(value, Mapping):
        raise BadRecord(origin, f"column `{column}` holds {show(value)}", "It is an object of named fields")
    return value
