"""AndroidControl: demonstrations on real apps, as published in TFRecord files (google-research/android_control).

A record is an episode: episode_id, goal, screenshots (PNG, one more than there are actions), accessibility_trees,
screenshot_widths, screenshot_heights, actions (JSON), step_instructions. ``splits.json`` beside the files says which
episodes are train, validation and test; without it, episodes are held out by a hash of their goal. Every step becomes
an example; screenshots and trees are read when a step is asked for. Where pictures are checked in full, so are the
records' checksums when the files are opened; otherwise a damaged record is named when it is used.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from perl_vlm.data.adapters import Source
from perl_vlm.data.sources import collect
from perl_vlm.errors import Absent, BadRecord, PerlVlmError
from perl_vlm.types import SPLITS, Comparison, Example, Rating, RewardHead, Split
from perl_vlm_ui_automation.actions import Action, format_action
from perl_vlm_ui_automation.elements import Element, inside
from perl_vlm_ui_automation.episodes import Episode, Screenshot, read_episodes, read_tree, record_files
from perl_vlm_ui_automation.judge import in_frame
from perl_vlm_ui_automation.mistakes import wrong_action
from perl_vlm_ui_automation.prompts import prompt
from perl_vlm_ui_automation.sampling import draw
from perl_vlm_ui_automation.tfrecord import RecordFile

if TYPE_CHECKING:
    from perl_vlm_ui_automation.task import UiAutomationConfig

_TENTHS = 10
_ALIKE = 8


class AndroidControl(Source):
    """The adapter."""

    config: UiAutomationConfig

    def __init__(self, config: UiAutomationConfig) -> None:
        super().__init__(config)
        self._by_split: dict[Split, list[tuple[Episode, int]]] | None = None

    def examples(self, split: Split) -> Sequence[Example]:
        return _Records(self, split, "example")

    def preferences(self, split: Split) -> Sequence[Comparison] | Sequence[Rating]:
        return _Records(self, split, "pair" if self.reward_head().kind == "pairs" else "rating")

    def reward_head(self) -> RewardHead:
        return RewardHead("pairs" if self.config.feedback == "pairs" else "labels")

    def steps(self, split: Split) -> Sequence[tuple[Episode, int]]:
        """The steps of a split: an episode and a position in its ``steps``."""
        if self._by_split is None:
            self._by_split = self._open()
        steps = self._by_split[split]
        if not steps:
            raise Absent(f"There are no {split} steps in {self.config.path}.")
        return draw(steps, self.config.size(split), self.config.data_seed)

    def _open(self) -> dict[Split, list[tuple[Episode, int]]]:
        path = Path(self.config.path or "")
        check = self.config.picture_check == "full"
        found: list[tuple[dict[str, Any], str]] = []
        for file in record_files(path):
            found += [({"item": item}, "") for item in read_episodes(RecordFile(file), check)]
        episodes, bad = collect(
            found, lambda row, _: _usable(row["item"]), on_bad_record=self.config.on_bad_record, what="episodes"
        )
        if bad:
            self.skipped["episodes"] = bad
        split_of = _splits(path if path.is_dir() else path.parent)
        by_split: dict[Split, list[tuple[Episode, int]]] = {split: [] for split in SPLITS}
        for episode in episodes:
            split = split_of.get(episode.id) if split_of else _held_out(episode.goal)
            if split is not None:
                by_split[split] += [(episode, position) for position in range(len(episode.steps))]
        return by_split


class _Records(Sequence[Any]):
    """Examples, comparisons or ratings of steps, made at each access."""

    def __init__(self, adapter: AndroidControl, split: Split, what: str) -> None:
        self._config, self._split, self._what = adapter.config, split, what
        self._steps = adapter.steps(split)
        self._by_kind: dict[str, list[Action]] | None = None

    def __len__(self) -> int:
        return len(self._steps)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._record(*step) for step in self._steps[index]]
        return self._record(*self._steps[index])

    def __iter__(self) -> Iterator[Any]:
        return (self._record(*step) for step in self._steps)

    def _record(self, episode: Episode, position: int) -> Example | Comparison | Rating:
        config = self._config
        step, action, told = episode.steps[position]
        frame = episode.frames[step]
        elements = read_tree(episode, step) if config.elements else []
        listed = elements[: config.elements]
        screen: dict[str, Any] = {"frame": list(frame), "elements": {str(e.number): list(e.box or ()) for e in listed}}
        target = _target(action, elements)
        if target is not None:
            screen["boxes"] = [list(target.box or ())]
            action = _named(action, target, config)
        instruction = {"goal": episode.goal, "step": told, "both": f"{episode.goal}\nStep: {told}"}[config.instruction]
        common: dict[str, Any] = {
            "id": f"{self._split}: episode {episode.id} step {step + 1}",
            "messages": prompt(instruction, frame, elements, limit=config.elements, hint=config.hint),
            "images": (Screenshot(episode, step),),
            "metadata": {"kind": action.action, **screen},
            "origin": episode.origin(step),
        }
        right = format_action(action)
        if self._what == "example":
            return Example(reference=right, **common)
        rng = random.Random(f"{config.data_seed}-{episode.id}-{step}-wrong")
        good = rng.random() < 0.5
        others = [_here(other, elements, frame, config, rng) for number, other, _ in episode.steps if number != step]
        # Those that would be named as the right one is.
        mistaken = [e for e in elements if (e.number <= config.elements) == (action.element is not None)]
        mistaken = mistaken if config.target == "element" else elements
        mistaken = [element for element in mistaken if element.clickable] or mistaken
        about = {**screen, "elements": {str(element.number): list(element.box or ()) for element in mistaken}}
        alike = self._alike(action.action)
        alike = rng.sample(alike, min(_ALIKE, len(alike)))
        wrong = format_action(wrong_action(action, about, others, rng, config.tolerance, alike))
        if self._what == "pair":
            return Comparison(chosen=right, rejected=wrong, **common)
        return Rating(response=right if good else wrong, label=good, **common)

    def _alike(self, kind: str) -> Sequence[Action]:
        """The split's actions of a type."""
        if self._by_kind is None:
            self._by_kind = {}
            for episode, position in self._steps:
                action = episode.steps[position][1]
                self._by_kind.setdefault(action.action, []).append(action)
        return self._by_kind.get(kind, [])


