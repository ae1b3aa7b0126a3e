"""TFRecord files, plain or gzipped, read without TensorFlow.

A record is its length (8 bytes, little-endian), the masked CRC-32C of those 8 bytes, the data, and the masked CRC-32C
of the data. ``scan`` goes through a file once and learns where its records are; ``read`` then gives any of them. A
plain file is mapped into memory, so that only what is looked at is read. A gzipped one is unpacked from its beginning,
and the state of the unpacker is kept every CHECKPOINT bytes; a record is later unpacked from the state before it.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from perl_vlm.errors import BadRecord, PerlVlmError
from perl_vlm_ui_automation.crc32c import masked_crc32c

CHECKPOINT = 16 * 1024 * 1024
"""Bytes between the kept states of an unpacker, each some 50 kB, and between the times that mapped pages are let go."""
MAX_RECORD = 1 << 28
"""No record is longer. AndroidControl's have some tens of megabytes."""
MAX_RATIO = 100
"""A gzipped file that holds more bytes than this for each of its own is read no further: a small one could fill the
memory. Screenshots hardly shrink, so that no data set comes near."""
_SLACK = 1 << 24
"""Bytes that any file may hold."""
_PIECE = 1 << 20
"""Unpacked at a time."""
_HEADER, _FOOTER = 12, 4
_CHUNK = 1 << 16
_KEPT = 4
_GZIP = b"\x1f\x8b"
_AGAIN = "Copy the file again, or leave the record out with --task.on_bad_record skip"
_REST = "Copy the file again; --task.on_bad_record skip leaves out this record and all behind it"


class RecordFile:
    """The records of one file."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises PerlVlmError where it cannot be read."""
        self.name = path.name
        self._places: list[tuple[int, int]] = []
        self._checked: set[int] = set()
        try:
            with path.open("rb") as stream:
                gzipped = stream.read(len(_GZIP)) == _GZIP
            self._bytes: _Bytes = _Gzipped(path) if gzipped else _Plain(path)
        except (OSError, ValueError) as error:
            raise PerlVlmError(f"{path} cannot be read: {error}.") from error

    def origin(self, index: int) -> str:
        """Where record ``index``, from 0, stands: ``android_control-00003-of-00020 record 12``."""
        return f"{self.name} record {index + 1}"

    def scan(self, check: bool) -> Iterator[memoryview | BadRecord]:
        """Go through the records in order.

        Args:
            check: whether to read every record in full and give a BadRecord for one whose checksum is wrong; otherwise
                ``read`` sees to that.

        Raises:
            BadRecord: the file is damaged so that the next record cannot be found. Those before it can be read.
        """
        self._places.clear()
        reader = self._bytes.reader()
        while header := self._next(reader, _HEADER, partial=True):
            index = len(self._places)
            self._check(header[:8], header[8:], "length", index)
            length = struct.unpack("<Q", header[:8])[0]
            if length > MAX_RECORD:
                raise BadRecord(self.origin(index), f"it claims {length} bytes; at most {MAX_RECORD} are read", _REST)
            start = reader.position
            data = self._next(reader, length + _FOOTER)
            self._places.append((start, length))
            try:
                if check:
                    self._verify(data, index)
            except BadRecord as error:
                yield error
                continue
            yield data[:length]

    def read(self, index: int) -> memoryview:
        """The data of a record that ``scan`` has passed. Raises BadRecord where its checksum is wrong."""
        start, length = self._places[index]
        try:
            data = self._bytes.take(start, length + _FOOTER)
        except (zlib.error, OSError, EOFError) as error:
            raise BadRecord(self.origin(index), f"the gzipped data is damaged ({error})", _AGAIN) from error
        if index not in self._checked:
            self._verify(data, index)
        return data[:length]

    def _verify(self, data: memoryview, index: int) -> None:
        self._check(data[:-_FOOTER], data[-_FOOTER:], "data", index)
        self._checked.add(index)

    def _next(self, reader: _Reader, length: int, partial: bool = False) -> memoryview:
        """That many bytes; under ``partial`` none at all at the end of the file."""
        index = len(self._places)
        try:
            data = reader.read(length)
        except (zlib.error, OSError, EOFError) as error:
            raise BadRecord(self.origin(index), f"the gzipped data is damaged ({error})", _REST) from error
        if len(data) < length and not (partial and not data):
            problem = f"the file ends inside the record: {len(data)} of {length} bytes are there"
            raise BadRecord(self.origin(index), problem, _REST)
        return data

    def _check(self, data: memoryview, stored: memoryview, what: str, index: int) -> None:
        wanted, found = struct.unpack("<I", stored)[0], masked_crc32c(data)
        if wanted != found:
            problem = f"the checksum of its {what} is {found:#010x}, and the file says {wanted:#010x}"
            raise BadRecord(self.origin(index), problem, _REST if what == "length" else _AGAIN)


