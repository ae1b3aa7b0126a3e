"""The reward model: Bradley-Terry on pairs, or binary cross-entropy on labels, in one head with one output for each
objective; one model, or an ensemble of adapters. The loop reads top to bottom.

What a trained model is worth is measured in ``reward_report.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from perl_vlm.config import RmConfig
from perl_vlm.errors import PerlVlmError
from perl_vlm.formulas import bradley_terry, label_accuracy, label_bce, pair_accuracy
from perl_vlm.models.roles import REFERENCE
from perl_vlm.train.backoff import in_micro_batches
from perl_vlm.train.best import Best
from perl_vlm.train.log import progress, say
from perl_vlm.train.optimize import Optimizer, RoleRates, mean_metrics
from perl_vlm.train.reward_report import evaluate_reward_model
from perl_vlm.train.sampling import ANCHOR, noise, sample
from perl_vlm.train.scoring import Feedback, collate_feedback, head_scores
from perl_vlm.train.stage import DataOrder, Keeper, Stage, spaced
from perl_vlm.types import Comparison, Example, Rating, RewardHead

ANCHOR_SAMPLES = 512


def member_names(members: int) -> list[str]:
    """The roles of a reward model: ``reward``, or of an ensemble ``reward-0``, ``reward-1``, ..."""
    return ["reward"] if members == 1 else [f"reward-{member}" for member in range(members)]


def train_reward_model(stage: Stage) -> dict[str, float]:
    """Train the reward roles on the task's preferences; returns their held-out metrics.

    Members of an ensemble share nothing but the base: each has its own start, data order or bag, and optimizer state.
    At the end each head is given the constants that bring its rewards to mean 0 and standard deviation 1.
    """
    config, roles, head = stage.config.rm, stage.roles, stage.task.reward_head()
    stage.begin()
    records = stage.preferences("train")
    _check_records(head, records)
    names = member_names(config.members)
    for name in names:
        add_reward_role(stage, name)
    optimizer = Optimizer(
        roles,
        [RoleRates(name, config.lr, config.vision_lr, config.projector_lr) for name in names],
        config,
        steps=config.steps,
        parallel=stage.parallel,
    )
    say(roles.describe(names[0]) + (f", in each of {len(names)} members" if len(names) > 1 else ""))
    best = Best(roles, names, patience=config.patience)
    keeper = Keeper(stage, optimizer, names, best=best)
    start = keeper.resume()
    orders = {
        name: DataOrder(
            len(records), config.batch_size, f"{stage.config.seed}-{name.replace('reward', 'rm')}",
            bagging=config.bagging,
        )
        for name in names
    }  # fmt: skip
    weight = _positive_weight(config, records)
    log = stage.metric_log(start)
    keeper.logs = (log,)
    with progress(config.steps, "rm", initial=start) as bar:
        for step in range(start, config.steps):
            if best.exhausted:
                say(f"rm: stopped after step {step}: {config.patience} measurements without a better one")
                break
            parts = {
                name: train_batch(stage, name, [records[index] for index in orders[name].batch(step)], weight, step)
                for name in names
            }
            metrics = mean_metrics(list(parts.values()))
            if len(names) > 1:
                metrics |= {f"accuracy/{name}": part["accuracy"] for name, part in parts.items()}
            metrics |= {"lr": optimizer.lr, **optimizer.step()}
            if config.eval_every and ((step + 1) % config.eval_every == 0 or step + 1 == config.steps):
                metrics |= measure(stage, best, names, weight, step + 1)
            log.log(step + 1, metrics)
            bar.update()
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", accuracy=f"{metrics['accuracy']:.2f}")
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps or best.exhausted:
                keeper.save(step + 1)
            keeper.stop_if_asked(step + 1)
    keeper.close_logs()
    kept, done = best.restore(), optimizer.step_count
    normalise_reward(stage, names)
    measured = evaluate_reward_model(stage, names, done)
    return measured | {f"reward_model/best_step/{name}": float(step) for name, step in kept.items()}


def add_reward_role(stage: Stage, name: str) -> None:
    """Add a fresh reward role with one output for each of the task's objectives, mixed by their weights."""
    wanted = stage.task.reward_head()
    stage.roles.add(name, head="reward", outputs=len(wanted.objectives))
    head = stage.roles.head(name)
    head.feedback = wanted.kind
    head.mix.copy_(torch.tensor(list(wanted.objectives.values()), dtype=head.mix.dtype))


