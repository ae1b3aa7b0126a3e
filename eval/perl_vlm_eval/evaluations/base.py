"""What every evaluation is: settings, the runs it is for, the data it reads, and what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from perl_vlm.errors import PerlVlmError
from perl_vlm_eval.identity import Record
from perl_vlm_eval.opened import OpenRun
from perl_vlm_eval.results import Findings
from perl_vlm_eval.runs import FoundRun


class NotFor(PerlVlmError):
    """An evaluation has nothing to measure in a run, for a reason that no other settings would change: its cell is left
    out, not failed."""


class Evaluation:
    """One line of a suite. Subclasses set the class attributes and implement ``records`` and ``measure``.

    Args:
        settings: an instance of the subclass's ``Settings``.

    Raises ValueError for settings that contradict each other.
    """

    kind: ClassVar[str]
    """What a suite's file calls it."""
    Settings: ClassVar[type]
    """A frozen dataclass; its fields are the keys of its line in a suite."""
    needs: ClassVar[Sequence[str]] = ()
    """The stages of which a run must have one to be measured; none is any run."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def applies(self, run: FoundRun) -> str:
        """Why a run cannot be measured so; empty where it can."""
        if not self.needs or any(stage in run.stages for stage in self.needs):
            return ""
        return f"it measures runs of {' or '.join(self.needs)}, and {run.path} has {run.has}"

    def records(self, opened: OpenRun) -> Sequence[Record]:
        """What it reads, as the task gives it: part of the cell's hash."""
        return ()

    def depends_on(self, opened: OpenRun) -> str:
        """What else its figures depend on: part of the cell's hash."""
        return ""

    def measure(self, opened: OpenRun) -> Findings:
        """Measure a run. Raises NotFor where there is nothing to measure, PerlVlmError where it cannot be done."""
        raise NotImplementedError
