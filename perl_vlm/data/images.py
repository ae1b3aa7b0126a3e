"""Pictures from files, bytes and zip archives: decoded when they are needed, and only when that is safe.

The rules, the same for every source:

* The formats are those of FORMATS. TIFF stays out: its decoder has a long history of holes, and its 16- and 32-bit
  float pictures have no honest conversion to RGB.
* The header is read first. More pixels than MAX_PIXELS, a side of 0, or more than one frame is refused before any
  pixel is decoded. Pillow's own decompression warnings are errors.
* The whole picture is decoded: ``verify()`` lets truncated JPEGs pass.
* EXIF orientation is applied, transparency is laid on white, the result is RGB.
* A path in a data set must lie under a root folder after symbolic links are resolved. URLs are refused. Members of
  archives are read in memory and never extracted.

Every refusal is a BadRecord that names the picture, the problem and the remedy, and the row where that is known. Paths:
``image_paths``. What is looked at before training, and how closely: ``checking``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import reprlib
import threading
import warnings
import zipfile
import zlib
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

from perl_vlm.data.image_paths import MAX_BYTES, is_url, plain_file, resolve_image_path
from perl_vlm.data.screening import HEAD, TAIL, Peek, peek_at
from perl_vlm.errors import BadRecord
from perl_vlm.types import ImageSource

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 50_000_000
_REPLACE = "Replace the picture, or leave the record out with --task.on_bad_record skip"
# warnings.catch_warnings changes global state; threads that open pictures must take turns.
_WARNINGS = threading.Lock()
_EXIF_ORIENTATION = 0x0112
_ARCHIVE_ERRORS = (
    OSError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError, ValueError,
)  # fmt: skip
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageFile:
    """A picture in a file."""

    path: str | Path
    """Where it is; relative paths start at ``root``."""
    root: str | Path | None = None
    """The folder that the resolved path must lie under. None trusts the path: only for paths that a program made."""
    origin: str = field(default="", compare=False, repr=False)
    """The row that it belongs to, for error messages."""

    @property
    def content_key(self) -> Hashable:
        """Its absolute path."""
        return "file", os.path.abspath(os.path.join(self.root or "", self.path))

    def load(self) -> Image.Image:
        """Return the picture as RGB. Raises BadRecord where it cannot be read safely."""
        name = str(self.path)
        with _told_at(self.origin, name), resolve_image_path(self.path, self.root, name).open("rb") as stream:
            return decode_image(stream, name)

    def peek(self, head: int = HEAD) -> Peek:
        """Return its size, first and last bytes. Raises BadRecord where the file cannot be opened."""
        name = str(self.path)
        with _told_at(self.origin, name):
            return _peek_at_file(plain_file(name, self.root) or resolve_image_path(self.path, self.root, name), head)


def _peek_at_file(path: str | Path, head: int) -> Peek:
    # Bare system calls: a file object takes twice as long to make as all of this.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        size = os.fstat(handle).st_size
        first = os.read(handle, head)
        if size <= len(first):
            return Peek(size, first, first[-TAIL:])
        os.lseek(handle, -min(TAIL, size), os.SEEK_END)
        return Peek(size, first, os.read(handle, TAIL))
    finally:
        os.close(handle)


@dataclass(frozen=True)
class ImageBytes:
    """A picture in memory, still encoded."""

    data: bytes = field(repr=False)
    """The file's content."""
    name: str
    """What error messages call it."""

    @property
    def content_key(self) -> Hashable:
        """A hash of its bytes."""
        return key_of_bytes(self.data)

    def load(self) -> Image.Image:
        """Return the picture as RGB. Raises BadRecord where it cannot be read safely."""
        return decode_image(io.BytesIO(self.data), self.name)

    def peek(self, head: int = HEAD) -> Peek:
        """Return its size, first and last bytes."""
        return peek_at(self.data, head)


