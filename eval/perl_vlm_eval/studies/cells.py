"""Cells of a study: ordinary perl-vlm commands, each a process and a run folder of its own.

A finished cell is never run again, an unfinished one is continued with ``--resume``, and one that fails is a hole in
the study's tables: whatever needs it is left out with it, everything else goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from perl_vlm.errors import PerlVlmError
from perl_vlm.train.log import read_log
from perl_vlm.train.rundir import RunDir
from perl_vlm.train.signals import StopOnSignal
from perl_vlm_eval.results import read_json
from perl_vlm_eval.runs import step_seconds

PATIENCE = 30.0
"""Seconds that a cell has for saving its state once the study was asked to stop."""


@dataclass(frozen=True)
class StudyCell:
    """One command."""

    name: str
    """Unique within the study; its folder under ``OUT/cells`` begins with it."""
    arguments: Sequence[str]
    """Of ``perl-vlm``, without ``--out``: task, verb, ``--key``, value, ..."""
    needs: Sequence[str] = ()
    """Cells that must be done before."""
    basis: str = ""
    """What it builds on beside its arguments, as a hash: resolved settings, the files of its model and data."""
    wants: str = ""
    """Of ``perl-vlm eval`` of a suite: the kind of evaluation without which it is a hole; others may be missing."""

    @property
    def folder(self) -> str:
        """Its folder's name. With other settings, or on other files, it is another cell."""
        parts = [*self.arguments, *filter(None, [self.basis])]
        return f"{self.name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]}"

    @property
    def measures(self) -> bool:
        """Whether it is ``perl-vlm eval`` of a suite, not a stage of a task."""
        return self.arguments[0] == "eval"


@dataclass(frozen=True)
class Outcome:
    """What became of a cell."""

    folder: Path
    why: str = ""
    """Why it is a hole; empty where it is done."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """A run's summary, or a suite's results."""

    @property
    def done(self) -> bool:
        return not self.why

    @property
    def metrics(self) -> Mapping[str, float]:
        """The figures of its summary."""
        return self.summary.get("metrics", {})

    @property
    def seconds(self) -> float | None:
        """What it took; of a suite's results the sum over its cells."""
        if "cells" in self.summary:
            return sum(cell["seconds"] for cell in self.summary["cells"])
        found: float | None = self.summary.get("seconds")
        return found

    def log(self, stage: str) -> list[dict[str, Any]]:
        """What a stage of it logged."""
        return [line for line in read_log(RunDir(self.folder).metrics) if line.get("stage") == stage]

    def step_seconds(self, stage: str) -> float | None:
        """The median time from one logged step of a stage to the next; None where fewer than three were."""
        return step_seconds(RunDir(self.folder), stage)


