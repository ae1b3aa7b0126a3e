"""The evaluation's judge: a reward that scores greedy answers beside the task, at best one nobody was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from perl_vlm.config import RunConfig
from perl_vlm.data.sequences import to_device, with_responses
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.heads import ScalarHead
from perl_vlm.rollout.scorers import make_scorer
from perl_vlm.rollout.scorers.saved_run import RunScorer, find_run
from perl_vlm.rollout.scorers.spec import ACCEPTED, parse_reward, shown, spec_kind
from perl_vlm.train.compare import JUDGE, POSITIVE, Answer
from perl_vlm.train.reward import member_names
from perl_vlm.train.rewards import Rewards
from perl_vlm.train.rundir import RunDir, role_folder
from perl_vlm.train.stage import Stage
from perl_vlm.types import Example

JUDGE_ROLE = "reward-judge"
"""How the names of a judge's adapters on this base begin: a role's kind comes first."""


def refuse_judge(given: str | None, *, live: bool, trained: bool) -> None:
    """Refuse a judge that cannot be had, before anything trains or is decoded.

    Args:
        given: ``eval.judge``; None is none, and fine.
        live: whether the task plays episodes in a live environment.
        trained: whether this run trains a reward model, or has.
    """
    if given is None:
        return
    if live:
        raise PerlVlmError(
            f"eval.judge {given} scores single answers, and this task plays episodes in a live environment, which pays "
            "for them itself; leave eval.judge out"
        )
    specs = [term.spec for term in parse_reward(given)]
    if "learned" in specs and not trained:
        raise PerlVlmError(
            "eval.judge learned is the reward model that `run` trains, and there is none here; name the folder of one: "
            "--eval.judge runs/.../rm"
        )
    refuse_missing(specs)


def refuse_missing(specs: Sequence[str]) -> None:
    """Refuse functions and runs that are not there before a stage needs them. Models and servers are not asked for."""
    for spec in specs:
        if spec_kind(spec) == "python":
            make_scorer(spec)
        elif spec_kind(spec) == "run":
            find_run(spec, ACCEPTED)


def rewards_of_policy(config: RunConfig) -> set[str | Path]:
    """What a policy was trained to please, as ``_same`` writes it: the reward of this run, and where ``eval`` was given
    a policy's folder, that of the run which left it there."""
    found: list[tuple[str, Path | None]] = [(term.spec, None) for term in parse_reward(config.ppo.reward_model)]
    if config.eval.policy is not None:
        run = RunDir(role_folder(Path(config.eval.policy), "ppo").resolve().parent)
        given = run.read_config().get("ppo", {}).get("reward_model")
        found += [(term.spec, run.path.parent) for term in parse_reward(given)] if isinstance(given, str) else []
    return {one for spec, whole in found for one in _same(spec, whole)}


def _same(spec: str, run: Path | None = None) -> set[str | Path]:
    """What tells whether two sources are one: of a saved reward model its resolved folders, else what was written.

    ``run`` is the folder of the whole run that ``learned`` speaks of.
    """
    if spec == "learned" and run is not None and (run / "rm").is_dir():
        spec = str(run / "rm")
    if spec_kind(spec) != "run":
        return {spec}
    try:
        return {member.resolve() for member in find_run(spec, ACCEPTED).members}
    except PerlVlmError:  # it has gone since
        return {Path(spec).expanduser().resolve()}


@torch.no_grad()
def totals(stage: Stage, rewards: Rewards, examples: Sequence[Example], answers: Sequence[Answer]) -> list[float]:
    """What a reward gives each answer in all."""
    parts = []
    for block in stage.blocks(len(examples), stage.config.eval.batch_size):
        part = [examples[place] for place in block]
        tokens = [answers[place].tokens for place in block]
        rendered = with_responses(stage.collator.prompts(part), tokens, stage.roles.backbone.pad_id)
        texts = [answers[place].response for place in block]
        parts.append(rewards.score(to_device(rendered, stage.device), texts, part).total)
    scores: list[float] = stage.gathered(torch.cat(parts), len(examples)).tolist()
    return scores


