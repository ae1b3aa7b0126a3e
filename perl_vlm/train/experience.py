"""From sampled responses to what the policy learns from: rewards, reference and old log-probs, values, advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perl_vlm.config import EXACT_REGULARIZERS, PpoConfig
from perl_vlm.data.sequences import take
from perl_vlm.formulas import (
    baseline_advantages,
    gae,
    grpo_advantages,
    k1,
    logprob_agreement,
    masked_sum,
    masked_whiten,
    over_tokens,
    rloo_advantages,
    sampled_divergence,
    shape_scores,
    token_rewards,
)
from perl_vlm.models.logits import ResponseLogprobs
from perl_vlm.models.pictures import remembering_pictures
from perl_vlm.models.roles import REFERENCE
from perl_vlm.train.backoff import in_micro_batches
from perl_vlm.train.rewards import Rewards
from perl_vlm.train.sampling import Episodes, sample_episodes
from perl_vlm.train.stage import Stage
from perl_vlm.types import Example, Rollout


@dataclass(frozen=True)
class Measured:
    """What one sweep of scoring says about some episodes. Every tensor is detached; B rows, R columns."""

    mask: Tensor
    """[B, R] real response tokens."""
    ended: Tensor
    """[B] whether the response ended by itself."""
    rewards: Tensor
    """[B] what the response earned, before it is shaped."""
    parts: Tensor
    """[B, terms] the summands of the reward."""
    doubt: Tensor
    """[B] standard deviation over the members of an ensemble."""
    sampled_logprobs: Tensor
    """[B, R] log-probs as the sampler saw them."""
    logprobs: Tensor
    """[B, R] log-probs under the policy as it was when it sampled: recomputed, or, where ``ppo.recomputes`` says that
    the update does that, the sampler's."""
    reference_logprobs: Tensor
    """[B, R] the same tokens under the reference."""
    divergence: Tensor
    """[B, R] the regulariser d_t."""
    entropy: Tensor
    """[B, R] entropy of the sampling policy; zero where nothing was recomputed."""
    values: Tensor
    """[B, R] value predictions before the update, zero where there is no value function."""


@dataclass(frozen=True)
class Experience:
    """One round of episodes, scored. The sequences are this process's; everything else is of all processes, so that
    whatever is computed of it is global."""

    episodes: Episodes
    """This process's."""
    rows: range
    """Which of the round's rows those are."""
    measured: Measured
    scores: Tensor
    """[B] shaped rewards of whole responses."""
    advantages: Tensor
    """[B, R]."""
    returns: Tensor
    """[B, R] targets of the value function."""

    @property
    def rollout(self) -> Rollout:
        """This process's responses."""
        return self.episodes.rollout

    @property
    def mask(self) -> Tensor:
        return self.measured.mask

    def __len__(self) -> int:
        return len(self.scores)


@torch.no_grad()
def make_experience(stage: Stage, prompts: Sequence[Example], rewards: Rewards, step: int, beta: float) -> Experience:
    """Sample ``ppo.group_size`` responses to each prompt, or as many episodes from it, and score them, with dropout off
    throughout."""
    config = stage.config.ppo
    starts = [prompt for prompt in prompts for _ in range(config.group_size)]
    rows = stage.parallel.share(len(starts))
    size = micro_size(stage)
    own = [starts[row] for row in rows]
    episodes = sample_episodes(stage, "policy", own, step, rows, size * config.minibatches)
    if stage.task.environment() is not None:
        rows = range(len(episodes.prompts))  # a row for each turn, all of them this process's
    measured = gather(stage, score(stage, episodes.rollout, episodes.prompts, rewards, size))
    return assemble(episodes, rows, measured, config, beta)


