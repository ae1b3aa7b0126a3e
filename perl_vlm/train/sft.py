"""Supervised fine-tuning: the loop reads top to bottom. It leaves out packing and several epochs' early stopping."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from perl_vlm.data.sequences import take, to_device
from perl_vlm.formulas import masked_sum
from perl_vlm.rollout.sampler import decode
from perl_vlm.train.backoff import in_micro_batches
from perl_vlm.train.log import SampleLog, progress, say
from perl_vlm.train.optimize import Optimizer, RoleRates
from perl_vlm.train.stage import DataOrder, Keeper, Stage, first
from perl_vlm.types import Sequences

SAMPLES = 32


def train_sft(stage: Stage) -> dict[str, float]:
    """Train the ``sft`` role on reference answers by cross-entropy over response tokens; returns the last metrics."""
    config, roles = stage.config.sft, stage.roles
    stage.begin()
    records = stage.demonstrations("train")
    roles.add("sft")
    optimizer = Optimizer(
        roles,
        [RoleRates("sft", config.lr, config.vision_lr, config.projector_lr)],
        config,
        steps=config.steps,
        parallel=stage.parallel,
    )
    say(roles.describe("sft"))
    keeper = Keeper(stage, optimizer, ["sft"])
    start = keeper.resume()
    order = DataOrder(len(records), config.batch_size, f"{stage.config.seed}-sft")
    log = stage.metric_log(start)
    keeper.logs = (log,)
    metrics = keeper.last_metrics(start)
    with progress(config.steps, "sft", initial=start) as bar:
        for step in range(start, config.steps):
            batch = stage.own([records[index] for index in order.batch(step)])
            whole = stage.collator.references(batch)
            tokens = int(stage.parallel.sum_(whole.response_mask.sum().to(stage.device)))
            sums = torch.stack(
                in_micro_batches(
                    stage, "records", range(len(batch)), len(batch) // config.accumulate,
                    partial(learn, stage, whole, tokens), undo=lambda: roles.clear_gradients("sft"),
                )
            ).sum(dim=0)  # fmt: skip
            stage.require_finite(sums, "the sft loss", [record.id for record in batch], step + 1)
            loss_mean, accuracy = stage.parallel.sum_(sums).tolist()
            metrics = {
                "loss": loss_mean,
                "mean_token_accuracy": accuracy,
                "num_tokens": float(tokens),
                "lr": optimizer.lr,
                **optimizer.step(),
            }
            log.log(step + 1, metrics)
            bar.update()
            bar.set_postfix(loss=f"{metrics['loss']:.3f}")
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                keeper.save(step + 1)
            keeper.stop_if_asked(step + 1)
    keeper.close_logs()
    log_samples(stage)
    return {f"sft/{key}": value for key, value in metrics.items()}


def learn(stage: Stage, batch: Sequences, tokens: int, rows: Sequence[int]) -> Tensor:
    """Add the gradient of some rows of a batch of so many response tokens; their share, [2], of its loss and of its
    accuracy."""
    sequences = to_device(take(batch, rows), stage.device)
    out = stage.roles.logprobs("sft", sequences, training=True, entropy_gradient=False)
    assert out.likeliest is not None  # logprobs always tells
    loss = -masked_sum(out.logprobs, sequences.response_mask) / tokens
    loss.backward()
    return torch.stack([loss.detach(), masked_sum(out.likeliest, sequences.response_mask) / tokens])


def log_samples(stage: Stage) -> None:
    """Greedy answers to the first held-out prompts, into samples.jsonl."""
    examples = first(stage.demonstrations("validation", needed=False), SAMPLES)
    if not examples:
        return
    prompts = to_device(stage.collator.prompts(examples), stage.device)
    limit = stage.config.ppo.max_new_tokens
    tokens = decode(
        stage.roles, "sft", prompts, max_new_tokens=limit, greedy=True, synced=stage.sharded
    ).tokens  # every process decodes them all; one writes
    lines = [
        {
            "id": example.id,
            "prompt": example.messages[-1].text,
            "reference": example.reference,
            "response": stage.renderer.decode(row),
        }
        for example, row in zip(examples, tokens, strict=True)
    ]
    log = SampleLog(stage.run.samples, stage="sft")
    log.log(stage.config.sft.steps, lines)
    log.close()
