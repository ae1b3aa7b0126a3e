"""The turns of Taskmaster's files: reward records, dialogues of TM-3 and TM-4, and TM-3's lines of tags."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from perl_vlm.data.messages import check_text, show
from perl_vlm.errors import BadRecord
from perl_vlm_dialogue.actions import Action, Call, Heard, Result, Say, Turn, Value, canonical, check_name

_DELETED = "(deleted)"
_TAG = re.compile(r"<(U|A|PN|PAN|PAV|PR|PRAN|PRAV|C|S)>|\[(A|PN|PAN|PAV)\]")
_TURN_REMEDY = (
    'A turn is {"role": "user" or "agent", "text": ...}, {"role": "agent", "api": {NAME: {...}}} or '
    '{"role": "api", "response": {NAME: ...}}'
)


def read_json(value: Any, column: str, origin: str) -> Any:
    """What a column holds as a JSON text. Raises BadRecord where it is none."""
    text = check_text(value, column, origin)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = f"column `{column}` holds {show(text)}, which is no JSON ({error})"
        raise BadRecord(origin, problem, "Mend or remove the record") from error


def context_turns(value: Any, origin: str) -> list[Turn]:
    """The column ``context`` of a reward record: a JSON list of turns. Raises BadRecord where it is none, or empty."""
    turns = read_json(value, "context", origin)
    if not isinstance(turns, list):
        raise BadRecord(origin, f"column `context` holds {show(turns)}, not a list of turns", _TURN_REMEDY)
    if not turns:
        raise BadRecord(origin, "the dialogue before the answer (column `context`) is empty", "Remove the record")
    return [_turn(turn, f"{origin}, turn {number} of the context") for number, turn in enumerate(turns, start=1)]


def generated_action(value: Any, origin: str) -> Action:
    """The column ``generation`` of a reward record: a JSON object, what the agent said or called."""
    turn = _turn(read_json(value, "generation", origin), f"{origin}, column `generation`")
    if not isinstance(turn, (Say, Call)):
        raise BadRecord(origin, f"column `generation` is a turn of the {_speaker(turn)}", _TURN_REMEDY)
    if isinstance(turn, Say) and not turn.text:
        raise BadRecord(origin, "column `generation` holds an empty text", "Remove the record")
    return turn


def _turn(value: Any, origin: str) -> Turn:
    role = value.get("role") if isinstance(value, Mapping) else None
    if role in ("user", "agent") and "text" in value:
        text = _line(value["text"], "text", origin)
        return Heard(text) if role == "user" else Say(text)
    holder = {"agent": "api", "api": "response"}.get(str(role))
    named = value.get(holder) if holder else None
    if not isinstance(named, Mapping) or len(named) != 1:
        raise BadRecord(origin, f"this is no turn: {show(value)}", _TURN_REMEDY)
    ((name, content),) = named.items()
    return _call(name, content, origin) if holder == "api" else _result(name, content, origin)


def dialog_turns(utterances: Any, origin: str) -> list[Turn]:
    """The column ``utterances`` of a whole dialogue.

    What the user says is followed by the API calls it led to: in TM-4 the annotations ``api_call``, ``request``,
    ``api_response``, ``response``, in TM-3 the list ``apis`` of {name, args, response}, where the hub's copy holds args
    as a list of {arg_name, arg_value} and the response as one of {response_name, response_value}.

    Raises:
        BadRecord: no utterance, a speaker that is neither user nor assistant, an API value that is no JSON.
    """
    if not isinstance(utterances, Sequence) or isinstance(utterances, str):
        raise BadRecord(origin, f"column `utterances` holds {show(utterances)}", "It is a list of utterances")
    turns: list[Turn] = []
    for number, utterance in enumerate(utterances, start=1):
        place = f"{origin}, utterance {number}"
        if not isinstance(utterance, Mapping):
            raise BadRecord(place, f"this is {show(utterance)}", "An utterance has `speaker` and `text`")
        speaker = str(utterance.get("speaker")).lower()
        if speaker not in ("user", "assistant"):
            raise BadRecord(place, f"the speaker is {speaker!r}", "Speakers are user and assistant")
        text = _line(utterance.get("text"), "text", place)
        if text and text != _DELETED:
            turns.append(Heard(text) if speaker == "user" else Say(text))
        turns.extend(_annotated(utterance.get("annotations") or [], place))
        turns.extend(_listed(utterance.get("apis") or [], place))
    if not turns:
        raise BadRecord(origin, "the dialogue is empty", "Remove the record")
    if not any(isinstance(turn, (Say, Call)) for turn in turns) or not any(isinstance(turn, Heard) for turn in turns):
        raise BadRecord(origin, "only one side speaks in the dialogue", "Remove the record")
    return turns


def _annotated(annotations: Sequence[Mapping[str, Any]], origin: str) -> Iterator[Turn]:
    name, request = "", cast(Any, None)
    for annotation in annotations:
        kind, value = annotation.get("name"), annotation.get("value")
        if kind == "api_call":
            if request is not None:  # the call before was not answered
                yield _call(name, request, origin)
            name, request = str(value), {}
        elif kind == "request":
            request = read_json(value, "request", origin)
        elif kind == "api_response":
            if request is not None:
                yield _call(name, request, origin)
            name, request = str(value), None
        elif kind == "response":
            yield _result(name, read_json(value, "response", origin), origin)
    if request is not None:
        yield _call(name, request, origin)


def _listed(apis: Sequence[Mapping[str, Any]], origin: str) -> Iterator[Turn]:
    for api in apis:
        yield _call(str(api.get("name")), _by_name(api.get("args"), "arg", origin), origin)
        yield _result(str(api.get("name")), _by_name(api.get("response"), "response", origin), origin)


def _by_name(values: Any, what: str, origin: str) -> Any:
    """Named values as {name: value}; a list of {<what>_name, <what>_value} is brought into that form."""
    if not isinstance(values, list):
        return values or {}
    found: dict[str, list[Any]] = {}
    for item in values:
        if not isinstance(item, Mapping) or not {f"{what}_name", f"{what}_value"} <= set(item):
            remedy = f"It is {{name: value}}, or a list of {{{what}_name, {what}_value}}"
            raise BadRecord(origin, f"an API's {what} holds {show(item)}", remedy)
        found.setdefault(str(item[f"{what}_name"]), []).append(_listed_again(item[f"{what}_value"]))
    return {name: held if len(held) > 1 else held[0] for name, held in found.items()}


def _listed_again(value: Any) -> Any:
    """A list that the hub's copy, whose values are texts, holds as Python writes it: ``"['Mulan', 'Emma']"``."""
    if not isinstance(value, str) or not value.startswith("["):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value  # a text that happens to begin so