def micro_size(stage: Stage) -> int:
    """Rows that go through the model at once."""
    config = stage.config.ppo
    return max(1, config.batch_size // (config.minibatches * config.accumulate * stage.parallel.world))


@torch.no_grad()
def score(
    stage: Stage,
    rollout: Rollout,
    examples: Sequence[Example],
    rewards: Rewards,
    size: int,
    *,
    learning: bool = True,
) -> list[Measured]:
    """Measure a rollout, ``size`` rows at a time; what only an update needs is left out unless ``learning``."""

    def work(rows: Sequence[int]) -> Measured:
        with remembering_pictures(stage.roles.backbone.model):
            return _score(stage, rollout, examples, rewards, rows, learning)

    return in_micro_batches(stage, "answers to score", range(len(examples)), size, work)


def _score(
    stage: Stage, rollout: Rollout, examples: Sequence[Example], rewards: Rewards, rows: Sequence[int], learning: bool
) -> Measured:
    config, roles = stage.config.ppo, stage.roles
    start, end = rows[0], rows[-1] + 1
    part = take(rollout.sequences, range(start, end))
    width = part.response_mask.shape[1]
    scored = rewards.score(part, rollout.texts[start:end], examples[start:end])
    head = "value" if config.value_kind == "policy_head" else None
    exact = config.kl if learning and config.kl_in == "reward" and config.kl in EXACT_REGULARIZERS else None
    sampled = rollout.sampled_logprobs[start:end, :width]
    policy = ResponseLogprobs(sampled, torch.zeros_like(sampled))
    if config.recomputes if learning else config.engine == "served":
        policy = roles.logprobs("policy", part, value_head=head, divergence=exact, **sampling(config))
    # Not cut to its own nucleus, which would be another distribution than the reference.
    reference = roles.logprobs(REFERENCE, part, **{**sampling(config), "top_p": 1.0}).logprobs
    values = policy.values
    if values is None and learning and "value" in roles:
        values = roles.values("value", part)
    divergence = policy.divergence
    if divergence is None and config.kl not in ("none", *EXACT_REGULARIZERS):
        divergence = sampled_divergence(config.kl, policy.logprobs, reference)
    nothing = torch.zeros_like(reference)
    return Measured(
        mask=part.response_mask,
        ended=rollout.ended[start:end],
        rewards=scored.total,
        parts=scored.parts.T,
        doubt=scored.doubt,
        sampled_logprobs=sampled,
        logprobs=policy.logprobs,
        reference_logprobs=reference,
        divergence=nothing if divergence is None else divergence,
        entropy=policy.entropy,
        values=nothing if values is None else values,
    )


def sampling(config: PpoConfig) -> dict[str, Any]:
    """What makes recomputed log-probs those of the distribution that the sampler drew from."""
    return {"temperature": config.temperature, "top_p": config.top_p, "min_new_tokens": config.min_new_tokens}


def gather(stage: Stage, parts: Sequence[Measured]) -> Measured:
    """Join the parts, and those of all processes, in the order of the episodes."""
    width = max(part.mask.shape[1] for part in parts)

    def joined(name: str) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        if tensors[0].dim() == 2 and name != "parts":
            # `take` drops response columns that a part does not use.
            tensors = [torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors]
        return stage.parallel.gather_rows(torch.cat(tensors))

    return Measured(**{name: joined(name) for name in Measured.__dataclass_fields__})


def assemble(episodes: Episodes, rows: range, measured: Measured, config: PpoConfig, beta: float) -> Experience:
    """Shaped scores, token rewards, advantages and returns of a measured round.

    Args:
        beta: the regulariser's coefficient in this round.
    """
    mask, divergence = measured.mask, measured.divergence
    scores = shaped(measured, config)
    if config.kl in EXACT_REGULARIZERS:
        # d_t is a matter of the state, whatever token is drawn in it. So a token answers for the divergences after it;
        # the one in its own state acts through the loss, where it has a gradient (update.py). Together they are the
        # gradient of the expected sum.
        divergence = torch.cat([divergence[:, 1:], torch.zeros_like(divergence[:, :1])], dim=1)
    score_coef = 1 - beta if config.reward_mix else 1.0
    rewards = token_rewards(
        scores,
        divergence,
        mask,
        kl_coef=beta if config.kl_in == "reward" and config.kl != "none" else 0.0,
        score_coef=score_coef,
    )
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    if config.advantage == "gae":
        advantages, returns = gae(rewards, measured.values, mask, gamma=config.gamma, lam=config.lam)
    elif config.advantage == "reinforce":
        advantages, returns = baseline_advantages(rewards, measured.values, mask)
    else:
        estimate = rloo_advantages if config.advantage == "rloo" else grpo_advantages
        totals = episode_totals(rewards, score_coef * clipped(measured, config), episodes)
        compared = estimate(totals, config.group_size)
        if len(totals) < len(rewards):  # several turns to an episode: each answers for the whole of it
            compared, totals = compared[episodes.episode], totals[episodes.episode]
        advantages, returns = over_tokens(compared, mask), over_tokens(totals, mask)
    if config.whitens_advantages:
        advantages = masked_whiten(advantages, mask)
    return Experience(episodes, rows, measured, scores, advantages, returns)


def episode_totals(rewards: Tensor, earned: Tensor, episodes: Episodes) -> Tensor:
    """[E] what each whole episode earned, penalties included.

    What a turn earned is the return from it on, so that over an episode only the first turn's counts, while every turn
    pays for its own divergence, length and missing end.

    Args:
        rewards: [B, R] token rewards, with what the turn earned among them.
        earned: [B] that alone, as it entered the rewards.
    """
    totals = rewards.sum(dim=1)
    if len(episodes.begins) == len(episodes.prompts):
        return totals  # one turn each; the rows may be other processes' too
    later = torch.ones_like(earned)
    later[episodes.begins] = 0.0
    owner = torch.tensor(episodes.episode, device=totals.device)
    return totals.new_zeros(len(episodes.begins)).index_add(0, owner, totals - later * earned)


def clipped(measured: Measured, config: PpoConfig) -> Tensor:
    """[B] rewards of whole responses, clipped and with nothing taken off yet."""
    limit = config.reward_clip
    return measured.rewards if limit is None else measured.rewards.clamp(-limit, limit)


def shaped(measured: Measured, config: PpoConfig) -> Tensor:
    """[B] rewards of whole responses, clipped and with what is taken off for length and for not ending."""
    return shape_scores(
        measured.rewards,
        measured.mask.sum(dim=1),
        measured.ended,
        clip=config.reward_clip,
        missing_eos_penalty=config.missing_eos_penalty,
        length_penalty=config.length_penalty,
    )


def sequence_kl(measured: Measured) -> Tensor:
    """[B] sum of log pi - log pi_ref over each sampled response: the k1 estimate of the sequence-level KL, in nats."""
    return masked_sum(k1(measured.logprobs, measured.reference_logprobs), measured.mask, dim=1)


def agreement(measured: Measured) -> float:
    """mean(exp|delta log-prob|) between sampler and recomputation; 1 is perfect."""
    return logprob_agreement(measured.sampled_logprobs, measured.logprobs, measured.mask).item()
