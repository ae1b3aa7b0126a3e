"""Peak memory of a stage, phase by phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from perl_vlm.models.inspection import Skeleton
from perl_vlm.plan.costs import drawing, sampler_cost
from perl_vlm.plan.flops import Reads, Trains, update_graphs
from perl_vlm.plan.gpus import GIB
from perl_vlm.plan.passes import TYPES, Rehearsal
from perl_vlm.plan.settings import Batch, Job
from perl_vlm.plan.shapes import Shapes
from perl_vlm.plan.skeletons import adapter_counts, shortened

CONTEXT = int(0.5 * GIB)
"""What CUDA itself takes, with cuBLAS's workspace."""
SLACK = 1.05
"""What the allocator takes beyond the tensors, as a factor."""
USABLE = 0.98
"""Of a GPU's memory, what the driver leaves."""
FLOAT = 4
"""Bytes of adapters, heads, full copies, gradients and each of AdamW's two states."""


@dataclass(frozen=True)
class Phase:
    """A part of a step, and what is alive at its peak, in bytes."""

    name: str
    items: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.items.values())


@dataclass(frozen=True)
class Memory:
    """What a stage holds on one GPU. Tensors alone; see ``needed`` for what the device must have."""

    phases: tuple[Phase, ...]
    trains: dict[str, Trains]
    """What trains in each role."""
    trainable: int
    """Parameters that train, heads included."""
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.peak)

    def needed(self, device: str) -> int:
        """Bytes that a device must have free for the peak."""
        return int(self.peak.peak * SLACK) + CONTEXT if device == "cuda" else self.peak.peak


def limit(gib: float) -> int:
    """Bytes of a GPU's memory that can be used."""
    return int(gib * GIB * USABLE)


def rewards_here(job: Job) -> int:
    """Reward models that are roles of the base in a ppo stage."""
    named = job.config.ppo.reward_model
    return job.config.rm.members * int("learned" in named) + int("untrained" in named) if job.stage == "ppo" else 0


def graphs_of(job: Job) -> list[tuple[str, Reads]]:
    """Roles that a training step goes through, and what is read of each."""
    if job.stage == "ppo":
        return update_graphs(job.config.ppo)
    return [("sft", "logprobs")] if job.stage == "sft" else [("reward", "scores")]


def memory_of(skeleton: Skeleton, shapes: Shapes, job: Job) -> Memory:
    """The memory of a stage, by a dry run of its passes.

    Raises PerlVlmError where the settings do not fit the model, or it cannot be run without weights.
    """
    stage = _StageMemory(skeleton, shapes, job)
    phases = [stage.training(), stage.optimizer()]
    if job.stage == "ppo":
        phases = [stage.rollout(), stage.scoring(), *phases]
    return Memory(tuple(phases), stage.trains, stage.trainable, tuple(stage.notes()))


