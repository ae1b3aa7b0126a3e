"""Which tasks are installed: the entry points of the group ``perl_vlm.tasks``, listed without importing any of them.

A plugin is foreign code, and nothing that one does may harm another. A name that two distributions claim cannot be
used, and no other is touched by it; perl-vlm's own tasks keep their names whoever else claims them. Metadata that
cannot be read is told of by the side.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import cast, get_args

from perl_vlm.errors import PerlVlmError
from perl_vlm.task import Modality, Task

GROUP = "perl_vlm.tasks"
COMMAND_GROUP = "perl_vlm.commands"
"""Commands that perl-vlm's other packages bring: the library knows none of them."""
COMMANDS = ("tasks", "new-task", "models", "eval", "study", "plan", "doctor")
"""What else may follow ``perl-vlm``: no task can have such a name."""
_OWN = "perl-vlm"
_LONGEST = 400
"""Characters of a foreign error that are shown."""


class UnknownTask(PerlVlmError):
    """No installed distribution registers a task of that name."""


@dataclass(frozen=True)
class TaskEntry:
    """A registered task. Nothing of it has been imported."""

    name: str
    """What the command line calls it."""
    distribution: str
    """The installed distribution that registers it, with its version: ``perl-vlm 0.1.0``; all of them, where several
    do."""
    value: str
    """Where its class lies: ``module:Class``."""
    problem: str = ""
    """Why it cannot be used, where that is known without importing it."""
    note: str = ""
    """What else the user should know: somebody else claims the name of one of perl-vlm's tasks."""

    @property
    def own(self) -> bool:
        """Whether perl-vlm itself brings the task."""
        return self.distribution.partition(" ")[0] == _OWN


@dataclass(frozen=True)
class _Claim:
    """One entry point."""

    distribution: str
    value: str
    own: bool
    """Whether perl-vlm itself registers it."""

    def __str__(self) -> str:
        return f"{self.distribution} ({self.value})"


def registered() -> dict[str, TaskEntry]:
    """Every registered task by name, sorted; those that cannot be used have a ``problem``."""
    claims: dict[str, list[_Claim]] = {}
    for distribution, points in _readable():
        for point in points:
            claim = _Claim(label(distribution), point.value, _normal(distribution) == _OWN)
            others = claims.setdefault(point.name, [])
            if claim not in others:  # a line that stands twice in one file
                others.append(claim)
    return {name: _entry(name, claims[name]) for name in sorted(claims)}


def unreadable() -> list[str]:
    """What is wrong with distributions whose entry points cannot be read, a sentence each."""
    found = []
    for distribution in distributions():
        try:
            _points(distribution)
        except Exception as error:
            found.append(
                f"the entry points of {label(distribution)} cannot be read ({told(error)}); whatever it registers is "
                "left out. Reinstall or uninstall it."
            )
    return found


def repeated() -> list[str]:
    """Which distributions with tasks are installed in several versions, a sentence each.

    Copies of one version are no fault: setuptools leaves a second ``egg-info`` beside the sources of an editable
    install, and a folder may stand on the path twice.
    """
    found: dict[str, dict[str, str]] = {}
    for distribution, _ in _readable(every=True):
        copies = found.setdefault(_normal(distribution), {})
        copies.setdefault(label(distribution), os.path.realpath(str(distribution.locate_file(""))))
    return [
        f"{name} is installed {len(copies)} times: {', then '.join(f'{one} in {at}' for one, at in copies.items())}. "
        f"The first is used; run `pip uninstall {name}` until it finds none, then install it again."
        for name, copies in found.items()
        if len(copies) > 1
    ]


