"""Supervised fine-tuning: the loop reads top to bottom. It leaves out packing and several epochs' early stopping."""

from __future__ import annotations

from perl_vlm.data.sequences import to_device
from perl_vlm.formulas import masked_sum
from perl_vlm.train.log import progress
from perl_vlm.train.optimize import Optimizer, RoleRates
from perl_vlm.train.stage import DataOrder, Keeper, Stage, micro_batches, require_finite


def train_sft(stage: Stage) -> dict[str, float]:
    """Train the ``sft`` role on reference answers by cross-entropy over response tokens; returns the last metrics."""
    config, roles = stage.config.sft, stage.roles
    stage.begin()
    records = stage.examples("train")
    roles.add("sft")
    optimizer = Optimizer(
        roles,
        [RoleRates("sft", config.lr, config.vision_lr)],
        steps=config.steps,
        warmup=config.warmup,
        schedule=config.schedule,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    keeper = Keeper(stage, optimizer, ["sft"])
    start = keeper.resume()
    order = DataOrder(len(records), config.batch_size, f"{stage.config.seed}-sft")
    log = stage.metric_log(start)
    keeper.logs = (log,)
    metrics: dict[str, float] = {}
    with progress(config.steps, "sft", initial=start) as bar:
        for step in range(start, config.steps):
            batch = [records[index] for index in order.batch(step)]
            parts = []
            batches = [
                to_device(stage.collator.references(part), stage.device)
                for part in micro_batches(batch, config.accumulate)
            ]
            tokens = sum(int(part.response_mask.sum()) for part in batches)
            for sequences in batches:
                out = roles.logprobs("sft", sequences, training=True)
                loss = -masked_sum(out.logprobs, sequences.response_mask) / tokens
                require_finite(loss, "the sft loss", [record.id for record in batch], step + 1)
                loss.backward()
                hits = (out.logits.argmax(dim=-1) == sequences.input_ids[:, -out.logits.shape[1] :]).float()
                parts.append({"loss": loss.item(), "hits": masked_sum(hits, sequences.response_mask).item() / tokens})
            lr = optimizer.lr
            metrics = {
                "loss": sum(part["loss"] for part in parts),
                "mean_token_accuracy": sum(part["hits"] for part in parts),
                "num_tokens": float(tokens),
                "lr": lr,
                **optimizer.step(),
            }
            log.log(step + 1, metrics)
            bar.update()
            bar.set_postfix(loss=f"{metrics['loss']:.3f}")
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                keeper.save(step + 1)
            keeper.stop_if_asked(step + 1)
    keeper.close_logs()
    return {f"sft/{key}": value for key, value in metrics.items()}
