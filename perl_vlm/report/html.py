"""The report of a run: one HTML file that needs no network, no script and no other file.

Every string of data or model passes through jinja2's autoescape, and a content security policy in the page forbids
whatever is neither inline style nor an inline picture. Nothing is read from the environment.
"""

from __future__ import annotations

import base64
import dataclasses
import numbers
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perl_vlm.errors import PerlVlmError
from perl_vlm.report import charts
from perl_vlm.report.files import write_atomically

if TYPE_CHECKING:
    from jinja2 import Template

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SMALL_PICTURE = 256
"""Pictures with both sides below this many pixels are enlarged with hard pixel edges."""

_LONG_ANSWER = 14
"""Cards with a longer answer, in characters, give every answer the full width, below its label."""
_LONG_TEXT = 160
"""Galleries with a longer text, in characters, have wider cards."""

_OUTCOMES = {
    (False, True): ("became right", "gained"),
    (True, False): ("became wrong", "lost"),
    (True, True): ("stayed right", "same"),
    (False, False): ("stayed wrong", "same"),
}


@dataclass(frozen=True)
class Curve:
    """One chart of lines over a common x axis."""

    title: str
    x_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    """Name of a line -> its (x, y) points in any order. Points that are not finite are left out and counted."""
    note: str = ""
    """What the reader should know of the quantity."""


@dataclass(frozen=True)
class GalleryItem:
    """One prompt, answered before and after training."""

    image_png: bytes | None
    """The picture as a PNG file, or None for a text task."""
    prompt: str
    reference: str | None
    """The right answer, if known."""
    before: str | None
    """None where there is one answer alone, the later one."""
    after: str
    before_right: bool | None
    """Whether the answer before was right; None where that is not known."""
    after_right: bool | None
    reward_before: float | None = None
    """The reward model's score of the answer before."""
    reward_after: float | None = None
    labels: tuple[str, str] = ("before", "after")
    """What the two answers are called."""


@dataclass(frozen=True)
class Distribution:
    """One chart of histograms over common bins."""

    title: str
    series: Mapping[str, Sequence[float]]
    """Name -> its values. Values that are not finite are left out and counted."""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Figures side by side."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    """As many cells each as the header has; the first names the row."""
    note: str = ""


@dataclass(frozen=True)
class Report:
    """All that the page shows; a part that is empty is not shown."""

    title: str
    subtitle: str = ""
    headline: Sequence[tuple[str, str, str]] = ()
    """(label, value, explanation) of the few figures that matter most."""
    tables: Sequence[Table] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    """What ran: model, data, seed, device, duration."""
    curves: Sequence[Curve] = ()
    gallery: Sequence[GalleryItem] = ()
    """Shown in this order; the caller chooses."""
    distributions: Sequence[Distribution] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration, nested; shown as YAML."""
    notes: Sequence[str] = ()
    """Remarks and warnings, a paragraph each."""


@dataclass(frozen=True)
class _Figure:
    title: str
    x_label: str
    note: str
    alt: str
    chart: charts.Chart


@dataclass(frozen=True)
class _Answer:
    when: str
    text: str
    right: bool | None
    reward: str


@dataclass(frozen=True)
class _Card:
    prompt: str
    reference: str | None
    image: str | None
    small: bool
    long: bool
    answers: tuple[_Answer, ...]
    outcome: str
    outcome_class: str
    reward_change: str


def write_report(path: Path, report: Report) -> None:
    """Render ``report`` and write it to ``path`` at once or not at all; missing folders are made.

    Equal reports give equal bytes. Raises PerlVlmError where a gallery picture is no PNG file, and OSError where the
    file cannot be written.
    """
    write_atomically(Path(path), render(report))


def render(report: Report) -> str:
    """The page as text. Raises PerlVlmError where a gallery picture is no PNG file."""
    cards = [_card(index, item) for index, item in enumerate(report.gallery, start=1)]
    outcomes = [card.outcome for card in cards if card.outcome]
    return _template().render(
        report=report,
        curves=[_figure(curve, curve.x_label, charts.line_chart(curve.series)) for curve in report.curves],
        distributions=[_figure(item, "", charts.histogram(item.series)) for item in report.distributions],
        cards=cards,
        wide=any(
            len(text or "") > _LONG_TEXT for item in report.gallery for text in (item.prompt, item.before, item.after)
        ),
        tally=[(text, outcomes.count(text)) for text, _ in _OUTCOMES.values() if text in outcomes],
        settings=settings_yaml(report.settings) if report.settings else "",
    )


def settings_yaml(settings: Any) -> str:
    """Nested mappings, dataclasses, sequences and scalars as YAML in the order given; anything else as its text."""
    import yaml

    return yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True, default_flow_style=False, width=100)


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_printable, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(files("perl_vlm.report").joinpath("report.html.jinja").read_text("utf-8"))


# Control characters are not allowed in HTML and can hide text, so their Unicode pictures stand in for them. Tab and
# line feed stay; carriage returns go, since a browser reads them as line feeds.
_CONTROL_PICTURES: dict[int, str | int] = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
_CONTROL_PICTURES.update({13: "", 127: 0x2421})
_CONTROL_PICTURES.update(dict.fromkeys(range(128, 160), "\N{REPLACEMENT CHARACTER}"))


def _printable(value: Any) -> Any:
    return value.translate(_CONTROL_PICTURES) if type(value) is str else value


def _figure(source: Curve | Distribution, x_label: str, chart: charts.Chart) -> _Figure:
    kind = "Lines over " + x_label if x_label else "Histogram"
    parts = [f"{entry.label}: {entry.summary}" for entry in chart.legend]
    return _Figure(source.title, x_label, source.note, f"{source.title}. {kind}. {'; '.join(parts)}", chart)


def _card(index: int, item: GalleryItem) -> _Card:
    known = item.before_right is not None and item.after_right is not None
    outcome, outcome_class = _OUTCOMES[bool(item.before_right), bool(item.after_right)] if known else ("", "")
    before, after = charts.finite(item.reward_before), charts.finite(item.reward_after)
    change = "" if before is None or after is None else charts.number(after - before)
    if change and not change.startswith("\N{MINUS SIGN}"):
        change = f"+{change}"
    return _Card(
        prompt=item.prompt,
        reference=item.reference,
        image=None if item.image_png is None else _png_uri(index, item.image_png),
        small=item.image_png is not None and max(_png_size(item.image_png)) < _SMALL_PICTURE,
        long=max(map(len, (item.reference or "", item.before or "", item.after))) > _LONG_ANSWER,
        answers=tuple(
            _Answer(when, text, right, _reward(reward))
            for when, text, right, reward in (
                (item.labels[0], item.before, item.before_right, item.reward_before),
                (item.labels[1], item.after, item.after_right, item.reward_after),
            )
            if text is not None
        ),
        outcome=outcome,
        outcome_class=outcome_class,
        reward_change=change,
    )


def _reward(value: float | None) -> str:
    return "" if value is None else charts.number(value)


def _png_uri(index: int, data: bytes) -> str:
    if not data.startswith(_PNG_SIGNATURE) or len(data) < 24:
        raise PerlVlmError(
            f"report gallery item {index}: a PNG file was expected, and the bytes begin with {bytes(data[:8])!r}. "
            'Encode the picture with image.save(stream, format="PNG").'
        )
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _png_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header that every PNG file begins with."""
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def _plain(value: Any) -> Any:
    """``value`` in the types that a safe YAML dump knows."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    return str(value)
