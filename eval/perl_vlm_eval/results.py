"""What evaluations leave behind: figures with their intervals, the items behind them, and ``results.json``.

The file's shape has a version, ``SCHEMA``; docs/eval-suite.md describes it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from perl_vlm.errors import PerlVlmError
from perl_vlm.train.rundir import finite_or_null
from perl_vlm_eval.statistics import Difference, Estimate

SCHEMA = 1

Unit = Literal["share", "number", "nats", "tokens", "seconds", "bytes", "joules"]
Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Figure:
    """One figure of one cell."""

    estimate: Estimate
    unit: Unit = "number"
    """A ``share`` lies in [0, 1] and is written in percent."""
    better: Better | None = None
    note: str = ""
    """What a reader must know to read it right."""


@dataclass(frozen=True)
class Chart:
    """Lines over a common x axis, or histograms where there is no ``x``."""

    title: str
    series: Mapping[str, Sequence[Any]]
    """Points (x, y) of each line, or the values of each histogram."""
    x: str = ""
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """One item for the reader's eye: a prompt and what was made of it."""

    prompt: str
    reference: str | None
    before: str
    after: str
    labels: tuple[str, str] = ("before", "after")
    before_right: bool | None = None
    after_right: bool | None = None
    before_score: float | None = None
    after_score: float | None = None
    image: str | None = None
    """A PNG in base64."""


@dataclass(frozen=True)
class Items:
    """The figures of single items: what systems are compared by."""

    ids: Sequence[str] = ()
    keys: Sequence[str] = ()
    """A hash of what each item says: generated items of two tasks may have one id."""
    groups: Sequence[str] = ()
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """By the name of the figure whose mean they are, or that has ``labels``; NaN where an item has none."""
    scales: Mapping[str, str] = field(default_factory=dict)
    """Of figures that two runs may have on scales of their own, such as rewards, or by instruments of their own, such
    as judges: which one it is. Runs are compared by them where it is the same."""
    labels: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Of figures that are areas under ROC curves, whose values are scores: 1 for good items and 0 for bad ones."""


@dataclass(frozen=True)
class Findings:
    """What one evaluation found of one run."""

    figures: dict[str, Figure] = field(default_factory=dict)
    headlines: Sequence[str] = ()
    """The names of the figures that matter most."""
    items: Items = field(default_factory=Items)
    charts: Sequence[Chart] = ()
    samples: Sequence[Sample] = ()
    verdicts: Sequence[str] = ()
    """What is to be said in words, with its evidence."""
    warnings: Sequence[str] = ()
    missing: Sequence[str] = ()
    """What could not be measured though it was asked for, each with its cause: the cell counts as failed and is tried
    again, and what it has is shown."""
    said: Sequence[Mapping[str, Any]] = ()
    """What was asked and answered, an entry for each item: ``--log_samples`` writes it. It stands beside the cell's
    file, not in it."""


@dataclass(frozen=True)
class Cell:
    """One evaluation of one run, done or not."""

    evaluation: str
    """Its name in the suite."""
    kind: str
    run: str
    """How the run is called."""
    key: str
    """The hash of what it depends on: settings, weights, data, and the version of this suite."""
    status: Literal["done", "failed", "skipped"]
    why: str = ""
    """Of a cell that is not done."""
    seconds: float = 0.0
    findings: Findings = field(default_factory=Findings)
    kin: str = ""
    """What runs share that differ in their seeds alone."""
    seed: int | None = None
    """Of the run."""


def to_json(value: Any) -> Any:
    """Dataclasses, mappings and sequences as JSON values; numbers that are not finite become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_json(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return finite_or_null(value)


def cell_from_json(given: Mapping[str, Any]) -> Cell:
    """A cell as ``to_json`` wrote it. Raises PerlVlmError where it is none."""
    try:
        found = given["findings"]
        figures = {
            name: Figure(**{**one, "estimate": _estimate(one["estimate"])}) for name, one in found["figures"].items()
        }
        items = {**found["items"], "values": {name: _numbers(own) for name, own in found["items"]["values"].items()}}
        findings = Findings(
            figures=figures,
            headlines=found["headlines"],
            items=Items(**items),
            charts=[Chart(**one) for one in found["charts"]],
            samples=[Sample(**{**one, "labels": tuple(one["labels"])}) for one in found["samples"]],
            verdicts=found["verdicts"],
            warnings=found["warnings"],
            missing=found["missing"],
        )
        return Cell(**{**given, "findings": findings})
    except (KeyError, TypeError, AttributeError) as error:
        raise PerlVlmError(f"this is no cell of a suite's results: {type(error).__name__} {error}") from error


def _estimate(given: Mapping[str, Any]) -> Estimate:
    value = float("nan") if given["value"] is None else given["value"]
    return (Difference if "test" in given else Estimate)(**{**given, "value": value})


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def read_json(path: Path) -> Any:
    """A JSON file. Raises PerlVlmError, which names it, where it cannot be read as one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PerlVlmError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise PerlVlmError(f"{path} is no JSON file, or only the beginning of one: {error}") from error


def shown(figure: Figure) -> str:
    """A figure and its interval as people read them."""
    found = figure.estimate
    text = written(found.value, figure.unit)
    if found.low is None or found.high is None:
        return text
    low, high = (written(end, figure.unit, bare=True) for end in (found.low, found.high))
    return f"{text} [{low}, {high}]"


def written(value: float | None, unit: str, *, bare: bool = False, sign: bool = False) -> str:
    """A number in its unit.

    Args:
        bare: without the unit's name.
        sign: as a difference, with its sign; of shares in points.
    """
    if value is None or value != value:
        return "none"
    plus = "+" if sign else ""
    if unit == "share":
        return f"{100 * value:{plus}.1f}" + ("" if bare else " points" if sign else " %")
    if unit == "bytes":
        return f"{value / 2**20:{plus},.0f}" + ("" if bare else " MiB")
    name = {"nats": " nats", "tokens": " tokens", "seconds": " s", "joules": " J"}.get(unit, "")
    return f"{value:{plus}.3g}" + ("" if bare else name)