class _StageMemory:
    def __init__(self, skeleton: Skeleton, shapes: Shapes, job: Job) -> None:
        self.shapes, self.job = shapes, job
        self.size = TYPES[job.dtype].itemsize
        self.graphs = graphs_of(job)
        self.rehearsals = self._rehearse(skeleton)
        config = job.config
        full, members = config.tuning == "full", config.rm.members if job.stage == "rm" else 1
        counts = dict(shapes.parameters) if full else adapter_counts(skeleton, config.lora)
        if full and config.lora.vision_rank == 0:
            counts["vision"] = 0
        one = Trains(full, counts["language"], counts["vision"], counts["projector"], job.config.checkpointing)
        self.trains = {name: one for name, _ in self.graphs}
        heads = sum(shapes.hidden + 1 for _, reads in self.graphs if reads != "logprobs")
        self.trainable = members * (len(self.graphs) * sum(counts.values()) + heads)
        self.held = self._held(sum(counts.values()), members)

    def _rehearse(self, skeleton: Skeleton) -> list[tuple[float, Rehearsal]]:
        """Rehearsals whose peaks, with these weights, add up to the whole model's: of layers that are alike, two
        numbers of them tell what each takes. What full tuning's gradients take while they come into being depends on
        where in the model one looks, so there it is the whole model itself."""
        shapes, job = self.shapes, self.job
        period, layers, seen = shapes.period, shapes.layers, shapes.vision_layers
        few = max(2, period)
        if job.config.tuning == "full" or layers <= few + period:
            return [(1.0, self._prepared(skeleton))]
        more = (layers - few) / period
        least = min(2, seen)
        tall = float(seen - least) if job.config.lora.vision_rank else 0.0  # a frozen tower keeps nothing of a layer
        found = [(1.0 - more - tall, (few, least)), (more, (few + period, least))]
        if tall:
            found.append((tall, (few, least + 1)))
        return [(weight, self._prepared(shortened(skeleton, *size))) for weight, size in found]

    def _prepared(self, skeleton: Skeleton) -> Rehearsal:
        rehearsal = Rehearsal(skeleton, self.shapes, self.job)
        for name, _ in self.graphs:
            rehearsal.add(name)
        if self.job.config.checkpointing:
            rehearsal.checkpoint()
        return rehearsal

    def _most(self, work: Callable[[Rehearsal], tuple[int, ...]]) -> int:
        """The highest of a pass's parts in the whole model."""
        found = [(weight, work(rehearsal)) for weight, rehearsal in self.rehearsals]
        parts = range(len(found[0][1]))
        return int(max(sum(weight * peaks[part] for weight, peaks in found) for part in parts))

    def _held(self, adapter: int, members: int) -> dict[str, int]:
        """What is alive all the time."""
        job, shapes = self.job, self.shapes
        base = shapes.base_bytes(self.size, four_bit=job.config.load_in_4bit)
        gathered = 0
        if job.sharded:
            base -= int(shapes.layer_parameters * self.size * (1 - 1 / job.plan.gpus))
            gathered = 2 * shapes.largest_layer * self.size  # the one that runs and the one that comes next
        width = "4 bits" if job.config.load_in_4bit else job.dtype
        found = {f"frozen base ({width})": base}
        if gathered:
            found["layers gathered to run"] = gathered
        frozen = rewards_here(job) + len(self.rehearsals[0][1].below)
        if job.config.tuning == "full":
            copies = (members * len(self.graphs) + frozen) * shapes.total
            found["full copies (float32)"] = copies * FLOAT
        else:
            found["adapters and heads (float32)"] = (self.trainable + frozen * (adapter + shapes.hidden + 1)) * FLOAT
        found["AdamW states"] = 2 * FLOAT * self.trainable
        if job.config.load_in_4bit:
            found["a weight taken out of 4 bits"] = shapes.largest_linear * self.size
        return found

    def _pictures(self, prompts: int) -> dict[str, int]:
        """Pixels on the device: those of so many prompts, and in ppo those of the whole round's episodes."""
        picture, job = self.shapes.picture, self.job
        if job.stage == "ppo":
            prompts += job.config.ppo.batch_size // job.plan.gpus
        if picture is None or not job.image_tokens or not prompts:
            return {}
        return {"pictures": int(prompts * job.image_tokens * picture.per_token * picture.pixel_bytes)}

    def _pictures_of(self, batch: Batch) -> dict[str, int]:
        """A pair has its prompt's twice, and rows that share a prompt are packed with one more copy."""
        return self._pictures(batch.sequences + (batch.prompts if batch.shared else 0))

    @property
    def gradients(self) -> int:
        return self.trainable * FLOAT

    def training(self) -> Phase:
        """Forward and backward passes of one micro-batch."""
        job = self.job
        several = job.own.accumulate > 1
        batch = job.batch(job.micro)
        peak = self._most(lambda each: each.training_peaks(batch, list(self.graphs), with_gradients=several))
        grads = self.gradients if several else min(self.gradients, peak)
        return Phase(
            "update" if job.stage == "ppo" else "micro-batch",
            {
                **self.held,
                **self._pictures_of(batch),
                "gradients": grads,
                "activations": peak - (0 if several else grads),
            },
        )

    def optimizer(self) -> Phase:
        """AdamW's step: its many-tensor form on CUDA holds one more tensor for each parameter."""
        roles = self.rehearsals[0][1].roles.values()
        largest = max(value.numel() for role in roles for value in role.own)
        extra = self.trainable if self.job.device == "cuda" else 2 * largest
        own = {"gradients": self.gradients, "AdamW at work": extra * FLOAT}
        return Phase("optimizer step", {**self.held, **self._pictures(0), **own})

    def scoring(self) -> Phase:
        """The policy's pass: no role's takes more, since it has an adapter and meets the LM head."""
        batch = self.job.batch(self.job.micro)
        peak = self._most(lambda each: each.scoring_peaks(batch, "policy", "logprobs"))
        return Phase("scoring", {**self.held, **self._pictures_of(batch), "activations": peak})

    def rollout(self) -> Phase:
        """Reading the prompts, then decoding; with a served engine neither happens here."""
        job, config = self.job, self.job.config.ppo
        if job.served:
            return Phase("rollout (served)", {**self.held, **self._pictures(0)})
        rows = job.micro * config.minibatches
        prompts = -(-rows // config.group_size)
        tokens = job.config.max_prompt_tokens + config.max_new_tokens
        one = self.shapes.cache_bytes(tokens, self.size)
        logits = int(sampler_cost(TYPES[job.dtype], drawing(config)) * rows * self.shapes.vocabulary)
        reading = {"cache": prompts * one, "activations": self._most(lambda each: each.reading_peaks(prompts))}
        # Rows that end leave the batch: a layer's keys are copied meanwhile.
        leaving = one * rows // max(1, 2 * self.shapes.layers)
        decoding = {"cache": rows * one + leaving, "logits of a step": logits}
        larger = reading if sum(reading.values()) > sum(decoding.values()) else decoding
        return Phase("rollout", {**self.held, **self._pictures(prompts), **larger})

    def notes(self) -> list[str]:
        found = []
        rehearsal = self.rehearsals[0][1]
        if rehearsal.vision_left_out:
            found.append(
                "the vision tower could not be run without its weights "
                f"({rehearsal.vision_left_out}): its activations are NOT in these figures"
            )
        text = rehearsal.base.config.get_text_config()
        if any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            found.append("a mixture of experts: operations are counted for dense layers only")
        return found


def with_micro(job: Job, records: int) -> Job:
    """The same job with micro-batches of so many records, whatever the batch is then."""
    minibatches = job.config.ppo.minibatches if job.stage == "ppo" else 1
    batch = records * minibatches * job.own.accumulate * job.plan.gpus
    changed = {"batch_size": batch}
    return replace(job, config=replace(job.config, **{job.stage: replace(job.own, **changed)}))  # type: ignore[arg-type]
