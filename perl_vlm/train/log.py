"""What a run says while it runs: ``metrics.jsonl``, ``samples.jsonl``, trackers, a progress bar, plain lines.

Only the main process of a run writes or prints; on the others every call does nothing.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

from perl_vlm.errors import PerlVlmError
from perl_vlm.train.rundir import finite_or_null, flatten, write_whole

Tracker = Literal["none", "tensorboard", "trackio", "wandb"]

_RESERVED = frozenset({"stage", "step", "time"})


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints: rank 0, or the only one."""
    # Not accelerate's PartialState: made here, before the Accelerator, it would fix the backend too early.
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return bool(torch.distributed.get_rank() == 0)
    return os.environ.get("RANK", "0") == "0"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl`` or ``samples.jsonl``; a torn last line is left out, an absent file is empty.

    Raises:
        PerlVlmError: a line before the last is no JSON object; the row is named.
    """
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    rows = path.read_bytes().split(b"\n")
    for row, raw in enumerate(rows, start=1):
        try:
            line = json.loads(raw)
        except ValueError:
            line = None
        if isinstance(line, dict):
            lines.append(line)
        elif row < len(rows):
            raise PerlVlmError(
                f"{path} row {row} is no JSON object: {raw[:60]!r}. Every row is written whole, so the file was "
                "altered from outside; mend or delete that row."
            )
    return lines


class MetricLog:
    """One JSON line for each logged step: ``{"stage", "step", "time", ...}``, time in seconds since 1970.

    Opening it with ``start_step`` drops what this stage logged after that step, so that a resumed run neither doubles
    nor loses a line: log everything of a step, call ``sync``, then save the checkpoint of that step. ``start_step=0``
    means that nothing is done yet and drops all lines of the stage. Lines of other stages stay.

    Args:
        path: the file; the tracker's own files, if any, go beside it.
        stage: ``sft``, ``rm``, ``ppo`` or ``eval``.
        start_step: the finished steps of the checkpoint that the run goes on from.
        tracker: also log there, under ``<stage>/<key>``.
        project: the tracker's name for the run.
        config: the settings that the tracker shows.

    Raises:
        PerlVlmError: the tracker's package is not installed.
    """

    def __init__(
        self,
        path: Path,
        *,
        stage: str,
        start_step: int = 0,
        tracker: Tracker = "none",
        project: str = "perl-vlm",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.stage = stage
        self._tracker = _start_tracker(tracker, project, path.parent, config or {}) if is_main_process() else None
        self._lines = _Lines(path, stage, start_step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the values (numbers or one-element tensors) of one step. NaN and infinities are written as null."""
        reserved = _RESERVED & set(values)
        if reserved:
            raise ValueError(f"{sorted(reserved)} cannot name a metric; every line has them already")
        numbers = {key: value if isinstance(value, int) else float(value) for key, value in values.items()}
        self._lines.append({"stage": self.stage, "step": step, "time": round(time.time(), 3), **numbers})
        if self._tracker is not None:
            self._tracker.log({f"{self.stage}/{key}": value for key, value in numbers.items()}, step=step)

    def read(self) -> list[dict[str, Any]]:
        """All lines of the file, of every stage, null given back as NaN."""
        return [
            {key: math.nan if value is None else value for key, value in line.items()}
            for line in read_log(self._lines.path)
        ]

    def sync(self) -> None:
        """Bring the lines to the disk; to be called before a checkpoint is saved."""
        self._lines.sync()

    def close(self) -> None:
        """Close the file and finish the tracker."""
        self._lines.close()
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None


class SampleLog:
    """One JSON line for each sample: ``{"stage", "step", ...}``. ``start_step`` is as in MetricLog."""

    def __init__(self, path: Path, *, stage: str, start_step: int = 0) -> None:
        self.stage = stage
        self._lines = _Lines(path, stage, start_step)

    def log(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Append samples (JSON values) of one step."""
        for sample in samples:
            if {"stage", "step"} & set(sample):
                raise ValueError("a sample cannot have the keys stage and step; every line has them already")
            self._lines.append({"stage": self.stage, "step": step, **sample})

    def read(self) -> list[dict[str, Any]]:
        """All lines of the file, of every stage."""
        return read_log(self._lines.path)

    def sync(self) -> None:
        """Bring the lines to the disk; to be called before a checkpoint is saved."""
        self._lines.sync()

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class _Lines:
    """The JSONL file behind both logs. Off the main process it writes nothing."""

    def __init__(self, path: Path, stage: str, start_step: int) -> None:
        self.path = path
        self._file: TextIO | None = None
        if is_main_process():
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut(path, stage, start_step)
            self._file = path.open("a", encoding="utf-8", newline="\n")

    def append(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            # ASCII: model text may hold lone surrogates, which UTF-8 cannot.
            self._file.write(json.dumps(finite_or_null(line), allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _cut(path: Path, stage: str, start_step: int) -> None:
    """Rewrite the file without the stage's lines after ``start_step`` and without a torn last line."""
    if not path.exists():
        return
    kept = [
        line
        for line in read_log(path)
        if line.get("stage") != stage or (start_step > 0 and line.get("step", 0) <= start_step)
    ]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    if text.encode() != path.read_bytes():
        write_whole(path, text)


def _start_tracker(tracker: Tracker, project: str, folder: Path, config: Mapping[str, Any]) -> Any:
    if tracker == "none":
        return None
    from accelerate import tracking, utils

    available = {
        "tensorboard": utils.is_tensorboard_available,
        "trackio": utils.is_trackio_available,
        "wandb": utils.is_wandb_available,
    }
    if tracker not in available:
        raise PerlVlmError(f"--report_to {tracker} is not known; it can be none, {', '.join(available)}.")
    if not available[tracker]():
        raise PerlVlmError(
            f"--report_to {tracker} needs the package {tracker}, which is not installed. Install it with `pip install "
            f"{tracker}`, or leave --report_to at none: metrics.jsonl is written either way."
        )
    started: Any
    if tracker == "tensorboard":
        started = tracking.TensorBoardTracker(project, logging_dir=folder / "tensorboard")
    else:
        started = (tracking.TrackioTracker if tracker == "trackio" else tracking.WandBTracker)(project)
    started.start()
    flat = flatten(config)
    started.store_init_configuration(
        {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in flat.items()}
    )
    return started


def progress(total: int, desc: str, initial: int = 0) -> Any:
    """A bar with rate and ETA on stderr, on the main process only, and silent where stderr is no terminal.

    It has tqdm's ``update``, ``set_postfix``, ``close`` and works as a context manager.
    """
    from accelerate.utils import tqdm

    visible = is_main_process() and sys.stderr is not None and sys.stderr.isatty()
    return tqdm(total=total, desc=desc, initial=initial, disable=not visible, main_process_only=False)


def say(text: str) -> None:
    """Print a line on stdout, on the main process only, above a progress bar if one is running."""
    if not is_main_process():
        return
    tqdm = sys.modules.get("tqdm")
    if tqdm is not None and getattr(tqdm.tqdm, "_instances", None):
        tqdm.tqdm.write(text, file=sys.stdout)
    else:
        print(text)
    sys.stdout.flush()
