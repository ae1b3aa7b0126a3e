"""The reward model: Bradley-Terry on pairs, or binary cross-entropy on labels. The loop reads top to bottom; it
leaves out early stopping, ensembles and several objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from perl_vlm.data.images import BlankImage
from perl_vlm.data.sequences import to_device
from perl_vlm.errors import PerlVlmError
from perl_vlm.formulas import bradley_terry, label_accuracy, label_bce, pair_accuracy
from perl_vlm.train.log import SampleLog, progress, say
from perl_vlm.train.optimize import Optimizer, RoleRates
from perl_vlm.train.stage import (
    DataOrder,
    Keeper,
    Stage,
    first,
    micro_batches,
    require_finite,
)
from perl_vlm.types import Comparison, Rating, Sequences, Split

Feedback = Comparison | Rating
SAMPLES = 32


def train_reward_model(stage: Stage) -> dict[str, float]:
    """Train the ``reward`` role on the task's preferences; returns its held-out metrics.

    At the end the head is rescaled so that rewards have mean 0 and standard deviation 1 on validation responses; the
    constants are part of the saved head.
    """
    config, roles = stage.config.rm, stage.roles
    stage.begin()
    records = stage.preferences("train")
    _check_kind(stage, records)
    roles.add("reward", head="reward")
    optimizer = Optimizer(
        roles,
        [RoleRates("reward", config.lr, config.vision_lr)],
        steps=config.steps,
        warmup=config.warmup,
        schedule=config.schedule,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    say(roles.describe("reward"))
    keeper = Keeper(stage, optimizer, ["reward"])
    start = keeper.resume()
    order = DataOrder(len(records), config.batch_size, f"{stage.config.seed}-rm")
    log = stage.metric_log(start)
    keeper.logs = (log,)
    with progress(config.steps, "rm", initial=start) as bar:
        for step in range(start, config.steps):
            batch = [records[index] for index in order.batch(step)]
            loss_sum, scored = 0.0, []
            for part in micro_batches(batch, config.accumulate):
                sequences, targets = collate_feedback(stage, part)
                scores = roles.scores("reward", sequences, training=True)
                loss = feedback_loss(stage, scores, targets) * (len(part) / len(batch))
                require_finite(loss, "the reward model's loss", [record.id for record in batch], step + 1)
                loss.backward()
                loss_sum += loss.item()
                scored.append((scores.detach(), targets, sequences))
            metrics = {"loss": loss_sum, **_describe(stage, scored), "lr": optimizer.lr, **optimizer.step()}
            log.log(step + 1, metrics)
            bar.update()
            bar.set_postfix(loss=f"{loss_sum:.3f}", accuracy=f"{metrics['accuracy']:.2f}")
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                keeper.save(step + 1)
            keeper.stop_if_asked(step + 1)
    keeper.close_logs()
    # Measured first: labels are judged by the sign of the score, which the rescaling moves.
    measured = evaluate_reward_model(stage, "reward")
    normalise_reward(stage, "reward")
    return measured


def collate_feedback(stage: Stage, records: Sequence[Feedback]) -> tuple[Sequences, Tensor | None]:
    """Tensors on the stage's device: 2B rows and margins for pairs, B rows and labels for labels."""
    if stage.task.reward_head().kind == "pairs":
        sequences, targets = stage.collator.comparisons(records)  # type: ignore[arg-type]  # checked by _check_kind
    else:
        sequences, targets = stage.collator.ratings(records)  # type: ignore[arg-type]
    return to_device(sequences, stage.device), None if targets is None else targets.to(stage.device)


def feedback_loss(stage: Stage, scores: Tensor, targets: Tensor | None) -> Tensor:
    """The head's loss: pairs by Bradley-Terry, labels by binary cross-entropy."""
    if stage.task.reward_head().kind == "pairs":
        chosen, rejected = scores.chunk(2)
        return bradley_terry(chosen, rejected, margin=targets)
    if targets is None:
        raise PerlVlmError("a reward head of kind `labels` needs labels")
    return label_bce(scores, targets)


