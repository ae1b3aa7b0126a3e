"""Reinforcement learning on roles of one frozen base: PPO (Schulman et al., 1707.06347) with one of four advantage
estimators.

The loop reads top to bottom: sample, score, estimate advantages, update, log, and now and then measure the reward on
held-out prompts and remember the best policy. How rewards come about is in ``rewards.py``, what the policy learns from
in ``experience.py``, the steps in ``update.py``.
"""

from __future__ import annotations

import math

import torch

from perl_vlm.config import PpoConfig
from perl_vlm.errors import PerlVlmError
from perl_vlm.formulas import adaptive_kl_coef, explained_variance, masked_mean
from perl_vlm.train.best import Best
from perl_vlm.train.experience import (
    Experience,
    Measured,
    agreement,
    gather,
    make_experience,
    micro_size,
    score,
    sequence_kl,
    shaped,
)
from perl_vlm.train.log import SampleLog, progress, say
from perl_vlm.train.optimize import Optimizer, RoleRates
from perl_vlm.train.rewards import Rewards
from perl_vlm.train.sampling import HELD_OUT, sample_episodes
from perl_vlm.train.stage import DataOrder, Keeper, Stage
from perl_vlm.train.update import update

SAMPLES_A_ROUND = 4
CHECKED = 64
"""Training prompts that every source of rewards looks at before the first round."""
AGREEMENT_LIMIT = 1.05
CRITIC_GRACE, CRITIC_LIMIT, CRITIC_GROWTH = 20, -1.0, 10


