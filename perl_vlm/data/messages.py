"""From what a row calls a prompt or a response to the messages of perl_vlm.types."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from perl_vlm.errors import BadRecord
from perl_vlm.types import ImageSlot, ImageSource, Message

ROLES = ("system", "user", "assistant")
_TURN = re.compile(r"\n\n(Human|Assistant):")


def show(value: Any) -> str:
    """A value in an error message: its type and a short form."""
    return f"{type(value).__name__} {reprlib.repr(value)}"


def check_text(value: Any, column: str, origin: str) -> str:
    """Return ``value`` if it is text that a tokenizer can read. Raises BadRecord for anything else."""
    if not isinstance(value, str):
        raise BadRecord(origin, f"column `{column}` holds {show(value)}, not text", "Write it as a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"column `{column}` holds text that is no valid Unicode ({error.reason} at {error.start})"
        raise BadRecord(origin, problem, "Write the text again as UTF-8") from error
    return value


def parse_messages(value: Any, column: str, origin: str) -> tuple[tuple[Message, ...], bool]:
    """Read a string or a list of messages.

    Returns:
        The messages, and whether all contents were plain strings, so that images have no stated place in them.

    Raises:
        BadRecord: another type, a wrong role, a content part of an unknown kind.
    """
    if isinstance(value, str):
        return (Message("user", (check_text(value, column, origin),)),), True
    if isinstance(value, Mapping) or not isinstance(value, Sequence):
        problem = f"column `{column}` holds {show(value)}"
        raise BadRecord(origin, problem, 'Give a string, or a list of {"role": ..., "content": ...}')
    messages, plain = [], True
    for number, turn in enumerate(value, start=1):
        where = f"{column}, message {number}"
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            problem = f"`{where}` is {show(turn)}"
            raise BadRecord(origin, problem, 'Each message is {"role": ..., "content": ...}')
        role = turn["role"]
        if role not in ROLES:
            problem = f"`{where}` has the role {reprlib.repr(role)}"
            raise BadRecord(origin, problem, f"Roles are {', '.join(ROLES)}")
        if role == "system" and number > 1:
            raise BadRecord(origin, f"`{where}` is a system message, which may only come first", "Move it to the top")
        content = turn["content"]
        if not isinstance(content, str):
            plain = False
        messages.append(Message(role, _parse_content(content, where, origin)))
    return tuple(messages), plain


def _parse_content(content: Any, where: str, origin: str) -> tuple[str | ImageSlot, ...]:
    if isinstance(content, str):
        return (check_text(content, where, origin),)
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        remedy = 'Give a string, or a list of {"type": "text", "text": ...} and {"type": "image"}'
        raise BadRecord(origin, f"the content of `{where}` is {show(content)}", remedy)
    parts: list[str | ImageSlot] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            parts.append(check_text(part.get("text"), f"{where}, text part", origin))
        elif kind == "image":
            # Columns of Arrow tables give every part every key, most of them null.
            extra = sorted(str(key) for key, item in part.items() if key != "type" and item is not None)
            if extra:
                problem = f"an image part of `{where}` carries its own {', '.join(extra)}"
                raise BadRecord(origin, problem, "Put pictures into the `images` column; the part marks their place")
            parts.append(ImageSlot())
        else:
            remedy = 'Parts are {"type": "text", "text": ...} and {"type": "image"}'
            raise BadRecord(origin, f"`{where}` holds the part {show(part)}", remedy)
    return tuple(parts)


def place_images(
    messages: tuple[Message, ...], plain: bool, images: Sequence[ImageSource], origin: str
) -> tuple[Message, ...]:
    """Give every image a slot: before the first user text where all contents are plain strings.

    Raises:
        BadRecord: structured contents whose slots do not count as many as the images.
    """
    if plain and images:
        first = next(i for i, message in enumerate(messages) if message.role == "user")
        user = Message("user", (ImageSlot(),) * len(images) + messages[first].content)
        return (*messages[:first], user, *messages[first + 1 :])
    slots = sum(isinstance(part, ImageSlot) for message in messages for part in message.content)
    if slots != len(images):
        problem = f'the messages hold {slots} {{"type": "image"}} parts, but the record has {len(images)} images'
        raise BadRecord(origin, problem, "Give one part for each image, or plain strings as contents")
    return messages


def check_prompt(messages: tuple[Message, ...], column: str, origin: str) -> None:
    """Raise BadRecord for a prompt that is empty or does not end in a user turn."""
    if not messages or (messages[-1].role == "user" and _is_empty(messages[-1])):
        raise BadRecord(origin, f"the prompt (column `{column}`) is empty", "Write a prompt, or remove the record")
    if messages[-1].role != "user":
        problem = f"the prompt (column `{column}`) ends in a turn of the {messages[-1].role}"
        raise BadRecord(origin, problem, "A prompt ends in a user turn; what follows is the response")


def _is_empty(message: Message) -> bool:
    return not message.text.strip() and not any(isinstance(part, ImageSlot) for part in message.content)


def response_text(messages: tuple[Message, ...], column: str, origin: str) -> str:
    """Return the text of a response: exactly one assistant turn without images. Raises BadRecord otherwise."""
    roles = [message.role for message in messages]
    if roles != ["assistant"]:
        problem = f"column `{column}` holds, after the prompt, turns of {roles or 'nobody'}"
        raise BadRecord(origin, problem, "A response is exactly one turn of the assistant")
    if any(isinstance(part, ImageSlot) for part in messages[0].content):
        problem = f"column `{column}` has an image in the response"
        raise BadRecord(origin, problem, "Images belong to the prompt")
    return messages[0].text


def transcript_messages(text: str) -> tuple[Message, ...] | None:
    r"""Read a transcript of ``\n\nHuman:`` and ``\n\nAssistant:`` turns, as the HH data sets write conversations.

    Returns None for any other text.
    """
    if not text.startswith("\n\nHuman:"):
        return None
    _, *pieces = _TURN.split(text)
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return tuple(Message("user" if who == "Human" else "assistant", (said.strip(),)) for who, said in turns)


def shared_beginning(one: str, other: str) -> str:
    """The longest text that both begin with."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]
