"""What every study is: settings, a plan that asks for cells and looks at them, and what it found."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, ClassVar, TypeVar

from perl_vlm import registry
from perl_vlm.cli_parse import parse
from perl_vlm.config import RunConfig
from perl_vlm.config.checks import require
from perl_vlm.report.html import Curve, Table
from perl_vlm_eval.seeds import Seeds
from perl_vlm_eval.studies.cells import Outcome, StudyCell

Key = TypeVar("Key", bound=Hashable)
Found = TypeVar("Found")
Part = Generator[Sequence[StudyCell], Mapping[str, Outcome], Found]
"""A part of a plan: asks for cells, is sent what became of them, and ends with what it found."""
Plan = Part["StudyFindings"]
"""All of a study."""

_SET_BY_ALL = {
    "model": "give --models", "config": "give --config before the lone --", "seed": "give --seeds",
    "out": "give --out before the lone --", "resume": "the same command again goes on from where it ended",
}  # fmt: skip


@dataclass(frozen=True)
class StudySettings:
    """What all studies have in common."""

    task: str = ""
    """The task that everything is trained on."""
    models: tuple[str, ...] = ("tiny",)
    """Bases, each a column of the tables."""
    config: str = "none"
    """A config of the task that all cells begin with, by name or as a file; none for the defaults."""
    seeds: int = 3
    """How often each arm is trained once its learning rate is chosen."""
    options: tuple[str, ...] = ()
    """Settings for every cell, as --key value on the command line after a lone --."""

    sets: ClassVar[Mapping[str, str]] = {}
    """Settings that the study gives its cells itself, and what to give it instead."""

    def __post_init__(self) -> None:
        keys = [word[2:].partition("=")[0].replace("-", "_") for word in self.options if word.startswith("--")]
        for key in keys:
            instead = {**_SET_BY_ALL, **self.sets}.get(key)
            require(
                instead is None, f"--{key} after the lone -- is what the study sets for each of its cells; {instead}"
            )
        require(self.seeds >= 1, f"seeds is {self.seeds}; it must be at least 1")
        require(bool(self.models), "models is empty; name at least one")
        for each in dataclasses.fields(self):
            values = getattr(self, each.name)
            if isinstance(values, tuple) and each.name != "options":
                names = [PurePath(one).name if each.name == "models" else one for one in values]
                twice = [str(one) for place, one in enumerate(names) if one in names[:place]]
                what = "the names of models" if each.name == "models" else each.name
                require(not twice, f"{what} hold {', '.join(twice)} twice; each stands for an arm of its own")


@dataclass(frozen=True)
class StudyFindings:
    """The tables, figures and words of a study."""

    tables: Sequence[Table] = ()
    curves: Sequence[Curve] = ()
    verdicts: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    """What stands in ``study.json``: JSON values by name."""


def cell(
    settings: StudySettings, name: str, verb: str, model: str, options: Mapping[str, Any], *needs: str
) -> StudyCell:
    """A cell of a study's task, with the options of all cells and its own."""
    own = [part for key, value in options.items() for part in (f"--{key}", _text(value))]
    first = [settings.task, verb, "--config", settings.config, "--model", model]
    return StudyCell(name, [*first, *settings.options, *own], needs, _basis(settings, verb, model))


def together(parts: Mapping[Key, Part[Found]]) -> Part[dict[Key, Found]]:
    """Parts of a plan that do not need one another: whatever they ask for is asked for at once, so that as many cells
    can run side by side as there are devices, not as one arm happens to have."""
    found: dict[Key, Found] = {}
    outcomes: Mapping[str, Outcome] | None = None
    while len(found) < len(parts):
        asked: list[StudyCell] = []
        for key, part in parts.items():
            if key in found:
                continue
            try:
                asked += next(part) if outcomes is None else part.send(outcomes)
            except StopIteration as end:
                found[key] = end.value
        if len(found) < len(parts):
            outcomes = yield asked
    return {key: found[key] for key in parts}


def resolved(settings: StudySettings, verb: str, model: str) -> RunConfig:
    """The settings that every cell of a verb begins with."""
    given = ["--config", settings.config, "--model", model, *settings.options]
    return parse(registry.load(settings.task), verb, given).config


@lru_cache
def _basis(settings: StudySettings, verb: str, model: str) -> str:
    """A hash of the settings that all cells of a verb begin with, and of the files that these name: a config that was
    edited, a model exported anew or other data make other cells."""
    config = dataclasses.asdict(resolved(settings, verb, model))
    named = {text for text in _texts(config) if _exists(text)}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for text in sorted(named):
        root = Path(text)
        for one in sorted(path for path in (root, *root.rglob("*")) if path.is_file()):
            found = one.stat()
            digest.update(repr((str(one), found.st_size, found.st_mtime_ns)).encode())
    return digest.hexdigest()


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).exists()
    except (OSError, ValueError):  # a text that no path can be
        return False


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _texts(one)


def even_start(settings: StudySettings, model: str) -> dict[str, str]:
    """What lets value functions of all arms start alike: ``ppo.value auto`` would start one from the reward model where
    its adapter happens to fit the arm's, and from nothing in the others."""
    config = resolved(settings, "ppo", model).ppo
    return {"ppo.value": "zero"} if config.value == "auto" and config.value_kind == "reward" else {}


def measured_on_the_way(settings: StudySettings, verb: str, model: str) -> dict[str, int]:
    """What lets trials be compared on validation data, unless the options say how: eight measurements."""
    config = resolved(settings, verb, model)
    own = config.rm if verb == "rm" else config.ppo
    return {} if own.eval_every is not None else {f"{verb}.eval_every": max(1, own.steps // 8)}


def spread(found: Seeds | None, scale: float = 100.0) -> str:
    """A figure over seeds as tables have it: mean, and standard deviation where there are several."""
    if found is None:
        return "-"
    digits = 1 if scale > 1 else 2
    text = f"{scale * found.mean:.{digits}f}"
    return text if found.spread is None else f"{text} ± {scale * found.spread:.{digits}f}"


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
