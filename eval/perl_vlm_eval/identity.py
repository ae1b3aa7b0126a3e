"""What cells and items are known by: hashes of records, settings and rewards."""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import os
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from perl_vlm import __version__
from perl_vlm.config import RunConfig
from perl_vlm.data.images import content_key, to_png_bytes
from perl_vlm.data.lazy import Lazy
from perl_vlm.errors import PerlVlmError
from perl_vlm.rollout.scorers.saved_run import find_run
from perl_vlm.rollout.scorers.spec import ACCEPTED, classifier_target, parse_reward, python_target, spec_kind
from perl_vlm.task import Task
from perl_vlm.train.figures import group_of
from perl_vlm.train.stage import first, spaced
from perl_vlm.types import Comparison, Example, Rating, Split
from perl_vlm_eval.runs import files_hash

Record = Example | Comparison | Rating

MOST_HASHED = 20_000
"""Records of a split that are all part of a cell's hash."""
SHOWN_PIXELS = 320
"""The longer side of a picture beside a sample."""


def basis(task: Task, records: Sequence[Any], limit: int) -> list[Any]:
    """What a cell's hash is made of: all records of a split, since which of them are measured depends on which can be
    used; of very many, and of those that are read as they are asked for, the ones that a stage would take."""
    if isinstance(records, Lazy) or task.environment() is not None:
        return first(records, limit)
    return list(records) if len(records) <= MOST_HASHED else spaced(records, limit)


def examples_of(task: Task, split: Split, limit: int) -> list[Example]:
    """The examples that an evaluation's hash is made of."""
    return basis(task, task.examples(split), limit)


def data_hash(records: Sequence[Record]) -> str:
    """A SHA-256 over records: their ids, what they say, their pictures (files by name, size and date, which costs
    little), and what they are compared with."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(_record_bytes(record, [_picture(source) for source in record.images]) + record.id.encode())
    return digest.hexdigest()


def item_keys(records: Sequence[Record]) -> list[str]:
    """What each item is known by, on any machine and whatever its id: all that it says, its pictures by their bytes.
    Of several that say the same, each has its number too."""
    seen: dict[str, int] = {}
    found = []
    for record in records:
        said = _record_bytes(record, [_content(source) for source in record.images])
        key = hashlib.sha256(said).hexdigest()[:16]
        seen[key] = seen.get(key, 0) + 1
        found.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
    return found


def _record_bytes(record: Record, pictures: Sequence[str]) -> bytes:
    names = ("chosen", "rejected", "response", "label", "reference", "choices", "objective", "margin")
    said = [getattr(record, name, None) for name in names]
    text = [[message.role, message.text] for message in record.messages]
    metadata = json.dumps(dict(record.metadata), sort_keys=True, default=str)
    return json.dumps([said, text, list(pictures), metadata], default=str).encode()


def _picture(source: Any) -> str:
    """What changes where a picture does, without reading it where that can be had."""
    key = _key(source)
    if key[:1] in (("file",), ("member",)):
        try:
            found = os.stat(key[1])
        except OSError:
            return repr(key)
        return repr((os.path.basename(key[1]), *key[2:], found.st_size, found.st_mtime_ns))
    return repr(key)


def _content(source: Any) -> str:
    """What a picture is, wherever it lies."""
    key = _key(source)
    try:
        data = Path(key[1]).read_bytes() if key[0] == "file" else source.read() if key[0] == "member" else None
    except (OSError, PerlVlmError):
        return repr(key)
    return repr(key) if data is None else hashlib.sha256(data).hexdigest()


def _key(source: Any) -> tuple[Any, ...]:
    """Its content key, where that says anything in another process; else a hash of its pixels."""
    key: Any = content_key(source)
    if isinstance(key, tuple) and key:
        return key
    if key is source and type(source).__repr__ is object.__repr__:
        picture = source.load()
        return "pixels", picture.mode, picture.size, hashlib.sha256(picture.tobytes()).hexdigest()
    return "own", key


def group_names(records: Sequence[Record]) -> list[str]:
    """What each record is drawn together with, as short texts that can be written down."""
    return [_short(group_of(record)) for record in records]


def _short(group: Hashable) -> str:
    text = repr(group)
    return text if len(text) <= 24 else hashlib.sha256(text.encode()).hexdigest()[:16]


def code_hash(kind: type) -> str:
    """A SHA-256 over the code that a class is part of, its module or the package around that: a task that judges
    otherwise than it did gives other figures."""
    try:
        path = Path(inspect.getfile(kind))
    except (TypeError, OSError):  # made up in memory
        return ""
    return _code_hash(path, kind.__module__.partition(".")[0])


@cache
def _code_hash(path: Path, package: str) -> str:
    around = next((one for one in path.parents if one.name == package), None)
    files = [path] if around is None else sorted(around.rglob("*.py"))
    digest = hashlib.sha256()
    for one in files:
        digest.update(one.name.encode() + one.read_bytes())
    return digest.hexdigest()


def settings_hash(config: RunConfig, task: Task) -> str:
    """What a figure may depend on beside its own settings, as text: those of what is decoded and shown, where it is
    computed, and the code of the task that judges."""
    keep = {
        "perl_vlm": __version__, "model": config.model, "revision": config.revision, "seed": config.seed,
        "tuning": config.tuning, "dtype": config.dtype, "load_in_4bit": config.load_in_4bit,
        "device": [config.device, torch.cuda.is_available()],
        "limits": [config.max_prompt_tokens, config.max_response_tokens],
        "ppo": [config.ppo.max_new_tokens, config.ppo.min_new_tokens, config.ppo.temperature, config.ppo.top_p],
        "task": [task.name, repr(task.config), code_hash(type(task))],
    }  # fmt: skip
    return json.dumps(keep, sort_keys=True, default=str)


def reward_identity(given: str, own: Mapping[str, str]) -> str:
    """What tells whether a reward, as ppo.reward_model takes it, is what it was: of a saved model its weights, of
    Python code its text, else what was written.

    Args:
        own: what stands for the words that mean another model in every run (``learned``, ``untrained``).
    """
    parts = [[term.weight, *_known(term.spec, own)] for term in parse_reward(given)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _known(spec: str, own: Mapping[str, str]) -> list[str]:
    kind = spec_kind(spec)
    try:
        if kind == "run":
            return list(map(files_hash, find_run(spec, ACCEPTED).members))
        if kind == "python":
            return [spec, hashlib.sha256(_source(python_target(spec)[0]).read_bytes()).hexdigest()]
        if kind == "classifier":
            folder = Path(classifier_target(spec)[0])
            return [spec, files_hash(folder)] if folder.is_dir() else [spec]
    except (PerlVlmError, OSError, ImportError):
        pass  # it is told where it is loaded
    return [spec, own.get(spec, "")]


def _source(where: str) -> Path:
    """The file of ``path/to/rules.py`` or ``package.module``."""
    if where.endswith(".py"):
        return Path(where).expanduser()
    found = find_spec(where)
    if found is None or found.origin is None:
        raise ImportError(where)
    return Path(found.origin)


def thumbnail(record: Record) -> str | None:
    """The record's first picture, small, as a PNG in base64; None where it has none."""
    if not record.images:
        return None
    picture = record.images[0].load()
    picture.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    return base64.b64encode(to_png_bytes(picture)).decode("ascii")
