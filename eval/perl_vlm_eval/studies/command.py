"""``perl-vlm study``: parse, make the cells, show what they came to."""

from __future__ import annotations

import dataclasses
import difflib
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perl_vlm import __version__, registry
from perl_vlm.cli_parse import flags_help, typed_values
from perl_vlm.cli_settings import UsageError, settings_of
from perl_vlm.errors import PerlVlmError
from perl_vlm_eval.command import one_process

if TYPE_CHECKING:
    from perl_vlm_eval.studies import Study
    from perl_vlm_eval.studies.base import Plan, StudyFindings
    from perl_vlm_eval.studies.cells import Outcome, Workshop

STUDY = "perl-vlm study"
SCHEMA = 1
_OWN = ("out", "parallel")


def study(argv: Sequence[str]) -> int:
    """Run ``perl-vlm study`` and return the exit code: 0, or 1 where a cell is missing.

    Raises UsageError for arguments that are not understood.
    """
    from perl_vlm_eval.studies import STUDIES

    given = list(argv)
    if not given or given[0] in ("-h", "--help"):
        print(_help(STUDIES))
        return 0
    name = given.pop(0)
    if name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"there is no study {name!r}.{hint} Studies: {', '.join(STUDIES)}")
    kind = STUDIES[name]
    if "-h" in given or "--help" in given:
        print(f"usage: {STUDY} {name} --task TASK [--key value ...] [-- --key value ...]\n\n{kind.about}\n")
        print(flags_help(settings_of(kind.settings(), docs=True)))
        print("  --out FOLDER, --parallel N|GPU,GPU,...; what stands after a lone -- goes to every cell")
        return 0
    one_process(STUDY)
    settings, own = _parsed(kind, name, given)
    registry.find(settings.task)
    out = Path(own.get("out", f"results/{name}-{settings.task}"))
    _check_out(out, name, settings)
    return _run(kind, name, settings, out, _devices(own.get("parallel", "1")))


def _parsed(kind: Study, name: str, given: list[str]) -> tuple[Any, dict[str, str]]:
    extra = given[given.index("--") + 1 :] if "--" in given else []
    given = given[: given.index("--")] if "--" in given else given
    known, values, own = settings_of(kind.settings()), dict[str, Any](), dict[str, str]()
    while given:
        word = given.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not word.startswith("--"):
            raise UsageError(f"unexpected argument {word!r}; `{STUDY} {name} --help` lists its flags")
        if not equals:
            if not given or given[0].startswith("--"):
                raise UsageError(f"--{key} needs a value")
            value = given.pop(0)
        if key in _OWN:
            own[key] = value
        else:
            several = key in known and "tuple" in str(known[key].hint)
            values[key] = value.split(",") if several else value
    if "options" in values:
        raise UsageError("settings for every cell stand after a lone --, such as `-- --rm.steps 100`")
    typed = typed_values(known, values, f"{STUDY} {name}")
    if not typed.get("task"):
        raise UsageError(f"`{STUDY} {name}` needs --task, one of {', '.join(registry.registered())}")
    try:
        return kind.settings(**typed, options=tuple(extra)), own
    except ValueError as error:
        raise UsageError(f"`{STUDY} {name}`: {error}") from error


def _devices(given: str) -> list[str | None]:
    """One entry for each cell that may run at once: GPUs by number, or None where cells share what is there."""
    if given.isdecimal() and int(given) >= 1:
        return [None] * int(given)
    parts = given.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"--parallel is {given!r}; give how many cells run at once, or GPUs by number, such as 0,1,2")
    return [part.strip() for part in parts]


def _run(kind: Study, name: str, settings: Any, out: Path, devices: Sequence[str | None]) -> int:
    from rich.console import Console

    from perl_vlm.train.signals import StopOnSignal, Stopped
    from perl_vlm_eval.report import print_table
    from perl_vlm_eval.studies.cells import Workshop

    began = time.monotonic()
    with StopOnSignal() as stop:
        workshop = Workshop(out, devices, _say, stop)
        try:
            found = drive(kind.plan(settings), workshop)
        except Stopped as stopped:
            text = f"stopped; finished cells are kept in {out / 'cells'}. The same command goes on from there"
            raise Stopped(text, stopped.code) from None
    _write(out, name, settings, found, workshop.outcomes, time.monotonic() - began)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for table in found.tables:
        print_table(console, table.title, table.header, table.rows)
    for verdict in found.verdicts:
        _say(verdict)
    holes = [cell for cell, outcome in workshop.outcomes.items() if not outcome.done]
    if holes:
        _say(f"{len(holes)} of {len(workshop.outcomes)} cells are missing: {', '.join(holes[:8])}")
    _say(f"study: {out / 'study.json'}, report: {out / 'report.html'}")
    return int(bool(holes))


def drive(plan: Plan, workshop: Workshop) -> StudyFindings:
    """Make the cells that a plan asks for until it knows enough."""
    try:
        asked = next(plan)
        while True:
            asked = plan.send(workshop.make(asked))
    except StopIteration as end:
        found: StudyFindings = end.value
        return found


def _write(
    out: Path, name: str, settings: Any, found: StudyFindings, outcomes: Mapping[str, Outcome], seconds: float
) -> None:
    from perl_vlm.report.files import write_atomically
    from perl_vlm.report.html import Report, write_report
    from perl_vlm_eval.results import to_json

    cells = {
        cell: {"done": outcome.done, "why": outcome.why, "seconds": outcome.seconds}
        for cell, outcome in outcomes.items()
    }
    content = {
        "schema": SCHEMA, "study": name, "perl_vlm": __version__, "settings": to_json(settings),
        "figures": to_json(found.figures), "verdicts": list(found.verdicts), "tables": to_json(found.tables),
        "cells": cells,
    }  # fmt: skip
    write_atomically(out / "study.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    holes = [f"{cell} is missing: {outcome.why}" for cell, outcome in outcomes.items() if not outcome.done]
    spent = sum(float(outcome.summary.get("seconds") or 0) for outcome in outcomes.values())
    facts = {
        "Study": name,
        "Cells": f"{len(outcomes)}, {spent / 60:.0f} minutes of training and evaluation in all",
        "Machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "This command": f"{seconds / 60:.0f} minutes",
    }
    write_report(
        out / "report.html",
        Report(
            title=f"perl-vlm study {name}: {settings.task}",
            subtitle="The paper's figures stand beside ours for their shape; models, data and machines are others.",
            tables=found.tables,
            curves=found.curves,
            facts=facts,
            settings=dataclasses.asdict(settings),
            notes=[*found.verdicts, *holes],
        ),
    )


def _check_out(out: Path, name: str, settings: Any) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "cells").is_dir()):
        raise PerlVlmError(f"--out {out} holds something that is no study; give another folder")
    from perl_vlm_eval.results import read_json

    path = out / "study.json"
    before = read_json(path).get("study") if path.is_file() else name
    if before != name:
        raise PerlVlmError(f"--out {out} holds the study {before}; give another folder")


def _help(studies: Mapping[str, Study]) -> str:
    lines = [f"usage: {STUDY} NAME --task TASK [--key value ...] [-- --key value ...]", "", "studies:"]
    lines += [f"  {name:<14}{kind.about}" for name, kind in studies.items()]
    return "\n".join([*lines, "", f"`{STUDY} NAME --help` lists a study's settings."])


def _say(text: str) -> None:
    print(f"study: {text}", flush=True)
