"""A finished plan, as a table and as JSON."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

from perl_vlm.cli_settings import UsageError
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.inspection import open_skeleton
from perl_vlm.plan.advice import Change, changes, largest_micro
from perl_vlm.plan.command import with_pictures
from perl_vlm.plan.gpus import GIB
from perl_vlm.plan.memory import CONTEXT, SLACK, USABLE, Memory, limit, memory_of
from perl_vlm.plan.schedule import UTILISATION, Time, time_of
from perl_vlm.plan.settings import Job
from perl_vlm.plan.shapes import Shapes, shapes_of

RECORDS = {"sft": "demonstrations", "rm": "pairs", "ppo": "episodes"}


@dataclass(frozen=True)
class Engine:
    """A separate rollout engine, on a GPU of its own."""

    weights: int
    """Bytes of the base, unsharded, in the run's type."""
    cache: int
    """Bytes of keys and values, were all of a round's episodes under way at once."""


@dataclass(frozen=True)
class Plan:
    """What was found."""

    job: Job
    shapes: Shapes
    memory: Memory
    time: Time
    largest: int
    """Records of the largest micro-batch that fits."""
    changes: tuple[Change, ...]
    engine: Engine | None

    @property
    def needed(self) -> int:
        return self.memory.needed(self.job.device)

    @property
    def fits(self) -> bool:
        return self.needed <= limit(self.job.gpu.gib)

    def assumptions(self) -> list[str]:
        """What the figures take for granted."""
        job, found = self.job, list(self.memory.notes)
        found.append(
            f"every sequence is as long as allowed: {job.config.max_prompt_tokens} tokens of prompt"
            + (f", {job.image_tokens} of them pictures," if job.image_tokens else "")
            + f" and {job.batch(1).response} of response"
        )
        if job.device == "cuda":
            found.append(
                f"memory needed is tensors x {SLACK:g} (allocator) + {CONTEXT / GIB:g} GiB (CUDA), of {USABLE:.0%} of "
                f"{job.gpu.gib:g} GiB"
            )
        speeds = job.gpu.speeds_of
        peak = f"{job.gpu.tflops(job.dtype):g} TFLOP/s in {job.dtype}, {job.gpu.bandwidth:g} GB/s"
        found.append(
            f"time: {peak}" + (f" (size alone says nothing of speed: taken from {speeds})" if speeds else "")
            + "; reached of it: " + ", ".join(f"{name} {share:.0%}" for name, share in UTILISATION.items())
        )  # fmt: skip
        if job.plan.gpus > 1:
            runs = {"zero2": "ddp", "zero3": "fsdp"}.get(job.plan.strategy)
            also = f" ({job.plan.strategy} runs as {runs})" if runs else ""
            found.append(f"{job.plan.gpus} GPUs{also}, {job.gpu.link:g} GB/s between them; figures are of one of them")
        if job.stage == "ppo" and not {"learned", "untrained"} & set(_words(job.config.ppo.reward_model)):
            found.append(f"the reward {job.config.ppo.reward_model} is not counted: it is no role of this base")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers: bytes, seconds, FLOP."""
        job, shapes = self.job, self.shapes
        return {
            "model": shapes.name,
            "stage": job.stage,
            "parameters": shapes.total,
            "trainable": self.memory.trainable,
            "dtype": job.dtype,
            "gpu": asdict(job.gpu),
            "gpus": job.plan.gpus,
            "strategy": job.plan.strategy,
            "micro_batch": {"records": job.micro, "of": RECORDS[job.stage], "rows": job.batch(job.micro).rows,
                            "tokens_a_row": job.batch(job.micro).length, "shared_prompts": job.batch(job.micro).shared},
            "memory": {
                "phases": {phase.name: {**phase.items, "peak": phase.peak} for phase in self.memory.phases},
                "peak_phase": self.memory.peak.name,
                "needed": self.needed,
                "usable": limit(job.gpu.gib),
                "fits": self.fits,
                "largest_micro_batch": self.largest,
            },
            "flop": self.time.accounting.parts,
            "decode": {"steps": self.time.accounting.decode_steps, "bytes": self.time.accounting.decode_bytes},
            "seconds": {**self.time.parts, "step": self.time.total},
            "engine": None if self.engine is None else asdict(self.engine),
            "changes": [asdict(change) for change in self.changes],
            "assumptions": self.assumptions(),
        }  # fmt: skip


def _words(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() else " " for letter in text).split()


def make_plan(job: Job, name: str) -> Plan:
    """Plan a job for a model.

    Raises UsageError for a model that is not there, and PerlVlmError for one that cannot be planned or does not go with
    the stage.
    """
    config = job.config
    try:
        skeleton = open_skeleton(name, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except PerlVlmError as error:
        raise UsageError(str(error)) from error
    if skeleton.kind == "clip":
        raise PerlVlmError(
            f"{name} is a two-tower model: it holds no sequences to speak of, and fits wherever its weights do "
            "(perl-vlm models inspect says how many). The planner is for models that read prompts"
        )
    if skeleton.kind == "encoder" and job.stage != "rm":
        raise PerlVlmError(f"{name} is an encoder, which scores texts but writes none; plan --stage rm")
    shapes = shapes_of(skeleton)
    job = with_pictures(job, None if shapes.picture is None else shapes.picture.tokens)
    memory = memory_of(skeleton, shapes, job)
    fits = memory.needed(job.device) <= limit(job.gpu.gib)
    largest = largest_micro(skeleton, shapes, job)
    engine = None
    if job.stage == "ppo" and job.served:
        tokens = config.max_prompt_tokens + config.ppo.max_new_tokens
        size = 4 if job.dtype == "float32" else 2
        engine = Engine(shapes.base_bytes(size), config.ppo.batch_size * shapes.cache_bytes(tokens, size))
    return Plan(
        job=job,
        shapes=shapes,
        memory=memory,
        time=time_of(shapes, job, memory),
        largest=largest,
        changes=() if fits else tuple(changes(skeleton, shapes, job, memory, largest)),
        engine=engine,
    )


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def show(found: Plan) -> None:
    """Print a plan."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    job, memory = found.job, found.memory
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=False)

    def say(text: str) -> None:
        console.print(Text(text))

    where = job.gpu.name + (f" x {job.plan.gpus}, {job.plan.strategy}" if job.plan.gpus > 1 else "")
    share = memory.trainable / found.shapes.total
    say(
        f"{found.shapes.name}, {found.shapes.total:,} parameters in {job.dtype}; {job.stage}, --tuning "
        f"{job.config.tuning}, trains {memory.trainable:,} ({share:.2%}); on {where}"
    )
    batch = job.batch(job.micro)
    say(
        f"micro-batch: {job.micro} {RECORDS[job.stage]} in {batch.rows} rows of {batch.length} tokens"
        + (", prompts read once" if batch.shared else "")
    )
    names = list(dict.fromkeys(name for phase in memory.phases for name in phase.items))
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("memory of tensors")
    for phase in memory.phases:
        table.add_column(phase.name, justify="right")
    for name in names:
        table.add_row(
            *map(Text, (name, *(gib(phase.items[name]) if name in phase.items else "" for phase in memory.phases)))
        )
    table.add_section()
    table.add_row(*map(Text, ("peak", *(gib(phase.peak) for phase in memory.phases))))
    console.print(table)
    verdict = "fits" if found.fits else "DOES NOT FIT"
    say(f"{verdict}: needs {gib(found.needed)} of {gib(limit(job.gpu.gib))}, most in the {memory.peak.name}")
    if found.largest:
        say(f"largest micro-batch that fits: {found.largest} {RECORDS[job.stage]}")
    else:
        say("not even the smallest micro-batch fits")
    for change in found.changes:
        say(f"  {change.flags:<28} {gib(change.needed):>12}  {'fits' if change.fits else 'still does not fit'}")
    if found.engine is not None:
        say(
            f"rollout engine, a GPU of its own: {gib(found.engine.weights)} of weights, "
            f"{gib(found.engine.cache)} of keys and values for a whole round at once"
        )
    _show_time(found, say)
    for line in found.assumptions():
        say(f"- {line}")


def _show_time(found: Plan, say: Any) -> None:
    what = "round" if found.job.stage == "ppo" else "step"
    own = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in found.time.parts.items())
    records = found.job.own.batch_size
    say(
        f"time of a {what}: {found.time.total:.3g} s ({own}); {records / found.time.total:.3g} "
        f"{RECORDS[found.job.stage]} a second; {found.time.accounting.total / 1e12:.3g} TFLOP on each GPU"
    )
