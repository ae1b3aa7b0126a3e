"""One round's updates: epochs of clipped steps over its episodes, whoever of the processes sampled them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perl_vlm.config import EXACT_REGULARIZERS, PpoConfig
from perl_vlm.data.sequences import take
from perl_vlm.formulas import clipped_surrogate, clipped_value_loss, masked_sum, sampled_divergence
from perl_vlm.models.logits import ResponseLogprobs
from perl_vlm.models.pictures import remembering_pictures
from perl_vlm.train.backoff import in_micro_batches
from perl_vlm.train.experience import Experience, micro_size, sampling
from perl_vlm.train.optimize import Optimizer, mean_metrics
from perl_vlm.train.stage import Stage

AGREEMENT = "rollout/logprob_agreement"
DIAGNOSTICS = (
    "loss/policy_avg", "loss/value_avg", "loss/regularizer_avg", "policy/approxkl_avg", "policy/clipfrac_avg",
    "val/ratio", "val/clipfrac_avg", "policy/entropy_avg", AGREEMENT,
)  # fmt: skip


def update(stage: Stage, experience: Experience, optimizer: Optimizer, step: int, beta: float) -> dict[str, float]:
    """Several epochs of clipped updates over one round; returns their mean losses and diagnostics.

    The minibatches are the same however many processes there are: a process computes those rows of each that it
    sampled itself, divides by the tokens of the whole minibatch, and the gradients are added up. So accumulation and
    processes both give the gradient of the whole minibatch.

    With ``ppo.stop_kl`` the round ends once a minibatch finds the policy further away; its own step is not taken.
    """
    config = stage.config.ppo
    records: list[dict[str, float]] = []
    for chosen in _minibatches(stage, len(experience), step):
        diagnostics = accumulate(stage, experience, chosen, step, beta)
        if config.stop_kl is not None and diagnostics["policy/approxkl_avg"] > config.stop_kl:
            optimizer.torch.zero_grad(set_to_none=True)
            break
        records.append({**diagnostics, **optimizer.step()})
    found = {**mean_metrics(records or [diagnostics]), "policy/updates": float(len(records))}
    # Of a policy that has moved since it sampled, this says nothing about the sampler; see `experience.agreement`.
    agreed = found.pop(AGREEMENT)
    if config.recomputes:
        return found
    return {**found, AGREEMENT: agreed, "objective/entropy": found["policy/entropy_avg"]}


def _minibatches(stage: Stage, count: int, step: int) -> Iterator[list[int]]:
    """Rows of the round's minibatches, epoch after epoch. Answers to one prompt stay together, so that it is read once
    for all of them; turns of an episode have prompts of their own."""
    config = stage.config.ppo
    size = -(-count // config.minibatches)  # episodes of several turns give rows in any number
    together = config.group_size if stage.task.environment() is None else 1
    groups = [range(start, min(start + together, count)) for start in range(0, count, together)]
    shuffle = random.Random(f"{stage.config.seed}-{step}")
    for _ in range(config.epochs):
        order = shuffle.sample(groups, len(groups))
        rows = [row for group in order for row in group]
        yield from (rows[start : start + size] for start in range(0, count, size))


def accumulate(stage: Stage, experience: Experience, chosen: Sequence[int], step: int, beta: float) -> dict[str, float]:
    """Add the gradient of one minibatch, given as rows of the round; returns its diagnostics over all processes."""
    tokens = float(experience.mask[list(chosen)].sum())
    shares = [[row for row in chosen if row in share] for share in stage.parallel.shares(len(experience))]
    size = micro_size(stage)
    own = shares[stage.parallel.rank]

    def work(rows: Sequence[int], weight: float = 1.0) -> Tensor:
        with remembering_pictures(stage.roles.backbone.model):
            loss, diagnostics = learn(stage, experience, rows, tokens, beta, weight=weight)
        return torch.stack([loss, *(diagnostics[name] for name in DIAGNOSTICS)])

    def undo() -> None:
        for name in ("policy", "value"):
            if name in stage.roles:
                stage.roles.clear_gradients(name)

    nothing = torch.zeros(1 + len(DIAGNOSTICS), device=stage.device)
    losses, *total = sum(in_micro_batches(stage, "episodes", own, size, work, undo=undo), nothing)
    # The parts of a sharded base must run in step: who has fewer rows goes through one more for nothing.
    idle = max(-(-len(share) // size) for share in shares) - -(-len(own) // size) if stage.sharded else 0
    for _ in range(idle):
        work([experience.rows[0]], 0.0)
    ids = [experience.rollout.example_ids[row - experience.rows.start] for row in own]
    stage.require_finite(losses, "the ppo loss", ids, step + 1)
    return dict(zip(DIAGNOSTICS, stage.parallel.sum_(torch.stack(total)).tolist(), strict=True))


def learn(
    stage: Stage, experience: Experience, rows: Sequence[int], tokens: float, beta: float, *, weight: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the gradient of some of this process's rows: of the policy, regulariser and entropy loss, and of the value
    loss, each a sum over tokens divided by ``tokens``; returns the whole loss and what it consists of.

    A value function of its own shares nothing that trains with the policy, so the one's backward pass is done before
    the other's forward pass: what both keep for it is never held at once.
    """
    config, roles = stage.config.ppo, stage.roles
    part = take(experience.rollout.sequences, [row - experience.rows.start for row in rows])
    here = _Rows(config, experience, list(rows), part.response_mask, tokens)
    on_trunk = "value" if config.value_kind == "policy_head" else None
    exact = config.kl if config.kl in EXACT_REGULARIZERS else None
    out = roles.logprobs(
        "policy", part, value_head=on_trunk, divergence=exact, entropy_gradient=config.entropy_coef != 0,
        **sampling(config),
    )  # fmt: skip
    loss, found = here.policy_loss(out, beta)
    if out.values is not None:
        own, found["val/clipfrac_avg"] = here.value_loss(out.values)
        loss, found["loss/value_avg"] = loss + config.vf_coef * own, own
    (loss * weight).backward()
    total = loss.detach()
    if "value" in roles and on_trunk is None:
        own, found["val/clipfrac_avg"] = here.value_loss(roles.values("value", part))
        (config.vf_coef * own * weight).backward()
        total, found["loss/value_avg"] = total + config.vf_coef * own.detach(), own
    return total, {key: value.detach() for key, value in found.items()}