def tagged_turns(context: str, origin: str) -> list[Turn]:
    """The first column of TM-3's ``splits/*.tsv``: ``NEWEST<C>BEFORE`` or, at the beginning, ``NEWEST`` alone.

    ``<U>`` and ``<A>`` begin what user and agent said; ``<PN>`` a call, ``<PAN>`` and ``<PAV>`` the name and value of
    an argument; ``<PR>`` a result, ``<PRAN>`` the name and ``<PRAV>`` each value of what it holds. ``<S>`` marks the
    start of a dialogue that the agent opened.
    """
    newest, _, before = context.partition("<C>")
    return _tagged(before + newest, origin)


def tagged_action(target: str, origin: str) -> Action:
    """The second column, the agent's next turn: ``[A]`` a text, ``[PN]`` a call. Of several the first is taken."""
    action = next(iter(_tagged(target, origin)), None)
    if not isinstance(action, (Say, Call)) or action == Say(""):
        raise BadRecord(origin, f"the target holds {show(target)}", "It begins with [A] or [PN]")
    return action


def _tagged(text: str, origin: str) -> list[Turn]:
    first, *pieces = _TAG.split(text)
    if first.strip():
        raise BadRecord(origin, f"the line begins with {show(first)}", "It begins with a tag such as <U>")
    turns: list[Turn] = []
    name, values, argument = "", dict[str, Any](), ""
    for angled, squared, content in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        tag, content = angled or squared, " ".join(content.replace("\\n", " ").split())
        if tag == "U":
            turns.append(Heard(content))
        elif tag == "A":
            turns.append(Say(content))
        elif tag in ("PN", "PR"):
            name, values = content, {}
            turns.append(_call(name, values, origin) if tag == "PN" else _result(name, values, origin))
        elif tag in ("PAN", "PRAN"):
            argument = content
        elif tag in ("PAV", "PRAV"):
            if not turns or not isinstance(turns[-1], (Call, Result)):
                raise BadRecord(origin, f"<{tag}> stands where no call or result is", "Mend or remove the line")
            values.setdefault(argument, []).append(content)
            flat = {key: held if len(held) > 1 else held[0] for key, held in values.items()}
            turns[-1] = _call(name, flat, origin) if isinstance(turns[-1], Call) else _result(name, flat, origin)
    return turns


def _call(name: str, arguments: Any, origin: str) -> Call:
    if not isinstance(arguments, Mapping):
        raise BadRecord(origin, f"the API {name} is called with {show(arguments)}", "Arguments are {name: value}")
    try:
        values = canonical(arguments)
        assert isinstance(values, Mapping)  # as its argument is
        return Call(check_name(name), values)
    except ValueError as error:
        raise BadRecord(origin, f"the call of an API cannot be written: {error}", "Mend or remove it") from error


def _result(name: str, content: Any, origin: str) -> Result:
    try:
        value: Value = canonical(content)
        return Result(check_name(name), value)
    except ValueError as error:
        raise BadRecord(origin, f"the answer of an API cannot be written: {error}", "Mend or remove it") from error


def _line(value: Any, column: str, origin: str) -> str:
    return " ".join(check_text(value, column, origin).split())


def _speaker(turn: Turn) -> str:
    return "user" if isinstance(turn, Heard) else "API"
