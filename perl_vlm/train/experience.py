"""From sampled responses to what PPO learns from: rewards, reference and old log-probs, values, advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perl_vlm.config import PpoConfig
from perl_vlm.data.sequences import take, to_device
from perl_vlm.errors import PerlVlmError
from perl_vlm.formulas import gae, k1, logprob_agreement, masked_sum, masked_whiten, token_rewards
from perl_vlm.models.roles import REFERENCE, Roles
from perl_vlm.rollout.sampler import sample_rollout
from perl_vlm.train.stage import Stage
from perl_vlm.types import Example, Rollout, Sequences

Scorer = Callable[[Sequences, Sequence[str], Sequence[Example]], Tensor]
"""Gives each of B responses, as tokens and as texts, a reward: [B] float32."""


@dataclass(frozen=True)
class Experience:
    """One round of episodes, scored. Every tensor is detached; masks say which tokens count."""

    rollout: Rollout
    scores: Tensor
    """[B] reward of each whole response."""
    logprobs: Tensor
    """[B, R] log-probs under the policy as it was when it sampled."""
    reference_logprobs: Tensor
    """[B, R] the same tokens under the reference."""
    entropy: Tensor
    """[B, R] entropy of the sampling policy."""
    values: Tensor
    """[B, R] value predictions before the update."""
    advantages: Tensor
    """[B, R]."""
    returns: Tensor
    """[B, R] targets of the value function."""
    agreement: float
    """mean(exp|delta log-prob|) between sampler and recomputation; 1 is perfect."""

    @property
    def sequences(self) -> Sequences:
        return self.rollout.sequences

    @property
    def mask(self) -> Tensor:
        return self.rollout.sequences.response_mask


def make_scorer(stage: Stage, role: str) -> Scorer:
    """The reward of an episode: a reward role's score, or the task's own ``verify`` for ``ppo.reward_model verify``."""
    if stage.config.ppo.reward_model == "verify":

        def verified(sequences: Sequences, texts: Sequence[str], examples: Sequence[Example]) -> Tensor:
            given = [stage.task.verify(example, text) for example, text in zip(examples, texts, strict=True)]
            for example, reward in zip(examples, given, strict=True):
                if reward is None:
                    raise PerlVlmError(
                        f"ppo.reward_model is `verify`, but task {stage.task.name} cannot verify {example.id} "
                        "(no reference answer); use the learned reward model or give references"
                    )
            return torch.tensor(given, dtype=torch.float32, device=stage.device)

        return verified

    def learned(sequences: Sequences, texts: Sequence[str], examples: Sequence[Example]) -> Tensor:
        return stage.roles.scores(role, sequences)

    return learned


@torch.no_grad()
def make_experience(stage: Stage, examples: Sequence[Example], scorer: Scorer, rows: int) -> Experience:
    """Sample one response for each example and score it, ``rows`` episodes at a time, with dropout off throughout."""
    config, roles = stage.config.ppo, stage.roles
    prompts = to_device(stage.collator.prompts(examples), stage.device)
    rollout = sample_rollout(
        roles,
        "policy",
        prompts,
        stage.renderer,
        [example.id for example in examples],
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        temperature=config.temperature,
        rows=len(examples) // config.accumulate,
    )
    scores, old, reference, entropy, values = [], [], [], [], []
    width = rollout.sequences.response_mask.shape[1]
    for start in range(0, len(examples), rows):
        end = min(start + rows, len(examples))
        part = take(rollout.sequences, range(start, end))
        scores.append(scorer(part, rollout.texts[start:end], examples[start:end]))
        policy = recompute(roles, "policy", part, config)
        old.append(_widen(policy[0], width))
        entropy.append(_widen(policy[1], width))
        reference.append(_widen(recompute(roles, REFERENCE, part, config)[0], width))
        values.append(_widen(roles.values("value", part), width))
    return assemble(
        rollout, torch.cat(scores), torch.cat(old), torch.cat(reference), torch.cat(entropy), torch.cat(values), config
    )


def recompute(roles: Roles, role: str, sequences: Sequences, config: PpoConfig) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [B, R] under the distribution the sampler used: same temperature, same ban on an early
    end."""
    out = roles.logprobs(role, sequences, temperature=config.temperature, min_new_tokens=config.min_new_tokens)
    return out.logprobs, out.entropy


def assemble(
    rollout: Rollout,
    scores: Tensor,
    logprobs: Tensor,
    reference_logprobs: Tensor,
    entropy: Tensor,
    values: Tensor,
    config: PpoConfig,
) -> Experience:
    """Token rewards, advantages and returns of a scored rollout."""
    mask = rollout.sequences.response_mask
    rewards = token_rewards(scores, k1(logprobs, reference_logprobs), mask, kl_coef=config.kl_coef)
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    return Experience(
        rollout=rollout,
        scores=scores,
        logprobs=logprobs,
        reference_logprobs=reference_logprobs,
        entropy=entropy,
        values=values,
        advantages=advantages,
        returns=returns,
        agreement=logprob_agreement(rollout.sampled_logprobs, logprobs, mask).item(),
    )


def sequence_kl(experience: Experience) -> Tensor:
    """[B] sum of log pi - log pi_ref over each sampled response: the k1 estimate of the sequence-level KL, in nats."""
    return masked_sum(k1(experience.logprobs, experience.reference_logprobs), experience.mask, dim=1)


def _widen(values: Tensor, width: int) -> Tensor:
    # `take` drops response columns that a part does not use.
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))
