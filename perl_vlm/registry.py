"""Which tasks are installed: the entry points of the group ``perl_vlm.tasks``, listed without importing any of them."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import get_args

from perl_vlm.errors import PerlVlmError
from perl_vlm.task import Modality, Task

GROUP = "perl_vlm.tasks"


@dataclass(frozen=True)
class TaskEntry:
    """A registered task. Nothing of it has been imported."""

    name: str
    """What the command line calls it."""
    distribution: str
    """The installed distribution that registers it, with its version: ``perl-vlm 0.1.0``."""
    value: str
    """Where its class lies: ``module:Class``."""


def registered() -> dict[str, TaskEntry]:
    """Every registered task by name, sorted.

    Raises:
        PerlVlmError: two distributions register the same name; both are named.
    """
    found: dict[str, TaskEntry] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        entry = TaskEntry(point.name, _distribution(point), point.value)
        other = found.setdefault(point.name, entry)
        if other != entry:
            raise PerlVlmError(
                f"task {point.name!r} is registered twice: by {other.distribution} ({other.value}) and by "
                f"{entry.distribution} ({entry.value}). Uninstall one of them, or have its author rename the task."
            )
    return found


def find(name: str) -> TaskEntry:
    """The entry of a task. Raises PerlVlmError that names the nearest and all, where there is none of that name."""
    entries = registered()
    if name in entries:
        return entries[name]
    if not entries:
        raise PerlVlmError(
            f"no task {name!r}: no installed distribution registers any task under the entry-point group {GROUP}. "
            "Install perl-vlm itself with pip (from a checkout: pip install -e .)."
        )
    near = difflib.get_close_matches(name, entries, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise PerlVlmError(f"there is no task or command {name!r}.{hint} Registered tasks: {', '.join(entries)}.")


def load(name: str) -> type[Task]:
    """Import a task's class and check that it is one.

    Raises:
        PerlVlmError: no such task, or its plugin is broken; the text names the distribution and the cause.
    """
    entry = find(name)
    remedy = f"Upgrade or reinstall {entry.distribution.split()[0]}, or uninstall it."
    try:
        task = EntryPoint(entry.name, entry.value, GROUP).load()
    except (Exception, SystemExit) as error:
        # A plugin is foreign code: whatever its import raises is its own fault and is told as such.
        raise PerlVlmError(
            f"task {name!r} of {entry.distribution} cannot be loaded from {entry.value}: "
            f"{type(error).__name__}: {error}. {remedy}"
        ) from error
    problem = _problem(task, name)
    if problem:
        raise PerlVlmError(f"task {name!r} of {entry.distribution} is broken: {entry.value} {problem}. {remedy}")
    return task


def _problem(task: object, name: str) -> str:
    """What keeps the object from being the task of that name; empty if nothing does."""
    if not (isinstance(task, type) and issubclass(task, Task)):
        return "is no subclass of perl_vlm.task.Task"
    if getattr(task, "name", None) != name:
        return f"calls itself {getattr(task, 'name', None)!r} while its entry point calls it {name!r}"
    if getattr(task, "modality", None) not in get_args(Modality):
        return (
            f"has modality {getattr(task, 'modality', None)!r}; right would be one of {', '.join(get_args(Modality))}"
        )
    if not isinstance(getattr(task, "primary_metric", None), str):
        return "does not name its primary_metric"
    if not dataclasses.is_dataclass(task.Config):
        return "has a Config that is no dataclass"
    return ""


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown distribution"
