"""The rows of an Arrow table, mapped from its file, with the pictures in its cells left where they are."""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from perl_vlm.data.images import ImageBytes, key_of_bytes
from perl_vlm.data.screening import HEAD, Peek, peek_at
from perl_vlm.errors import BadRecord

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

Keys = tuple[str | int, ...]
"""The way to a cell of a row: the column, then positions inside lists."""

_BLOCK = 512
"""Rows that are turned into Python objects at once."""
_SPARSE = 16
"""Where fewer than one row in so many is wanted, each is read by itself."""
_UNREADABLE = (ValueError, OSError, OverflowError)


class ArrowTable:
    """A Hugging Face data set. Cells are read as stored; encoded pictures become ``CellImage``s."""

    def __init__(self, dataset: datasets.Dataset, name: str) -> None:
        # The arrow format hands out what is stored, still mapped; the data set's own would decode every picture.
        self._table: pa.Table = dataset.with_format("arrow")[:]
        self._name = name
        self._chunks: dict[str, tuple[list[int], list[pa.Array]]] = {}

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def origin(self, index: int) -> str:
        return f"{self._name} row {index + 1}"

    def row(self, index: int) -> dict[str, Any]:
        try:
            return self._block(index, 1)[0]
        except _UNREADABLE as error:
            raise BadRecord(self.origin(index), f"the row cannot be read ({error})", "Write the file again") from error

    def read(self, indices: Iterable[int]) -> Iterator[dict[str, Any] | BadRecord]:
        """Rows in any order; those that stand near one another are read together, with the few between them."""
        for near in _spans(indices):
            start, end = near[0], near[-1] + 1
            rows: Iterable[dict[str, Any] | BadRecord] = map(self._row_or_error, near)
            if len(near) * _SPARSE > end - start:
                with contextlib.suppress(*_UNREADABLE):
                    block = self._block(start, end - start)
                    rows = (block[index - start] for index in near)
            yield from rows

    def _row_or_error(self, index: int) -> dict[str, Any] | BadRecord:
        try:
            return self.row(index)
        except BadRecord as error:
            return error

    def _block(self, start: int, count: int) -> list[dict[str, Any]]:
        part, rows = self._table.slice(start, count), range(start, start + count)
        names = part.column_names
        columns = [self._values(part.column(name), rows, [(name,)] * count) for name in names]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    def _values(self, column: pa.ChunkedArray, rows: Sequence[int], keys: Sequence[Keys]) -> list[Any]:
        """What cells hold; pictures as CellImages. ``rows[i]`` and ``keys[i]`` are the way to cell i."""
        import pyarrow as pa
        import pyarrow.compute as pc

        kind = column.type
        if _is_binary(kind):
            there = column.is_valid().to_pylist()
            return [CellImage(self, row, key) if yes else None for row, key, yes in zip(rows, keys, there, strict=True)]
        if _is_encoded(kind):
            pictures = self._values(pc.struct_field(column, "bytes"), rows, keys)
            if None not in pictures:
                return pictures
            others = [field.name for field in kind if field.name != "bytes"]
            rest = [pc.struct_field(column, name).to_pylist() for name in others]
            whole = [{"bytes": None, **dict(zip(others, more, strict=True))} for more in zip(*rest, strict=True)]
            there = column.is_valid().to_pylist()
            return [
                (other if yes else None) if picture is None else picture
                for picture, other, yes in zip(pictures, whole or [{"bytes": None}] * len(rows), there, strict=True)
            ]
        if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _holds_pictures(kind.value_type):
            sizes = pc.list_value_length(column).to_pylist()
            inner = [
                (row, (*key, n)) for row, key, size in zip(rows, keys, sizes, strict=True) for n in range(size or 0)
            ]
            items = iter(self._values(pc.list_flatten(column), [row for row, _ in inner], [key for _, key in inner]))
            return [None if size is None else list(itertools.islice(items, size)) for size in sizes]
        return list(column.to_pylist())

    def encoded(self, index: int, keys: Keys) -> memoryview:
        """The bytes of a picture where they lie in the mapped file: nothing is copied."""
        array, place = self._chunk(str(keys[0]), index)
        for number in keys[1:]:
            array, place = array.values, array.offsets[place].as_py() + number
        if not _is_binary(array.type):
            array = array.field("bytes")
        _, offsets, data = array.buffers()
        starts = memoryview(offsets).cast("q" if "large" in str(array.type) else "i")
        place += array.offset
        return memoryview(data)[starts[place] : starts[place + 1]]

    def _chunk(self, column: str, index: int) -> tuple[pa.Array, int]:
        """The piece of a column that holds row ``index``, and the row's place in it."""
        if column not in self._chunks:
            chunks = self._table.column(column).chunks
            self._chunks[column] = list(itertools.accumulate(map(len, chunks))), chunks
        ends, chunks = self._chunks[column]
        number = bisect.bisect_right(ends, index)
        return chunks[number], index - (ends[number - 1] if number else 0)


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_encoded(kind: pa.DataType) -> bool:
    """Whether a type is that of the library's Image feature: a structure with ``bytes`` in it."""
    import pyarrow as pa

    return pa.types.is_struct(kind) and any(field.name == "bytes" and _is_binary(field.type) for field in kind)


def _holds_pictures(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_pictures(kind.value_type)
    return _is_binary(kind) or _is_encoded(kind)


def _spans(indices: Iterable[int]) -> Iterator[list[int]]:
    """Cut into runs that rise and reach over less than _BLOCK rows."""
    near: list[int] = []
    for index in indices:
        if near and not near[-1] < index < near[0] + _BLOCK:
            yield near
            near = []
        near.append(index)
    if near:
        yield near


@dataclass(frozen=True)
class CellImage:
    """An encoded picture in a cell of an Arrow table, fetched when it is needed."""

    table: ArrowTable
    index: int
    keys: Keys

    @property
    def place(self) -> str:
        """Row and column in words."""
        column = "".join(f"[{key}]" if isinstance(key, int) else key for key in self.keys)
        return f"{self.table.origin(self.index)} column {column}"

    @property
    def content_key(self) -> Hashable:
        """A hash of its bytes, read where they lie."""
        return key_of_bytes(self.table.encoded(self.index, self.keys))

    def read(self) -> bytes:
        """Return the encoded picture."""
        return bytes(self.table.encoded(self.index, self.keys))

    def peek(self, head: int = HEAD) -> Peek:
        """Return its size, first and last bytes."""
        return peek_at(self.table.encoded(self.index, self.keys), head)

    def load(self) -> Image.Image:
        """Return the picture as RGB. Raises BadRecord where it cannot be read safely."""
        return ImageBytes(self.read(), self.place).load()
