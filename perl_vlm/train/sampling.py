"""Sampled answers, drawn the same way wherever a stage needs some; in a live environment, whole episodes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perl_vlm.data.sequences import to_device, with_responses
from perl_vlm.rollout.episodes import play
from perl_vlm.rollout.sampler import episode_seeds, sample_rollout
from perl_vlm.train.stage import Stage
from perl_vlm.train.validate import with_room
from perl_vlm.types import Example, Rollout

ANCHOR, HELD_OUT = -1, -2
"""Steps whose noise no training round draws: the same at every measurement."""
_NEXT_TURN = 2**24
"""Between the noise of one turn of an episode and that of its next; no round has as many episodes."""


def noise(stage: Stage, step: int, places: Sequence[int], turn: int = 0) -> list[int]:
    """The seeds of the episodes at some places of a step, in their turn of that number."""
    return [seed for place in places for seed in episode_seeds(stage.config.seed, step, place + turn * _NEXT_TURN, 1)]


def sample(
    stage: Stage, role: str, examples: Sequence[Example], seeds: Sequence[int], rows: int | None = None
) -> Rollout:
    """One response to each example as ``role``, with the settings of ``ppo``, ``rows`` at a time; the policy's from the
    rollout server, where the stage has one."""
    config = stage.config.ppo
    prompts = with_room(stage.collator.prompts(examples), examples, stage.renderer, config.max_new_tokens)
    if stage.engine is not None and role == "policy":
        return stage.engine.sample_rollout(
            to_device(prompts, stage.device),
            examples,
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seeds=seeds,
        )
    return sample_rollout(
        stage.roles,
        role,
        to_device(prompts, stage.device),
        stage.renderer,
        [example.id for example in examples],
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seeds=seeds,
        rows=rows,
        synced=stage.sharded,
    )


@dataclass(frozen=True)
class Episodes:
    """Sampled responses, one row each, and the prompts that they answer."""

    rollout: Rollout
    prompts: list[Example]
    """One a row. Those of a live environment are annotated as ``rollout.episodes.Turn.prompt`` says."""
    episode: list[int]
    """For each row, which of the examples its episode began with."""
    begins: list[int]
    """The rows that begin an episode: all of them where there is no environment."""

    @property
    def truncated(self) -> int:
        """How many episodes ended because their next prompt was too long."""
        return sum("episode_truncated" in self.prompts[row].metadata for row in self.begins)


def sample_episodes(
    stage: Stage, role: str, examples: Sequence[Example], step: int, places: Sequence[int], rows: int
) -> Episodes:
    """A response to each example as ``role``, or, where the task has an environment, an episode from each: a row for
    every turn, episode by episode.

    Args:
        step: whose noise is drawn, see ``noise``.
        places: of the examples, within the step.
        rows: how many are decoded at once.
    """
    environment = stage.task.environment()
    if environment is None:
        rollout = sample(stage, role, examples, noise(stage, step, places), rows)
        every = list(range(len(examples)))
        return Episodes(rollout, list(examples), every, every)

    def answer(prompts: Sequence[Example], of: Sequence[int], turn: int) -> list[_Answer]:
        seeds = noise(stage, step, [places[episode] for episode in of], turn)
        return _answers(sample(stage, role, prompts, seeds, rows))

    turns = play(environment, examples, answer)
    prompts = [turn.prompt for turn in turns]
    return Episodes(
        rollout=_joined(stage, prompts, [turn.answer for turn in turns]),
        prompts=prompts,
        episode=[turn.episode for turn in turns],
        begins=[row for row, turn in enumerate(turns) if turn.number == 0],
    )


@dataclass(frozen=True)
class _Answer:
    """One row of a rollout."""

    text: str
    tokens: list[int]
    logprobs: Tensor
    """[R] of this row's own length."""
    ended: Tensor
    """A single bool."""


def _answers(rollout: Rollout) -> list[_Answer]:
    sequences = rollout.sequences
    responses = sequences.input_ids[:, sequences.prompt_width :]
    return [
        _Answer(
            text, responses[row][mask].tolist(), rollout.sampled_logprobs[row, : len(mask)][mask], rollout.ended[row]
        )
        for row, (text, mask) in enumerate(zip(rollout.texts, sequences.response_mask, strict=True))
    ]


def _joined(stage: Stage, prompts: Sequence[Example], answers: Sequence[_Answer]) -> Rollout:
    """One rollout of answers that were sampled turn by turn. Prompts are rendered again, all to one width."""
    rendered = to_device(stage.collator.prompts(prompts), stage.device)
    sequences = with_responses(rendered, [answer.tokens for answer in answers], stage.roles.backbone.pad_id)
    width = sequences.response_mask.shape[1]
    padded = [torch.nn.functional.pad(one.logprobs, (0, width - len(one.logprobs))) for one in answers]
    return Rollout(
        sequences=sequences,
        sampled_logprobs=torch.stack(padded),
        ended=torch.stack([answer.ended for answer in answers]),
        texts=tuple(answer.text for answer in answers),
        example_ids=tuple(prompt.id for prompt in prompts),
    )