def train_batch(
    stage: Stage, name: str, batch: Sequence[Feedback], positive_weight: float, step: int
) -> dict[str, float]:
    """Accumulate the gradient of one member's mean loss over a batch; returns what the batch looked like."""
    config = stage.config.rm
    own = stage.own(batch)

    def work(part: Sequence[Feedback]) -> tuple[Tensor, Scored]:
        scored = forward(stage, name, part, training=True)
        loss = feedback_loss(stage, scored, positive_weight, len(batch))
        loss.backward()
        return loss.detach(), scored

    done = in_micro_batches(
        stage, "records", own, len(own) // config.accumulate, work, undo=lambda: stage.roles.clear_gradients(name)
    )
    total, gathered = sum((loss for loss, _ in done), torch.zeros((), device=stage.device)), [each for _, each in done]
    stage.require_finite(total, "the reward model's loss", [record.id for record in own], step + 1)
    return {"loss": stage.parallel.sum_(total).item(), **_describe(stage, gathered)}


class Scored(NamedTuple):
    """A micro-batch through a reward role."""

    scores: Tensor
    """[2B] for pairs, chosen before rejected, [B] for labels: the raw output for each record's objective."""
    targets: Tensor | None
    """[B] margins (pairs; none where no record has one) or labels."""
    tokens: int


def forward(stage: Stage, name: str, records: Sequence[Feedback], *, training: bool) -> Scored:
    """Raw scores of some records under a reward role."""
    sequences, targets = collate_feedback(stage, records)
    scores = head_scores(stage, stage.roles.raw_scores(name, sequences, training=training), records)
    return Scored(scores, targets, int(sequences.attention_mask.sum()))


def feedback_loss(stage: Stage, scored: Scored, positive_weight: float, records: int) -> Tensor:
    """The sum of a micro-batch's losses over the number of ``records`` of the whole batch: pairs by Bradley-Terry,
    labels by binary cross-entropy. With several objectives every record counts once, whichever it speaks of."""
    config = stage.config.rm
    if stage.task.reward_head().kind == "pairs":
        chosen, rejected = scored.scores.chunk(2)
        margin = scored.targets if config.use_margin else None
        return bradley_terry(
            chosen, rejected, margin=margin, centering_coef=config.centering_coef, denominator=float(records)
        )
    assert scored.targets is not None  # labels always come with targets
    return label_bce(scored.scores, scored.targets, positive_weight=positive_weight, denominator=float(records))


@torch.no_grad()
def measure(stage: Stage, best: Best, names: Sequence[str], positive_weight: float, step: int) -> dict[str, float]:
    """Validation loss and accuracy of each member, offered to ``best``."""
    config = stage.config.rm
    records = stage.some(stage.preferences("validation"), config.eval_pairs)
    if not records:
        raise PerlVlmError(
            f"rm.eval_every is {config.eval_every}, but task {stage.task.name} has no validation preferences to choose "
            "the best weights by. Give some, or leave rm.eval_every out"
        )
    found: dict[str, dict[str, float]] = {}
    for name in names:
        rows = []
        for block in stage.blocks(len(records), stage.rows_at_once, stopping=False):
            part = [records[place] for place in block]
            scored = forward(stage, name, part, training=False)
            rows.append(_per_record(stage, scored, positive_weight))
        loss, hit = stage.gathered(torch.cat(rows), len(records)).mean(dim=0).tolist()
        found[name] = {"eval/loss": loss, "eval/accuracy": hit}
    keys = {
        name: (m["eval/accuracy"], -m["eval/loss"]) if config.select_by == "accuracy" else (-m["eval/loss"],)
        for name, m in found.items()
    }
    best.offer(step, keys)
    metrics = mean_metrics(list(found.values()))
    if len(names) > 1:
        metrics |= {f"{key}/{name}": value for name, part in found.items() for key, value in part.items()}
    return metrics


def _per_record(stage: Stage, scored: Scored, positive_weight: float) -> Tensor:
    """[B, 2] on the CPU: loss, the one that is trained on, and correctness of each record, a tie being half right."""
    scores, targets = scored.scores.cpu(), None if scored.targets is None else scored.targets.cpu()
    sides = 2 if stage.task.reward_head().kind == "pairs" else 1
    rows = scores.unflatten(0, (sides, -1)).T
    losses = [
        feedback_loss(
            stage, Scored(row, None if targets is None else targets[place : place + 1], 0), positive_weight, 1
        )
        for place, row in enumerate(rows)
    ]
    if sides == 2:
        hits = (rows[:, 0] > rows[:, 1]).float() + 0.5 * (rows[:, 0] == rows[:, 1]).float()
    else:
        assert targets is not None  # labels always come with targets
        hits = torch.eq(scores > 0, targets > 0.5).float()
    return torch.stack([torch.stack(losses), hits], dim=1)


