"""A study's cells: run once, continued, left out where what they need is missing."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from perl_vlm.errors import PerlVlmError
from perl_vlm.train.signals import StopOnSignal, Stopped
from perl_vlm_eval.studies import cells
from perl_vlm_eval.studies.cells import StudyCell, Workshop

Run = tuple[list[str], "str | None"]


class Bench(Workshop):
    """Cells that write their summaries themselves; those named ``bad`` fail."""

    def __init__(self, out: Path, devices: Sequence[str | None] = (None,), seconds: float = 0.0) -> None:
        self.said: list[str] = []
        self.runs: list[Run] = []
        self.at_once, self.most, self.seconds = 0, 0, seconds
        self.guard = threading.Lock()
        self.stop = StopOnSignal()
        super().__init__(out, devices, self.said.append, self.stop)

    def _wait(self, arguments: Sequence[str], log: Path, device: str | None) -> int:
        with self.guard:
            self.runs.append((list(arguments), device))
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        time.sleep(self.seconds)
        with self.guard:
            self.at_once -= 1
        folder = Path(arguments[arguments.index("--out") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text("seed: 0\n")
        if folder.name.startswith("bad"):
            log.write_text("a line\nperl-vlm: error: no memory for this\nanother\n")
            return 1
        (folder / "summary.json").write_text(json.dumps({"metrics": {"x": len(self.runs)}}))
        log.write_text("fine\n")
        return 0


def cell(name: str, *needs: str, lr: str = "1") -> StudyCell:
    return StudyCell(name, ["vqa", "rm", "--rm.lr", lr], needs)


def name_of(run: Run) -> str:
    """The cell that a command was for."""
    return Path(run[0][run[0].index("--out") + 1]).name.rpartition("-")[0]


def test_cells_run_once_in_the_order_of_their_needs(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    found = bench.make([cell("b", "a"), cell("a"), cell("c", "b")])
    assert [name_of(run) for run in bench.runs] == ["a", "b", "c"]
    assert all(outcome.done for outcome in found.values())
    assert found["a"].metrics == {"x": 1}
    again = Bench(tmp_path)
    assert again.make([cell("a"), cell("b", "a")])["b"].metrics == {"x": 2}
    assert again.runs == []


def test_a_failed_cell_is_a_hole_and_so_is_what_needs_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    found = bench.make([cell("bad"), cell("after", "bad"), cell("beside")])
    assert found["bad"].why == "no memory for this"
    assert found["after"].why == "bad is missing"
    assert found["beside"].done
    assert any("bad: failed" in line for line in bench.said)
    assert bench.make([cell("later", "after", "beside")])["later"].why == "after is missing"
    again = Bench(tmp_path)
    again.make([cell("bad")])
    assert "--resume" in again.runs[0][0], "it left a folder to go on from"


def test_as_many_at_once_as_there_are_places(tmp_path: Path) -> None:
    bench = Bench(tmp_path, ("0", "3"), seconds=0.05)
    bench.make([cell(str(place)) for place in range(6)])
    assert bench.most == 2
    assert {device for _, device in bench.runs} == {"0", "3"}


@pytest.mark.parametrize(
    ("devices", "own", "threads"),
    [((None,), None, None), ((None, None, None), None, "2"), (("0",) * 9, None, "1"), ((None, None), "5", "5")],
)
def test_cells_at_once_share_the_cores(
    devices: Sequence[str | None], own: str | None, threads: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "_cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    seen = tmp_path / "seen"
    monkeypatch.setattr(sys, "executable", str(seen))
    seen.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS $CUDA_VISIBLE_DEVICES" > "$0.said"\nexit 3\n')
    seen.chmod(0o755)
    workshop = Workshop(tmp_path / "out", devices, lambda text: None, StopOnSignal())
    assert not any(found.done for found in workshop.make([cell(str(at)) for at in range(len(devices))]).values())
    said = (tmp_path / "seen.said").read_text().rstrip("\n").split(" ")
    assert said == [threads or "", devices[0] or os.environ.get("CUDA_VISIBLE_DEVICES", "")]


def test_a_cell_that_is_alone_has_all_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    bench = Bench(tmp_path, (None,) * 4)
    bench.make([cell("a")])
    assert "OMP_NUM_THREADS" not in bench._environment(None)
    bench.make([cell("b"), cell("c")])
    assert bench._environment(None)["OMP_NUM_THREADS"] == str(max(1, cells._cores() // 2))


def test_a_stop_starts_none_of_those_that_wait(tmp_path: Path) -> None:
    class Stopping(Bench):
        def _wait(self, arguments: Sequence[str], log: Path, device: str | None) -> int:
            self.stop.code = 130
            return super()._wait(arguments, log, device)

    bench = Stopping(tmp_path)
    with pytest.raises(Stopped):
        bench.make([cell(str(place)) for place in range(5)])
    assert len(bench.runs) == 1
    assert not any("failed" in line for line in bench.said)


def test_an_older_attempt_s_error_is_not_this_one_s(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    folder = tmp_path / "cells" / cell("silent").folder
    folder.parent.mkdir(parents=True)
    folder.with_name(f"{folder.name}.log").write_text("perl-vlm: error: an old one\n")

    class Silent(Bench):
        def _wait(self, arguments: Sequence[str], log: Path, device: str | None) -> int:
            return 9

    assert Silent(tmp_path).make([cell("silent")])["silent"].why == "exit code 9"
    assert bench.runs == []


def test_other_settings_are_another_cell(tmp_path: Path) -> None:
    Bench(tmp_path).make([cell("a")])
    again = Bench(tmp_path)
    again.make([cell("a", lr="2")])
    assert len(again.runs) == 1
    assert Bench(tmp_path).make([cell("a")])["a"].metrics == {"x": 1}, "both are kept"
    with pytest.raises(PerlVlmError, match="nobody is needed and is no cell"):
        Bench(tmp_path).make([cell("c", "nobody")])
    with pytest.raises(PerlVlmError, match="same name"):
        Bench(tmp_path).make([cell("a"), cell("a", lr="2")])


def test_a_suite_without_what_is_wanted_is_a_hole_and_tried_again(tmp_path: Path) -> None:
    class Suite(Bench):
        status = "failed"

        def _wait(self, arguments: Sequence[str], log: Path, device: str | None) -> int:
            self.runs.append((list(arguments), device))
            folder = Path(arguments[arguments.index("--out") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            cells = [{"kind": "hacking", "status": self.status}, {"kind": "factuality", "status": "failed"}]
            (folder / "results.json").write_text(json.dumps({"cells": cells}))
            log.write_text("eval: hacking failed: no reward\n")
            return 1

    wanted = StudyCell("way", ["eval", "--runs", "x"], wants="hacking")
    bench = Suite(tmp_path)
    assert bench.make([wanted])["way"].why == "eval: hacking failed: no reward"
    again = Suite(tmp_path)
    again.status = "done"
    assert again.make([wanted])["way"].done
    assert len(again.runs) == 1
    assert "--resume" not in again.runs[0][0]
    assert Suite(tmp_path).make([wanted])["way"].done


def test_a_stop_starts_nothing_further(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.stop.request()
    with pytest.raises(Stopped):
        bench.make([cell("a"), cell("b", "a")])
    assert len(bench.runs) <= 1


def test_a_real_process_says_why_it_failed(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, [None], lambda text: None, StopOnSignal())
    found = workshop.make([StudyCell("typo", ["vqa", "rm", "--rm.stepz", "3"])])
    assert "--rm.stepz" in found["typo"].why


@pytest.mark.parametrize("obstinate", [False, True])
def test_a_running_cell_is_stopped_and_may_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstinate: bool
) -> None:
    program = tmp_path / "program"
    on_term = "true" if obstinate else f"echo > {tmp_path / 'saved'}; exit 143"
    program.write_text(
        f"#!/bin/sh\ntrap '{on_term}' TERM\necho $$ > {tmp_path / 'began'}\nwhile :; do sleep 0.05; done\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(cells.sys, "executable", str(program))
    monkeypatch.setattr(cells, "PATIENCE", 0.5)
    stop = StopOnSignal()

    def ask() -> None:
        while not (tmp_path / "began").exists() or not (tmp_path / "began").read_text().strip():
            time.sleep(0.02)
        stop.request()

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(Stopped):
        Workshop(tmp_path / "out", [None], lambda text: None, stop).make([StudyCell("long", ["vqa", "rm"])])
    asking.join()
    assert (tmp_path / "saved").exists() == (not obstinate)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "began").read_text()), 0)