@dataclass(frozen=True)
class ZipMember:
    """A picture inside a zip archive."""

    archive_path: str | Path
    """The archive."""
    member: str
    """The member's name, used as a key only: nothing is written under it."""
    origin: str = field(default="", compare=False, repr=False)
    """The row that it belongs to, for error messages."""

    @property
    def name(self) -> str:
        """What error messages call it."""
        return f"{Path(self.archive_path).name}:{self.member}"

    @property
    def content_key(self) -> Hashable:
        """The archive's absolute path and the member's name."""
        return "member", os.path.abspath(self.archive_path), self.member

    def load(self) -> Image.Image:
        """Return the picture as RGB. Raises BadRecord where it cannot be read safely."""
        with _told_at(self.origin, self.name):
            return decode_image(io.BytesIO(self.read()), self.name)

    def peek(self, head: int = HEAD) -> Peek:
        """Return its size and first bytes. Raises BadRecord where the archive or the member is missing or damaged."""
        with _told_at(self.origin, self.name):
            size, first = self._read(head)
            return Peek(size, first, None)

    def read(self) -> bytes:
        """Return the member's bytes. Raises BadRecord where the archive or the member is missing or damaged."""
        return self._read()[1]

    def _read(self, first: int | None = None) -> tuple[int, bytes]:
        """The member's unpacked size, and its bytes or the first ones."""
        try:
            found = os.stat(self.archive_path)
            # A forked worker needs its own file position, a rewritten archive a new index.
            archive = _open_archive(str(self.archive_path), os.getpid(), found.st_mtime_ns, found.st_size)
            info = archive.getinfo(self.member)
            if info.file_size > MAX_BYTES:
                problem = f"the member unpacks to {info.file_size} bytes; at most {MAX_BYTES} are read"
                raise BadRecord(self.name, problem, _REPLACE)
            if first is None:
                return info.file_size, archive.read(info)
            with archive.open(info) as stream:
                return info.file_size, stream.read(first)
        except KeyError as error:
            problem = "the archive has no such member"
            raise BadRecord(self.name, problem, "Check the image column of the record") from error
        except _ARCHIVE_ERRORS as error:
            problem = f"the archive cannot be read ({error})"
            raise BadRecord(self.name, problem, "Copy or make the archive again") from error


@dataclass(frozen=True)
class BlankImage:
    """Another picture's size in even gray: what a model that looks at pictures must not be able to answer from."""

    of: ImageSource

    def load(self) -> Image.Image:
        """A gray picture as large as the one it stands for."""
        return Image.new("RGB", self.of.load().size, (128, 128, 128))


@dataclass(frozen=True)
class ShuffledImage:
    """Another picture cut into 4 x 4 tiles, laid out anew: its colours and textures without its arrangement."""

    of: ImageSource

    def load(self) -> Image.Image:
        """The picture with its tiles in an order that depends on its size alone. Pixels beyond the last whole tile stay
        where they are; a picture of fewer than 4 pixels a side is left as it is."""
        picture = self.of.load()
        width, height = picture.width // 4, picture.height // 4
        if not width or not height:
            return picture
        places = [(column * width, row * height) for row in range(4) for column in range(4)]
        order = list(places)
        random.Random(f"{picture.size}").shuffle(order)
        mixed = picture.copy()
        for (left, top), place in zip(places, order, strict=True):
            mixed.paste(picture.crop((left, top, left + width, top + height)), place)
        return mixed


def content_key(source: ImageSource) -> Hashable:
    """What tells whether two sources give one picture, wherever they stand.

    Of a file or an archive's member its place, which costs nothing; of a picture stored in a row a hash of its bytes;
    of a source with another ``content_key`` that; else the source itself, or a hash of its pixels where it cannot be
    hashed. Raises BadRecord where a picture would have to be read for it and cannot.
    """
    given: Any = source
    key: Hashable = getattr(given, "content_key", given)
    try:
        hash(key)
    except TypeError:
        picture = source.load()
        return "pixels", picture.mode, picture.size, hashlib.sha256(picture.tobytes()).hexdigest()
    return key


def key_of_bytes(data: bytes | memoryview) -> Hashable:
    """The content key of an encoded picture."""
    return "bytes", hashlib.sha256(data).hexdigest()


