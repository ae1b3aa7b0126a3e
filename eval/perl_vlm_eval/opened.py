"""A finished run's model in memory, ready to answer and to score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from perl_vlm.errors import PerlVlmError
from perl_vlm.report.files import write_atomically
from perl_vlm.rollout.scorers.saved_run import find_run as find_reward
from perl_vlm.rollout.scorers.spec import ACCEPTED, parse_reward
from perl_vlm.task import Task
from perl_vlm.train.compare import Answer
from perl_vlm.train.evaluate import greedy_answers
from perl_vlm.train.judge import Judge
from perl_vlm.train.rewards import Rewards
from perl_vlm.train.rundir import RunDir, role_folder
from perl_vlm.train.session import Session, open_session
from perl_vlm.train.signals import StopOnSignal
from perl_vlm.train.stage import Stage
from perl_vlm.types import Example
from perl_vlm_eval.identity import data_hash, reward_identity, settings_hash
from perl_vlm_eval.results import read_json
from perl_vlm_eval.runs import FoundRun, files_hash, settings_of, weights_hash


class OpenRun:
    """A run that cells ask. Its task and settings are read at once, its model at first use.

    Args:
        found: the run.
        changes: settings that take the place of the run's own, by dotted key.
        scratch: a folder for what measuring writes by the side.
        stop: asked to stop by Ctrl-C and SIGTERM.
    """

    def __init__(self, found: FoundRun, changes: Mapping[str, Any], scratch: Path, stop: StopOnSignal) -> None:
        self.found, self._scratch, self._stop = found, scratch, stop
        self._noted = 0
        self._judges: dict[tuple[str, str, str], Judge] = {}
        own = next(iter(found.stages.values()))
        changes = dict(changes)
        if "sft" in found.stages:  # it stands under every role
            changes |= {"sft.enabled": "false", "sft.adapter": str(found.stages["sft"].path)}
        if "ppo" in found.stages:  # judges are told by it what the policy was trained to please
            changes["eval.policy"] = str(found.stages["ppo"].path)
        self.task, self.config = settings_of(own, found.task, changes)

    @cached_property
    def weights(self) -> str:
        """The hash of all weights that may answer or score."""
        parts = {name: weights_hash(run) for name, run in self.found.stages.items()}
        parts["base"] = str(self.found.summary.get("base_fingerprint"))
        supervised = self.config.sft.adapter
        if supervised is not None and "sft" not in parts:
            parts["sft"] = files_hash(role_folder(Path(supervised), "sft"))
        return json.dumps(parts, sort_keys=True)

    @cached_property
    def session(self) -> Session:
        """The base with every role of the run on it."""
        session = open_session(self.task, self.config, self._stop)
        roles, stages, supervised = session.roles, self.found.stages, self.config.sft.adapter
        if supervised is not None:
            roles.load("sft", role_folder(Path(supervised), "sft"))
            roles.stack_sft()
        if "rm" in stages:
            for name, folder in zip(self.reward_names, self.members, strict=True):
                roles.load(name, folder, head="reward")
        if "ppo" in stages:
            roles.load("policy", stages["ppo"].adapter)
        return session

    @cached_property
    def members(self) -> tuple[Path, ...]:
        """The folders of the run's reward model, one for each member."""
        return find_reward(str(self.found.stage("rm").path), ACCEPTED).members

    @property
    def reward_names(self) -> list[str]:
        """The roles of the run's reward model."""
        count = len(self.members)
        return ["reward"] if count == 1 else [f"reward-{member}" for member in range(count)]

    @property
    def policy(self) -> str | None:
        """The role that answers beside the anchor: the trained policy; None where the run trained none. A run of sft
        alone is its own anchor."""
        return "policy" if "ppo" in self.found.stages else None

    @property
    def own_reward(self) -> str | None:
        """The reward that its policy was trained to please, where it can be scored with: not one that was ``learned``
        in a run that is not here."""
        if self.policy is None:
            return None
        given = self.config.ppo.reward_model
        learned = any(term.spec == "learned" for term in parse_reward(given))
        return None if learned and "rm" not in self.found.stages else given

    @cached_property
    def rewards(self) -> Rewards | None:
        """The reward that its policy was trained to please, ready to score."""
        return None if self.own_reward is None else Rewards(self.stage)

    @cached_property
    def own_reward_identity(self) -> str:
        """What tells whether the reward of two runs is one, and whether it is what it was."""
        config = self.config.ppo
        how = f"{config.ensemble} {config.ensemble_penalty}"
        return "" if self.own_reward is None else f"{self.identity_of(self.own_reward)} {how}"

    def identity_of(self, reward: str) -> str:
        """What tells whether a reward is what it was, and that of another run: a run has words for its own models."""
        stages = [self.found.stages[name] for name in ("sft", "rm") if name in self.found.stages]
        base = str(self.found.summary.get("base_fingerprint"))
        own = {
            "learned": " ".join([base, *map(weights_hash, stages)]),
            "untrained": f"{base} {self.config.seed} {self.config.lora}",
        }
        return reward_identity(reward, own)

    def judge(self, given: str, stage: Stage) -> Judge:
        """A reward that scores single answers to the prompts of a stage's task, loaded once. Raises PerlVlmError where
        it cannot be had."""
        key = (stage.task.name, repr(stage.task.config), given)
        if key not in self._judges:
            config = replace(stage.config, eval=replace(stage.config.eval, judge=given))
            self._judges[key] = Judge(replace(stage, config=config))
        return self._judges[key]

    def new_notes(self) -> list[str]:
        """What measuring warned of since this was asked last."""
        notes = self.session.notes[self._noted :] if "session" in vars(self) else []
        self._noted += len(notes)
        return notes

    @property
    def judgements(self) -> Path:
        """The folder for what judges behind endpoints said, shared by all runs of a suite."""
        return self._scratch.parent.parent / "judges"

    def answers(self, stage: Stage, role: str, examples: Sequence[Example]) -> list[Answer]:
        """Greedy answers of a role. They are kept by the side, since a judge or a source of knowledge that fails
        afterwards must not cost them, and since several evaluations ask the same."""
        given = self.kept(
            "answers", stage, [role, data_hash(examples)],
            lambda: [asdict(answer) for answer in greedy_answers(stage, role, examples)],
        )  # fmt: skip
        return [
            Answer(one["response"], list(one["tokens"]), one["judged"], tuple(one["logprobs"]), one["turns"])
            for one in given
        ]

    def kept(self, what: str, stage: Stage, depends: Sequence[str], make: Callable[[], Any]) -> Any:
        """A JSON value that takes models to make, from the side where it was made before.

        Args:
            what: how its file is called.
            depends: what it depends on beside the run's weights, its settings, and the task that asks and judges.
            make: makes it.
        """
        parts = [self.weights, settings_hash(self.config, stage.task), *depends]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
        path = self._scratch / f"{what}-{digest}.json"
        if path.is_file():
            return read_json(path)
        found = make()
        write_atomically(path, json.dumps(found))
        return found

    def answering(self, task: Task) -> Stage:
        """What measures on another task's records. Raises PerlVlmError where the model sees no pictures and the task
        has some."""
        if task.modality == "image+text" and not self.session.roles.backbone.sees_images:
            raise PerlVlmError(f"{self.found.path} sees no pictures, and task {task.name} has some")
        return replace(self.stage, task=task, collator=task.collator(self.session.renderer), seen={})

    @cached_property
    def stage(self) -> Stage:
        """What measures."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        return self.session.stage("eval", RunDir(self._scratch))
