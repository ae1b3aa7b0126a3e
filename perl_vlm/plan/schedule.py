"""Time of a step on paper: the accounting over what a GPU is assumed to reach."""

from __future__ import annotations

from dataclasses import dataclass, replace

from perl_vlm.plan.flops import (
    Accounting,
    Trains,
    decode,
    decode_bytes,
    head,
    read,
    scoring_passes,
    trained,
    trunk_forward,
    update_graphs,
)
from perl_vlm.plan.memory import Memory, rewards_here
from perl_vlm.plan.settings import Batch, Job
from perl_vlm.plan.shapes import Shapes

UTILISATION = {"training": 0.40, "scoring": 0.45, "reading prompts": 0.45, "decoding": 0.50}
"""Shares of the peak that are assumed: of FLOP/s, and in decoding of the memory's bandwidth."""
LINK = 0.7
"""Of a link's bandwidth, what reductions and gathers reach."""
SIZES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Time:
    """Seconds of one GPU's step (of ppo: round) by part."""

    accounting: Accounting
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def account(shapes: Shapes, job: Job, memory: Memory) -> Accounting:
    """The operations of one GPU's step: an optimizer step of sft and rm, a round of ppo."""
    if job.stage != "ppo":
        trains, members = next(iter(memory.trains.values())), job.config.rm.members if job.stage == "rm" else 1
        each = trained(shapes, job.batch(job.micro), "scores" if job.stage == "rm" else "logprobs", trains)
        return Accounting({"training": members * each * job.records / job.micro})
    config = job.config.ppo
    micro = job.batch(job.micro)
    times = config.minibatches * job.records / job.micro
    adapter = next(iter(memory.trains.values()))
    passes = scoring_passes(config, rewards_here(job))
    scoring = sum(
        read(shapes, batch, reads, None if role == "reference" else adapter)
        for (role, reads), batch in zip(passes, _seen_once(micro, len(passes), adapter), strict=True)
    )
    graphs = update_graphs(config)
    update = sum(
        trained(shapes, batch, reads, memory.trains[role])
        for (role, reads), batch in zip(graphs, _seen_once(micro, len(graphs), adapter), strict=True)
    )
    parts = {"scoring": times * scoring, "training": config.epochs * times * update}
    if job.served:
        return Accounting(parts)
    return _with_rollout(shapes, job, adapter, parts)


def _seen_once(batch: Batch, passes: int, trains: Trains) -> list[Batch]:
    """The batch of each pass over the same rows: pictures go through a frozen tower in the first alone."""
    return [batch if number == 0 or trains.vision else replace(batch, image_tokens=0) for number in range(passes)]


def _with_rollout(shapes: Shapes, job: Job, adapter: Trains, parts: dict[str, float]) -> Accounting:
    config, prompt = job.config.ppo, job.config.max_prompt_tokens
    rows = job.micro * config.minibatches
    times = job.records / job.micro
    prompts = Batch(-(-rows // config.group_size), 1, prompt, 0, job.image_tokens)
    reading = trunk_forward(shapes, prompts, adapter) + head(shapes, prompts.prompts)
    size = SIZES[job.dtype]
    weights = (shapes.parameters["language"] / max(1, shapes.total)) * shapes.base_bytes(
        size, four_bit=job.config.load_in_4bit
    )
    return Accounting(
        {
            "reading prompts": times * reading,
            "decoding": times * decode(shapes, rows, prompt, config.max_new_tokens, adapter),
            **parts,
        },
        decode_steps=int(times * config.max_new_tokens),
        decode_bytes=times * decode_bytes(shapes, rows, prompt, config.max_new_tokens, weights, size),
    )


def time_of(shapes: Shapes, job: Job, memory: Memory) -> Time:
    """Seconds of one step, each part at the utilisation assumed for it; decoding by operations or by bytes, whichever
    takes longer."""
    accounting = account(shapes, job, memory)
    peak = job.gpu.tflops(job.dtype) * 1e12
    parts = {name: flop / (peak * UTILISATION[name]) for name, flop in accounting.parts.items()}
    if "decoding" in parts:
        reads = accounting.decode_bytes / (job.gpu.bandwidth * 1e9 * UTILISATION["decoding"])
        parts["decoding"] = max(parts["decoding"], reads)
    if job.plan.gpus > 1:
        parts["between GPUs"] = exchanged_bytes(shapes, job, memory) / (job.gpu.link * 1e9 * LINK)
    return Time(accounting, parts)


def exchanged_bytes(shapes: Shapes, job: Job, memory: Memory) -> float:
    """What one GPU sends in a step: gradients in a ring, 2 (n - 1) / n of them; and with a sharded base each layer's
    weights, gathered in every forward and backward pass and at every decoded token."""
    gpus, config = job.plan.gpus, job.config.ppo
    updates = config.epochs * config.minibatches if job.stage == "ppo" else 1
    ring = (gpus - 1) / gpus
    found = 2 * ring * memory.trainable * 4 * updates
    if not job.sharded:
        return found
    micros = job.records / job.micro
    passes = 2 * micros * len(memory.trains)
    if job.stage == "ppo":
        scored = len(scoring_passes(config, rewards_here(job)))
        passes = config.minibatches * micros * (2 * config.epochs * len(memory.trains) + scored)
        passes += 0 if job.served else micros * (1 + config.max_new_tokens)
    return found + passes * ring * shapes.layer_parameters * SIZES[job.dtype]