@lru_cache(maxsize=8)
def _open_archive(path: str, pid: int, mtime_ns: int, size: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def decode_image(stream: IO[bytes], name: str) -> Image.Image:
    """Decode one picture in full, by the rules at the top of this file.

    Args:
        stream: a seekable binary stream.
        name: what error messages call the picture.

    Raises:
        BadRecord: the picture is damaged, too large, animated, of no allowed format.
    """
    try:
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=FORMATS)
        _check_header(image, name)
        image.load()
        return _to_rgb(image)
    except (BadRecord, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        problem = f"its header claims more pixels than the limit of {MAX_PIXELS:,} ({error})"
        raise BadRecord(name, problem, "Scale it down, or replace it") from error
    except UnidentifiedImageError as error:
        # What the file does hold stays unsaid: a path in a data set may have named somebody's secrets.
        problem = f"not a picture in a format read here ({', '.join(FORMATS)})"
        raise BadRecord(name, problem, "Convert it to PNG or JPEG") from error
    except Exception as error:
        # Damaged files make Pillow's decoders raise almost anything: OSError, SyntaxError, struct.error, IndexError.
        problem = f"the picture is truncated or damaged ({type(error).__name__}: {error})"
        raise BadRecord(name, problem, _REPLACE) from error


def _check_header(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise BadRecord(name, f"the picture is {width} x {height} pixels; both sides must be at least 1", _REPLACE)
    if width * height > MAX_PIXELS:
        problem = f"the picture is {width} x {height} = {width * height:,} pixels; the limit is {MAX_PIXELS:,}"
        raise BadRecord(name, problem, "Scale it down")
    # MPO is what phones write: a JPEG photo with a depth map or thumbnail behind it. The first picture is the photo.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        frames = getattr(image, "n_frames", "several")
        raise BadRecord(name, f"the picture is animated ({frames} frames)", "Save the frame that is meant as PNG")


def _to_rgb(image: Image.Image) -> Image.Image:
    image = _upright(image)
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion to 8 bits cuts everything above 255 off to white.
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    rgb = image.convert("RGB")
    if rgb is image:
        rgb = image.copy()  # a plain Image: file objects and metadata stay behind
    rgb.info = {}
    return rgb


def _upright(image: Image.Image) -> Image.Image:
    try:
        method = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        # EXIF that cannot be parsed says nothing about orientation; every viewer shows such a picture as stored.
        method = None
    return image if method is None else image.transpose(method)


def to_png_bytes(image: Image.Image) -> bytes:
    """Encode a picture as PNG: RGB, upright, on white, as ``load()`` of an image source gives it."""
    buffer = io.BytesIO()
    (image if type(image) is Image.Image and image.mode == "RGB" else _to_rgb(image)).save(buffer, "PNG")
    return buffer.getvalue()


@contextlib.contextmanager
def _told_at(origin: str, name: str) -> Iterator[None]:
    """Tell the errors of a file as those of a picture, and of the row that it belongs to."""
    try:
        yield
    except OSError as error:
        raise at_row(BadRecord(name, f"the file cannot be opened ({error})", _REPLACE), origin) from error
    except BadRecord as error:
        raise at_row(error, origin) from error


def at_row(error: BadRecord, origin: str) -> BadRecord:
    """The error of a picture as one of the row that the picture belongs to, where that is known."""
    if not origin or error.origin == origin:
        return error
    return BadRecord(origin, f"picture {error.origin}: {error.problem}", error.remedy)


def as_image_source(value: Any, *, root: str | Path | None, origin: str) -> ImageSource:
    """Turn what a row of a data set holds into an image source.

    Args:
        value: a path, encoded bytes, a ``{"bytes": ..., "path": ...}`` mapping as Hugging Face data sets hold it, a PIL
            image, or an image source.
        root: the folder that paths must lie under; None refuses paths.
        origin: where the row stands, for error messages.

    Raises:
        BadRecord: nothing that is a picture, or a path outside ``root``, or a URL.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if value is None:
            raise BadRecord(origin, "the image has neither bytes nor a path", 'Fill {"bytes": ...} or {"path": ...}')
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        if not isinstance(text, str) or not text.strip():
            raise BadRecord(origin, "the image path is empty", "Give the path of a picture")
        if root is None and not is_url(text):
            problem = f"the image is a path ({reprlib.repr(text)}), but no image folder is known"
            raise BadRecord(origin, problem, "Set --task.image_root to the folder of the pictures")
        if plain_file(text, root) is None:
            resolve_image_path(text, root, origin)
        return ImageFile(text, root, origin)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return ImageBytes(bytes(value), f"{origin}, image bytes")
    if isinstance(value, Image.Image):
        try:
            _check_header(value, origin)
            return ImageBytes(to_png_bytes(value), f"{origin}, image")
        except (OSError, ValueError, SyntaxError) as error:
            raise BadRecord(origin, f"the picture cannot be read ({error})", _REPLACE) from error
    if callable(getattr(value, "load", None)):  # isinstance with a protocol takes longer than all of the above
        source: ImageSource = value
        return source
    problem = f"the image is {type(value).__name__} ({reprlib.repr(value)})"
    raise BadRecord(origin, problem, 'Give a path, encoded bytes, or {"bytes": ..., "path": ...}')
