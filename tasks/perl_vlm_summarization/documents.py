"""Documents: how they are cut, asked about, and kept whole within one split."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from perl_vlm.data.adapters import Row, Source
from perl_vlm.data.messages import check_text
from perl_vlm.data.sources import LoadedRows
from perl_vlm.data.splits import plan
from perl_vlm.errors import BadRecord
from perl_vlm.types import Message, Split

if TYPE_CHECKING:
    from perl_vlm_summarization.task import SummarizationConfig

Kind = Literal["post", "article", "conversation"]
Style = Literal["tldr", "chat"]

_TENTHS = 10
_SHARES: dict[Split, range] = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s)|\n")
_LABELLED = re.compile(
    r"(?:SUBREDDIT: .*?\n\n)?(?:TITLE: (?P<title>.*?)\n\n)?(?:POST|ARTICLE): (?P<text>.*?)\s*TL;DR:\s*", re.DOTALL
)
_INSTRUCTED = re.compile(r"(?:Summarize this \w+ in a few sentences\.|summarize this article:)\s+")


@dataclass(frozen=True)
class Document:
    """What is to be summarized, cut to the length that the prompt shows."""

    text: str
    kind: Kind
    title: str = ""
    subreddit: str = ""

    def prompt(self, style: Style) -> tuple[Message, ...]:
        """One user turn.

        ``tldr`` is the layout of the TL;DR sets (Stienon et al., 2009.01325): labelled fields, then ``TL;DR:``.
        ``chat`` is an instruction, then the document.
        """
        if style == "tldr":
            fields = {"SUBREDDIT": self.subreddit and f"r/{self.subreddit}", "TITLE": self.title}
            lines = [f"{label}: {value}" for label, value in fields.items() if value]
            label = "ARTICLE" if self.kind == "article" else "POST"
            return (Message("user", ("\n\n".join([*lines, f"{label}: {self.text}", "TL;DR:"]),)),)
        title = f"{self.title}\n\n" if self.title else ""
        return (Message("user", (f"Summarize this {self.kind} in a few sentences.\n\n{title}{self.text}",)),)


def document_of(prompt: str) -> str:
    """What a prompt asks to have summarized: its document, with the title, and none of the words around them. A prompt
    that is laid out otherwise is taken whole."""
    labelled = _LABELLED.fullmatch(prompt)
    if labelled is not None:
        return "\n\n".join(part for part in (labelled["title"], labelled["text"]) if part)
    instructed = _INSTRUCTED.match(prompt)
    return prompt[instructed.end() :] if instructed is not None else prompt


def cut(text: str, limit: int) -> str:
    """At most the first ``limit`` characters (all for 0), ending after a sentence where one ends in their second half,
    else before a word."""
    text = text.strip()
    if not limit or len(text) <= limit:
        return text
    # One character more, to see whether a sentence or a word ends exactly there.
    head = text[: limit + 1]
    ends = [match.end() for match in _SENTENCE_END.finditer(head) if limit // 2 <= match.end() <= limit]
    if ends:
        return head[: ends[-1]].rstrip()
    space = max((i for i, letter in enumerate(head) if letter.isspace()), default=limit)
    return head[:space].rstrip()


def field(row: Row, column: str, origin: str) -> str:
    """The text of a column, stripped. Raises BadRecord where it is none, or empty."""
    text = check_text(row[column], column, origin).strip()
    if not text:
        raise BadRecord(origin, f"column `{column}` is empty", "Fill it, or remove the record")
    return text


class DocumentSource(Source):
    """A source whose rows are about documents. No document is in two splits that it cuts itself.

    Splits that the source names stay as they are. Where one table serves for several (``perl_vlm.data.splits`` says
    when), its rows are shared out by a hash of their document, since a document has several rows in many sets.
    """

    config: SummarizationConfig

    one_part_is_all = False
    """Whether a source that names a single held-out split is cut into all three, rather than serving as ``test``."""

    def __init__(self, config: SummarizationConfig) -> None:
        super().__init__(config)
        self._tenths: dict[Split | None, bytes] = {}
        self._kept: dict[tuple[Split, str], list[Any]] = {}

    def document_text(self, row: Row) -> Any:
        """The document of a row that may be broken in any way."""
        raise NotImplementedError

    def kept(self, split: Split, what: str, convert: Callable[[Row, str], Any]) -> list[Any]:
        """``collect`` of the split's rows, done once."""
        if (split, what) not in self._kept:
            self._kept[split, what] = self.collect(self.rows(split), convert, split, what)
        return self._kept[split, what]

    def style(self, usual: Style) -> Style:
        """The prompt style that is set, else the data set's usual one."""
        return usual if self.config.prompt_style == "auto" else self.config.prompt_style

    def rows(self, split: Split) -> LoadedRows:
        """The rows of a split, at most as many as the configuration takes, drawn evenly and put in order."""
        tables, limit = self.opened.tables, self.config.size(split)
        # One row is enough to have the table; which rows are taken is decided here.
        if self.one_part_is_all and len(tables) == 1:
            wanted, key = _SHARES[split], next(iter(tables))
            part = self.opened.rows("test", limit=1)
        else:
            wanted, key = plan(tables, split, self.opened.place)
            part = self.opened.rows(split, limit=1)
        order: Iterable[int] = range(len(part.table))
        if limit:
            order = random.Random(f"{self.config.data_seed}-rows").sample(range(len(part.table)), len(part.table))
        if len(wanted) < _TENTHS:
            if key not in self._tenths:
                self._tenths[key] = bytes(map(self._tenth, part.table.read(range(len(part.table)))))
            tenths = self._tenths[key]
            order = (index for index in order if tenths[index] in wanted)
        return LoadedRows(part.table, sorted(itertools.islice(order, limit or None)), part.root)

    def _tenth(self, row: Row | BadRecord) -> int:
        """The tenth of a table that a row belongs to, by its document."""
        text = None if isinstance(row, BadRecord) else self.document_text(row)
        if not isinstance(text, str):
            return 0  # reported with the training records
        # Documents that are alike as far as the prompt shows them are one.
        shown = cut(text, self.config.max_document_chars)
        digest = hashlib.sha256(shown.encode(errors="replace")).digest()
        return int.from_bytes(digest[:8], "big") % _TENTHS
