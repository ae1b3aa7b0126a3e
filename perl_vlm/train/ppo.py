"""PPO with generalised advantage estimation (Schulman et al., 1707.06347 and 1506.02438) on roles of one frozen base.

The loop reads top to bottom: sample, score, estimate advantages, update, log. It leaves out other estimators, adaptive
KL control and early stopping on KL.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from perl_vlm.data.sequences import take
from perl_vlm.errors import PerlVlmError
from perl_vlm.formulas import clipped_surrogate, clipped_value_loss, explained_variance, masked_mean, masked_sum
from perl_vlm.train.experience import Experience, make_experience, make_scorer, recompute, sequence_kl
from perl_vlm.train.log import SampleLog, progress, say
from perl_vlm.train.optimize import Optimizer, RoleRates, mean_metrics
from perl_vlm.train.reward import normalise_reward
from perl_vlm.train.rundir import role_folder
from perl_vlm.train.stage import DataOrder, Keeper, Stage, require_finite
from perl_vlm.types import Example

SAMPLES_A_ROUND = 4
AGREEMENT_LIMIT = 1.05
CRITIC_GRACE, CRITIC_LIMIT = 20, -1.0


def train_ppo(stage: Stage) -> dict[str, float]:
    """Train the ``policy`` and ``value`` roles against the reward; returns the last round's metrics."""
    config, roles = stage.config.ppo, stage.roles
    stage.begin()
    examples = stage.examples("train")
    reward_role = prepare_reward(stage)
    scorer = make_scorer(stage, reward_role)
    roles.add("policy")
    roles.add("value", head="value")
    if config.value_init == "reward" and reward_role in roles:
        roles.start_value_from_reward("value", reward_role)
    value_lr = config.lr if config.value_lr is None else config.value_lr
    optimizer = Optimizer(
        roles,
        [RoleRates("policy", config.lr, config.vision_lr), RoleRates("value", value_lr, config.vision_lr)],
        steps=config.steps * config.epochs * config.minibatches,
        warmup=config.warmup,
        schedule=config.schedule,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    say(roles.describe("policy"))
    say(roles.describe("value"))
    keeper = Keeper(stage, optimizer, ["policy", "value"])
    start = keeper.resume()
    order = DataOrder(len(examples), config.batch_size, f"{stage.config.seed}-ppo")
    log = stage.metric_log(start)
    samples = SampleLog(stage.run.samples, stage="ppo", start_step=start)
    keeper.logs = (log, samples)
    rows = config.batch_size // (config.minibatches * config.accumulate)
    metrics = keeper.last_metrics(start)
    with progress(config.steps, "ppo", initial=start) as bar:
        for step in range(start, config.steps):
            batch = [examples[index] for index in order.batch(step)]
            experience = make_experience(stage, batch, scorer, rows)
            require_finite(experience.scores, "a reward", list(experience.rollout.example_ids), step + 1)
            lr = optimizer.lr
            losses = update(stage, experience, optimizer, step)
            metrics = {**describe(experience), **losses, "lr": lr}
            metrics |= gold(stage, batch, experience.rollout.texts)
            watch(stage, metrics, step)
            log.log(step + 1, metrics)
            samples.log(
                step + 1, [_sample(experience, row, batch[row]) for row in range(min(SAMPLES_A_ROUND, len(batch)))]
            )
            bar.update()
            bar.set_postfix(reward=f"{metrics['objective/scores']:.2f}", kl=f"{metrics['objective/kl']:.3f}")
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                keeper.save(step + 1)
            keeper.stop_if_asked(step + 1)
    keeper.close_logs()
    return {f"ppo/{key}": value for key, value in metrics.items()}


def gold(stage: Stage, examples: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
    """How the task itself judges the sampled answers, over the examples that have a reference."""
    primary = stage.task.primary_metric
    known = [(example, text) for example, text in zip(examples, texts, strict=True) if example.reference is not None]
    judged = [stage.task.evaluate(example, text)[primary] for example, text in known]
    return {f"gold/{primary}": sum(judged) / len(judged)} if judged else {}


def prepare_reward(stage: Stage) -> str:
    """Make sure the wanted reward model is among the roles; returns its name (unused for ``verify``)."""
    wanted = stage.config.ppo.reward_model
    if wanted == "verify":
        return ""
    if wanted == "untrained":
        if "untrained" not in stage.roles:
            stage.roles.add("untrained", head="reward")
            normalise_reward(stage, "untrained")
        return "untrained"
    if "reward" not in stage.roles:
        if wanted == "learned":
            raise PerlVlmError(
                "ppo needs a reward model: train one with `perl-vlm "
                f"{stage.task.name} rm` and name its folder in --ppo.reward_model, or use --ppo.reward_model verify "
                f"for the task's own reward; `perl-vlm {stage.task.name} run` does both stages"
            )
        stage.roles.load("reward", role_folder(Path(wanted), "rm"), head="reward")
    return "reward"


def update(stage: Stage, experience: Experience, optimizer: Optimizer, step: int) -> dict[str, float]:
    """Several epochs of clipped updates over one round; returns their mean losses and diagnostics.

    Minibatches differ in tokens; each micro-batch is divided by its minibatch's token count, so that accumulation
    gives the gradient of the whole minibatch.
    """
    config = stage.config.ppo
    count = len(experience.sequences)
    size = count // config.minibatches
    shuffle = random.Random(f"{stage.config.seed}-{step}")
    records: list[dict[str, float]] = []
    for _ in range(config.epochs):
        rows = list(range(count))
        shuffle.shuffle(rows)
        for start in range(0, count, size):
            chosen = rows[start : start + size]
            tokens = experience.mask[chosen].sum()
            parts = []
            micro = size // config.accumulate
            for first in range(0, size, micro):
                loss, metrics = minibatch_loss(stage, experience, chosen[first : first + micro], tokens)
                require_finite(loss, "the ppo loss", [experience.rollout.example_ids[row] for row in chosen], step + 1)
                loss.backward()
                parts.append({key: float(value) for key, value in metrics.items()})
            summed = {key: sum(part[key] for part in parts) for key in parts[0]}
            records.append({**summed, **optimizer.step()})
    return mean_metrics(records)


def minibatch_loss(
    stage: Stage, experience: Experience, rows: Sequence[int], tokens: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy, value and entropy loss of some rows, each a sum over tokens divided by ``tokens``."""
    config, roles = stage.config.ppo, stage.roles
    part = take(experience.sequences, rows)
    mask, width = part.response_mask, part.response_mask.shape[1]

    def of(full: Tensor) -> Tensor:
        return full[list(rows), :width]

    logprobs, entropies = recompute(roles, "policy", part, config)
    policy_loss, diagnostics = clipped_surrogate(
        logprobs, of(experience.logprobs), of(experience.advantages), mask, clip_range=config.clip_range,
        denominator=tokens,
    )  # fmt: skip
    values = roles.values("value", part)
    value_loss, value_clipped = clipped_value_loss(
        values, of(experience.values), of(experience.returns), mask, clip_range=config.value_clip_range,
        denominator=tokens,
    )  # fmt: skip
    entropy = masked_sum(entropies, mask) / tokens
    loss = policy_loss + config.vf_coef * value_loss - config.entropy_coef * entropy
    return loss, {
        "loss/policy_avg": policy_loss.detach(),
        "loss/value_avg": value_loss.detach(),
        "policy/approxkl_avg": diagnostics["approx_kl"],
        "policy/clipfrac_avg": diagnostics["clip_fraction"],
        "val/ratio": diagnostics["ratio_mean"],
        "val/clipfrac_avg": value_clipped,
    }


def describe(experience: Experience) -> dict[str, float]:
    """What a round looked like, under TRL's names where the quantity is the same."""
    mask = experience.mask
    kl = sequence_kl(experience)
    lengths = mask.sum(dim=1).float()
    return {
        "objective/scores": experience.scores.mean().item(),
        "objective/scores_std": experience.scores.std(unbiased=False).item(),
        "objective/kl": kl.mean().item(),
        "objective/entropy": masked_mean(experience.entropy, mask).item(),
        "val/explained_variance": explained_variance(experience.values, experience.returns, mask).item(),
        "val/num_eos_tokens": experience.rollout.ended.sum().item(),
        "response/mean_length": lengths.mean().item(),
        "rollout/logprob_agreement": experience.agreement,
        "episodes": float(len(kl)),
    }


def watch(stage: Stage, metrics: dict[str, float], step: int) -> None:
    """Warn, once each, of what goes wrong while the policy's own metrics look fine."""
    if metrics["rollout/logprob_agreement"] > AGREEMENT_LIMIT:
        stage.warn(
            f"the sampler's log-probs and the recomputed ones differ (mean exp|delta| above {AGREEMENT_LIMIT}): the "
            "policy learns from samples of another model. Use --dtype float32 or look at the sampler"
        )
    # A critic that starts from a reward model needs some rounds to find the scale.
    if step >= CRITIC_GRACE and metrics["val/explained_variance"] < CRITIC_LIMIT:
        stage.warn(
            f"the value function explains less than nothing (explained variance below {CRITIC_LIMIT} after "
            f"{CRITIC_GRACE} rounds), so advantages are noisier than without it; lower --ppo.value_lr"
        )


def _sample(experience: Experience, row: int, example: Example) -> dict[str, object]:
    rollout = experience.rollout
    return {
        "id": example.id,
        "prompt": example.messages[-1].text,
        "response": rollout.texts[row],
        "reference": example.reference,
        "score": experience.scores[row].item(),
        "ended": bool(rollout.ended[row]),
    }
