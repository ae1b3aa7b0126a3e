"""ScreenSpot and data sets like it: a screenshot, an instruction, the box of what it means -> a click inside.

Columns: ``image`` (or ``img_filename``, ``file_name``), ``bbox``, ``instruction``, and, where they are there,
``data_type`` (text or icon) and ``data_source`` (the platform). Boxes come in three ways, see ``read_box``. ScreenSpot
and ScreenSpot-v2 are benchmarks: their published folders serve as ``test`` alone.
"""

from __future__ import annotations

import math
import random
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from perl_vlm.data.adapters import Row, Source, first_row, open_configured
from perl_vlm.data.columns import missing_columns
from perl_vlm.data.images import ZipMember, as_image_source
from perl_vlm.data.messages import check_text, show
from perl_vlm.data.sources import LoadedRows, Opened
from perl_vlm.data.tables import Chain, Renamed, Table, open_table
from perl_vlm.errors import Absent, BadRecord, PerlVlmError
from perl_vlm.types import Comparison, Example, ImageSource, Rating, RewardHead, Split
from perl_vlm_ui_automation.actions import Action, format_action
from perl_vlm_ui_automation.elements import Box, center
from perl_vlm_ui_automation.mistakes import wrong_action
from perl_vlm_ui_automation.prompts import prompt
from perl_vlm_ui_automation.sampling import draw

if TYPE_CHECKING:
    from perl_vlm_ui_automation.task import UiAutomationConfig

PUBLISHED = "screenspot_*.json"
_PICTURE_FOLDERS = ("screenspotv2_image", "screenspot_imgs", "images", ".")
_PICTURE_NAMES = ("image", "img_filename", "file_name")
_PLATFORMS = {"ios": "mobile", "android": "mobile", "macos": "desktop", "windows": "desktop"}


@dataclass(frozen=True)
class Grounding:
    """One instruction about one screenshot."""

    id: str
    instruction: str
    box: Box
    frame: tuple[int, int]
    image: ImageSource
    kind: str
    """Platform and type, such as ``mobile icon``, where they are known."""
    origin: str

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """The picture, as records hold it."""
        return (self.image,)

    @property
    def right(self) -> Action:
        """A click in the middle of the box."""
        x, y = center(self.box)
        return Action("click", x=x, y=y)


class ScreenSpot(Source):
    """The adapter."""

    config: UiAutomationConfig

    def __init__(self, config: UiAutomationConfig) -> None:
        super().__init__(config)
        self._check = None  # every picture is decoded here, for its size
        self._read: dict[Split, list[Grounding]] = {}
        self._sizes: dict[ImageSource, tuple[int, int]] = {}
        self._pictures = _Pictures(config)

    @cached_property
    def opened(self) -> Opened:
        """The configured source, with the pictures in the column by which rows are held out."""
        row, _ = first_row(self.config)
        name = next((name for name in _PICTURE_NAMES if row.get(name) is not None), "image")
        columns = dict(self.config.columns)
        if name != "image":
            columns["image"] = columns.pop(name, name)
        return open_configured(replace(self.config, columns=columns))

    def examples(self, split: Split) -> Sequence[Example]:
        return [
            Example(reference=format_action(one.right), **self._common(one), origin=one.origin)
            for one in self.read(split)
        ]

    def preferences(self, split: Split) -> Sequence[Comparison] | Sequence[Rating]:
        asked = self.read(split)
        on_picture: dict[ImageSource, list[Grounding]] = {}
        for one in asked:
            on_picture.setdefault(one.image, []).append(one)
        pairs = [(one, *self._answers(one, on_picture[one.image])) for one in asked]
        if self.reward_head().kind == "pairs":
            return [
                Comparison(chosen=right, rejected=wrong, **self._common(one), origin=one.origin)
                for one, right, wrong, _ in pairs
            ]
        return [
            Rating(response=right if good else wrong, label=good, **self._common(one), origin=one.origin)
            for one, right, wrong, good in pairs
        ]

    def reward_head(self) -> RewardHead:
        return RewardHead("pairs" if self.config.feedback == "pairs" else "labels")

    def read(self, split: Split) -> list[Grounding]:
        """The instructions of a split."""
        if split not in self._read:
            rows = self._rows(split)
            root = self._pictures.folder or self.root(rows)
            self._read[split] = self.collect(
                rows, lambda row, origin: self._convert(row, origin, root), split, "instructions"
            )
        return self._read[split]

    def _common(self, one: Grounding) -> dict[str, Any]:
        return {
            "id": one.id,
            "messages": prompt(one.instruction, one.frame, hint=self.config.hint),
            "images": one.images,
            "metadata": {"kind": one.kind, "frame": list(one.frame), "boxes": [list(one.box)]},
        }

    def _answers(self, one: Grounding, neighbours: Sequence[Grounding]) -> tuple[str, str, bool]:
        """A right and a wrong click, and which of them a Rating shows."""
        rng = random.Random(f"{self.config.data_seed}-{one.id}-wrong")
        good = rng.random() < 0.5
        elsewhere = {str(number): other.box for number, other in enumerate(neighbours, 1) if other.id != one.id}
        screen = {"frame": one.frame, "boxes": [one.box], "elements": elsewhere}
        wrong = wrong_action(one.right, screen, (), rng, self.config.tolerance)
        return format_action(one.right), format_action(wrong), good

    def _rows(self, split: Split) -> LoadedRows:
        files = self._pictures.published
        if not files:
            return self.rows(split)
        if split != "test":
            raise Absent(
                f"{self.config.path} is ScreenSpot, a benchmark: it has no {split} records. Use --eval.split test; to "
                "train on data of this kind, name its file train.jsonl."
            )
        table: Table = Chain([open_table(file, file.name) for file in files])
        if self.config.columns:
            table = Renamed(table, self.config.columns)
        return LoadedRows(
            table, draw(range(len(table)), self.config.size(split), self.config.data_seed), files[0].parent
        )

    def _convert(self, row: Row, origin: str, root: Path | None) -> Grounding:
        name = next((name for name in _PICTURE_NAMES if row.get(name) is not None), None)
        missing = [column for column in ("bbox", "instruction") if column not in row]
        if name is None or missing:
            raise missing_columns([*missing, *(["image"] if name is None else [])], row, origin)
        instruction = check_text(row["instruction"], "instruction", origin)
        if not instruction.strip():
            raise BadRecord(origin, "column `instruction` is empty", "Fill it, or remove the record")
        image = self._pictures.member(row[name]) or as_image_source(row[name], root=root, origin=origin)
        frame = self._size(image, origin)
        box = read_box(row["bbox"], frame, self.config.bbox, origin)
        source, sort = row.get("data_source"), row.get("data_type")
        platform = "" if source is None else _PLATFORMS.get(str(source).lower(), "web")
        kind = " ".join(part for part in (platform, str(sort or "")) if part) or "click"
        return Grounding(origin, instruction, box, frame, image, kind, origin)

    def _size(self, image: ImageSource, origin: str) -> tuple[int, int]:
        if image not in self._sizes:
            try:
                self._sizes[image] = image.load().size
            except BadRecord as error:
                raise BadRecord(origin, f"picture {error.origin}: {error.problem}", error.remedy) from error
        return self._sizes[image]


