"""Writing a text file so that a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path`` by way of a synced neighbour that is renamed over it.

    Missing folders are made. Lone surrogates, which UTF-8 cannot hold, are written as ``\\udXXX`` so that an odd
    model output cannot cost the user the file. Raises OSError where the folder cannot be written; the old file then
    stands as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Opened by name and not by mkstemp, so that the file gets the user's usual permissions.
        with draft.open("xb") as stream:
            stream.write(text.encode("utf-8", errors="backslashreplace"))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
