"""Policies beside their anchor: how the task judges them, how far they have moved, what they please, how they write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from perl_vlm import registry
from perl_vlm.cli_parse import typed_values
from perl_vlm.cli_settings import settings_of, with_values
from perl_vlm.config.checks import require
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.roles import REFERENCE
from perl_vlm.rollout.scorers.spec import parse_reward
from perl_vlm.task import Task
from perl_vlm.train.compare import JUDGE, Answer
from perl_vlm.train.judge import Judge, totals
from perl_vlm.train.stage import Stage, spaced
from perl_vlm.types import Example
from perl_vlm_eval.evaluations.answers import Scorer, said_of
from perl_vlm_eval.evaluations.base import Evaluation
from perl_vlm_eval.evaluations.policy_figures import OWN_REWARD, Measured
from perl_vlm_eval.identity import Record, examples_of
from perl_vlm_eval.judges import EndpointJudge, check_endpoint, instructions, is_endpoint, pairwise
from perl_vlm_eval.opened import OpenRun
from perl_vlm_eval.results import Findings


@dataclass(frozen=True)
class PolicySettings:
    """Settings of ``policy``."""

    split: Literal["train", "validation", "test"] = "test"
    """Of the examples."""
    limit: int = 1000
    """At most this many, from all over the set."""
    task: str = ""
    """Another task whose examples are answered and which judges them, by its name; the run's own when not given."""
    task_settings: dict[str, bool | int | float | str | list[str] | None] = field(default_factory=dict)
    """That task's settings, as --task.* of its commands."""
    judges: tuple[str, ...] = ()
    """Who else says which answer is better: any reward that ppo.reward_model takes, such as the folder of a reward
    model that the policy was not trained on, or ``openai:URL#MODEL``."""
    judge_prompt: str = ""
    """A file with instructions of one's own for judges behind endpoints."""
    kl_prompts: int = 256
    """Sampled answers that the divergence from the anchor is measured on; 0 leaves it out."""
    best_of: int = 0
    """N, samples to each of ``best_of_prompts`` prompts that best-of-n curves are drawn from; 0 draws none."""
    best_of_prompts: int = 64
    """At most this many."""

    def __post_init__(self) -> None:
        require(self.limit >= 1, f"limit is {self.limit}; it must be at least 1")
        require(self.kl_prompts >= 0, f"kl_prompts is {self.kl_prompts}; it must be 0 or more")
        require(self.best_of != 1 and self.best_of >= 0, f"best_of is {self.best_of}; it must be 0, or 2 or more")
        require(self.best_of_prompts >= 1, f"best_of_prompts is {self.best_of_prompts}; it must be at least 1")


class Policies(Evaluation):
    """``policy``: a ppo run's policy, or an sft run's, on its task's held-out examples."""

    kind = "policy"
    Settings = PolicySettings
    needs = ("ppo", "sft")
    settings: PolicySettings

    def __init__(self, settings: PolicySettings) -> None:
        super().__init__(settings)
        for judge in settings.judges:
            if is_endpoint(judge):
                check_endpoint(judge)
            else:
                parse_reward(judge)
        if any(map(is_endpoint, settings.judges)):
            pairwise(self._prompt)

    def records(self, opened: OpenRun) -> Sequence[Record]:
        """The examples of the split."""
        return examples_of(self._task(opened), self.settings.split, self.settings.limit)

    def _task(self, opened: OpenRun) -> Task:
        """Whose examples are answered. Raises PerlVlmError where another task cannot be had as it is wanted."""
        if not self.settings.task:
            return opened.task
        kind = registry.load(self.settings.task)
        known = settings_of(kind.Config())
        where = f"the suite's task {self.settings.task}"
        try:
            return kind(with_values(kind.Config(), typed_values(known, self.settings.task_settings, where)))
        except ValueError as error:
            raise PerlVlmError(f"{where}: {error}") from error

    def depends_on(self, opened: OpenRun) -> str:
        """The judges' weights and instructions, and those of the reward that was trained on."""
        judges = [judge if is_endpoint(judge) else opened.identity_of(judge) for judge in self.settings.judges]
        return json.dumps([opened.own_reward_identity, judges, self._instructions])

    @property
    def _prompt(self) -> Path | None:
        return Path(self.settings.judge_prompt).expanduser() if self.settings.judge_prompt else None

    @property
    def _instructions(self) -> str:
        """What judges behind endpoints are told. Raises PerlVlmError where it cannot be read."""
        return instructions("pairwise", self._prompt)

    def measure(self, opened: OpenRun) -> Findings:
        """Raises PerlVlmError where nothing can be decoded; a judge that fails is named among what is missing."""
        settings = self.settings
        stage, examples, answers = self._answered(opened)
        task = stage.task
        measured = Measured(stage, examples, answers, opened.kept)
        scorers: dict[str, Scorer] = {}
        if task is opened.task and task.environment() is None:
            with measured.told(OWN_REWARD):
                rewards = opened.rewards
                if rewards is not None:
                    rewards.check(examples)
                    scorers[OWN_REWARD] = partial(totals, stage, rewards)
                    measured.scored_by(OWN_REWARD, scorers[OWN_REWARD], opened.own_reward_identity)
        for given in settings.judges:
            with measured.told(given):
                if is_endpoint(given):
                    stop = stage.stop.raise_if_requested
                    measured.compared_by(EndpointJudge(given, opened.judgements, own=self._prompt, stop=stop))
                    continue
                judge = opened.judge(given, stage)
                judge.check(examples)
                name = judge.name if judge.name not in scorers else given
                scorers[name] = partial(_judged, judge)
                measured.scored_by(name, scorers[name], opened.identity_of(given))
                if judge.seen:
                    measured.warnings.append(f"the policy was trained to please {name}: its word is no evidence")
        decoded = [example for example in examples if not example.choices]
        if "policy" in answers and settings.kl_prompts and decoded:
            with measured.told("kl"):
                measured.moved(spaced(decoded, settings.kl_prompts))
        if settings.best_of:
            with measured.told(f"best of {settings.best_of}"):
                measured.best_of(settings.best_of, settings.best_of_prompts, decoded, scorers)
        return measured.findings()

    def predict(self, opened: OpenRun) -> list[dict[str, Any]]:
        """Questions and answers alone, an entry for each example. Raises PerlVlmError where nothing can be decoded."""
        _, examples, answers = self._answered(opened)
        return said_of(examples, answers)

    def _answered(self, opened: OpenRun) -> tuple[Stage, Sequence[Example], dict[str, list[Answer]]]:
        """What asks, the examples, and the greedy answers of both sides."""
        task = self._task(opened)
        stage = opened.stage if task is opened.task else opened.answering(task)
        examples = stage.some_examples(self.settings.split, self.settings.limit)
        sides = {"anchor": REFERENCE} | ({} if opened.policy is None else {"policy": opened.policy})
        return stage, examples, {label: opened.answers(stage, role, examples) for label, role in sides.items()}


def _judged(judge: Judge, examples: Sequence[Example], answers: Sequence[Answer]) -> list[float]:
    return [one[JUDGE] for one in judge.judge(examples, answers)]
