"""``perl-vlm <task> data``: the first records of a task, as a table in the terminal and as a page with the pictures.

Every string of data passes through jinja2's autoescape on the page, and is printed as plain text, never as markup, in
the terminal. Nothing here imports torch.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from perl_vlm.data.images import to_png_bytes
from perl_vlm.errors import PerlVlmError
from perl_vlm.report.files import write_atomically
from perl_vlm.task import Task
from perl_vlm.types import Comparison, Example, Message, Rating

Record = TypeVar("Record", Example, Comparison, Rating)

_LONGEST_SIDE = 768
"""Larger pictures are scaled down to this many pixels on the page."""
_SMALL = 256
"""Pictures with both sides below this many pixels are enlarged with hard pixel edges."""
_TERMINAL_TEXT = 600
"""Longer texts are cut in the terminal, in characters; the page shows them whole."""


@dataclass(frozen=True)
class Picture:
    """One picture of a record, as the page shows it."""

    uri: str
    """PNG as a data URI."""
    size: str
    """Width x height of the original in pixels."""
    small: bool


@dataclass(frozen=True)
class Row:
    """One record in words."""

    id: str
    origin: str
    prompt: tuple[tuple[str, str], ...]
    """(role, text) of each turn; picture slots are written [image 1]."""
    answers: tuple[tuple[str, str], ...]
    """(what it is, text): reference; chosen and rejected; good or bad."""
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Part:
    """Examples or preferences."""

    title: str
    rows: tuple[Row, ...]
    note: str = ""
    """Why there are none."""


def preview(task: Task, count: int, out: str | None) -> Path:
    """Print the first ``count`` training examples and preferences and write the page with their pictures.

    Args:
        task: the task, configured.
        count: how many of each.
        out: the page's file; ``runs/<task>/preview.html`` when not given.

    Raises:
        PerlVlmError: the data cannot be read, a picture cannot be decoded, or ``out`` cannot be written.
    """
    path = Path("runs") / task.name / "preview.html" if out is None else Path(out)
    if path.is_dir():
        raise PerlVlmError(f"--out {path} is a folder; for the data verb it names the page, such as {path}/page.html")
    parts = collect(task, count)
    page = render(task.name, parts)
    print_parts(parts)
    try:
        write_atomically(path, page)
    except OSError as error:
        raise PerlVlmError(f"--out {path} cannot be written: {error.strerror or error}. Give another --out.") from error
    print(f"page with the pictures: {path}")
    return path


def collect(task: Task, count: int) -> list[Part]:
    """The first records of the training split. A task may lack one sort of record; without either it raises."""
    parts, errors = [], []
    for title, read in (("examples", task.examples), ("preferences", task.preferences)):
        try:
            parts.append(_part(title, read("train"), count))
        except (PerlVlmError, NotImplementedError) as error:
            errors.append(error)
            parts.append(Part(title, (), str(error)))
    if len(errors) == len(parts):
        raise PerlVlmError(str(errors[0])) from errors[0]
    return parts


def _part(title: str, records: Sequence[Example] | Sequence[Comparison] | Sequence[Rating], count: int) -> Part:
    shown = [records[place] for place in range(min(count, len(records)))]
    return Part(f"{title}: {len(shown)} of {len(records):,}", tuple(_row(record) for record in shown))


def _row(record: Example | Comparison | Rating) -> Row:
    pictures = []
    for source in record.images:
        image = source.load()
        size = f"{image.width} x {image.height}"
        small = max(image.size) < _SMALL
        if max(image.size) > _LONGEST_SIDE:
            image = image.copy()  # a source may hand out a picture that it keeps
            image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        data = base64.b64encode(to_png_bytes(image)).decode("ascii")
        pictures.append(Picture(f"data:image/png;base64,{data}", size, small))
    return Row(record.id, record.origin, _turns(record.messages), _answers(record), tuple(pictures))


def _turns(messages: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    turns, slot = [], 0
    for message in messages:
        text = []
        for part in message.content:
            slot += not isinstance(part, str)
            text.append(part if isinstance(part, str) else f"[image {slot}] ")
        turns.append((message.role, "".join(text)))
    return tuple(turns)


def _answers(record: Example | Comparison | Rating) -> tuple[tuple[str, str], ...]:
    if isinstance(record, Example):
        return () if record.reference is None else (("reference", record.reference),)
    if isinstance(record, Rating):
        return (("good" if record.label else "bad", record.response),)
    better = "chosen" if record.margin is None else f"chosen, by {record.margin:g}"
    return ((better, record.chosen), ("rejected", record.rejected))


def printable(text: str) -> str:
    """The text with everything that is no visible character (escapes, direction marks) replaced, line ends kept."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def print_parts(parts: Sequence[Part]) -> None:
    """Print the records as tables of plain text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def cell(*paragraphs: str) -> Text:
        text = printable("\n".join(paragraphs))
        return Text(text if len(text) <= _TERMINAL_TEXT else f"{text[:_TERMINAL_TEXT]} ...")

    console = Console(width=None if sys.stdout.isatty() else 120)
    for part in parts:
        table = Table(title=cell(part.title), title_justify="left", box=box.SIMPLE, show_lines=False)
        for heading in ("record", "prompt", "answers", "pictures"):
            table.add_column(heading, overflow="fold")
        for row in part.rows:
            table.add_row(
                cell(row.id, *([row.origin] if row.origin else [])),
                cell(*(text if role == "user" else f"{role}: {text}" for role, text in row.prompt)),
                cell(*(f"{what}: {text}" for what, text in row.answers)),
                cell(*(picture.size for picture in row.pictures)),
            )
        console.print(table)
        if part.note:
            console.print(cell(f"none: {part.note}"))


def render(task: str, parts: Sequence[Part]) -> str:
    """The page: one HTML text that needs no network, no script and no other file."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.from_string(files("perl_vlm").joinpath("preview.html.jinja").read_text("utf-8"))
    return template.render(task=task, parts=parts)
