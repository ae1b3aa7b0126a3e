"""Look at records before anything trains on them: what can be known of a record then is reported then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from perl_vlm.data.rendering import PromptRenderer
from perl_vlm.errors import BadRecord, PerlVlmError
from perl_vlm.types import Comparison, Example, Rating

Record = TypeVar("Record", Example, Comparison, Rating)

RENDERED = 64
"""How many of the first records are rendered whole, and how many of the longest with pictures must fit in a row."""
_MARGIN = 8
"""Tokens that a tokenizer may add around a text."""
SHOWN = 5


def usable_records(
    records: Sequence[Record], renderer: PromptRenderer, what: str, *, skip: bool
) -> tuple[Sequence[Record], list[str]]:
    """The records that can be rendered within the limits, and a note about those left out.

    Of records read from somewhere (a list) every response is measured and every prompt without pictures. Prompts with
    pictures have to be rendered whole for that: the first ones are, and the longest ones until so many in a row fit
    that shorter ones will. Of records made on access only the first are looked at. Whether pictures open is the task's
    to say.

    Args:
        skip: leave bad records out and count them, rather than raise.

    Raises PerlVlmError naming the first bad records, unless ``skip``.
    """
    listed = isinstance(records, list)
    places = range(len(records) if listed else min(RENDERED, len(records)))
    problems: dict[int, BadRecord] = {}
    for place in places:
        record = records[place]
        try:
            for response in _responses(record):
                # A token is at least a byte, so a short text needs no counting.
                if len(response.encode()) >= renderer.max_response_tokens - _MARGIN:
                    renderer.response_ids(response, record.origin or record.id)
            if place < RENDERED or _may_be_long(record, renderer):
                renderer.prompts([record])
        except BadRecord as problem:
            problems[place] = problem
    seeing = [place for place in places if records[place].images] if listed else []
    longest = sorted(seeing, key=lambda place: -_prompt_length(records[place]))
    fitting = 0
    for place in longest:
        if fitting == RENDERED:
            break
        try:
            renderer.prompts([records[place]])
            fitting += 1
        except BadRecord as problem:
            problems.setdefault(place, problem)
            fitting = 0
    if not problems:
        return records, []
    named = "; ".join(str(problem) for problem in list(problems.values())[:SHOWN])
    named += f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    if not skip or not listed:
        raise PerlVlmError(f"{len(problems)} of {len(records)} {what} cannot be used. {named}")
    kept = [record for place, record in enumerate(records) if place not in problems]
    return kept, [f"{len(problems)} of {len(records)} {what} were skipped: {named}"]


def _may_be_long(record: Example | Comparison | Rating, renderer: PromptRenderer) -> bool:
    """Whether a prompt without pictures has enough bytes for too many tokens."""
    limit = renderer.max_prompt_tokens - _MARGIN
    return not record.images and len(renderer.prompt_text(record.messages).encode()) >= limit


def _prompt_length(record: Example | Comparison | Rating) -> int:
    return sum(len(message.text) for message in record.messages)


def _responses(record: Example | Comparison | Rating) -> tuple[str, ...]:
    if isinstance(record, Comparison):
        return record.chosen, record.rejected
    if isinstance(record, Rating):
        return (record.response,)
    return (record.reference,) if record.reference else ()
