"""Finished runs: what lies in the folder a user named, and its model brought back into memory."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perl_vlm import registry
from perl_vlm.cli_parse import parse
from perl_vlm.config import RunConfig
from perl_vlm.errors import PerlVlmError
from perl_vlm.task import Task
from perl_vlm.train.log import read_log
from perl_vlm.train.rundir import RunDir

STAGES = ("sft", "rm", "ppo")
_OF_NO_MATTER = ("seed", "device", "checkpointing", "report_to", "eval", "steps", "batch_size", "lr")
"""Settings that change nothing of what is learned. The last three stand in the stages' own."""
_BUILT_ON = (("sft", "adapter"), ("ppo", "reward_model"))
"""Settings that may name the folder of another run."""
_WEIGHTS = (".safetensors", ".json", ".bin")


@dataclass(frozen=True)
class FoundRun:
    """A folder with finished stages."""

    path: Path
    label: str
    """How tables call it."""
    task: str
    stages: Mapping[str, RunDir]
    """The finished stages in it that have weights."""
    summary: Mapping[str, Any]
    """Of the run itself."""

    def stage(self, name: str) -> RunDir:
        """Raises PerlVlmError where the run has not that stage."""
        if name not in self.stages:
            raise PerlVlmError(f"{self.path} has no finished {name} stage with weights; it has {self.has}")
        return self.stages[name]

    @property
    def has(self) -> str:
        return ", ".join(self.stages) or "none"


def find_run(given: Path | str, label: str = "") -> FoundRun:
    """Look at a run's folder: that of one stage, or of ``perl-vlm TASK run`` with several in it.

    Raises PerlVlmError, which says what is missing, for anything else: no folder, no settings, not finished, no
    adapter.
    """
    path = Path(given).expanduser()
    if not path.is_dir():
        raise PerlVlmError(f"--runs {given} is no folder. Name folders of finished runs, such as runs/vqa/ppo-tiny-s0")
    run = RunDir(path)
    if not run.config.is_file():
        raise PerlVlmError(f"--runs {path} is no run: it has no config.yaml. Name the folder that --out of a run named")
    summary = run.read_summary()
    if summary is None:
        raise PerlVlmError(f"the run {path} is not finished: it has no summary.json. Continue it with --resume")
    stage, task = summary.get("stage"), summary.get("task")
    if not isinstance(task, str) or not isinstance(stage, str):
        raise PerlVlmError(f"{run.summary} names no task and stage; it is damaged, or no run of perl-vlm")
    candidates = {name: RunDir(path / name) for name in STAGES} if stage == "run" else {stage: run}
    stages = {
        name: own
        for name, own in candidates.items()
        if name in STAGES and own.is_done() and any(map(_loaded, _folders(own)))
    }
    if not stages:
        raise PerlVlmError(
            f"the run {path} has no adapter: no weights under adapter/ or members/. Name a finished run of sft, rm or "
            "ppo, or copy its adapter back"
        )
    return FoundRun(path, label or "/".join(path.resolve().parts[-2:]), task, stages, summary)


def weights_hash(run: RunDir) -> str:
    """A SHA-256 over all that a stage left to be loaded."""
    return hashlib.sha256("".join(map(files_hash, _folders(run))).encode()).hexdigest()


def files_hash(folder: Path) -> str:
    """A SHA-256 over the weights and settings in an adapter's folder."""
    digest = hashlib.sha256()
    for path in sorted(_loaded(folder)):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def kin(run: FoundRun) -> str:
    """A hash of all that a run learned with but the seed, its own and those of the runs that it builds on: runs of one
    kin are the same thing tried again."""
    return hashlib.sha256(
        json.dumps(_learned_with(run.path, run.stages), sort_keys=True, default=str).encode()
    ).hexdigest()


def _learned_with(path: Path, stages: Iterable[str], within: tuple[Path, ...] = ()) -> dict[str, Any]:
    config = RunDir(path).read_config()
    kept = {key: value for key, value in config.items() if key not in (*_OF_NO_MATTER, *STAGES) or key in stages}
    for section, key in _BUILT_ON:
        own = kept.get(section)
        if isinstance(own, Mapping) and isinstance(own.get(key), str):
            found = _run_around(own[key])
            if found is not None and found.path not in (path, *within):
                stage = (found.read_summary() or {}).get("stage")
                known = _learned_with(found.path, STAGES if stage == "run" else [str(stage)], (path, *within))
                kept[section] = {**own, key: known}
    return kept


def _run_around(given: str) -> RunDir | None:
    """The run whose folder it is, or which has the folder (``runs/x/rm``, ``runs/x/rm/adapter``)."""
    try:
        path = Path(given).expanduser()
        if not given or not path.is_dir():
            return None
    except (OSError, RuntimeError):  # a text that is no path
        return None
    return next((run for run in map(RunDir, (path, *path.resolve().parents[:2])) if run.summary.is_file()), None)


def step_seconds(run: RunDir, stage: str) -> float | None:
    """The median time from one logged step of a stage to the next, measurements on the way left out; None where fewer
    than two such gaps were logged."""
    lines = [line for line in read_log(run.metrics) if line.get("stage") == stage]
    gaps = sorted(
        float(later["time"]) - float(sooner["time"])
        for sooner, later in itertools.pairwise(lines)
        if not any(key.startswith("eval/") for key in later)
    )
    return gaps[len(gaps) // 2] if len(gaps) > 1 else None


def _folders(run: RunDir) -> list[Path]:
    return [run.adapter, *sorted(run.path.glob("members/*"))]


def _loaded(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix in _WEIGHTS]


def settings_of(run: RunDir, task: str, changes: Mapping[str, Any]) -> tuple[Task, RunConfig]:
    """The task and the settings that a run began with, some of them changed.

    Args:
        changes: by dotted key, such as ``eval.limit``.

    Raises:
        PerlVlmError: the task is not installed, or the settings are no longer understood.
    """
    kind = registry.load(task)
    arguments = [f"--{key}={value}" for key, value in changes.items() if value is not None]
    config = parse(kind, "eval", ["--config", str(run.config), *arguments]).config
    return kind(config.task), config
