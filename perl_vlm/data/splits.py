"""Which rows are the training, validation and test records of a source.

Files (or their folders) named after a split belong to it: ``train``, ``training``; ``validation``, ``valid``,
``val``, ``dev``; ``test``, ``testing``, ``eval``, ``evaluation``; further words may stand around the name, as in
``train-00000-of-00002.parquet``. Where splits are missing, records are held out by a hash of their picture (or, without
one, their prompt), so that no picture is in two splits. A picture is known by its path; one that is stored with the
rows, by its size and its first and last bytes, so that dividing a set reads little of it:

============================ ===================== ==================== ============
there is                     train                 validation           test
============================ ===================== ==================== ============
train, validation, test      as named              as named             as named
train and one held-out split nine tenths of train  one tenth of train   the held-out
train alone, or no name      eight tenths          one tenth            one tenth
only held-out splits         an error              as named             as named
============================ ===================== ==================== ============

A held-out split that stands alone serves as ``test`` only. A file given by its own path is the whole source, whatever
stands beside it.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from perl_vlm.data.arrow_table import CellImage
from perl_vlm.data.messages import shared_beginning
from perl_vlm.data.tables import SUFFIXES, Table
from perl_vlm.errors import Absent, BadRecord, PerlVlmError
from perl_vlm.types import Split

Openers = dict[Split | None, Callable[[], Table]]
"""Opens the table of each split; the key None is for data that names no split."""
Known = Callable[[Callable[[], bytes]], bytes]
"""Gives the tenth of every row of a table, one byte each, computed by its argument where it is not known yet."""

_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS: dict[str, Split] = {word: split for split, words in _NAMES.items() for word in words}
_TENTHS = 10
_FASTER = 4


def split_named(path: Path | str) -> Split | None:
    """The split that a file name, or else the nearest folder above it, speaks of."""
    for part in reversed(Path(path).parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _WORDS:
                return _WORDS[word]
    return None


def plan(tables: Openers, split: Split, place: str) -> tuple[range, Split | None]:
    """Which tenths of which table serve as ``split``; the table in the module's docstring."""
    if not tables:
        raise PerlVlmError(f"{place} holds no data files ({', '.join(SUFFIXES)}). --task.path names a folder of them.")
    base: list[Split | None] = [key for key in ("train", None) if key in tables]
    held_out: list[Split] = [key for key in _NAMES if key != "train" and key in tables]
    whole, last = range(_TENTHS), range(_TENTHS - 1, _TENTHS)
    if base and not held_out:
        second_last = range(_TENTHS - 2, _TENTHS - 1)
        return {"train": range(_TENTHS - 2), "validation": second_last, "test": last}[split], base[0]
    if base and len(held_out) == 1:
        if split == "test":
            return whole, held_out[0]
        return (range(_TENTHS - 1) if split == "train" else last), base[0]
    if not base and len(held_out) == 1 and split == "test":
        return whole, held_out[0]
    if split not in tables or (not base and len(held_out) == 1):
        found = ", ".join(str(key) for key in tables)
        raise Absent(
            f"{place} has no {split} records: it holds {found} alone. Add a file for {split} "
            f"(such as {split}.jsonl), or use this data with --eval.split test only."
        )
    return whole, split


def choose(table: Table, wanted: range, limit: int, seed: int, known: Known, key: str | None = None) -> Sequence[int]:
    """At most ``limit`` rows (0 for all) of the wanted tenths, drawn evenly and put in order. ``key`` is the column of
    what stays in one tenth, in place of the picture or the prompt."""
    order: Sequence[int] = range(len(table))
    everything = len(wanted) == _TENTHS
    if everything and (not limit or limit >= len(table)):
        return order
    if limit:
        order = random.Random(f"{seed}-rows").sample(order, len(table))
    if everything:
        return sorted(order[:limit])
    # Reading all rows in order is several times faster than as many here and there.
    if not limit or limit * _TENTHS // len(wanted) * _FASTER > len(table):
        tenths = known(lambda: bytes(_tenth(row, key) for row in table.read(range(len(table)))))
        chosen = (index for index in order if tenths[index] in wanted)
    else:
        chosen = (index for index, row in zip(order, table.read(order), strict=True) if _tenth(row, key) in wanted)
    return sorted(itertools.islice(chosen, limit or None))


def _tenth(row: dict[str, Any] | BadRecord, key: str | None = None) -> int:
    """The tenth of the records that a row belongs to, by its content."""
    if isinstance(row, BadRecord):
        return 0  # reported with the training records
    kept = row.get(key) if key is not None else None
    content = _content_key(row) if kept is None else str(kept).encode(errors="replace")
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") % _TENTHS


def _content_key(row: dict[str, Any]) -> bytes:
    """What decides on the split of a row: its picture, else its prompt."""
    pictures = row.get("images") or row.get("image")
    if pictures is not None:
        pictures = pictures if isinstance(pictures, list) else [pictures]
        return b"|".join(repr(item.peek() if isinstance(item, CellImage) else item).encode() for item in pictures)
    if row.get("prompt") is not None:
        return repr(row["prompt"]).encode(errors="replace")
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = shared_beginning(chosen, rejected)
        return (shared.rpartition("\n\nAssistant:")[0] or shared).encode(errors="replace")
    if isinstance(chosen, list):
        return repr(chosen[:-1]).encode(errors="replace")
    return repr(row.get("messages") or row.get("question") or row).encode(errors="replace")
