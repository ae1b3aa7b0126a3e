"""Plausible wrong actions, where a data set holds right ones alone.

Nothing but what an action says about its screen may tell a wrong one from a right one: no type, no set of fields, no
length of texts may be more frequent among the wrong. So a mistake of the same type has the very fields of the right
action, and what it says is taken from right ones. A mistake of another type is a step of the same episode: each of two
steps is as often given in the place of the other, and every type is as frequent among the wrong as among the right.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from perl_vlm_ui_automation.actions import DIRECTIONS, Action
from perl_vlm_ui_automation.elements import center, inside
from perl_vlm_ui_automation.judge import in_frame, right_action

_NEAR = 0.75
_PLACES = ("back", "home")


def wrong_action(
    right: Action,
    screen: Mapping[str, Any],
    others: Sequence[Action],
    rng: random.Random,
    tolerance: float,
    alike: Sequence[Action] = (),
) -> Action:
    """An action that someone might mistake for the right one, and that ``right_action`` finds wrong.

    Mostly it is of the same type: another element, point, direction or text. Else, and where there is no such one, it
    is one of ``others``; where there is none, going back or waiting.

    Args:
        right: the right action.
        screen: as ``judge`` takes it; a mistaken target is one of its ``elements``.
        others: actions of the same episode, as they would be given on this screen.
        rng: decides.
        tolerance: as ``judge`` takes it.
        alike: right actions elsewhere, whose texts, apps and keys may be mistaken for this one's.
    """

    def wrong(actions: Sequence[Action]) -> list[Action]:
        return [action for action in actions if not right_action(action, right, screen, tolerance)]

    near = wrong(_same_type(right, screen, (*others, *alike), rng))
    drawn = rng.sample(others, len(others))
    far = wrong([action for action in drawn if action.action != right.action])
    # Waiting has no mistake of its type and is always exchanged, so that it has to be taken wherever it is drawn.
    exchanged = bool(drawn) and (drawn[0].action == "wait" or rng.random() >= _NEAR)
    if near and not (far and exchanged and drawn[0] == far[0]):
        return rng.choice(near)
    return (far or wrong((Action("navigate", to="back"), Action("wait"))))[0]


def _same_type(right: Action, screen: Mapping[str, Any], others: Sequence[Action], rng: random.Random) -> list[Action]:
    """Actions of the right one's type and fields that say something else."""
    same = [action for action in others if action.action == right.action]
    if right.action == "scroll":
        return [replace(right, direction=direction) for direction in DIRECTIONS]
    if right.action == "navigate":
        places = (*_PLACES, *(action.to for action in same)) if right.to in _PLACES else [action.to for action in same]
        return [replace(right, to=place) for place in places]
    if right.action == "drag":
        return same
    said = {name: getattr(right, name) for name in ("text", "app", "key") if getattr(right, name) is not None}
    near = [replace(right, **{name: getattr(action, name)}) for name in said for action in same]
    boxes: Mapping[str, Sequence[float]] = screen.get("elements") or {}
    if right.element is not None:
        near += [replace(right, element=int(number)) for number in boxes]
    elif right.point is not None:
        elsewhere = [action.point for action in same if action.point is not None and in_frame(action.point, screen)]
        near += [
            replace(right, x=x, y=y) for x, y in _points(right.point, screen, list(boxes.values()), elsewhere, rng)
        ]
    return near


def _points(
    point: tuple[int, int],
    screen: Mapping[str, Any],
    boxes: Sequence[Sequence[float]],
    elsewhere: list[tuple[int, int]],
    rng: random.Random,
) -> list[tuple[int, int]]:
    """Points that lie in other boxes as the right one lies in its own; where it lies in none, those elsewhere."""
    own = next((box for box in screen.get("boxes") or () if inside(box, *point)), None)
    frame = screen.get("frame")
    if boxes and (own is not None or frame is None):
        return [center(box) if own is None else _moved(point, own, box) for box in boxes]
    if elsewhere or frame is None:
        return elsewhere
    return [(rng.randrange(frame[0]), rng.randrange(frame[1])) for _ in range(8)]


def _moved(point: tuple[int, int], own: Sequence[float], box: Sequence[float]) -> tuple[int, int]:
    x, y = (
        round(box[side] + (point[side] - own[side]) / max(own[side + 2] - own[side], 1) * (box[side + 2] - box[side]))
        for side in (0, 1)
    )
    return x, y
