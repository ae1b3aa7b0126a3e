"""Suites: short YAML lists of evaluations."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from perl_vlm.cli_parse import typed_values
from perl_vlm.cli_settings import UsageError, nearest, settings_of
from perl_vlm_eval.evaluations import KINDS
from perl_vlm_eval.evaluations.base import Evaluation

_SHIPPED = files("perl_vlm_eval").joinpath("suites")


@dataclass(frozen=True)
class Line:
    """One evaluation of a suite."""

    name: str
    """How tables and results call it; unique within the suite."""
    evaluation: Evaluation

    @property
    def settings(self) -> str:
        """Its settings as text: part of a cell's hash."""
        return json.dumps(dataclasses.asdict(self.evaluation.settings), sort_keys=True, default=str)


@dataclass(frozen=True)
class Suite:
    """What is measured."""

    name: str
    lines: Sequence[Line]


def shipped() -> list[str]:
    """The names of the suites that come with the package."""
    return sorted(Path(entry.name).stem for entry in _SHIPPED.iterdir() if entry.name.endswith(".yaml"))


def read_suite(given: str, changes: Mapping[str, Any] | None = None) -> Suite:
    """A suite from a file, or one that is shipped, by name.

    Args:
        given: a path that ends in .yaml or .yml, or a name.
        changes: settings that take the place of those in the file, in every evaluation that has them.

    Raises:
        UsageError: no such suite, or one that is not understood; the place is named.
    """
    if given.endswith((".yaml", ".yml")):
        path = Path(given).expanduser()
    elif given in shipped():
        path = Path(str(_SHIPPED.joinpath(f"{given}.yaml")))
    else:
        near = nearest(given, shipped())
        raise UsageError(
            f"there is no suite {given!r}. {f'Nearest: {near[0]}. ' if near else ''}Shipped are "
            f"{', '.join(shipped())}; a suite of your own is a file that ends in .yaml"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the suite {path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("evaluations"), list) or not content["evaluations"]:
        raise UsageError(f"{path} should hold `evaluations:` and under it a list, each with a `kind:`")
    odd = content.keys() - {"name", "evaluations"}
    if odd:
        raise UsageError(f"{path} has {', '.join(map(repr, sorted(odd)))}; a suite has `name` and `evaluations`")
    lines = [_line(entry, place, path, changes or {}) for place, entry in enumerate(content["evaluations"], start=1)]
    twice = {line.name for line in lines if sum(line.name == other.name for other in lines) > 1}
    if twice:
        raise UsageError(f"{path}: {', '.join(sorted(twice))} is there twice; give each a `name:` of its own")
    return Suite(str(content.get("name") or path.stem), lines)


def _line(entry: Any, place: int, path: Path, changes: Mapping[str, Any]) -> Line:
    where = f"{path}, evaluation {place}"
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
        raise UsageError(f"{where}: found {entry!r}, where settings with a `kind:` were expected")
    kind = KINDS.get(entry["kind"])
    if kind is None:
        near = difflib.get_close_matches(entry["kind"], KINDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"{where}: there is no kind {entry['kind']!r}.{hint} There are {', '.join(KINDS)}")
    known = settings_of(kind.Settings())
    given = {str(key): value for key, value in entry.items() if key not in ("kind", "name")}
    given |= {key: value for key, value in changes.items() if key in known}
    values = typed_values(known, given, where)
    try:
        evaluation = kind(kind.Settings(**values))
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error
    return Line(str(entry.get("name") or entry["kind"]), evaluation)
