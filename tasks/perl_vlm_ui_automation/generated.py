"""Records about drawn screens, made when they are asked for.

Record i of a split is a function of (data_seed, split, i, what) alone, so nothing is stored and no two machines differ.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, TypeVar

from perl_vlm.data.lazy import Lazy
from perl_vlm.types import Comparison, Example, ImageSlot, Message, Rating, Split
from perl_vlm_ui_automation.actions import format_action
from perl_vlm_ui_automation.elements import describe_elements
from perl_vlm_ui_automation.screens import SIZE, Job, random_job

if TYPE_CHECKING:
    from perl_vlm_ui_automation.task import UiAutomationConfig

Record = TypeVar("Record")


class _Jobs(Lazy[Record]):
    """Records about a job each."""

    def __init__(self, config: UiAutomationConfig, split: Split) -> None:
        super().__init__(split, config.size(split), config.data_seed)
        self._config = config

    def _job(self, index: int) -> tuple[Job, random.Random, dict[str, Any]]:
        """The job, what decides on the rest of the record, and what all records about it share."""
        config = self._config
        rng = self._rng(index)
        # Where no elements are listed, none can be named.
        by_point = config.target == "point" or not config.elements
        job = random_job(rng, self._split, config.kinds, by_point)
        elements = job.screen.elements() if config.elements else []
        text = "\n".join(filter(None, (job.instruction, describe_elements(elements))))
        metadata: dict[str, Any] = {
            "kind": job.kind,
            "frame": [SIZE, SIZE],
            "elements": {str(element.number): list(element.box or ()) for element in elements},
        }
        if job.box is not None:
            metadata["boxes"] = [list(job.box)]
        return job, rng, {
            "id": f"generated-{config.data_seed}-{self._split}-{self.what}-{index}",
            "messages": (Message("user", (ImageSlot(), text)),),
            "images": (job.screen,),
            "metadata": metadata,
            "origin": f"generated {self._split} {self.what} {index}",
        }  # fmt: skip


class GeneratedExamples(_Jobs[Example]):
    """Instructions with right actions; ``metadata["kind"]`` is the kind of instruction."""

    what = "example"

    def _record(self, index: int) -> Example:
        job, _, common = self._job(index)
        return Example(reference=format_action(job.right), **common)


class GeneratedDemonstrations(_Jobs[Example]):
    """Instructions with what a hasty person did: of two shapes of the right colour, mostly the first is clicked,
    and mostly the first shape of all is what is typed."""

    what = "demonstration"

    def _record(self, index: int) -> Example:
        job, _, common = self._job(index)
        return Example(reference=format_action(job.hasty), **common)


class GeneratedComparisons(_Jobs[Comparison]):
    """The right action against a plausible wrong one."""

    what = "preference"

    def _record(self, index: int) -> Comparison:
        job, _, common = self._job(index)
        return Comparison(chosen=format_action(job.right), rejected=format_action(job.wrong), **common)


class GeneratedRatings(_Jobs[Rating]):
    """A right or a plausible wrong action with its label, as many of one as of the other."""

    what = "preference"

    def _record(self, index: int) -> Rating:
        job, rng, common = self._job(index)
        good = rng.random() < 0.5
        return Rating(response=format_action(job.right if good else job.wrong), label=good, **common)
