"""The folder that a run leaves, and how files reach the disk whole.

``runs/<task>/<stage>-<name>/`` holds ``config.yaml``, ``metrics.jsonl``, ``samples.jsonl``, ``checkpoints/``,
``adapter/``, ``README.md``, ``report.html`` and, once the stage is done, ``summary.json``. Nothing here imports torch,
so that an ``--out`` which cannot be used is refused at once.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from perl_vlm.errors import PerlVlmError

NOT_COMPARED = frozenset({"resume", "out"}) | {
    f"ppo.{name}" for name in ("engine_url", "engine_adapters", "engine_timeout", "engine_requests", "canary_every")
}
"""Settings that may differ between a run and its continuation: a server may have moved meanwhile."""

_TEMPORARY = ".tmp-"


def sync_folder(folder: Path) -> None:
    """Bring the folder's list of names to the disk. Windows cannot open a folder and needs no such call."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Bring the file's bytes to the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old text or the new one, never a part: temporary file, sync, rename."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    sync_file(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)


def finite_or_null(value: Any) -> Any:
    """The same JSON value with NaN and infinities, which JSON does not know, turned into null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return value


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key, as the command line spells them: ``{"rm": {"lr": 1}}`` gives ``{"rm.lr": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@dataclass(frozen=True)
class RunDir:
    """One run's folder. Made by ``create``; its attributes say where each thing lies."""

    path: Path

    @classmethod
    def create(cls, out: Path | str, config: Mapping[str, Any], *, resume: bool) -> RunDir:
        """Take ``out`` for a run with this (resolved, plain) config.

        A folder that is absent or empty becomes a new run, with ``resume`` too: a run killed before it wrote anything
        is continued from nothing. Raises PerlVlmError, with nothing touched, if the folder holds another run, or
        something that is no run, or (with ``resume``) a run whose settings differ from the given ones.
        """
        run = cls(Path(out))
        text = _dump(config)
        if run.path.exists() and not run.path.is_dir():
            raise PerlVlmError(
                f"--out {run.path} is a file; a run needs a folder of its own. Give another --out. "
                "Nothing has been touched."
            )
        if run.config.exists():
            if not resume:
                raise PerlVlmError(
                    f"--out {run.path} already holds a run (it has a config.yaml). Add --resume to continue that run, "
                    "or give another --out for a new one. Nothing has been touched."
                )
            _refuse_other_settings(run.config, yaml.safe_load(text))
            return run
        foreign = _foreign_names(run.path)
        if foreign:
            shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise PerlVlmError(
                f"--out {run.path} is not empty and holds no run: there is no config.yaml, but {shown}. Give another "
                "--out, or an empty folder. Nothing has been touched."
            )
        run.path.mkdir(parents=True, exist_ok=True)
        write_whole(run.config, text)
        return run

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON line for each logged step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON line for each logged sample."""
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of ``step-*`` checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter in PEFT's format, with its heads."""
        return self.path / "adapter"

    @property
    def readme(self) -> Path:
        """The model card."""
        return self.path / "README.md"

    @property
    def report(self) -> Path:
        """The self-contained report."""
        return self.path / "report.html"

    @property
    def summary(self) -> Path:
        """The figures of the finished run."""
        return self.path / "summary.json"

    def read_config(self) -> dict[str, Any]:
        """The resolved settings; empty where the folder is no run's."""
        try:
            settings = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return settings if isinstance(settings, dict) else {}

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json`` whole, which marks the run as done: write it last. NaN and infinities become null."""
        write_whole(self.summary, json.dumps(finite_or_null(summary), indent=2, allow_nan=False) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        """The summary, or None where it is absent or no JSON object."""
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return summary if isinstance(summary, dict) else None

    def is_done(self) -> bool:
        """Whether the run finished: its summary is there and readable."""
        return self.read_summary() is not None


def role_folder(given: Path, stage: str) -> Path:
    """Where a stage's adapter lies in what a user named: a whole run, that stage's run, or the adapter itself."""
    for folder in (given / stage / "adapter", given / "adapter"):
        if folder.is_dir():
            return folder
    return given


def fresh_out(base: Path, task: str, stage: str, name: str) -> Path:
    """The first of ``base/task/stage-name``, ``...-2``, ``...-3`` that is absent or empty. Creates nothing.

    Characters of ``name`` that do not belong into a folder's name, such as the slash of a hub name, become ``-``.
    """
    first = _first_out(base, task, stage, name)
    candidate, number = first, 1
    while candidate.exists() and (not candidate.is_dir() or _foreign_names(candidate)):
        number += 1
        candidate = first.with_name(f"{first.name}-{number}")
    return candidate


def latest_out(base: Path, task: str, stage: str, name: str) -> Path | None:
    """The highest-numbered folder that ``fresh_out`` gave and that holds a run; None where there is none."""
    first = _first_out(base, task, stage, name)
    pattern = re.compile(re.escape(first.name) + r"(?:-([2-9]|[1-9]\d+))?\Z")
    numbered = []
    for candidate in first.parent.iterdir() if first.parent.is_dir() else ():
        match = pattern.match(candidate.name)
        if match and (candidate / "config.yaml").is_file():
            numbered.append((int(match[1] or 1), candidate))
    return max(numbered)[1] if numbered else None


def _first_out(base: Path, task: str, stage: str, name: str) -> Path:
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
    return base / task / f"{stage}-{plain}"


def _foreign_names(folder: Path) -> list[str]:
    """What lies in the folder, sorted, but for the temporary files that a killed ``write_whole`` leaves."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(_TEMPORARY))


def _dump(config: Mapping[str, Any]) -> str:
    try:
        return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        raise PerlVlmError(f"the config cannot be written as plain YAML: {error}") from error


def _refuse_other_settings(path: Path, given: Mapping[str, Any]) -> None:
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PerlVlmError(f"{path} cannot be read as YAML, so the run cannot be continued: {error}") from error
    if not isinstance(stored, dict):
        raise PerlVlmError(f"{path} should hold the settings of a run; it holds {type(stored).__name__}.")
    sides = [
        {key: value for key, value in flatten(side).items() if key not in NOT_COMPARED} for side in (stored, given)
    ]
    absent = object()
    differing = []
    for key in sorted({*sides[0], *sides[1]}):
        old, new = (side.get(key, absent) for side in sides)
        # repr tells 1 from 1.0 and from true, and holds NaN equal to itself.
        if repr(old) != repr(new):
            was, now = ("absent" if value is absent else repr(value) for value in (old, new))
            differing.append(f"{key} (the run: {was}; given: {now})")
    if differing:
        raise PerlVlmError(
            f"--resume continues {path.parent} with the settings it began with, but these differ: "
            f"{', '.join(differing)}. Give the same settings, or another --out for a new run. Nothing has been touched."
        )
