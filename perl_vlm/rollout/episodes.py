"""Episodes of several turns in a live environment: who answers is the caller's, who acts is the task's environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from perl_vlm.errors import PerlVlmError, TooLong
from perl_vlm.task import Environment
from perl_vlm.types import Example


class Spoken(Protocol):
    """An answer of any kind that has a text."""

    @property
    def text(self) -> str: ...


Answer = TypeVar("Answer", bound=Spoken)


@dataclass(frozen=True)
class Turn(Generic[Answer]):
    """One prompt of an episode and what was answered to it."""

    episode: int
    """Which of the played examples it belongs to."""
    number: int
    """Its place in the episode, from 0."""
    prompt: Example
    """With ``episode_return`` and ``episode_turns`` in its metadata: what was earned from this turn on (for number 0
    the return of the whole episode), and how many turns the episode had; and ``episode_truncated``, which is true,
    where it ended because its next prompt was too long."""
    answer: Answer


def play(
    environment: Environment,
    examples: Sequence[Example],
    answer: Callable[[Sequence[Example], Sequence[int], int], Sequence[Answer]],
) -> list[Turn[Answer]]:
    """Play an episode from every example to its end; all open episodes take their turns together.

    An episode whose prompt grows longer than the model is given ends before that turn, with what it earned so far and
    the environment's ``truncated_reward``.

    Args:
        environment: the task's.
        examples: the first prompts, one for each episode.
        answer: gives the answers to the prompts of a turn; it is told which episodes they belong to and the turn's
            number. It raises TooLong before anything else where some prompts are, and is then asked for the others'.

    Returns:
        All turns, by episode and then by number.

    Raises:
        PerlVlmError: the environment gave back another number of steps than it was given responses.
        TooLong: a first prompt is.
    """
    prompts = dict(enumerate(examples))
    turns: list[list[tuple[Example, Answer, float]]] = [[] for _ in examples]
    truncated: set[int] = set()
    for number in range(environment.max_turns):
        waiting = set(prompts)
        places, answers = _answered(prompts, answer, number)
        for place in waiting - set(places):
            truncated.add(place)
            prompt, given, earned = turns[place][-1]
            turns[place][-1] = prompt, given, earned + getattr(environment, "truncated_reward", 0.0)
        if not places:
            break
        asked = [prompts[place] for place in places]
        steps = environment.step(asked, [given.text for given in answers])
        if len(steps) != len(asked):
            raise PerlVlmError(f"the environment gave {len(steps)} steps for {len(asked)} responses; it gives one each")
        for place, given, step in zip(places, answers, steps, strict=True):
            turns[place].append((prompts.pop(place), given, step.reward))
            if step.next is not None:
                prompts[place] = step.next
    return [
        Turn(episode, number, _annotated(prompt, own[number:], len(own), truncated=episode in truncated), given)
        for episode, own in enumerate(turns)
        for number, (prompt, given, _) in enumerate(own)
    ]


def _answered(
    prompts: dict[int, Example],
    answer: Callable[[Sequence[Example], Sequence[int], int], Sequence[Answer]],
    number: int,
) -> tuple[list[int], Sequence[Answer]]:
    """The open episodes and their answers. Episodes whose prompt is too long are taken out of ``prompts``."""
    while prompts:
        places = list(prompts)
        try:
            return places, answer([prompts[place] for place in places], places, number)
        except TooLong as error:
            long = [place for place in places if any(prompts[place] is record for record in error.records)]
            if number == 0 or not long:
                raise
            for place in long:
                del prompts[place]
    return [], []


def _annotated(prompt: Example, rest: Sequence[tuple[Any, Any, float]], turns: int, *, truncated: bool) -> Example:
    """A prompt with what is known of its episode; ``rest`` are the turns from its own on."""
    known = {"episode_return": sum(reward for *_, reward in rest), "episode_turns": turns}
    return replace(prompt, metadata={**prompt.metadata, **known, **({"episode_truncated": True} if truncated else {})})
