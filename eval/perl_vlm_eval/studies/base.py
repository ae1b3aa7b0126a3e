"""What every study is: settings, a plan that asks for cells and looks at them, and what it found."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from perl_vlm import registry
from perl_vlm.cli_parse import parse
from perl_vlm.config import RunConfig
from perl_vlm.config.checks import require
from perl_vlm.report.html import Curve, Table
from perl_vlm_eval.seeds import Seeds
from perl_vlm_eval.studies.cells import Outcome, StudyCell

Plan = Generator[Sequence[StudyCell], Mapping[str, Outcome], "StudyFindings"]
"""Asks for cells, is sent what became of them, and ends with its findings."""


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

    def __post_init__(self) -> None:
        require(self.seeds >= 1, f"seeds is {self.seeds}; it must be at least 1")
        require(bool(self.models), "models is empty; name at least one")


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
    return StudyCell(name, [*first, *settings.options, *own], needs)


def resolved(settings: StudySettings, verb: str, model: str) -> RunConfig:
    """The settings that every cell of a verb begins with."""
    given = ["--config", settings.config, "--model", model, *settings.options]
    return parse(registry.load(settings.task), verb, given).config


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
