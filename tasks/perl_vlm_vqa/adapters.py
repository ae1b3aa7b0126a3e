"""Which adapter reads a data set: the documented columns, RLAIF-V's, or those of ``question_sets``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perl_vlm.data.columns import detect_format, require, to_comparison, to_example, to_rating
from perl_vlm.data.sources import LoadedRows
from perl_vlm.data.tables import open_table
from perl_vlm.errors import BadRecord, PerlVlmError
from perl_vlm.types import Comparison, Example, Rating, RewardHead, Split
from perl_vlm_vqa.question_sets import EasyVqa, Nlvr, VqaV2
from perl_vlm_vqa.reading import Adapter, Row, Source, first_columns

if TYPE_CHECKING:
    from perl_vlm_vqa.task import VqaConfig


class Columns(Source):
    """The documented columns, or RLAIF-V's, which are renamed to them."""

    def __init__(self, config: VqaConfig, *, rlaif_v: bool = False) -> None:
        super().__init__(config)
        self._rlaif_v = rlaif_v
        self._head: RewardHead | None = None

    def examples(self, split: Split) -> Sequence[Example]:
        rows = self.rows(split)

        def convert(row: Row, origin: str) -> Example | None:
            example = to_example(self._renamed(row, origin), origin, root=self.root(rows))
            if example.reference is None and split != "train":
                if "label" in row:
                    return None  # a completion labelled bad is no reference
                remedy = "Add a column `reference`: validation and test compare answers with it"
                raise BadRecord(origin, "the record has no right answer", remedy)
            return example

        return self.collect(rows, convert, split, "examples")

    def preferences(self, split: Split) -> Sequence[Comparison] | Sequence[Rating]:
        rows = self.rows(split)
        make: Any = to_rating if self.reward_head().kind == "labels" else to_comparison
        return self.collect(
            rows,
            lambda row, origin: make(self._renamed(row, origin), origin, root=self.root(rows)),
            split,
            "preferences",
        )

    def reward_head(self) -> RewardHead:
        if self._head is None:
            unpaired = not self._rlaif_v and detect_format(first_columns(self.config)) == "unpaired"
            self._head = RewardHead("labels" if unpaired else "pairs")
        return self._head

    def _renamed(self, row: Row, origin: str) -> Row:
        if not self._rlaif_v:
            return row
        require(row, ["image", "question", "chosen", "rejected"], origin)
        return {"prompt": row["question"], **{key: row[key] for key in ("image", "chosen", "rejected")}}


def open_adapter(config: VqaConfig) -> Adapter:
    """Return the adapter for the configuration's format, recognising it where that is ``auto``."""
    kind: str = config.format
    if kind == "auto":
        kind = _recognise(config)
    if kind in ("easy_vqa", "nlvr"):
        _require_files(kind, Path(config.path or ""))
    if kind == "easy_vqa":
        return EasyVqa(config)
    if kind == "nlvr":
        return Nlvr(config)
    if kind == "vqav2":
        return VqaV2(config)
    return Columns(config, rlaif_v=kind == "rlaif_v")


def _recognise(config: VqaConfig) -> str:
    """Tell the format by a folder's files, else by the columns of its first record."""
    folder = Path(config.path) if config.source == "local" and config.path else None
    if folder is not None and (folder / "validation_images.zip").is_file():
        columns = LoadedRows(open_table(folder / "validation.jsonl.gz", ""), range(1), folder).columns
        return "nlvr" if "sentence" in columns else "easy_vqa"
    columns = first_columns(config)
    if {"question", "chosen", "rejected"} <= set(columns):
        return "rlaif_v"
    if "question" in columns and {"multiple_choice_answer", "answers", "answer"} & set(columns):
        return "vqav2"
    return "columns"


def _require_files(kind: str, folder: Path) -> None:
    parts = ("train", "validation") if kind == "easy_vqa" else ("validation",)
    names = [name for part in parts for name in (f"{part}.jsonl.gz", f"{part}_images.zip")]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) if folder.is_dir() else "no folder"
        raise PerlVlmError(
            f"{folder} is no {kind} folder: {', '.join(missing)} is missing; found: {found}. "
            "The README of the vqa task says what such a folder holds."
        )