class _Reader(Protocol):
    """Reads a file from its beginning."""

    position: int

    def read(self, length: int) -> memoryview:
        """That many bytes, fewer at the end."""
        ...


class _Bytes(Protocol):
    """The unpacked bytes of a file."""

    def reader(self) -> _Reader: ...

    def take(self, start: int, length: int) -> memoryview: ...


class _Plain:
    """A file mapped into memory."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as stream:
            empty = not stream.read(1)
            self._map = None if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._view = memoryview(b"" if self._map is None else self._map)

    def reader(self) -> _Reader:
        return _PlainReader(self._view, self._forget)

    def _forget(self) -> None:
        """Hand pages that were looked at back to the system, which counts them as ours; they can be read again."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def take(self, start: int, length: int) -> memoryview:
        return self._view[start : start + length]


class _PlainReader:
    def __init__(self, view: memoryview, forget: Callable[[], None]) -> None:
        self._view, self._forget, self.position = view, forget, 0

    def read(self, length: int) -> memoryview:
        data = self._view[self.position : self.position + length]
        end = self.position + len(data)
        if end // CHECKPOINT > self.position // CHECKPOINT or not data:
            self._forget()
        self.position = end
        return data


@dataclass
class _State:
    """How far the unpacking of a file has come."""

    unpacker: Any
    """A zlib object; None between the members of the file."""
    read: int
    """Bytes of the file that went in."""
    out: int
    """Bytes that came out."""

    def copy(self) -> _State:
        return _State(None if self.unpacker is None else self.unpacker.copy(), self.read, self.out)

    def advance(self, stream: BinaryIO) -> bytes | None:
        """The next bytes, maybe none yet; None at the end. Raises zlib.error or EOFError for damaged files."""
        stream.seek(self.read)
        chunk = stream.read(_CHUNK)
        if self.unpacker is None:
            if not chunk:
                return None
            self.unpacker = zlib.decompressobj(wbits=31)
        data: bytes = self.unpacker.decompress(chunk, _PIECE)
        if not (chunk or data or self.unpacker.eof):
            raise EOFError("the file ends before its gzip stream does")
        # What did not fit into the piece is read again.
        self.read += len(chunk) - len(self.unpacker.unused_data) - len(self.unpacker.unconsumed_tail)
        self.out += len(data)
        if self.out > MAX_RATIO * self.read + _SLACK:
            raise zlib.error(f"{self.read} bytes of it hold {self.out}; at most {MAX_RATIO} times as many are unpacked")
        if self.unpacker.eof:
            self.unpacker = None
        return data


class _Gzipped:
    """A gzipped file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._states = [_State(None, 0, 0)]
        self._kept: OrderedDict[tuple[int, int], memoryview] = OrderedDict()

    def reader(self) -> _Reader:
        return _GzipReader(self._path, self._states)

    def take(self, start: int, length: int) -> memoryview:
        key = (start, length)
        if key not in self._kept:
            self._kept[key] = self._unpack(start, length)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _unpack(self, start: int, length: int) -> memoryview:
        state = next(state for state in reversed(self._states) if state.out <= start).copy()
        data = bytearray()
        with self._path.open("rb") as stream:
            while state.out < start + length:
                begin = state.out
                piece = state.advance(stream)
                if piece is None:
                    raise EOFError("the file is shorter than it was")
                data += piece[max(0, start - begin) : max(0, start + length - begin)]
        return memoryview(bytes(data))


class _GzipReader:
    def __init__(self, path: Path, states: list[_State]) -> None:
        self._path, self._states, self.position = path, states, 0
        self._state = states[0].copy()
        self._ready = bytearray()

    def read(self, length: int) -> memoryview:
        with self._path.open("rb") as stream:
            while len(self._ready) < length:
                piece = self._state.advance(stream)
                if piece is None:
                    break
                self._ready += piece
                if self._state.out - self._states[-1].out >= CHECKPOINT:
                    self._states.append(self._state.copy())
        with memoryview(self._ready) as ready:
            data = bytes(ready[:length])
        del self._ready[:length]
        self.position += len(data)
        return memoryview(data)
