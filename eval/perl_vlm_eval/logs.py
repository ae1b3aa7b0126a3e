"""What every item was asked and said, a line of JSON each: ``--log_samples`` and ``--predict_only``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perl_vlm.report.files import write_atomically
from perl_vlm_eval.identity import Record
from perl_vlm_eval.results import Cell, Findings, to_json


def asked(record: Record) -> dict[str, Any]:
    """A record's prompt as a line has it; pictures are counted."""
    found: dict[str, Any] = {
        "id": record.id,
        "messages": [{"role": message.role, "content": message.text} for message in record.messages],
    }
    if record.images:
        found["images"] = len(record.images)
    return found


def lines_of(findings: Findings) -> list[dict[str, Any]]:
    """An entry for each item: what was said, its group, its own figures."""
    items = findings.items
    said = findings.said or [{"id": name} for name in items.ids]
    return [
        {
            **own, "group": items.groups[place],
            "figures": {name: values[place] for name, values in items.values.items() if name not in items.labels},
        }
        for place, own in enumerate(said)
    ]  # fmt: skip


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines, whole or not at all; numbers that are not finite become null."""
    text = "".join(json.dumps(to_json(line), ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    write_atomically(path, text)


def sample_file(out: Path, run: str, evaluation: str) -> Path:
    """Where the lines of one evaluation of one run go."""
    return out / "samples" / f"{plain(run)}-{plain(evaluation)}.jsonl"


def copy_samples(out: Path, cells: Sequence[Cell]) -> list[Path]:
    """Write ``OUT/samples`` from what lies beside the cells' files, and return the files."""
    written = []
    for cell in cells:
        kept = out / "cells" / f"{cell.key}.jsonl"
        if cell.key and kept.is_file():
            path = sample_file(out, cell.run, cell.evaluation)
            path.parent.mkdir(exist_ok=True)
            shutil.copyfile(kept, path)
            written.append(path)
    return written


def plain(label: str) -> str:
    """A name as that of a file."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in label)
