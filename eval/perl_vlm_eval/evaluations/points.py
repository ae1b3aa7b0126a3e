"""A policy on its way from its anchor to what was published: what each point says to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from perl_vlm.formulas.masking import masked_sum
from perl_vlm.models.roles import REFERENCE
from perl_vlm.train.checkpoint import load_each
from perl_vlm.train.rewards import Rewards
from perl_vlm.train.sampling import HELD_OUT, noise, sample
from perl_vlm.types import Example
from perl_vlm_eval.metrics.texts import repeated
from perl_vlm_eval.opened import OpenRun

Array = NDArray[np.float64]

ANCHOR, FINAL = "anchor", "policy"


@dataclass(frozen=True)
class Point:
    """A policy on its way, by what it answers to the same prompts."""

    name: str
    gold: Array
    """[n] the task's primary metric."""
    proxy: Array
    """[n] the reward that was trained on."""
    doubt: Array
    """[n] how far the members of an ensemble disagree; zeros where there is none."""
    kl: Array
    """[n] exact divergence from the anchor over a response, in nats."""
    lengths: Array
    """[n] tokens."""
    empty: Array
    repeated: Array

    @property
    def distance(self) -> float:
        """The square root of the mean divergence."""
        return float(max(self.kl.mean(), 0.0) ** 0.5)


def points_of(opened: OpenRun, rewards: Rewards, examples: Sequence[Example]) -> list[Point]:
    """In the order of training: the policy that was published may be one from before the end."""
    roles, run = opened.session.roles, opened.found.stage("ppo")
    published = roles.state("policy")
    metrics = (run.read_summary() or {}).get("metrics", {})
    final = int(metrics.get("ppo/best_step", opened.config.ppo.steps))
    found = [(0, _point(opened, rewards, examples, ANCHOR, REFERENCE))]
    found.append((final, _point(opened, rewards, examples, FINAL, "policy")))
    try:
        for kept in load_each(run.checkpoints, warn=opened.stage.warn):
            state = kept.tensors["role-policy"]
            if any(not torch.equal(value, published[key]) for key, value in state.items()):
                roles.load_state("policy", dict(state))
                found.append((kept.step, _point(opened, rewards, examples, f"round {kept.step}", "policy")))
    finally:
        roles.load_state("policy", published)
    return [point for _, point in sorted(found, key=lambda each: each[0])]


@torch.no_grad()
def _point(opened: OpenRun, rewards: Rewards, examples: Sequence[Example], name: str, role: str) -> Point:
    stage, config = opened.stage, opened.stage.config.ppo
    rows: list[torch.Tensor] = []
    texts: list[str] = []
    for block in stage.blocks(len(examples), stage.config.eval.batch_size):
        part = [examples[place] for place in block]
        rollout = sample(stage, role, part, noise(stage, HELD_OUT, block))
        scored = rewards.score(rollout.sequences, rollout.texts, part)
        mask = rollout.sequences.response_mask
        if role == REFERENCE:
            kl = torch.zeros(len(part), device=mask.device)
        else:
            away = stage.roles.divergence(
                "reverse_kl", role, rollout.sequences, temperature=config.temperature,
                min_new_tokens=config.min_new_tokens,
            )  # fmt: skip
            kl = masked_sum(away, mask, dim=1)
        rows.append(torch.stack([one.float() for one in (scored.total, scored.doubt, kl, mask.sum(1))], dim=1))
        texts += rollout.texts
    table = stage.gathered(torch.cat(rows), len(examples)).double().numpy()
    primary = opened.task.primary_metric
    gold = [opened.task.evaluate(example, text)[primary] for example, text in zip(examples, texts, strict=True)]
    return Point(
        name, np.asarray(gold, dtype=np.float64), table[:, 0], table[:, 1], table[:, 2], table[:, 3],
        np.asarray([float(not text.strip()) for text in texts]), np.asarray(repeated(texts), dtype=np.float64),
    )  # fmt: skip
