"""Checkpoints that are whole or absent, and that tell when a byte of them changed.

``folder/step-00000123/`` holds one safetensors file for each group of tensors, one JSON file for each record, and
``manifest.json`` with the size and SHA-256 of every other file. It is written under a temporary name, synced, and
renamed; the latest is found by scanning the folder, never by a pointer file. Nothing is ever unpickled.

Only one process of a run may save; any number may load.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from perl_vlm.errors import PerlVlmError
from perl_vlm.train.rundir import sync_file, sync_folder

MANIFEST = "manifest.json"

_FORMAT = "perl-vlm checkpoint 1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.(safetensors|json)\Z")
# ".replaced": what step-N was before the same step was saved again; it stands in for step-N should a crash fall between
# the two renames.
_FOLDER = re.compile(r"step-(\d{8,})(\.replaced)?\Z")
_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back, every file of it verified."""

    path: Path
    """Its folder."""
    step: int
    """Finished steps."""
    tensors: dict[str, dict[str, Tensor]]
    """Groups of tensors as they were saved, on the CPU."""
    records: dict[str, Any]
    """Records as they were saved, but for tuples, which JSON reads back as lists."""


class _Found(NamedTuple):
    step: int
    original: bool
    path: Path


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    records: Mapping[str, Any],
    *,
    keep: int | None = 2,
) -> Path:
    """Write ``folder/step-<step>/`` so that a crash at any moment leaves it whole or absent; return its path.

    Saving a step again replaces it. Older checkpoints are removed once ``keep`` good ones stand, this one counted;
    ones that no longer verify do not count. Checkpoints of later steps are left alone.

    Args:
        folder: where the checkpoints lie; made if absent.
        step: finished steps, 0 or more.
        tensors: groups of tensors of any dtype and device; each becomes ``<group>.safetensors``.
        records: JSON values with string keys; each becomes ``<name>.json``. NaN and infinities survive.
        keep: how many good checkpoints to keep, at least 1; None for all.

    Raises:
        ValueError: for a step below 0, a keep below 1, or a name that is no plain file name.
        PerlVlmError: for a record that JSON would not give back as it is.
    """
    if step < 0 or (keep is not None and keep < 1):
        raise ValueError(f"step is {step} and keep is {keep}; they must be at least 0 and 1")
    for name in (*tensors, *records):
        if not _NAME.match(name) or (name in records and f"{name}.json" == MANIFEST):
            raise ValueError(f"{name!r} cannot name a part of a checkpoint: letters, digits, '.', '_', '-' can")
    for name, record in records.items():
        _refuse_inexact(record, name)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f"{_TEMPORARY}*"):
        _delete(stale)
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{_TEMPORARY}{final.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        _write(temporary, step, tensors, records)
    except Exception:
        _delete(temporary)
        raise
    _swap_in(temporary, final)
    if keep is not None:
        _prune(folder, step, keep)
    return final


def load_latest(folder: Path, *, warn: Callable[[str], None] | None = None) -> Checkpoint | None:
    """The newest good checkpoint in ``folder``; None where there is none at all.

    Every file is held against the manifest first. A checkpoint with a missing, added, short or changed file is
    reported through ``warn`` (one line on stderr where not given), the file named, and the one before it is taken.

    Raises:
        PerlVlmError: there are checkpoints and none is good.
    """
    bad: list[str] = []
    for checkpoint in _good(_scan(folder), warn, bad):
        return checkpoint
    if bad:
        raise PerlVlmError(
            f"no checkpoint in {folder} can be used: {', '.join(bad)}. Bring the named files back from a copy, or "
            "start a new run with another --out. Nothing has been touched."
        )
    return None


def load_each(folder: Path, *, warn: Callable[[str], None] | None = None) -> Iterator[Checkpoint]:
    """Every good checkpoint in ``folder``, the oldest first and one at a time; damaged ones are reported as by
    ``load_latest`` and left out."""
    steps: set[int] = set()
    for checkpoint in _good(sorted(_scan(folder), key=lambda found: (found.step, not found.original)), warn, []):
        if checkpoint.step not in steps:
            steps.add(checkpoint.step)
            yield checkpoint


def _good(candidates: Iterable[_Found], warn: Callable[[str], None] | None, bad: list[str]) -> Iterator[Checkpoint]:
    """Those that verify, read back; of the others, which are added to ``bad``, ``warn`` is told."""
    report = _print_warning if warn is None else warn
    for found in candidates:
        problems = verify(found.path)
        if not problems:
            try:
                yield _read(found)
                continue
            except _Unreadable as error:
                problems = [str(error)]
        bad.append(f"{found.path.name} ({'; '.join(problems)})")
        report(f"checkpoint {found.path} is damaged and not used: {'; '.join(problems)}")


def verify(path: Path) -> list[str]:
    """What is wrong with the checkpoint at ``path``, each entry beginning with the file's name; empty if it is good."""
    match = _FOLDER.match(path.name)
    if match is None or not path.is_dir():
        return [f"{path.name}: not a folder named step-<number>"]
    try:
        listed = _read_manifest(path / MANIFEST, int(match[1]))
        present = set(os.listdir(path)) - {MANIFEST}
    except _Unreadable as error:
        return [str(error)]
    except OSError as error:
        return [f"{path.name}: cannot be listed: {error.strerror}"]
    problems = [f"{name}: not in the manifest" for name in sorted(present - set(listed))]
    for name, (size, digest) in sorted(listed.items()):
        problem = _file_problem(path / name, size, digest)
        if problem:
            problems.append(f"{name}: {problem}")
    return problems


class _Unreadable(Exception):
    """A file of a checkpoint cannot be used; the text begins with its name."""


def _print_warning(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _refuse_inexact(value: Any, where: str) -> None:
    """Raise PerlVlmError where JSON would change the value (an int key becomes text) or cannot hold it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise PerlVlmError(
                    f"record {where} has the key {key!r}, which JSON would give back as text. Use text keys."
                )
            _refuse_inexact(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse_inexact(item, f"{where}[{index}]")
    elif value is not None and not isinstance(value, str | bool | int | float):
        raise PerlVlmError(f"record {where} is a {type(value).__name__}, which JSON cannot hold. Use plain values.")


def _write(temporary: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], records: Mapping[str, Any]) -> None:
    for name, group in tensors.items():
        save_file(_separate(group), temporary / f"{name}.safetensors")
    for name, record in records.items():
        (temporary / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8", newline="\n")
    files = {}
    for path in sorted(temporary.iterdir()):
        sync_file(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    manifest = temporary / MANIFEST
    manifest.write_bytes(_manifest_bytes(step, files))
    sync_file(manifest)
    sync_folder(temporary)


def _separate(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two in one storage: safetensors refuses tensors that share memory."""
    separate, storages = {}, set()
    for name, tensor in group.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    return separate


def _swap_in(temporary: Path, final: Path) -> None:
    aside = final.with_name(f"{final.name}.replaced")
    if os.path.lexists(final):
        _remove(aside)
        os.rename(final, aside)
    os.rename(temporary, final)
    sync_folder(final.parent)
    _remove(aside)


def _prune(folder: Path, step: int, keep: int) -> None:
    good = {step}
    for found in _scan(folder):
        if found.step >= step:
            continue
        if found.step in good or len(good) >= keep:
            _remove(found.path)
        elif not verify(found.path):
            good.add(found.step)


def _remove(path: Path) -> None:
    """Delete a checkpoint by way of a temporary name, so that a crash does not leave half of it under its own."""
    if os.path.lexists(path):
        doomed = path.with_name(f"{_TEMPORARY}old-{path.name}")
        _delete(doomed)
        os.rename(path, doomed)
        _delete(doomed)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _scan(folder: Path) -> list[_Found]:
    """The checkpoints in the folder, newest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _FOLDER.match(path.name)
        if match:
            found.append(_Found(int(match[1]), match[2] is None, path))
    return sorted(found, reverse=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _manifest_bytes(step: int, files: Mapping[str, Any]) -> bytes:
    """The manifest in the one spelling that is accepted, sealed by a hash of itself."""
    body = {"format": _FORMAT, "step": step, "files": files}
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": seal}, indent=1, sort_keys=True) + "\n").encode()


def _read_manifest(path: Path, step: int) -> dict[str, tuple[int, str]]:
    """Size and hash by file name. Raises _Unreadable where the manifest is not exactly as it was written."""
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw)
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        intact = raw == _manifest_bytes(manifest["step"], manifest["files"])
    except OSError as error:
        raise _Unreadable(f"{MANIFEST}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _Unreadable(f"{MANIFEST}: is no manifest of a checkpoint") from error
    if not intact:
        raise _Unreadable(f"{MANIFEST}: was changed after it was written")
    if manifest["step"] != step:
        raise _Unreadable(f"{MANIFEST}: belongs to step {manifest['step']}, the folder's name says {step}")
    odd = next((name for name in files if not _FILE.match(name)), None)
    if odd is not None:
        raise _Unreadable(f"{MANIFEST}: lists {odd!r}, which is no safetensors or JSON file of this folder")
    return files


def _file_problem(path: Path, size: int, digest: str) -> str | None:
    if not os.path.lexists(path):
        return "missing"
    if path.is_symlink() or not path.is_file():
        return "not a plain file"
    try:
        found = path.stat().st_size
        if found != size:
            return f"{found} bytes long, {size} in the manifest"
        return None if _sha256(path) == digest else "its SHA-256 is not the one in the manifest"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _read(found: _Found) -> Checkpoint:
    tensors: dict[str, dict[str, Tensor]] = {}
    records: dict[str, Any] = {}
    for path in sorted(found.path.iterdir()):
        try:
            if path.suffix == ".safetensors":
                # Copies: the file may be pruned or replaced while they live, and a mapped tensor is not aligned as a
                # fresh one is, which may change the order of vectorised sums.
                tensors[path.stem] = {name: tensor.clone() for name, tensor in load_file(path).items()}
            elif path.name != MANIFEST:
                records[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except (SafetensorError, ValueError, RecursionError, OSError) as error:
            raise _Unreadable(f"{path.name}: cannot be read as {path.suffix[1:]}: {error}") from error
    return Checkpoint(found.path, found.step, tensors, records)
