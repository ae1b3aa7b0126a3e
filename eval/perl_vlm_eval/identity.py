"""What cells and items are known by: hashes of records, settings and rewards."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch

from perl_vlm import __version__
from perl_vlm.config import RunConfig
from perl_vlm.data.images import content_key, to_png_bytes
from perl_vlm.data.lazy import Lazy
from perl_vlm.errors import PerlVlmError
from perl_vlm.rollout.scorers.saved_run import find_run
from perl_vlm.rollout.scorers.spec import ACCEPTED, parse_reward, python_target, spec_kind
from perl_vlm.task import Task
from perl_vlm.train.figures import group_of
from perl_vlm.train.stage import first, spaced
from perl_vlm.types import Comparison, Example, Rating, Split
from perl_vlm_eval.runs import files_hash

Record = Example | Comparison | Rating

SHOWN_PIXELS = 320
"""The longer side of a picture beside a sample."""


def chosen(task: Task, records: Sequence[Any], limit: int) -> list[Any]:
    """At most ``limit`` of a task's raw records, as a stage would take them: what a cell's hash is made of."""
    in_order = isinstance(records, Lazy) or task.environment() is not None
    return (first if in_order else spaced)(records, limit)


def examples_of(task: Task, split: Split, limit: int) -> list[Example]:
    """The examples that an evaluation asks, as the task gives them."""
    return chosen(task, task.examples(split), limit)


def data_hash(records: Sequence[Record]) -> str:
    """A SHA-256 over records: what they say, their pictures (by content; files by place, size and date), and what they
    are compared with."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(_record_bytes(record))
    return digest.hexdigest()


def item_keys(records: Sequence[Record]) -> list[str]:
    """What each item is known by, whichever run or task it was measured with."""
    return [hashlib.sha256(_record_bytes(record)).hexdigest()[:16] for record in records]


def _record_bytes(record: Record) -> bytes:
    names = ("id", "chosen", "rejected", "response", "label", "reference", "choices", "objective", "margin")
    said = [getattr(record, name, None) for name in names]
    text = [[message.role, message.text] for message in record.messages]
    pictures = [_picture(source) for source in record.images]
    metadata = json.dumps(dict(record.metadata), sort_keys=True, default=str)
    return json.dumps([said, text, pictures, metadata], default=str).encode()


def _picture(source: Any) -> str:
    key: Any = content_key(source)
    if isinstance(key, tuple) and key[:1] in (("file",), ("member",)):
        try:
            found = os.stat(key[1])
        except OSError:
            return repr(key)
        return repr((os.path.basename(key[1]), *key[2:], found.st_size, found.st_mtime_ns))
    return repr(key)


def group_names(records: Sequence[Record]) -> list[str]:
    """What each record is drawn together with, as short texts that can be written down."""
    return [_short(group_of(record)) for record in records]


def _short(group: Hashable) -> str:
    text = repr(group)
    return text if len(text) <= 24 else hashlib.sha256(text.encode()).hexdigest()[:16]


def settings_hash(config: RunConfig) -> str:
    """The settings that a figure may depend on beside its own, as text: those of what is decoded and shown, and where
    it is computed."""
    keep = {
        "perl_vlm": __version__, "model": config.model, "revision": config.revision, "seed": config.seed,
        "tuning": config.tuning, "dtype": config.dtype, "load_in_4bit": config.load_in_4bit,
        "device": [config.device, torch.cuda.is_available()],
        "limits": [config.max_prompt_tokens, config.max_response_tokens],
        "ppo": [config.ppo.max_new_tokens, config.ppo.min_new_tokens, config.ppo.temperature, config.ppo.top_p],
        "task": repr(config.task),
    }  # fmt: skip
    return json.dumps(keep, sort_keys=True, default=str)


def reward_identity(given: str) -> str:
    """What tells whether a reward, as ppo.reward_model takes it, is what it was: of a saved run its weights, of a
    Python file its text, else what was written."""
    parts = []
    for term in parse_reward(given):
        kind = spec_kind(term.spec)
        try:
            if kind == "run":
                parts.append([term.weight, *map(files_hash, find_run(term.spec, ACCEPTED).members)])
                continue
            if kind == "python":
                where = Path(python_target(term.spec)[0])
                text = where.read_bytes() if where.suffix == ".py" else b""
                parts.append([term.weight, term.spec, hashlib.sha256(text).hexdigest()])
                continue
        except (PerlVlmError, OSError):
            pass  # it is told where it is loaded
        parts.append([term.weight, term.spec])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def thumbnail(record: Record) -> str | None:
    """The record's first picture, small, as a PNG in base64; None where it has none."""
    if not record.images:
        return None
    picture = record.images[0].load()
    picture.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    return base64.b64encode(to_png_bytes(picture)).decode("ascii")
