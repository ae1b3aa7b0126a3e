"""Reward models on published benchmarks, whatever task they were trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from perl_vlm.config.checks import require
from perl_vlm.data.clip_render import renderer_for
from perl_vlm.data.sequences import to_device
from perl_vlm.data.sources import LoadedRows, collect, open_source
from perl_vlm.errors import BadRecords, PerlVlmError
from perl_vlm.stats import wins
from perl_vlm.train.stage import spaced
from perl_vlm.train.validate import SHOWN, usable_records
from perl_vlm.types import Comparison
from perl_vlm_eval import statistics
from perl_vlm_eval.evaluations.base import Evaluation
from perl_vlm_eval.identity import Record, group_names, item_keys
from perl_vlm_eval.logs import asked
from perl_vlm_eval.opened import OpenRun
from perl_vlm_eval.published import FORMATS
from perl_vlm_eval.results import Figure, Findings, Items
from perl_vlm_eval.statistics import Estimate

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PublishedSettings:
    """Settings of ``reward_bench``."""

    format: Literal["rewardbench", "vl_rewardbench", "multimodal_rewardbench"] = "rewardbench"
    """Whose columns and sections the rows have."""
    path: str = ""
    """A file or folder with the rows."""
    dataset: str = ""
    """Their name on the hub, where there is no path."""
    image_root: str = ""
    """The folder that paths of pictures lie under; that of the rows when not given."""
    limit: int = 0
    """At most this many, from all over the set; 0 for all."""
    max_prompt_tokens: int = 8192
    """Longer prompts are left out and told."""
    max_response_tokens: int = 4096
    """Longer responses, likewise."""


class PublishedSets(Evaluation):
    """``reward_bench``: an rm run on the rows of a published benchmark."""

    kind = "reward_bench"
    Settings = PublishedSettings
    needs = ("rm",)
    settings: PublishedSettings

    def __init__(self, settings: PublishedSettings) -> None:
        super().__init__(settings)
        require(bool(settings.path) != bool(settings.dataset), "reward_bench wants either a path or a dataset")

    @cached_property
    def rows(self) -> list[Comparison]:
        """All rows as comparisons. Raises PerlVlmError where they cannot be read, naming the first bad ones."""
        settings, benchmark = self.settings, FORMATS[self.settings.format]
        source: Literal["local", "hub"] = "local" if settings.path else "hub"
        opened = open_source(source, settings.path or None, name=settings.dataset or None)
        found: list[Comparison] = []
        for name in sorted(opened.tables, key=str):
            table = opened.tables[name]()
            own = LoadedRows(table, range(len(table)), opened.root)
            root = Path(settings.image_root) if settings.image_root else opened.root

            def read(row: dict[str, object], origin: str, root: Path | None = root) -> Comparison:
                return benchmark.read(row, origin, root)

            try:
                found += collect(own, read, on_bad_record="error")[0]
            except BadRecords as error:
                first = "; ".join(f"{bad.origin}: {bad.problem}" for bad in error.records[:SHOWN])
                more = f"; and {len(error.records) - SHOWN} more" if len(error.records) > SHOWN else ""
                raise PerlVlmError(
                    f"{len(error.records)} of {len(own)} rows of {opened.place} are none of {settings.format}'s: "
                    f"{first}{more}. Is this the right format?"
                ) from error
        return spaced(found, settings.limit) if settings.limit else found

    def records(self, opened: OpenRun) -> Sequence[Record]:
        """The benchmark's rows."""
        return self.rows

    def measure(self, opened: OpenRun) -> Findings:
        """Raises PerlVlmError where the rows have pictures and the model sees none."""
        stage, settings = opened.stage, self.settings
        backbone = opened.session.roles.backbone
        if any(row.images for row in self.rows) and not backbone.sees_images:
            raise PerlVlmError(
                f"{settings.format} has pictures, and {backbone.name} sees none; take a reward model of a VLM"
            )
        renderer = renderer_for(
            backbone, max_prompt_tokens=settings.max_prompt_tokens, max_response_tokens=settings.max_response_tokens
        )
        kept, notes = usable_records(self.rows, renderer, f"rows of {settings.format}", skip=True)
        if not kept:
            raise PerlVlmError(f"no row of {settings.format} can be scored: {'; '.join(notes)}")
        records, collator = list(kept), opened.task.collator(renderer)
        scores: list[torch.Tensor] = []
        with torch.no_grad():
            for block in stage.blocks(len(records), stage.rows_at_once):
                sequences = to_device(collator.comparisons([records[place] for place in block])[0], stage.device)
                each = [stage.roles.scores(name, sequences) for name in opened.reward_names]
                scores.append(torch.stack(each).mean(dim=0).unflatten(0, (2, -1)).T)
        table = stage.gathered(torch.cat(scores), len(records)).double().numpy()
        return findings(records, table, settings.format, notes)


