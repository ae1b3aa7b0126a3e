"""Errors meant for a person: the command line prints their text alone, without a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class PerlVlmError(Exception):
    """Something the user can mend. The text says what was sought, what was found and what would be right."""


class Absent(PerlVlmError):
    """The data has none of what was asked for: not this split, or no records of this sort. Whoever can do without it
    goes on; a split that is there and cannot be read is another PerlVlmError."""


class BadRecord(PerlVlmError):
    """A record of a data set cannot be used.

    Args:
        origin: where the record stands, such as ``train.jsonl row 12``.
        problem: what is wrong with it.
        remedy: what would make it right.
    """

    def __init__(self, origin: str, problem: str, remedy: str) -> None:
        super().__init__(f"{origin}: {problem}. {remedy}")
        self.origin, self.problem, self.remedy = origin, problem, remedy


class LeftOut(BadRecord):
    """A sound record that is left out: a set is better without it, or has no use for it. No fault of the data's."""


class TooLong(BadRecord):
    """Prompts have more tokens than the model is given.

    Args:
        origin, problem, remedy: of the first one, as in BadRecord.
        records: all of them, the objects that were to be rendered.
    """

    def __init__(self, origin: str, problem: str, remedy: str, records: Sequence[object] = ()) -> None:
        super().__init__(origin, problem, remedy)
        self.records = tuple(records)


class BadRecords(PerlVlmError):
    """Several records cannot be used: the text names the first few, ``records`` holds them all."""

    def __init__(self, text: str, records: Sequence[BadRecord]) -> None:
        super().__init__(text)
        self.records = tuple(records)


_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory. ``torch.OutOfMemoryError`` says so in its text, as do the plain RuntimeErrors of
    the CPU's allocator."""
    return any(part in str(error).lower() for part in _NO_MEMORY)