@torch.no_grad()
def normalise_reward(stage: Stage, names: Sequence[str]) -> None:
    """Give reward heads the constants that bring each objective to mean 0 and standard deviation 1.

    On answers that the anchor samples to validation prompts, so that a reward of 0 is the anchor's own mean; or on the
    validation preferences' responses, which is what a model that cannot sample is left with. All roles are measured on
    the same responses.
    """
    how = stage.config.rm.normalise
    if how == "none":
        return
    records = stage.some(stage.preferences("validation"), ANCHOR_SAMPLES)
    if len(records) < 2:
        stage.warn("there are no validation preferences to normalise the reward on: it keeps its own scale")
        return
    sampling = how == "anchor" and stage.roles.backbone.kind == "causal"
    raw = _anchor_scores(stage, names, records) if sampling else _response_scores(stage, names, records)
    for name, own in zip(names, raw.unbind(dim=1), strict=True):
        stage.roles.head(name).normalise_(own.mean(dim=0), own.std(dim=0))


def _anchor_scores(stage: Stage, names: Sequence[str], records: Sequence[Feedback]) -> Tensor:
    """[N, K, O] raw scores of answers that the reference samples to the records' prompts."""
    prompts = [Example(record.id, record.messages, record.images, origin=record.origin) for record in records]
    rows = []
    for block in stage.blocks(len(prompts), stage.rows_at_once):
        part = [prompts[place] for place in block]
        rollout = sample(stage, REFERENCE, part, noise(stage, ANCHOR, block))
        rows.append(torch.stack([stage.roles.raw_scores(name, rollout.sequences) for name in names], dim=1))
    return stage.gathered(torch.cat(rows), len(prompts))


def _response_scores(stage: Stage, names: Sequence[str], records: Sequence[Feedback]) -> Tensor:
    """[N or 2N, K, O] raw scores of the records' own responses."""
    rows = []
    for block in stage.blocks(len(records), stage.rows_at_once):
        part = [records[place] for place in block]
        sequences, _ = collate_feedback(stage, part)
        raw = torch.stack([stage.roles.raw_scores(name, sequences) for name in names], dim=1)
        # Both sides of a pair in one row, so that dropping repeated records drops whole pairs.
        rows.append(raw.unflatten(0, (-1, len(part))).transpose(0, 1))
    return stage.gathered(torch.cat(rows), len(records)).flatten(0, 1)


def _positive_weight(config: RmConfig, records: Sequence[Feedback]) -> float:
    """The weight of good labels; ``balanced`` gives both classes the same total weight."""
    if config.positive_weight != "balanced":
        return float(config.positive_weight)
    labels = [record.label for record in records if isinstance(record, Rating)]
    good = sum(labels)
    if not labels:
        return 1.0
    if good in (0, len(labels)):
        raise PerlVlmError(
            f"rm.positive_weight is balanced, but all {len(labels)} training labels are "
            f"{'good' if good else 'bad'}: there is nothing to tell apart"
        )
    return (len(labels) - good) / good


def _describe(stage: Stage, gathered: Sequence[Scored]) -> dict[str, float]:
    parallel, pairs = stage.parallel, stage.task.reward_head().kind == "pairs"
    sides = 2 if pairs else 1
    # One row a record: rows of several processes come one after the other.
    scores = parallel.gather_rows(torch.cat([part.scores.detach().unflatten(0, (sides, -1)).T for part in gathered]))
    tokens = torch.tensor(float(sum(part.tokens for part in gathered)), device=stage.device)
    metrics = {
        "mean_reward": scores.mean().item(),
        "min_reward": scores.min().item(),
        "max_reward": scores.max().item(),
        "num_tokens": parallel.sum_(tokens).item(),
    }
    if pairs:
        accuracy, margin = pair_accuracy(scores[:, 0], scores[:, 1]), (scores[:, 0] - scores[:, 1]).mean()
        return {"accuracy": accuracy.item(), "margin": margin.item(), **metrics}
    labels = parallel.gather_rows(torch.cat([part.targets for part in gathered if part.targets is not None]))
    return {"accuracy": label_accuracy(scores[:, 0], labels).item(), **metrics}


def _check_records(head: RewardHead, records: Sequence[Feedback]) -> None:
    """Refuse preferences that the head cannot learn from."""
    wanted = Comparison if head.kind == "pairs" else Rating
    looked = records if isinstance(records, list) else spaced(records, 256)
    for record in looked:
        if not isinstance(record, wanted):
            raise PerlVlmError(
                f"the task's reward head is of kind `{head.kind}`, which learns from {wanted.__name__}s, but "
                f"{record.origin or record.id} is a {type(record).__name__}"
            )
        if record.objective not in head.objectives:
            known = ", ".join(repr(name) for name in head.objectives)
            raise PerlVlmError(
                f"{record.origin or record.id} speaks of the objective {record.objective!r}, which the task's reward "
                f"head does not have; it has {known}"
            )