def train_ppo(stage: Stage) -> dict[str, float]:
    """Train the ``policy`` role, and a ``value`` role where there is one, against the reward; returns the last round's
    metrics."""
    config, roles = stage.config.ppo, stage.roles
    stage.begin()
    examples = stage.examples("train")
    rewards = Rewards(stage)
    rewards.check(stage.some_examples("train", CHECKED))
    trained = add_roles(stage, rewards)
    value_lr = config.lr if config.value_lr is None else config.value_lr
    steps_a_round = config.epochs * config.minibatches
    optimizer = Optimizer(
        roles,
        [
            RoleRates(name, value_lr if name == "value" else config.lr, config.vision_lr, config.projector_lr)
            for name in trained
        ],
        config,
        steps=config.steps * steps_a_round,
        parallel=stage.parallel,
    )
    for name in trained:
        say(roles.describe(name))
    best = Best(roles, ["policy"], followers={"policy": trained[1:]})
    keeper = Keeper(stage, optimizer, trained, best=best)
    keeper.memory["beta"] = config.kl_coef
    start = keeper.resume()
    order = DataOrder(len(examples), config.batch_size // config.group_size, f"{stage.config.seed}-ppo")
    log = stage.metric_log(start)
    samples = SampleLog(stage.run.samples, stage="ppo", start_step=start)
    keeper.logs = (log, samples)
    metrics = keeper.last_metrics(start)
    with progress(config.steps, "ppo", initial=start) as bar:
        for step in range(start, config.steps):
            beta = keeper.memory["beta"]
            prompts = [examples[index] for index in order.batch(step)]
            experience = make_experience(stage, prompts, rewards, step, beta)
            require_rewards(stage, experience, step + 1)
            metrics = {**describe(experience), "lr": optimizer.lr}
            if "value" in roles:
                metrics["val/explained_variance"] = explained(experience)
            if config.kl != "none":
                metrics["objective/kl_coef"] = beta
            metrics |= reward_parts(experience, rewards)
            metrics |= environment_counts(stage, experience)
            metrics |= update(stage, experience, optimizer, step, beta)
            # A round that was cut short counts whole: the learning rate is a function of the round.
            optimizer.step_count = (step + 1) * steps_a_round
            keeper.memory["beta"] = next_beta(config, beta, metrics["objective/kl"], int(metrics["episodes"]))
            metrics |= gold(stage, experience)
            if config.eval_every and ((step + 1) % config.eval_every == 0 or step + 1 == config.steps):
                metrics |= measure(stage, rewards, best, step + 1)
            watch(stage, metrics, step)
            watch_critic(stage, metrics, step, keeper.memory)
            log.log(step + 1, metrics)
            shown = range(min(SAMPLES_A_ROUND, len(experience.rows)))
            samples.log(step + 1, [_sample(experience, row) for row in shown])
            bar.update()
            bar.set_postfix(reward=f"{metrics['objective/scores']:.2f}", kl=f"{metrics['objective/kl']:.3f}")
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                keeper.save(step + 1)
            keeper.stop_if_asked(step + 1)
    keeper.close_logs()
    if stage.engine is not None:
        stage.engine.close()
    kept = best.restore()
    if kept:
        metrics = {**keeper.last_metrics(kept["policy"]), "best_step": float(kept["policy"])}
        say(f"ppo: the policy after round {kept['policy']} had the best held-out reward and is kept")
    return {f"ppo/{key}": value for key, value in metrics.items()}


def add_roles(stage: Stage, rewards: Rewards) -> list[str]:
    """Add the policy and, where the estimator wants one, the value function; returns what trains."""
    config, roles = stage.config.ppo, stage.roles
    roles.add("policy")
    kind = config.value_kind
    if kind == "none":
        return ["policy"]
    if kind == "policy_head":
        roles.add_head_on("value", "policy")
        return ["policy", "value"]
    roles.add("value", head="value")
    if kind == "reward":
        why = start_value(stage, rewards)
        if why and config.value == "reward":
            raise PerlVlmError(f"ppo.value is reward, but {why}. Use ppo.value zero")
        if why and rewards.roles:
            stage.warn(f"{why}: the value function starts from zero")
    return ["policy", "value"]


def start_value(stage: Stage, rewards: Rewards) -> str:
    """Start the value function from the first reward role of this base; why that cannot be, where it cannot."""
    if not rewards.roles:
        return f"ppo.reward_model {stage.config.ppo.reward_model} has no adapter on this base to start from"
    if not stage.roles.alike("value", rewards.roles[0]):
        return "the reward model's adapter was trained with other --lora settings than this run's"
    stage.roles.start_value_from_reward("value", rewards.roles[0])
    return ""


def require_rewards(stage: Stage, experience: Experience, step: int) -> None:
    """Stop every process where a reward is no number, naming the examples that got it."""
    odd = [
        example.id
        for row, example in zip(experience.rows, experience.episodes.prompts, strict=True)
        if not bool(torch.isfinite(experience.scores[row]))
    ]
    named = stage.parallel.gather_objects(odd)
    if named:
        raise PerlVlmError(
            f"the reward of {', '.join(named[:16])}{' ...' if len(named) > 16 else ''} is not finite in round {step}; "
            f"no weight was touched. Look at what ppo.reward_model {stage.config.ppo.reward_model} gives there; "
            "continue from the last checkpoint with --resume"
        )


def next_beta(config: PpoConfig, beta: float, kl: float, episodes: int) -> float:
    """The regulariser's coefficient in the next round."""
    if config.kl_control == "fixed":
        return beta
    moved = adaptive_kl_coef(beta, kl, target=config.kl_target, horizon=config.kl_horizon, episodes=episodes)
    # In (1 - beta) r - beta KL it is a share.
    return min(moved, 1.0) if config.reward_mix else moved


@torch.no_grad()
def measure(stage: Stage, rewards: Rewards, best: Best, step: int) -> dict[str, float]:
    """Mean reward and KL of answers sampled to held-out prompts, offered to ``best``."""
    config = stage.config.ppo
    examples = stage.some_examples("validation", config.eval_prompts)
    size, parts, begins = micro_size(stage), list[Measured](), list[int]()
    for block in stage.blocks(len(examples), config.batch_size, stopping=False):
        asked = [examples[place] for place in block]
        episodes = sample_episodes(stage, "policy", asked, HELD_OUT, block, size * config.minibatches)
        begins += [row + sum(len(part.rewards) for part in parts) for row in episodes.begins]
        parts += score(stage, episodes.rollout, episodes.prompts, rewards, size, learning=False)
    measured = gather(stage, parts)
    scores, kl = shaped(measured, config), sequence_kl(measured)
    if stage.task.environment() is None:
        scores, kl = scores[: len(examples)], kl[: len(examples)]
    else:  # rows are turns: the first of an episode says what it returned, and all of them moved away
        scores, kl = scores[begins], kl.sum() / len(begins)
    found = {"eval/scores": scores.mean().item(), "eval/kl": kl.mean().item()}
    best.offer(step, {"policy": (found["eval/scores"],)})
    return found


def gold(stage: Stage, experience: Experience) -> dict[str, float]:
    """How the task itself judges the sampled answers, over the examples that have a reference; of a live environment,
    over its episodes."""
    primary, episodes = stage.task.primary_metric, experience.episodes
    live = stage.task.environment() is not None
    ends = [row - 1 for row in (*episodes.begins[1:], len(episodes.prompts))]
    known = [
        (episodes.prompts[begin], episodes.rollout.texts[end])  # an episode is judged by its last response
        for begin, end in zip(episodes.begins, ends, strict=True)
        if live or episodes.prompts[begin].reference is not None
    ]
    judged = stage.parallel.gather_objects([stage.task.evaluate(example, text)[primary] for example, text in known])
    return {f"gold/{primary}": sum(judged) / len(judged)} if judged else {}


def describe(experience: Experience) -> dict[str, float]:
    """What a round looked like, under TRL's names where the quantity is the same."""
    mask, measured, scores = experience.mask, experience.measured, experience.scores
    several_turns = len(experience.episodes.begins) < len(experience.episodes.prompts)
    if several_turns:
        scores = scores[experience.episodes.begins]
    return {
        "objective/scores": scores.mean().item(),
        "objective/scores_std": scores.std(unbiased=False).item(),
        "objective/kl": sequence_kl(measured).mean().item(),
        "objective/entropy": masked_mean(measured.entropy, mask).item(),
        "val/num_eos_tokens": measured.ended.sum().item(),
        "response/mean_length": mask.sum(dim=1).float().mean().item(),
        "rollout/logprob_agreement": agreement(measured),
        "episodes": float(len(scores)),
        **({"turns": float(len(experience))} if several_turns else {}),
    }


def explained(experience: Experience) -> float:
    """The share of the returns' variance that the value function foresaw."""
    return explained_variance(experience.measured.values, experience.returns, experience.mask).item()


def reward_parts(experience: Experience, rewards: Rewards) -> dict[str, float]:
    """Each summand's mean where there are several, and how far the members of an ensemble disagree."""
    found = {}
    if len(rewards.terms) > 1:
        means = experience.measured.parts.mean(dim=0).tolist()
        found = {f"reward/{term.name}": mean for term, mean in zip(rewards.terms, means, strict=True)}
    if rewards.ensembled:
        found["reward/disagreement"] = experience.measured.doubt.mean().item()
    return found


def environment_counts(stage: Stage, experience: Experience) -> dict[str, float]:
    """Of a live environment: what it counts itself, as far as it has come, and how many of the round's episodes ended
    because their next prompt was too long."""
    environment = stage.task.environment()
    if environment is None:
        return {}
    counts = getattr(environment, "counts", {})
    own = {f"environment/{name}": float(count) for name, count in counts.items()}
    return {**own, "environment/too_long": float(experience.episodes.truncated)}


def watch(stage: Stage, metrics: dict[str, float], step: int) -> None:
    """Warn, once each, of what goes wrong while the policy's own metrics look fine."""
    if metrics["rollout/logprob_agreement"] > AGREEMENT_LIMIT:
        stage.warn(
            f"the sampler's log-probs and the recomputed ones differ (mean exp|delta| above {AGREEMENT_LIMIT}): the "
            "policy learns from samples of another model. Use --dtype float32, or look at the sampler, or at the "
            "flags of the server (docs/served-rollouts.md)"
        )


def watch_critic(stage: Stage, metrics: dict[str, float], step: int, memory: dict[str, float]) -> None:
    """Warn of a value function that goes astray. ``memory`` holds its largest gradient of the first rounds, in which a
    critic that starts from a reward model finds the scale."""
    if "value" not in stage.roles:
        return
    norm = metrics.get("grad_norm/value", 0.0)
    if step < CRITIC_GRACE:
        memory["critic_norm"] = max(norm, memory.get("critic_norm", 0.0))
        return
    if norm > CRITIC_GROWTH * memory.get("critic_norm", math.inf):
        stage.warn(
            f"the value function's gradient is more than {CRITIC_GROWTH} times the largest of its first {CRITIC_GRACE} "
            "rounds: it diverges, whatever the policy's metrics say; lower --ppo.value_lr"
        )
    if metrics["val/explained_variance"] < CRITIC_LIMIT:
        stage.warn(
            f"the value function explains less than nothing (explained variance below {CRITIC_LIMIT} after "
            f"{CRITIC_GRACE} rounds), so advantages are noisier than without it; lower --ppo.value_lr"
        )


def _sample(experience: Experience, row: int) -> dict[str, object]:
    rollout, example = experience.rollout, experience.episodes.prompts[row]
    return {
        "id": example.id,
        "prompt": example.messages[-1].text,
        "response": rollout.texts[row],
        "reference": example.reference,
        "score": experience.scores[experience.rows[row]].item(),
        "ended": bool(rollout.ended[row]),
    }
