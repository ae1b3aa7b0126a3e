"""What fits, and what to change where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from perl_vlm.errors import PerlVlmError
from perl_vlm.models.inspection import Skeleton
from perl_vlm.plan.memory import Memory, limit, memory_of, with_micro
from perl_vlm.plan.settings import Job
from perl_vlm.plan.shapes import Shapes

_TRIES = 6


@dataclass(frozen=True)
class Change:
    """A setting that would lower the peak."""

    flags: str
    """What to write."""
    needed: int
    """Bytes that the device must have with it."""
    fits: bool


def changes(skeleton: Skeleton, shapes: Shapes, job: Job, memory: Memory, largest: int) -> list[Change]:
    """Settings that lower the peak, each tried by a plan of its own; those that fit come first.

    Args:
        memory: the job's own.
        largest: records of the largest micro-batch that fits, as ``largest_micro`` has it.
    """
    before, room = memory.needed(job.device), limit(job.gpu.gib)
    found = []
    for flags, other in _alternatives(shapes, job, memory, largest):
        try:
            needed = memory_of(skeleton, shapes, other).needed(job.device)
        except PerlVlmError:
            continue  # not for this model
        if needed < before:
            found.append(Change(flags, needed, needed <= room))
    return sorted(found, key=lambda change: not change.fits)


def _alternatives(shapes: Shapes, job: Job, memory: Memory, largest: int) -> Iterator[tuple[str, Job]]:
    """One change at a time, those that cost least first."""
    config, plan = job.config, job.plan
    accumulate = _finer(job, largest)
    if accumulate is not None:
        yield f"--{job.stage}.accumulate {accumulate}", job.with_own(accumulate=accumulate)
    if not config.checkpointing:
        yield "--checkpointing true", job.with_config(checkpointing=True)
    if config.tuning == "full":
        yield "--tuning lora", job.with_config(tuning="lora")
    if job.dtype == "float32" and job.gpu.bf16 is not None and config.model != "tiny":
        yield "--dtype bfloat16", job.with_config(dtype="bfloat16")
    if job.image_tokens and config.lora.vision_rank:
        yield "--lora.vision_rank 0", job.with_config(lora=replace(config.lora, vision_rank=0))
    if job.device == "cuda" and not config.load_in_4bit and config.tuning == "lora" and not job.sharded:
        yield "--load_in_4bit", job.with_config(load_in_4bit=True)
    if memory.trainable > 0.05 * shapes.total and config.tuning == "lora" and config.lora.language_rank > 1:
        rank = max(1, config.lora.language_rank // 4)
        yield f"--lora.language_rank {rank}", job.with_config(lora=replace(config.lora, language_rank=rank))
    if job.stage == "ppo":
        if config.ppo.value_kind in ("reward", "zero"):
            yield "--ppo.value policy_head", job.with_own(value="policy_head")
        if not job.served and memory.peak.name == "rollout":
            yield "--ppo.engine served", job.with_plan(rollout="served")
    if plan.gpus > 1 and not job.sharded and config.tuning == "lora" and not config.load_in_4bit:
        yield "--strategy fsdp", job.with_plan(strategy="fsdp")


def _finer(job: Job, largest: int) -> int | None:
    """The least accumulation whose micro-batches are no larger than the largest that fits; the finest where none is."""
    whole = job.records
    possible = [size for size in range(job.own.accumulate + 1, whole + 1) if whole % size == 0]
    if job.stage == "ppo":  # answers to one prompt stay together
        possible = [size for size in possible if whole // size % job.config.ppo.group_size == 0] or possible
    return next((size for size in possible if whole // size <= largest), possible[-1] if possible else None)


def largest_micro(skeleton: Skeleton, shapes: Shapes, job: Job) -> int:
    """The most records (pairs, demonstrations, episodes) of a micro-batch that fit; 0 where not even one does."""
    unit = job.config.ppo.group_size if job.stage == "ppo" else 1
    room = limit(job.gpu.gib)

    @cache
    def needed(units: int) -> int:
        return memory_of(skeleton, shapes, with_micro(job, units * unit)).needed(job.device)

    return unit * _largest(needed, room)


def _largest(needed: Callable[[int], int], room: int) -> int:
    """The largest count whose need does not pass ``room``; needs grow, and nearly along a line."""
    first, second = needed(1), needed(4)
    if first > room:
        return 0
    fits, fails = (1, 4) if second > room else (4, 0)
    slope = max(1.0, (second - first) / 3)
    for _ in range(_TRIES):
        if fails and fails - fits <= 1:
            break
        guess = int(fits + (room - needed(fits)) / slope) if not fails else (fits + fails) // 2
        guess = max(fits + 1, min(guess, fails - 1 if fails else guess))
        if needed(guess) <= room:
            fits = guess
        else:
            fails = guess
    return fits
