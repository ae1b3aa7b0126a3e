"""What the adapters share: opening rows and collecting records as the task's configuration says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from perl_vlm.data.images import image_checker
from perl_vlm.data.sources import LoadedRows, collect, load_rows
from perl_vlm.errors import BadRecord, PerlVlmError
from perl_vlm.types import SPLITS, Comparison, Example, Rating, RewardHead, Split

if TYPE_CHECKING:
    from perl_vlm_vqa.task import VqaConfig

Row = Mapping[str, Any]


class Adapter(Protocol):
    """A source of records."""

    skipped: dict[str, list[BadRecord]]
    """The records left out under ``on_bad_record: skip``, by ``<split> examples`` or ``<split> preferences``."""

    def examples(self, split: Split) -> Sequence[Example]: ...

    def preferences(self, split: Split) -> Sequence[Comparison] | Sequence[Rating]: ...

    def reward_head(self) -> RewardHead: ...


class Source:
    """Reads rows and makes records of them; adapters build on it."""

    def __init__(self, config: VqaConfig) -> None:
        self.config = config
        self.skipped: dict[str, list[BadRecord]] = {}
        self._check = image_checker() if config.check_images else lambda record: None

    def rows(self, split: Split) -> LoadedRows:
        """The rows of a split, as many as the configuration takes."""
        return open_rows(self.config, split, self.config.size(split))

    def root(self, rows: LoadedRows) -> Path | None:
        """The folder that image paths must lie under."""
        return rows.root if self.config.image_root is None else Path(self.config.image_root)

    def collect(self, rows: LoadedRows, convert: Callable[[Row, str], Any], split: Split, what: str) -> list[Any]:
        """Convert rows, check the pictures of the records, prefix ids by the split."""

        def checked(row: Row, origin: str) -> Any:
            record = convert(row, origin)
            if record is None:
                return None
            self._check(record)
            return replace(record, id=f"{split}: {record.id}")

        name = f"{split} {what}"
        records, bad = collect(rows, checked, on_bad_record=self.config.on_bad_record, what=name)
        if bad:
            self.skipped[name] = bad
        if not records:
            raise PerlVlmError(f"There are no {name} in {self.config.path or self.config.dataset}.")
        return records


def open_rows(config: VqaConfig, split: Split, limit: int) -> LoadedRows:
    """The rows of a split of the configured source, at most ``limit``."""
    source: Literal["local", "hub"] = "hub" if config.source == "hub" else "local"
    return load_rows(
        source,
        config.path,
        split,
        name=config.dataset,
        config=config.dataset_config,
        limit=limit,
        seed=config.data_seed,
    )


def first_columns(config: VqaConfig) -> tuple[str, ...]:
    """The columns of the source, read from the first of its splits that has rows."""
    first_error: PerlVlmError | None = None
    for split in SPLITS:
        try:
            columns = open_rows(config, split, limit=20).columns
        except PerlVlmError as error:
            first_error = first_error or error
            continue
        if columns:
            return columns
    raise first_error or PerlVlmError(f"{config.path or config.dataset} holds no row that can be read.")