def findings(records: Sequence[Comparison], scores: Array, format: str, notes: Sequence[str]) -> Findings:
    """Accuracies by subset and section, and the two ways to put them together.

    Args:
        scores: [N, 2] of chosen and rejected.
    """
    benchmark, groups = FORMATS[format], group_names(records)
    right = wins(scores[:, 1], scores[:, 0])
    sections = np.array([record.metadata["section"] for record in records])
    subsets = np.array([record.metadata["subset"] for record in records])
    figures = {"overall": Figure(statistics.share(right, groups), "share", "higher", "every row counts alike")}

    def macro(places: NDArray[np.int64]) -> float:
        own = sections[places]
        parts = [
            _section(right[places], subsets[places], own == name, (benchmark.weights or {}).get(name))
            for name in np.unique(own)
        ]
        return float(np.mean(parts))

    found = statistics.statistic(macro, len(right), groups)
    figures["macro"] = Figure(_sure(found, right, groups), "share", "higher", "the mean of the sections")
    for name in np.unique(sections):
        places = np.flatnonzero(sections == name)
        weights = (benchmark.weights or {}).get(name)

        def measure(
            drawn: NDArray[np.int64], own: NDArray[np.int64] = places, w: Mapping[str, float] | None = weights
        ) -> float:
            at = own[drawn]
            return _section(right[at], subsets[at], np.ones(len(at), dtype=bool), w)

        together = [groups[place] for place in places]
        found = statistics.share(right[places], together)
        if weights:
            found = _sure(statistics.statistic(measure, len(places), together), right[places], together)
        figures[f"section/{name}"] = Figure(found, "share", "higher")
    for name in np.unique(subsets):
        if name not in sections:
            places = np.flatnonzero(subsets == name)
            own = statistics.share(right[places], [groups[place] for place in places])
            figures[f"subset/{name}"] = Figure(own, "share", "higher")
    heads = [benchmark.headline, *(name for name in figures if name.startswith("section/"))]
    return Findings(
        figures=figures,
        headlines=heads,
        items=Items([record.id for record in records], item_keys(records), groups, {"overall": right.tolist()}),
        warnings=list(notes),
        said=[
            {
                **asked(record), "subset": record.metadata["subset"],
                "chosen": {"response": record.chosen, "score": float(own[0])},
                "rejected": {"response": record.rejected, "score": float(own[1])},
            }
            for record, own in zip(records, scores, strict=True)
        ],
    )  # fmt: skip


def _sure(found: Estimate, right: Array, groups: Sequence[str]) -> Estimate:
    """A weighted share; where all rows are alike, which resampling takes for certainty, with the interval of the plain
    one."""
    if found.low is None or found.low != found.high:
        return found
    plain = statistics.share(right, groups)
    return replace(found, low=plain.low, high=plain.high, method=plain.method)


def _section(
    right: Array, subsets: NDArray[np.str_], inside: NDArray[np.bool_], weights: Mapping[str, float] | None
) -> float:
    """A section's accuracy: its subsets' own, weighted; where no weights are given, all its rows alike."""
    if weights is None:
        return float(right[inside].mean())
    own = np.unique(subsets[inside])
    parts = [(right[inside & (subsets == name)].mean(), weights[str(name)]) for name in own]
    return float(sum(value * weight for value, weight in parts) / sum(weight for _, weight in parts))
