"""The VQA task: answer a short question about a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from perl_vlm.errors import BadRecord, PerlVlmError
from perl_vlm.task import Task
from perl_vlm.types import Comparison, Example, Rating, RewardHead, Split

if TYPE_CHECKING:
    from perl_vlm_vqa.reading import Adapter

Kind = Literal["color", "shape", "count", "exists", "check"]
_ENOUGH_VOTES = 3


@dataclass(frozen=True)
class VqaConfig:
    """Where the questions come from."""

    source: Literal["generated", "local", "hub"] = "generated"
    """``generated``: scenes drawn on the fly; ``local``: task.path; ``hub``: task.dataset."""
    path: str | None = None
    """For local: a folder, or a JSON lines, JSON, Parquet or CSV file."""
    dataset: str | None = None
    """For hub: the data set's name, such as openbmb/RLAIF-V-Dataset."""
    dataset_config: str | None = None
    """For hub: the data set's configuration, where it has several."""
    format: Literal["auto", "columns", "easy_vqa", "nlvr", "vqav2", "rlaif_v"] = "auto"
    """How records are written; auto tells by the files or the columns."""
    image_root: str | None = None
    """The folder that image paths are relative to and must lie under; task.path's folder when not given."""
    on_bad_record: Literal["error", "skip"] = "error"
    """Stop at records that cannot be used, naming them, or leave them out and count them."""
    check_images: bool = True
    """Decode every picture once before training, so that a bad one is named then and not in the middle of a run."""
    train_size: int = 20_000
    """Training records: how many are generated, or at most taken (0 for all)."""
    validation_size: int = 2048
    """Validation records, likewise."""
    test_size: int = 2048
    """Test records, likewise."""
    data_seed: int = 0
    """Seeds generated records, and the choice of records and of wrong answers elsewhere."""
    kinds: tuple[Kind, ...] = ("color", "shape", "count", "exists", "check")
    """For generated: the kinds of questions."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))  # a YAML file gives a list
        if self.source == "local" and not self.path:
            raise ValueError("task.source is local, but task.path is not given; it names a data file or a folder")
        if self.source == "hub" and not self.dataset:
            raise ValueError("task.source is hub, but task.dataset is not given; it is a name such as owner/data")
        if self.source != "local" and self.path:
            raise ValueError(f"task.path is given, but task.source is {self.source}; add --task.source local")
        if self.source != "hub" and self.dataset:
            raise ValueError(f"task.dataset is given, but task.source is {self.source}; add --task.source hub")
        if self.source == "hub" and self.format in ("easy_vqa", "nlvr"):
            raise ValueError(f"task.format {self.format} reads a local folder; use --task.source local --task.path")
        if not self.kinds:
            raise ValueError("task.kinds is empty; name at least one kind of question")
        least = 1 if self.source == "generated" else 0
        for name in ("train_size", "validation_size", "test_size"):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"task.{name} is {value}; with source {self.source} it must be at least {least}")

    def size(self, split: Split) -> int:
        """The number of records of a split, or 0 for all."""
        return {"train": self.train_size, "validation": self.validation_size, "test": self.test_size}[split]


class VQA(Task):
    """Questions about pictures, judged by exact match."""

    name = "vqa"
    modality = "image+text"
    primary_metric = "accuracy"
    Config = VqaConfig

    config: VqaConfig

    def __init__(self, config: VqaConfig | None = None) -> None:
        super().__init__(config)
        self._opened: Adapter | None = None
        self._records: dict[tuple[str, Split], Sequence[Any]] = {}

    def examples(self, split: Split) -> Sequence[Example]:
        """Questions with their reference answers."""
        if self.config.source == "generated":
            from perl_vlm_vqa.generated import GeneratedExamples

            return GeneratedExamples(split, self.config.size(split), self.config.data_seed, self.config.kinds)
        if ("examples", split) not in self._records:
            self._records["examples", split] = self._adapter().examples(split)
        return self._records["examples", split]

    def preferences(self, split: Split) -> Sequence[Comparison] | Sequence[Rating]:
        """The right answer against a plausible wrong one, or the data set's own preferences or labels."""
        if self.config.source == "generated":
            from perl_vlm_vqa.generated import GeneratedComparisons

            return GeneratedComparisons(split, self.config.size(split), self.config.data_seed, self.config.kinds)
        if ("preferences", split) not in self._records:
            self._records["preferences", split] = self._adapter().preferences(split)
        return self._records["preferences", split]

    def reward_head(self) -> RewardHead:
        """A scalar trained on pairs, or on labels where the data has prompt, completion and label."""
        return RewardHead("pairs") if self.config.source == "generated" else self._adapter().reward_head()

    def evaluate(self, example: Example, response: str) -> dict[str, float]:
        """Judge one answer.

        Returns:
            ``accuracy``: 1 where the answer equals the reference after ``normalise``, else 0. Where the metadata holds
            ``answers``, also ``vqav2_accuracy`` = min(1, matching annotators / 3) (Antol et al. 2015, VQA; without
            the averaging over subsets of annotators and the spelling rules of the official script).

        Raises:
            PerlVlmError: the example has no reference.
        """
        if example.reference is None:
            raise PerlVlmError(
                f"{example.origin or example.id} has no right answer to compare with. Add a column `reference`."
            )
        answer = normalise(response)
        scores = {"accuracy": float(answer == normalise(example.reference))}
        answers = example.metadata.get("answers")
        if answers:
            matches = sum(answer == normalise(one) for one in answers)
            scores["vqav2_accuracy"] = min(1.0, matches / _ENOUGH_VOTES)
        return scores

    def verify(self, example: Example, response: str) -> float | None:
        """1 for the reference answer, 0 for another, None without a reference."""
        if example.reference is None:
            return None
        return float(normalise(response) == normalise(example.reference))

    @property
    def skipped(self) -> dict[str, list[BadRecord]]:
        """The records left out so far under ``on_bad_record: skip``, by split and sort."""
        return {} if self._opened is None else self._opened.skipped

    def _adapter(self) -> Adapter:
        if self._opened is None:
            from perl_vlm_vqa.adapters import open_adapter

            self._opened = open_adapter(self.config)
        return self._opened


def normalise(answer: str) -> str:
    """Lower case, single spaces, no trailing period."""
    return " ".join(answer.lower().split()).removesuffix(".").rstrip()
