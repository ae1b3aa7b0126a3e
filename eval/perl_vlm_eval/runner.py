"""Runs suites: one cell for each evaluation and run, kept when it is done, so that nothing is measured twice.

A cell's key is a hash of all that its figures depend on: the version of the results, the evaluation and its settings,
the run's weights, the data, the code that measures. ``OUT/cells/KEY.json`` is a finished one. A cell that fails is told
with its cause and harms no other.
"""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from perl_vlm.errors import PerlVlmError
from perl_vlm.report.files import write_atomically
from perl_vlm.train.signals import StopOnSignal, Stopped
from perl_vlm_eval.evaluations.base import NotFor
from perl_vlm_eval.evaluations.policies import Policies
from perl_vlm_eval.identity import code_hash, data_hash, settings_hash
from perl_vlm_eval.logs import lines_of, plain, sample_file, write_lines
from perl_vlm_eval.opened import OpenRun
from perl_vlm_eval.results import SCHEMA, Cell, cell_from_json, read_json, to_json
from perl_vlm_eval.runs import FoundRun, kin
from perl_vlm_eval.suite import Line, Suite


def run_cells(
    suite: Suite,
    runs: Sequence[FoundRun],
    out: Path,
    *,
    changes: Mapping[str, Any],
    say: Callable[[str], None],
    stop: StopOnSignal,
) -> list[Cell]:
    """Measure every run by every evaluation of a suite that it can be measured by; a run's model is loaded once.

    Args:
        out: the results' folder; finished cells in it are taken over.
        changes: settings that take the place of the runs' own, by dotted key.
        say: takes a line for the terminal.
        stop: a signal ends the work between two batches; what was finished is kept.

    Raises:
        PerlVlmError: no run can be measured by any evaluation.
    """
    (out / "cells").mkdir(parents=True, exist_ok=True)  # what tells a folder of results
    cells: list[Cell] = []
    for run in runs:
        opened: OpenRun | None = None
        own: dict[str, Any] = {"kin": kin(run), "seed": run.summary.get("seed")}
        for line in suite.lines:
            why = line.evaluation.applies(run)
            if why:
                cells.append(Cell(line.name, line.evaluation.kind, run.label, "", "skipped", why))
                continue
            try:
                opened = opened or _opened(run, changes, out, stop)
                cells.append(replace(_cell(line, run, opened, out, say), **own))
            except Stopped:
                raise
            except NotFor as error:
                say(f"{run.label}: {line.name}: left out: {error}")
                cells.append(Cell(line.name, line.evaluation.kind, run.label, "", "skipped", str(error)))
            except Exception as error:  # a task's or a judge's own code may raise anything
                cells.append(_failed(line, run, error, out, say))
        del opened
    if all(cell.status == "skipped" for cell in cells):
        reasons = "; ".join(dict.fromkeys(cell.why for cell in cells))
        raise PerlVlmError(f"no evaluation of the suite {suite.name} can measure any of these runs: {reasons}")
    return cells


def predict(
    suite: Suite,
    runs: Sequence[FoundRun],
    out: Path,
    *,
    changes: Mapping[str, Any],
    say: Callable[[str], None],
    stop: StopOnSignal,
) -> list[Path]:
    """Answer what the suite's evaluations of policies ask, and measure nothing; arguments as of ``run_cells``.

    Returns:
        A file of JSON lines for each, under ``OUT/samples``. The answers are kept as when measuring, which takes them
        over.

    Raises:
        PerlVlmError: no evaluation of the suite asks any of these runs for answers, or a run cannot be loaded.
    """
    (out / "cells").mkdir(parents=True, exist_ok=True)  # so that measuring may take the answers over
    written = []
    for run in runs:
        lines = [
            (line.name, line.evaluation)
            for line in suite.lines
            if isinstance(line.evaluation, Policies) and not line.evaluation.applies(run)
        ]
        opened = _opened(run, changes, out, stop) if lines else None
        for name, evaluation in lines:
            assert opened is not None  # there are lines
            say(f"{run.label}: {name} ...")
            path = sample_file(out, run.label, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_lines(path, evaluation.predict(opened))
            written.append(path)
        del opened
    if not written:
        raise PerlVlmError(
            f"no evaluation of the suite {suite.name} asks any of these runs for answers: that takes `kind: policy` "
            "and a run of ppo or sft"
        )
    return written


def _opened(run: FoundRun, changes: Mapping[str, Any], out: Path, stop: StopOnSignal) -> OpenRun:
    return OpenRun(run, changes, out / "scratch" / plain(run.label), stop)


def keep(out: Path, cell: Cell) -> None:
    """Write a cell's file, ``cells/KEY.json``; of one that has less than it should, ``cells/KEY.partial.json``, which
    is shown and compared, and measured again."""
    whole, partial = (out / "cells" / f"{cell.key}{ending}" for ending in (".json", ".partial.json"))
    path = whole if cell.status == "done" else partial
    write_atomically(path, json.dumps(to_json(cell), allow_nan=False) + "\n")
    if cell.status == "done":
        partial.unlink(missing_ok=True)


def _cell(line: Line, run: FoundRun, opened: OpenRun, out: Path, say: Callable[[str], None]) -> Cell:
    key = _key(line, opened)
    kept = out / "cells" / f"{key}.json"
    if kept.is_file():
        try:
            cell = cell_from_json(read_json(kept))
            say(f"{run.label}: {line.name}: measured before")
            return replace(cell, run=run.label, evaluation=line.name)
        except PerlVlmError as error:
            say(f"{run.label}: {line.name}: measured anew, for {kept} cannot be used: {error}")
    say(f"{run.label}: {line.name} ...")
    began = time.monotonic()
    findings = line.evaluation.measure(opened)
    findings = replace(findings, warnings=[*findings.warnings, *opened.new_notes()])
    took = round(time.monotonic() - began, 2)
    if findings.items.ids:
        write_lines(kept.with_suffix(".jsonl"), lines_of(findings))
    why = "; ".join(findings.missing)
    if why:
        say(f"{run.label}: {line.name}: not all could be measured: {why}")
    status: Literal["done", "failed"] = "failed" if why else "done"
    cell = Cell(line.name, line.evaluation.kind, run.label, key, status, why, took, replace(findings, said=()))
    keep(out, cell)
    return cell


def _key(line: Line, opened: OpenRun) -> str:
    """Raises PerlVlmError where the run's data cannot be read."""
    parts = [
        SCHEMA, line.evaluation.kind, line.settings, opened.weights, settings_hash(opened.config, opened.task),
        data_hash(line.evaluation.records(opened)), line.evaluation.depends_on(opened),
        code_hash(type(line.evaluation)),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _failed(line: Line, run: FoundRun, error: Exception, out: Path, say: Callable[[str], None]) -> Cell:
    why = str(error)
    if not isinstance(error, PerlVlmError):
        log = out / "cells" / f"{plain(run.label)}-{line.name}.log"
        write_atomically(log, "".join(traceback.format_exception(error)))
        why = f"{type(error).__name__}: {error} (more in {log})"
    say(f"{run.label}: {line.name} failed: {why}")
    return Cell(line.name, line.evaluation.kind, run.label, "", "failed", why)