@torch.no_grad()
def score_feedback(stage: Stage, role: str, records: Sequence[Feedback]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, response lengths in tokens, and correctness of each record (1, 0, or a half for a tie), on the CPU.

    Scores and lengths have 2B entries for pairs (chosen first) and B for labels; correctness always B.
    """
    scores, lengths, correct = [], [], []
    size = stage.config.eval.batch_size
    for start in range(0, len(records), size):
        stage.stop.raise_if_requested()
        sequences, targets = collate_feedback(stage, records[start : start + size])
        got = stage.roles.scores(role, sequences)
        if stage.task.reward_head().kind == "pairs":
            chosen, rejected = got.chunk(2)
            hit = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
        elif targets is not None:
            hit = torch.eq(got > 0, targets > 0.5).float()
        scores.append(got.cpu())
        lengths.append(sequences.response_mask.sum(dim=1).cpu())
        correct.append(hit.cpu())
    return torch.cat(scores), torch.cat(lengths), torch.cat(correct)


def normalise_reward(stage: Stage, role: str, split: Split = "validation") -> None:
    """Rescale a reward head to mean 0 and standard deviation 1 on the responses of ``split``."""
    records: list[Feedback] = first(stage.preferences(split), min(512, stage.config.rm.eval_pairs))
    if not records:
        stage.warn(f"there are no {split} preferences: the reward keeps its own scale")
        return
    scores, _, _ = score_feedback(stage, role, records)
    stage.roles.head(role).normalise_(scores.mean().item(), scores.std().item())


def evaluate_reward_model(stage: Stage, role: str) -> dict[str, float]:
    """Held-out accuracy, and what it rests on: the same with pictures blanked or swapped, and its liking for length."""
    split = stage.config.eval.split
    records: list[Feedback] = first(stage.preferences(split), stage.config.rm.eval_pairs)
    if not records:
        stage.warn(f"there are no {split} preferences to measure the reward model on")
        return {}
    name = "pair_accuracy" if stage.task.reward_head().kind == "pairs" else "label_accuracy"
    scores, lengths, correct = score_feedback(stage, role, records)
    _log_samples(stage, records, scores, correct)
    metrics = {
        f"reward_model/{name}": correct.mean().item(),
        "reward_model/length_correlation": _correlation(scores, lengths.float()),
        "reward_model/held_out": float(len(records)),
    }
    if any(record.images for record in records):
        for how in ("blank", "shuffled"):
            changed = without_sight(records, how)
            if changed:
                _, _, blind = score_feedback(stage, role, changed)
                metrics[f"reward_model/{name}_{how}_images"] = blind.mean().item()
    return metrics


def _log_samples(stage: Stage, records: Sequence[Feedback], scores: Tensor, correct: Tensor) -> None:
    """The first held-out records with their scores, into samples.jsonl."""
    lines = []
    for place, record in enumerate(records[:SAMPLES]):
        line: dict[str, object] = {"id": record.id, "prompt": record.messages[-1].text, "right": correct[place].item()}
        if isinstance(record, Comparison):
            line |= {"chosen": record.chosen, "chosen_score": scores[place].item()}
            line |= {"rejected": record.rejected, "rejected_score": scores[len(records) + place].item()}
        else:
            line |= {"response": record.response, "score": scores[place].item(), "label": record.label}
        lines.append(line)
    log = SampleLog(stage.run.samples, stage=stage.name)
    log.log(stage.config.rm.steps, lines)
    log.close()


def without_sight(records: Sequence[Feedback], how: str) -> list[Feedback]:
    """The same records with each picture made gray (``blank``) or taken from another record (``shuffled``). A record
    that no other one could lend a different picture is left out."""
    if how == "blank":
        return [replace(record, images=tuple(BlankImage(source) for source in record.images)) for record in records]
    changed: list[Feedback] = []
    for place, record in enumerate(records):
        # Neighbouring records often share a picture, so the search begins half the set away.
        others = (records[(place + len(records) // 2 + offset) % len(records)] for offset in range(len(records)))
        fitting = (other for other in others if len(other.images) == len(record.images))
        donor = next((other for other in fitting if other.images != record.images), None)
        if donor is not None:
            changed.append(replace(record, images=donor.images))
    return changed


def _describe(stage: Stage, scored: Sequence[tuple[Tensor, Tensor | None, Sequences]]) -> dict[str, float]:
    everything = torch.cat([scores for scores, _, _ in scored])
    metrics = {
        "mean_reward": everything.mean().item(),
        "min_reward": everything.min().item(),
        "max_reward": everything.max().item(),
        "num_tokens": float(sum(int(sequences.attention_mask.sum()) for _, _, sequences in scored)),
    }
    if stage.task.reward_head().kind == "pairs":
        chosen = torch.cat([scores.chunk(2)[0] for scores, _, _ in scored])
        rejected = torch.cat([scores.chunk(2)[1] for scores, _, _ in scored])
        accuracy, margin = pair_accuracy(chosen, rejected), (chosen - rejected).mean()
        return {"accuracy": accuracy.item(), "margin": margin.item(), **metrics}
    labels = torch.cat([targets for _, targets, _ in scored if targets is not None])
    return {"accuracy": label_accuracy(everything, labels).item(), **metrics}


def _check_kind(stage: Stage, records: Sequence[Feedback]) -> None:
    kind = stage.task.reward_head().kind
    wanted = Comparison if kind == "pairs" else Rating
    if not isinstance(records[0], wanted):
        raise PerlVlmError(
            f"task {stage.task.name} has a reward head of kind `{kind}`, which learns from {wanted.__name__}s, but its "
            f"preferences are {type(records[0]).__name__}s"
        )


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = (a.square().sum() * b.square().sum()).sqrt().item()
    return (a * b).sum().item() / scale if scale > 0 else 0.0
