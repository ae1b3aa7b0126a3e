"""Rows by number from one file or one Arrow data set, without holding decoded pictures.

Each table gives ``len(table)``, ``table.row(i)`` (raises BadRecord for a row that cannot be parsed),
``table.read(indices)``, many times faster for many rows, and ``table.origin(i)``, the place of row i in words. Rows
count from 1 as in an editor: line numbers for JSON lines.
"""

from __future__ import annotations

import bisect
import codecs
import csv
import gzip
import itertools
import json
import os
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from perl_vlm.data.arrow_table import ArrowTable
from perl_vlm.errors import BadRecord, PerlVlmError

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv")
_LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV field: a long document passes the 128 KiB that the csv module takes by default."""
_LINE_REMEDY = "Each line is one JSON object; mend or remove this one"


class Table(Protocol):
    """Rows by number."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> dict[str, Any]:
        """The columns of row ``index``, from 0. Raises BadRecord where the row cannot be parsed."""
        ...

    def read(self, indices: Iterable[int]) -> Iterator[dict[str, Any] | BadRecord]:
        """These rows in this order, a row that cannot be parsed as its error."""
        ...

    def origin(self, index: int) -> str:
        """Where row ``index`` stands: ``train.jsonl row 12``."""
        ...


class JsonLines:
    """A JSON lines file. Plain files are read line by line when asked; gzipped ones are kept in memory as text."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._lines: list[bytes] | None = None
        if _is_gzipped(path):
            with gzip.open(path, "rb") as stream:
                self._lines = stream.read().splitlines(keepends=True)
        # Eight bytes a row each: the offset of its line (its place in _lines), and the line's number.
        self._starts, self._numbers = array("Q"), array("Q")
        offset = 0
        with path.open("rb") as plain:
            for number, line in enumerate(plain if self._lines is None else self._lines, start=1):
                if line.removeprefix(codecs.BOM_UTF8).strip():
                    self._starts.append(offset if self._lines is None else number - 1)
                    self._numbers.append(number)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def origin(self, index: int) -> str:
        return f"{self._name} row {self._numbers[index]}"

    def row(self, index: int) -> dict[str, Any]:
        return _or_raise(next(self.read([index])))

    def read(self, indices: Iterable[int]) -> Iterator[dict[str, Any] | BadRecord]:
        if self._lines is not None:
            for index in indices:
                yield self._parse(self._lines[self._starts[index]], index)
            return
        with self._path.open("rb") as stream:
            for index in indices:
                yield self._parse(_line_at(stream, self._starts[index]), index)

    def _parse(self, line: bytes, index: int) -> dict[str, Any] | BadRecord:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            return BadRecord(self.origin(index), f"the line is no JSON ({error})", _LINE_REMEDY)
        return _as_row(value, self.origin(index))


def _line_at(stream: IO[bytes], offset: int) -> bytes:
    stream.seek(offset)
    return stream.readline()


class Rows:
    """Rows in memory, from a JSON list or a CSV file; a row that could not be parsed is kept as its error."""

    def __init__(self, rows: Sequence[Any], name: str) -> None:
        self._rows, self._name = rows, name

    def __len__(self) -> int:
        return len(self._rows)

    def origin(self, index: int) -> str:
        return f"{self._name} row {index + 1}"

    def row(self, index: int) -> dict[str, Any]:
        return _or_raise(self._row(index))

    def read(self, indices: Iterable[int]) -> Iterator[dict[str, Any] | BadRecord]:
        return map(self._row, indices)

    def _row(self, index: int) -> dict[str, Any] | BadRecord:
        value = self._rows[index]
        return value if isinstance(value, BadRecord) else _as_row(value, self.origin(index))


class Chain:
    """Several tables one after the other."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables = tables
        self._ends = list(itertools.accumulate(len(table) for table in tables))

    def __len__(self) -> int:
        return self._ends[-1]

    def _number(self, index: int) -> int:
        return bisect.bisect_right(self._ends, index)

    def _place(self, index: int) -> tuple[Table, int]:
        number = self._number(index)
        return self._tables[number], index - (self._ends[number - 1] if number else 0)

    def origin(self, index: int) -> str:
        table, row = self._place(index)
        return table.origin(row)

    def row(self, index: int) -> dict[str, Any]:
        table, row = self._place(index)
        return table.row(row)

    def read(self, indices: Iterable[int]) -> Iterator[dict[str, Any] | BadRecord]:
        for number, group in itertools.groupby(indices, key=self._number):
            start = self._ends[number - 1] if number else 0
            yield from self._tables[number].read(index - start for index in group)