@dataclass(frozen=True)
class _Rows:
    """Some rows of a round and their losses."""

    config: PpoConfig
    experience: Experience
    rows: list[int]
    mask: Tensor
    """[b, R] of their responses."""
    tokens: float
    """What sums over tokens are divided by."""

    def of(self, full: Tensor) -> Tensor:
        """What belongs to these rows, as wide as their responses."""
        return full[self.rows, : self.mask.shape[1]]

    def mean(self, values: Tensor) -> Tensor:
        return masked_sum(values, self.mask) / self.tokens

    def policy_loss(self, out: ResponseLogprobs, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped surrogate with the regulariser and the entropy bonus; and every diagnostic there is, those of a
        value function being zero."""
        config, measured = self.config, self.experience.measured
        old = self.of(measured.logprobs) if config.recomputes else out.logprobs.detach()
        policy_loss, diagnostics = clipped_surrogate(
            out.logprobs, old, self.of(self.experience.advantages), self.mask, clip_range=config.clip_range,
            denominator=self.tokens,
        )  # fmt: skip
        regularizer = nothing = torch.zeros_like(policy_loss)
        away = out.divergence
        if away is None and config.kl_in == "loss" and config.kl != "none":
            away = sampled_divergence(config.kl, out.logprobs, self.of(measured.reference_logprobs))
        if away is not None:
            regularizer = beta * self.mean(away)
        loss = policy_loss + regularizer
        if config.entropy_coef:
            loss = loss - config.entropy_coef * self.mean(out.entropy)
        return loss, {
            "loss/policy_avg": policy_loss,
            "loss/value_avg": nothing,
            "loss/regularizer_avg": regularizer,
            "policy/approxkl_avg": diagnostics["approx_kl"],
            "policy/clipfrac_avg": diagnostics["clip_fraction"],
            "val/ratio": diagnostics["ratio_mean"],
            "val/clipfrac_avg": nothing,
            "policy/entropy_avg": self.mean(out.entropy),
            AGREEMENT: self.mean((self.of(measured.sampled_logprobs) - out.logprobs).abs().exp()),
        }

    def value_loss(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The clipped value loss and the share of clipped tokens."""
        return clipped_value_loss(
            values, self.of(self.experience.measured.values), self.of(self.experience.returns), self.mask,
            clip_range=self.config.value_clip_range, denominator=self.tokens,
        )  # fmt: skip