class _Pictures:
    """Where the pictures of a published folder are."""

    def __init__(self, config: UiAutomationConfig) -> None:
        path = Path(config.path or "")
        local = config.source == "local" and path.is_dir()
        self.published = sorted((*path.glob(PUBLISHED), *path.glob(f"*/{PUBLISHED}"))) if local else []
        self.folder: Path | None = None
        self._archive, self._members = path / "screenspotv2_image.zip", dict[str, str]()
        if not self.published or config.image_root is not None:
            return
        self.folder = next((path / name for name in _PICTURE_FOLDERS if (path / name).is_dir()), None)
        if self.folder == path and self._archive.is_file():
            try:
                with zipfile.ZipFile(self._archive) as archive:
                    self._members = {Path(name).name: name for name in archive.namelist()}
            except (OSError, zipfile.BadZipFile) as error:
                raise PerlVlmError(f"{self._archive} cannot be read: {error}. Copy it again.") from error

    def member(self, name: Any) -> ZipMember | None:
        """The picture of that name in the archive, where there is one."""
        found = self._members.get(name) if isinstance(name, str) else None
        return None if found is None else ZipMember(self._archive, found)


def read_box(value: Any, frame: tuple[int, int], form: Literal["auto", "xywh", "xyxy", "relative"], origin: str) -> Box:
    """The box in whole pixels, widened to them.

    Args:
        value: four numbers.
        frame: width and height of the picture.
        form: ``xywh``, left, top, width, height in pixels (ScreenSpot's and ScreenSpot-v2's JSON files); ``xyxy``, two
            corners in pixels; ``relative``, two corners as shares of the picture (the copies on the hub);
            ``auto``, relative where no number is above 1, else xywh.
        origin: where the row stands.

    Raises:
        BadRecord: no box, or one that is empty or leaves the picture.
    """
    remedy = "A box is four numbers; --task.bbox xywh, xyxy or relative says how they are meant"
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(numbers) != 4 or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers):
        raise BadRecord(origin, f"column `bbox` holds {show(value)}", remedy)
    if not all(-1e9 < number < 1e9 for number in numbers):
        raise BadRecord(origin, f"column `bbox` holds {show(value)}", remedy)
    a, b, c, d = (float(number) for number in numbers)
    if form == "auto":
        form = "relative" if max(numbers) <= 1 else "xywh"
    if form == "xywh":
        c, d = a + c, b + d
    elif form == "relative":
        a, b, c, d = a * frame[0], b * frame[1], c * frame[0], d * frame[1]
    if not (0 <= a < c <= frame[0] + 1 and 0 <= b < d <= frame[1] + 1):
        problem = f"the box {show(value)}, read as {form}, is empty or leaves the picture of {frame[0]} x {frame[1]}"
        raise BadRecord(origin, problem, remedy)
    return math.floor(a), math.floor(b), min(math.ceil(c), frame[0]), min(math.ceil(d), frame[1])