class Workshop:
    """Where a study's cells are made.

    Args:
        out: the study's folder.
        devices: what ``CUDA_VISIBLE_DEVICES`` is for each cell that runs beside others; one entry, None, where cells
            run one after the other on whatever is there.
        say: takes a line for the terminal.
        stop: a signal ends running cells, which save their state, and starts no further ones.
    """

    def __init__(
        self, out: Path, devices: Sequence[str | None], say: Callable[[str], None], stop: StopOnSignal
    ) -> None:
        self.out, self._say, self._stop = out.resolve(), say, stop
        self._free: Queue[str | None] = Queue()
        for device in devices:
            self._free.put(device)
        self._at_once = self._side_by_side = len(devices)
        self.outcomes: dict[str, Outcome] = {}

    def make(self, cells: Sequence[StudyCell]) -> dict[str, Outcome]:
        """Run cells, each after those it needs, and return what became of all of them.

        Raises:
            Stopped: the study was asked to stop.
            PerlVlmError: two cells have one name, or one needs what is no cell.
        """
        waiting = {cell.name: cell for cell in cells if cell.name not in self.outcomes}
        self._side_by_side = min(self._at_once, len(waiting))
        if len({cell.name for cell in cells}) < len(cells):
            raise PerlVlmError("two cells of the study have the same name; this is a fault of the study")
        known = {*self.outcomes, *(cell.name for cell in cells)}
        unknown = [one for cell in cells for one in cell.needs if one not in known]
        if unknown:
            raise PerlVlmError(f"{unknown[0]} is needed and is no cell of the study; this is a fault of the study")
        running: dict[Future[Outcome], str] = {}
        with ThreadPoolExecutor(self._at_once) as pool:
            while waiting or running:
                for name, cell in list(waiting.items()):
                    missing = [one for one in cell.needs if one not in self.outcomes or not self.outcomes[one].done]
                    if any(one not in self.outcomes for one in missing):
                        continue
                    del waiting[name]
                    if missing:
                        self.outcomes[name] = Outcome(self.out / "cells" / cell.folder, f"{missing[0]} is missing")
                    else:
                        running[pool.submit(self._run, cell)] = name
                if not running:
                    continue
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    self.outcomes[running.pop(future)] = future.result()
                if self._stop.requested:
                    waiting.clear()
        self._stop.raise_if_requested()
        return {cell.name: self.outcomes[cell.name] for cell in cells}

    def _run(self, cell: StudyCell) -> Outcome:
        folder = self.out / "cells" / cell.folder
        if self._stop.requested:
            return Outcome(folder, "the study was stopped")
        log = folder.with_name(f"{folder.name}.log")
        summary = self._product(cell, folder)
        if summary is not None:
            return Outcome(folder, "", summary)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A suite's results go on by themselves.
        resumed = ["--resume"] if not cell.measures and (folder / "config.yaml").is_file() else []
        device = self._free.get()
        began, before = time.monotonic(), log.stat().st_size if log.is_file() else 0
        try:
            code = self._wait([*cell.arguments, "--out", str(folder), *resumed], log, device)
        finally:
            self._free.put(device)
        summary, took = self._product(cell, folder), time.monotonic() - began
        # A suite with a hole in it ends in 1 and has results all the same.
        if summary is not None and (code == 0 or cell.measures):
            self._say(f"{cell.name}: done in {took:.0f} s")
            return Outcome(folder, "", summary)
        why = _last_line(log, before) or f"exit code {code}"
        self._say(f"{cell.name}: failed after {took:.0f} s: {why}")
        return Outcome(folder, why)

    def _product(self, cell: StudyCell, folder: Path) -> Mapping[str, Any] | None:
        """What marks a cell as done: a run's summary, or a suite's results with what is wanted of them; None where it
        is not there."""
        if not cell.measures:
            return RunDir(folder).read_summary()
        path = folder / "results.json"
        if not path.is_file():
            return None
        content: Mapping[str, Any] = read_json(path)
        done = [one["kind"] for one in content["cells"] if one["status"] == "done"]
        return content if cell.wants in done else None

    def _environment(self, device: str | None) -> dict[str, str]:
        """What a cell's process is started with. Processes that each take all cores wait for one another most of the
        time, so cells that run at once share them, unless the user has said how many threads there shall be."""
        found = dict(os.environ)
        if device is not None:
            found["CUDA_VISIBLE_DEVICES"] = device
        if self._side_by_side > 1:
            found.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // self._side_by_side)))
        return found

    def _wait(self, arguments: Sequence[str], log: Path, device: str | None) -> int:
        environment = self._environment(device)
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "perl_vlm.cli", *arguments],
                stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip
            while True:
                try:
                    return process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    if self._stop.requested:
                        process.terminate()
                        try:
                            return process.wait(timeout=PATIENCE)
                        except subprocess.TimeoutExpired:
                            process.kill()
                            return process.wait()


def _cores() -> int:
    """How many this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@cache
def bare_bytes() -> int:
    """What a cell's process holds before it has a model, where peaks are those of whole processes: 0 on a GPU, whose
    allocator counts for itself."""
    if torch.cuda.is_available():
        return 0
    code = (
        "import perl_vlm.train.pipeline, perl_vlm.train.costs as costs, torch; "
        "print(costs.peak_memory_bytes(torch.device('cpu')) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    return int(done.stdout.split()[-1])


def _last_line(log: Path, before: int) -> str:
    """What a cell said at the end of this attempt, an error's text where there is one.

    Args:
        before: bytes that earlier attempts left.
    """
    text = log.read_bytes()[before:].decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("perl-vlm: error:")]
    return (errors or lines or [""])[-1].removeprefix("perl-vlm: error: ")[:400]
