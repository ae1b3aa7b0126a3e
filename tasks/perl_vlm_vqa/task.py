"""The VQA task: answer a short question about a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from perl_vlm.data.adapters import Adapter, DataTask, What
from perl_vlm.data.config import ImageDataConfig
from perl_vlm.errors import PerlVlmError
from perl_vlm.types import Example, Split
from perl_vlm_vqa.scoring import judge, yes_no_totals

Kind = Literal["color", "shape", "count", "exists", "check"]


@dataclass(frozen=True)
class VqaConfig(ImageDataConfig):
    """Where the questions come from."""

    HUB: ClassVar[Mapping[str, str]] = {
        "vqav2": "lmms-lab/VQAv2",
        "pope": "lmms-lab/POPE",
        "rlaif_v": "openbmb/RLAIF-V-Dataset",
        "rlhf_v": "openbmb/RLHF-V-Dataset",
    }
    # There is no training split there, and the others have no answers.
    HUB_SPLIT: ClassVar[Mapping[str, str]] = {"vqav2": "validation"}
    LOCAL_ONLY = ("easy_vqa", "nlvr")

    format: Literal["auto", "columns", "easy_vqa", "nlvr", "vqav2", "pope", "rlaif_v", "rlhf_v"] = "auto"
    """How records are written; auto tells by the files or the columns."""
    instruction: str = ""
    """For easy_vqa, nlvr, vqav2 and pope: put behind every question on a line of its own, such as "Answer the question
    using a single word or phrase."."""
    kinds: tuple[Kind, ...] = ("color", "shape", "count", "exists", "check")
    """For generated: the kinds of questions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "kinds", tuple(self.kinds))  # a YAML file gives a list
        if not self.kinds:
            raise ValueError("task.kinds is empty; name at least one kind of question")


class VQA(DataTask):
    """Questions about pictures, judged by exact match or, where ten people answered, by how many of them said so."""

    name = "vqa"
    modality = "image+text"
    primary_metric = "accuracy"
    Config = VqaConfig

    config: VqaConfig

    def generated(self, what: What, split: Split) -> Sequence[Any]:
        """Scenes drawn on the fly; the right answer against a plausible wrong one."""
        from perl_vlm_vqa.generated import GeneratedComparisons, GeneratedExamples

        make = GeneratedExamples if what == "examples" else GeneratedComparisons
        return make(split, self.config.size(split), self.config.data_seed, self.config.kinds)

    def open_adapter(self) -> Adapter:
        """The adapter of the configured format."""
        from perl_vlm_vqa.adapters import open_adapter

        return open_adapter(self.config)

    def evaluate(self, example: Example, response: str) -> dict[str, float]:
        """Judge one answer.

        Returns:
            ``accuracy``: 1 where the answer equals the reference after ``normalise``, else 0. Where several annotators
            answered (``answers`` in the metadata), equal after ``vqa_normalise`` is enough, and ``vqa_accuracy``, the
            official figure, is given too; where ten did, it is the accuracy. Of a probe (``probe`` in the metadata)
            the first word is the answer. Where the reference is yes or no, also ``yes_ratio``, 1 for yes, and
            ``unparsed``, 1 for neither.

        Raises:
            PerlVlmError: the example has no reference.
        """
        if example.reference is None:
            raise PerlVlmError(
                f"{example.origin or example.id} has no right answer to compare with. Add a column `reference`."
            )
        return judge(example, response)

    def totals(self, judged: Sequence[tuple[Example, dict[str, float]]]) -> dict[str, float]:
        """``precision``, ``recall`` and ``f1`` of saying yes, over the questions whose right answer is yes or no."""
        return yes_no_totals(judged)

    def verify(self, example: Example, response: str) -> float | None:
        """The ``accuracy`` of ``evaluate``: 1 for the reference answer and 0 for another or, where ten people answered,
        the VQA accuracy, from 0 to 1. None without a reference."""
        return None if example.reference is None else judge(example, response)["accuracy"]