def _here(
    action: Action, elements: Sequence[Element], frame: tuple[int, int], config: UiAutomationConfig, rng: random.Random
) -> Action:
    """The action of another step as it would be given on this screen: on an element of it, named as right ones are."""
    point = action.point
    if point is None:
        return action
    targets = [element.box for element in elements if element.clickable and element.box is not None]
    if targets:
        left, top, right, bottom = rng.choice(targets)
        action = replace(action, x=rng.randint(left, right), y=rng.randint(top, bottom))
    elif not in_frame(point, {"frame": frame}):
        action = replace(action, x=rng.randrange(frame[0]), y=rng.randrange(frame[1]))
    target = _target(action, elements)
    return action if target is None else _named(action, target, config)


def _target(action: Action, elements: Sequence[Element]) -> Element | None:
    """The smallest element under the point, of those that can be clicked if there are any."""
    point = action.point
    if point is None:
        return None
    under = [element for element in elements if element.box is not None and inside(element.box, *point)]
    under = [element for element in under if element.clickable] or under
    return min(under, key=_area, default=None)


def _area(element: Element) -> int:
    left, top, right, bottom = element.box or (0, 0, 0, 0)
    return (right - left) * (bottom - top)


def _named(action: Action, target: Element, config: UiAutomationConfig) -> Action:
    """The action on the element by its number, where that is asked for and the element is listed."""
    if config.target != "element" or target.number > config.elements:
        return action
    return Action(action.action, element=target.number, text=action.text)


def _usable(item: Episode | BadRecord) -> Episode:
    if isinstance(item, BadRecord):
        raise item
    return item


def _splits(folder: Path) -> dict[str, Split]:
    """The split of each episode, by ``splits.json``; empty without that file."""
    path = folder / "splits.json"
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
        return {str(number): split for split in SPLITS for number in value[split]}
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise PerlVlmError(
            f"{path} cannot be used ({type(error).__name__}: {error}). It holds lists of episode ids by split: "
            '{"train": [...], "validation": [...], "test": [...]}.'
        ) from error


def _held_out(goal: str) -> Split:
    """Eight tenths of the goals to train, one tenth each to validation and test."""
    key = " ".join(goal.casefold().split()).encode()
    tenth = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % _TENTHS
    return "test" if tenth == _TENTHS - 1 else "validation" if tenth == _TENTHS - 2 else "train"