def find(name: str) -> TaskEntry:
    """The entry of a task that can be tried.

    Raises:
        UnknownTask: there is none of that name; the text names the nearest and all.
        PerlVlmError: it has a ``problem``.
    """
    entries = registered()
    if name in entries:
        if entries[name].problem:
            raise PerlVlmError(entries[name].problem)
        return entries[name]
    if not entries:
        raise UnknownTask(
            f"no task {name!r}: no installed distribution registers any task under the entry-point group {GROUP}. "
            "Install perl-vlm itself with pip (from a checkout: pip install -e .)."
        )
    near = difflib.get_close_matches(name, entries, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownTask(f"there is no task or command {name!r}.{hint} Registered tasks: {', '.join(entries)}.")


def load_command(name: str) -> Callable[[Sequence[str]], int]:
    """A command that another package of perl-vlm's own distribution brings. Raises PerlVlmError where it is missing."""
    for distribution in distributions():
        if _normal(distribution) == _OWN:
            for point in distribution.entry_points:
                if point.group == COMMAND_GROUP and point.name == name:
                    return cast(Callable[[Sequence[str]], int], point.load())
    raise PerlVlmError(f"perl-vlm was installed without its command `{name}`; reinstall it with pip")


def load(name: str) -> type[Task]:
    """Import a task's class and check that it is one. What the import prints goes to stderr.

    Raises:
        PerlVlmError: no such task, or its plugin is broken; the text names the distribution and the cause.
    """
    entry = find(name)
    try:
        with redirect_stdout(sys.stderr):
            task = EntryPoint(entry.name, entry.value, GROUP).load()
        problem = _problem(task, name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # A plugin is foreign code: whatever its import raises, an exit included, is its own fault and is told as such.
        raise PerlVlmError(
            f"task {name!r} of {entry.distribution} cannot be loaded from {entry.value}: {told(error)}. {remedy(entry)}"
        ) from error
    if problem:
        raise PerlVlmError(f"task {name!r} of {entry.distribution} is broken: {entry.value} {problem}. {remedy(entry)}")
    return task


def remedy(entry: TaskEntry) -> str:
    """What to do about a broken plugin."""
    return f"Upgrade or reinstall {entry.distribution.partition(' ')[0]}, or uninstall it."


def plain(text: str) -> str:
    """Foreign text in one line of bounded length, without letters that could steer a terminal."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


def told(error: BaseException) -> str:
    """A foreign error in one line. Even its text may fail."""
    try:
        text = str(error)
    except Exception:
        text = "its message cannot be shown"
    return f"{type(error).__name__}: {plain(text)}"


def label(distribution: Distribution) -> str:
    """A distribution's name and version."""
    found: list[str | None] = [None, None]
    with suppress(Exception):
        found = [distribution.metadata["Name"], distribution.metadata["Version"]]
    # Where its metadata is damaged, the folder still says which it is.
    folder = os.path.basename(str(getattr(distribution, "_path", "an unknown distribution")))
    return plain(f"{found[0] or folder} {found[1] or '(no version)'}")


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


def _entry(name: str, claims: list[_Claim]) -> TaskEntry:
    own = [claim for claim in claims if claim.own]
    if len(own) == 1 and len(claims) > 1:
        others = " and ".join(str(claim) for claim in claims if not claim.own)
        note = (
            f"task {name!r} is {own[0].distribution}'s own; that of {others} has the same name and cannot be used. "
            "Have its author rename it, or uninstall it."
        )
        return TaskEntry(name, own[0].distribution, own[0].value, note=note)
    distribution = " and ".join(dict.fromkeys(claim.distribution for claim in claims))
    values = list(dict.fromkeys(claim.value for claim in claims))
    # The same class under two distributions is no quarrel: one was renamed, and the old name's files were left behind.
    problem = ""
    if len(values) > 1:
        problem = (
            f"task {name!r} is registered twice: by {' and by '.join(map(str, claims))}. Uninstall one of them, or "
            "have its author rename the task."
        )
    elif name in COMMANDS:
        problem = f"task {name!r} of {distribution} has the name of a command of perl-vlm; have its author rename it."
    elif name.startswith("-") or not name.strip():
        problem = f"task {name!r} of {distribution} cannot be typed after `perl-vlm`; have its author rename it."
    return TaskEntry(name, distribution, " or ".join(values), problem)


def _readable(every: bool = False) -> Iterator[tuple[Distribution, list[EntryPoint]]]:
    """The distributions that register tasks, each with them; of copies of one the first on the path, as Python imports
    it, unless ``every`` copy is wanted."""
    seen: set[str] = set()
    for distribution in distributions():
        try:
            points = _points(distribution)
        except Exception:
            continue  # ``unreadable`` tells of it
        if not points:
            continue  # before its name is looked at, which is slow
        name = _normal(distribution)
        if every or name not in seen:
            seen.add(name)
            yield distribution, points


def _points(distribution: Distribution) -> list[EntryPoint]:
    return [point for point in distribution.entry_points if point.group == GROUP]


def _normal(distribution: Distribution) -> str:
    """Its name as indexes compare names, without its version."""
    name = label(distribution).partition(" ")[0]
    return re.sub(r"[-_.]+", "-", name).lower()
