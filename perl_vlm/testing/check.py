"""``check_task``: proof that a task plugin is sound.

    from perl_vlm.testing import check_task

    def test_my_task():
        check_task(MyTask(MyConfig(path="tests/data")))

It needs no model and no torch, unless a model is named to render for and train on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from PIL import Image

from perl_vlm.data.images import content_key
from perl_vlm.task import Task
from perl_vlm.testing.hooks import (
    Fault,
    check_choices,
    check_config,
    check_demonstrations,
    check_environment,
    check_episodes,
    check_light,
    check_metadata,
    check_objective,
    check_odd_responses,
    check_totals,
    close_environment,
    judges_alone,
    require,
)
from perl_vlm.types import SPLITS, Comparison, Example, ImageSlot, Rating, Split

_COMPARED = 8
"""For every record looked at in full, as many have their ids and prompts compared, their pictures not decoded."""


def check_task(
    task: Task,
    *,
    samples: int = 64,
    splits: Sequence[Split] = SPLITS,
    preferences: bool = True,
    model: str | None = None,
    max_prompt_tokens: int = 2048,
) -> None:
    """Check what training and evaluation take for granted.

    Ids are unique and the same at every load; no prompt with its pictures, and no picture, is in two splits; pictures
    open and count as many as their slots; references score 1 on the primary metric and under ``verify``; rejected
    responses score lower than chosen ones; preferences are of the type that the reward head is trained on; whatever a
    policy says is judged by finite numbers; the task is imported without torch; demonstrations, choices, totals and the
    environment, where the task has them, keep the contract; the environment is closed at the end. With a model, records
    fit into its prompts and one step of every stage that they allow trains on them.

    Args:
        task: the task, configured so that its data can be read.
        samples: how many records of each split, evenly spaced, are looked at in full. Of the first eight times as
            many, ids and prompts are compared.
        splits: the splits that the task has; without ``train``, a model is only evaluated.
        preferences: whether the task's data has any; some sets are prompts alone.
        model: render for this model and train a step of every stage on it; ``tiny``, the bundled one, takes seconds.
        max_prompt_tokens: with a model, the longest prompt that is let through.

    Raises:
        AssertionError: what is wrong, where, and how to mend it.
        PerlVlmError: importing the task takes minutes.
    """
    _check_class(task)
    check_config(task)
    check_light(task)
    again = type(task)(task.config)
    try:
        kept: dict[str, dict[Split, dict[Hashable, str]]] = {"id": {}, "prompt with its pictures": {}, "picture": {}}
        for split in splits:
            _check_split(task, again, split, samples, preferences, kept)
        _check_apart(task, kept)
        environment = task.environment()
        if environment is not None:
            prompts = _spaced(task.examples(splits[0]), 2)
            check_environment(task, environment, prompts)
            check_episodes(task, environment, prompts)
        if model is not None:
            from perl_vlm.testing.training import check_training

            check_training(task, model, samples, max_prompt_tokens, splits, preferences)
    finally:
        close_environment(again)
        close_environment(task)


def _check_split(
    task: Task,
    again: Task,
    split: Split,
    samples: int,
    preferences: bool,
    kept: dict[str, dict[Split, dict[Hashable, str]]],
) -> None:
    """Check one split's records; notes ids, prompts and pictures in ``kept``. ``again`` is a second task of the same
    configuration."""
    examples, first_examples = _load(task, again, "examples", split, samples)
    pairs, first_pairs = _load(task, again, "preferences", split, samples) if preferences else ([], [])
    kept["id"][split] = {record.id: record.id for record in first_examples}
    pictures = kept["picture"][split] = {}
    alone = judges_alone(task, examples[0])
    for example in examples:
        pictures.update(dict.fromkeys(_check_prompt(task, example), example.id))
        check_metadata(task, example)
        if example.choices:
            check_choices(task, example)
        elif alone:
            _check_reference(task, example)
    judged = [example for example in examples if alone and not example.choices and example.reference is not None]
    for example in judged[:2]:
        check_odd_responses(task, example)
    if alone:
        check_totals(task, judged)
    if type(task).demonstrations is not Task.demonstrations:
        check_demonstrations(task, _load(task, again, "demonstrations", split, samples)[0])
    for preference in pairs:
        pictures.update(dict.fromkeys(_check_prompt(task, preference), preference.id))
        check_metadata(task, preference)
        _check_preference(task, preference, alone)
        check_objective(task, preference)
    kept["prompt with its pictures"][split] = {
        _prompt_key(record): record.id for record in (*first_examples, *first_pairs)
    }


def _check_class(task: Task) -> None:
    for name in ("name", "modality", "primary_metric"):
        value = getattr(task, name, None)
        require(task, isinstance(value, str) and value, f"set the class attribute `{name}` to a text")
    modalities = ("text", "image+text")
    require(task, task.modality in modalities, f"`modality` is {task.modality!r}; it is one of {modalities}")
    config = task.Config
    frozen = dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen  # type: ignore[attr-defined]
    require(task, frozen, "`Config` must be a dataclass with frozen=True; its fields become the --task.* flags")


def _load(task: Task, again: Task, what: str, split: Split, samples: int) -> tuple[list[Any], list[Any]]:
    """The records to look at in full, and the first ones, after a check of lengths and ids."""
    records = getattr(task, what)(split)
    require(
        task,
        hasattr(records, "__len__") and hasattr(records, "__getitem__"),
        f"{what}({split!r}) returned {type(records).__name__}; return a sequence, which may make its items on demand",
    )
    require(task, len(records) > 0, f"{what}({split!r}) is empty; every split needs records")
    first = [records[i] for i in range(min(len(records), samples * _COMPARED))]
    seen: set[str] = set()
    for position, record in enumerate(first):
        key = record.id
        require(
            task,
            isinstance(key, str) and key,
            f"{what}({split!r})[{position}].id is {key!r}; an id is a text that is not empty",
        )
        require(task, key not in seen, f"{what}({split!r}) has the id {key!r} twice; ids are unique within a split")
        seen.add(key)
    spaced = _spaced(records, samples)
    _check_stable(task, again, what, split, len(records), spaced)
    return spaced, first


def _spaced(records: Sequence[Any], samples: int) -> list[Any]:
    count = min(samples, len(records))
    return [records[i * len(records) // count] for i in range(count)]


def _check_stable(task: Task, again: Task, what: str, split: Split, length: int, spaced: Sequence[Any]) -> None:
    """A second task of the same configuration has the same records in the same order."""
    second = getattr(again, what)(split)
    require(task, len(second) == length, f"{what}({split!r}) changed its length from one load to the next")
    for old, new in zip(spaced, _spaced(second, len(spaced)), strict=True):
        require(
            task,
            old.id == new.id and _words(old) == _words(new),
            f"{what}({split!r}) gave {old.id!r} ({_words(old)!r:.200}) and, loaded again, {new.id!r} "
            f"({_words(new)!r:.200}). Draw from random.Random of a fixed text, and avoid sets and hash()",
        )


def _words(record: Any) -> tuple[Hashable, ...]:
    return (record.messages, *(getattr(record, name, None) for name in ("reference", "chosen", "rejected", "response")))


def _check_prompt(task: Task, record: Example | Comparison | Rating) -> list[str]:
    """Check messages and pictures; returns a digest of each picture."""
    place = f"record {record.id!r}"
    require(task, record.messages, f"{place} has no messages")
    roles = [message.role for message in record.messages]
    unknown = sorted(set(roles) - {"system", "user", "assistant"})
    require(task, not unknown, f"{place} has the roles {unknown}; roles are system, user, assistant")
    require(task, roles[-1] == "user", f"{place} ends in a turn of {roles[-1]!r}; a prompt ends in a user turn")
    slots = sum(isinstance(part, ImageSlot) for message in record.messages for part in message.content)
    count = len(record.images)
    require(task, slots == count, f"{place} has {slots} image slots and {count} images; put one ImageSlot for each")
    if task.modality == "text":
        require(task, not record.images, f'{place} has images, but `modality` is "text"; make it "image+text"')
    has_text = any(message.text.strip() for message in record.messages)
    require(task, has_text or count, f"{place} has neither text nor images in its prompt")
    digests = []
    for position, image in enumerate(record.images):
        picture = _open(task, image, f"image {position} of {place}")
        require(
            task,
            isinstance(picture, Image.Image) and picture.mode == "RGB",
            f"image {position} of {place} loads as {getattr(picture, 'mode', type(picture).__name__)}; "
            "load() returns a PIL image in RGB",
        )
        digests.append(_digest(picture))
    return digests


def _open(task: Task, image: Any, place: str) -> Image.Image:
    try:
        picture: Image.Image = image.load()
    except Exception as error:
        raise AssertionError(f"{type(task).__name__}: {place} does not open: {error}") from error
    return picture


def _evaluate(task: Task, example: Example, response: str) -> float:
    scores = task.evaluate(example, response)
    place = f"evaluate() of record {example.id!r}"
    require(
        task,
        isinstance(scores, dict) and task.primary_metric in scores,
        f"{place} returned {scores!r}, which lacks the primary metric {task.primary_metric!r}",
    )
    for key, value in scores.items():
        number = isinstance(value, (int, float)) and math.isfinite(value)
        require(task, number, f"{place} gave {key} = {value!r}; scores are finite numbers, whatever the response")
    return float(scores[task.primary_metric])


def _check_reference(task: Task, example: Example) -> None:
    if example.reference is None:
        return
    place = f"the reference {example.reference!r} of record {example.id!r}"
    score = _evaluate(task, example, example.reference)
    # Where several people answered, the answer of most need not be that of all.
    graded = "answers" in example.metadata
    right = "more than 0 and at most 1" if graded else "1.0"

    def is_right(value: float) -> bool:
        return 0 < value <= 1 if graded else value == 1.0

    require(task, is_right(score), f"{place} scores {score} on {task.primary_metric}; the right answer scores {right}")
    reward = task.verify(example, example.reference)
    passes = reward is None or is_right(reward)
    require(task, passes, f"verify() gives {place} {reward}; the right answer earns {right}")
    _evaluate(task, example, "")


def _check_preference(task: Task, record: Comparison | Rating, alone: bool) -> None:
    kind = task.reward_head().kind
    wanted = Comparison if kind == "pairs" else Rating
    require(
        task,
        isinstance(record, wanted),
        f"reward_head() is of kind {kind!r}, which is trained on {wanted.__name__}s, but preferences() holds "
        f"{type(record).__name__} {record.id!r}; change one of the two",
    )
    if isinstance(record, Rating):
        require(task, isinstance(record.label, bool), f"record {record.id!r} has the label {record.label!r}, no bool")
        require(task, record.response.strip(), f"record {record.id!r} has an empty response")
        return
    for name, text in (("chosen", record.chosen), ("rejected", record.rejected)):
        require(task, isinstance(text, str) and text.strip(), f"record {record.id!r} has an empty {name} response")
    require(task, record.chosen != record.rejected, f"record {record.id!r}: chosen and rejected are the same")
    if not alone:
        return
    example = Example(
        record.id, record.messages, record.images, record.chosen, dict(record.metadata), origin=record.origin
    )
    _check_lower(task, example, record, "evaluate()", _evaluate)
    if task.verify(example, record.chosen) is not None:
        _check_lower(task, example, record, "verify()", lambda task, ex, text: float(task.verify(ex, text) or 0.0))


def _check_lower(
    task: Task, example: Example, record: Comparison, name: str, judge: Callable[[Task, Example, str], float]
) -> None:
    chosen, rejected = judge(task, example, record.chosen), judge(task, example, record.rejected)
    require(
        task,
        chosen > rejected,
        f"record {record.id!r}: {name} gives the chosen response {record.chosen!r:.80} {chosen} and the rejected one "
        f"{record.rejected!r:.80} {rejected}; the rejected one must score lower",
    )


def _check_apart(task: Task, kinds: Mapping[str, Mapping[Split, Mapping[Hashable, str]]]) -> None:
    """No id, prompt or picture of one split is in another; each mapping leads from a key to the id of its record."""
    for name, keys in kinds.items():
        for one, other in itertools.combinations(keys, 2):
            shared = keys[one].keys() & keys[other].keys()
            if shared:
                key = min(shared, key=repr)
                raise Fault(
                    f"{type(task).__name__}: {one} and {other} share {len(shared)} of the {name}s looked at, such as "
                    f"that of {keys[one][key]!r} and {keys[other][key]!r}; what is tested on must not be trained on",
                )


def _prompt_key(record: Example | Comparison | Rating) -> Hashable:
    return (record.messages, tuple(map(content_key, record.images)))


def _digest(picture: Image.Image) -> str:
    return hashlib.sha256(repr((picture.mode, picture.size)).encode() + picture.tobytes()).hexdigest()