class Judge:
    """The reward of ``eval.judge``, ready to score; the members of an ensemble are averaged.

    Raises PerlVlmError where it cannot be had, as ``Rewards`` does, and where the task plays episodes in a live
    environment: a judge scores answers to the evaluation's own prompts.
    """

    def __init__(self, stage: Stage) -> None:
        given = stage.config.eval.judge
        assert given is not None  # asked for
        trained = all(name in stage.roles for name in member_names(stage.config.rm.members))
        refuse_judge(given, live=stage.task.environment() is not None, trained=trained)
        ppo = replace(stage.config.ppo, reward_model=given, ensemble="mean")
        self.stage = stage
        self._rewards = _Sources(replace(stage, config=replace(stage.config, ppo=ppo)))
        terms = parse_reward(given)
        weights = [f"{term.weight:g}*" if term.weight != 1 else "" for term in terms]
        self.name = " + ".join(weight + shown(term.spec) for weight, term in zip(weights, terms, strict=True))
        pleased = rewards_of_policy(stage.config)
        self.seen = any(term.spec == "learned" or not _same(term.spec).isdisjoint(pleased) for term in terms)
        """Whether the policy was trained to please it, as far as this run and the policy's own know."""
        self._zero = self._where_logits_are_zero()

    @property
    def title(self) -> str:
        """Its name, and what its word is worth."""
        if self.name == "learned":
            return "the run's own reward model"
        return f"{self.name}, which the policy was trained on" if self.seen else self.name

    def check(self, examples: Sequence[Example]) -> None:
        """Refuse, before anything is decoded, prompts that it cannot score."""
        self._rewards.check(examples)

    @torch.no_grad()
    def judge(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[dict[str, float]]:
        """What it says of each answer: ``judge``, its score, and of one that predicts labels ``judge_positive``, 1
        where it takes the answer for a good one."""
        scores = totals(self.stage, self._rewards, examples, answers)
        if self._zero is None:
            return [{JUDGE: score} for score in scores]
        return [{JUDGE: score, POSITIVE: float(score > self._zero)} for score in scores]

    def _where_logits_are_zero(self) -> float | None:
        """The score at which a label is as likely good as bad: 0 before the head's constants moved it, for an ensemble
        the mean over its members. None where the judge is no single head of one label."""
        terms, heads = self._rewards.terms, self._rewards.heads()
        # The judge's own feedback counts, not that of the task that is evaluated.
        upright = all(head.outputs == 1 and head.mix.item() > 0 for head in heads)
        if not (len(terms) == 1 and terms[0].weight > 0 and heads and upright):
            return None
        if any(head.feedback is None for head in heads) and terms[0].name != "untrained":
            self.stage.warn(
                f"the judge {self.name} was saved without what it learned from, so {POSITIVE} is left out. Train it "
                'anew, or write "feedback": "labels" (or "pairs") into the role.json beside its adapter'
            )
        if not all(head.feedback == "labels" for head in heads):
            return None
        zeros = [head.mixed(torch.zeros(1, device=head.weight.device)).item() for head in heads]
        return terms[0].weight * sum(zeros) / len(zeros)


class _Sources(Rewards):
    """Rewards whose adapters get names of their own: the policy's reward models are in memory already."""

    def heads(self) -> list[ScalarHead]:
        """The heads of every reward model of ours in it, on this base or on one of its own."""
        found = [self.stage.roles.head(name) for name in self.roles]
        for term in self.terms:
            scorer = getattr(term.source, "__self__", None)
            if isinstance(scorer, RunScorer):
                found += [scorer.roles.head(name) for name in scorer.members]
        return found

    def _loaded(self, members: Sequence[Path], place: int) -> list[str]:
        taken = sum(name.startswith(JUDGE_ROLE) for name in self.stage.roles.names)  # by another judge
        names = [f"{JUDGE_ROLE}-{taken + member}" for member in range(len(members))]
        for name, folder in zip(names, members, strict=True):
            self.stage.roles.load(name, folder, head="reward")
        return names