class Renamed:
    """Another table with some columns under the names that are expected."""

    def __init__(self, table: Table, columns: Mapping[str, str]) -> None:
        """``columns`` is {expected: the table's}. Raises PerlVlmError where the first readable row lacks one."""
        self._table, self._columns = table, dict(columns)
        found: list[str] = []
        for index in range(len(table)):
            try:
                found = list(table.row(index))
                break
            except BadRecord:
                continue
        missing = [theirs for theirs in self._columns.values() if theirs not in found] if found else []
        if missing:
            raise PerlVlmError(
                f"task.columns names {', '.join(f'`{name}`' for name in missing)}, not to be found in "
                f"{table.origin(index)}; its columns: {', '.join(sorted(found))}. "
                "Write --task.columns '{expected: yours}'"
            )

    def __len__(self) -> int:
        return len(self._table)

    def origin(self, index: int) -> str:
        return self._table.origin(index)

    def row(self, index: int) -> dict[str, Any]:
        return self._renamed(self._table.row(index))

    def read(self, indices: Iterable[int]) -> Iterator[dict[str, Any] | BadRecord]:
        return (row if isinstance(row, BadRecord) else self._renamed(row) for row in self._table.read(indices))

    def _renamed(self, row: dict[str, Any]) -> dict[str, Any]:
        # A row of its own may lack a column: it then lacks the expected one, and whoever needs that says so.
        renamed = {expected: row[theirs] for expected, theirs in self._columns.items() if theirs in row}
        kept = {name: value for name, value in row.items() if name not in self._columns.values()}
        return {**kept, **renamed}


def _as_row(value: Any, origin: str) -> dict[str, Any] | BadRecord:
    if isinstance(value, dict):
        return value
    problem = f"the row is a {type(value).__name__}, not an object"
    return BadRecord(origin, problem, "Each row is an object of named columns")


def _or_raise(row: dict[str, Any] | BadRecord) -> dict[str, Any]:
    if isinstance(row, BadRecord):
        raise row
    return row


def has_suffix(path: Path) -> bool:
    """Whether ``open_table`` reads files of this name."""
    return path.name.lower().endswith(SUFFIXES)


def open_table(path: Path, name: str) -> Table:
    """Open a file of a format in SUFFIXES; ``name`` is what origins call it.

    Raises:
        PerlVlmError: the file as a whole cannot be read.
    """
    kind = path.name.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    try:
        if kind == "parquet":
            return ArrowTable(_read_parquet(path), name)
        if kind == "csv":
            return Rows(_read_csv(path, name), name)
        if kind == "jsonl" or not _begins_with_bracket(path):
            return JsonLines(path, name)
        with _opened(path) as stream:
            value = json.loads(stream.read())
        return Rows(value, name)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise PerlVlmError(
            f"{path} cannot be read as {kind.upper()}: {error}. Write or copy the file again."
        ) from error


def _begins_with_bracket(path: Path) -> bool:
    with _opened(path) as stream:
        return bool(stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["))


def _is_gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _opened(path: Path) -> Any:
    return gzip.open(path, "rb") if _is_gzipped(path) else path.open("rb")


def _read_csv(path: Path, name: str) -> list[Mapping[str, Any] | BadRecord]:
    rows: list[Mapping[str, Any] | BadRecord] = []
    # Of the whole process, and never lowered again, since another thread may be reading.
    csv.field_size_limit(_LONGEST_FIELD)
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        while True:
            origin = f"{name} row {len(rows) + 1}"
            try:
                row = next(reader, None)
            except csv.Error as error:
                rows.append(BadRecord(origin, f"the row is no CSV ({error})", "Mend or remove it"))
                continue
            if row is None:
                return rows
            if None in row:
                rows.append(BadRecord(origin, "the row has more cells than the header has names", "Quote the commas"))
            else:
                rows.append({column: cell or None for column, cell in row.items()})


def _read_parquet(path: Path) -> datasets.Dataset:
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        result: datasets.Dataset = Dataset.from_parquet(os.fspath(path))
    except DatasetGenerationError as error:
        raise ValueError(str(error.__cause__ or error)) from error
    return result
