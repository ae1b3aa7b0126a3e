"""What a step really takes: the stages' own passes over a model with random weights, their live tensors counted.

The planner's figures are held against these, by tests on small shapes and by ``benchmarks/planner.py`` on larger ones.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from perl_vlm.formulas import bradley_terry, masked_sum
from perl_vlm.models.backbone import Backbone
from perl_vlm.models.roles import REFERENCE, Roles
from perl_vlm.plan.flops import scoring_passes, update_graphs
from perl_vlm.plan.live import LiveBytes
from perl_vlm.plan.memory import rewards_here
from perl_vlm.plan.passes import TYPES
from perl_vlm.plan.random_models import IMAGE_TOKEN, random_pictures
from perl_vlm.plan.settings import Batch, Job
from perl_vlm.rollout.sampler import decode
from perl_vlm.train.experience import Measured as Scored
from perl_vlm.train.update import learn
from perl_vlm.types import Sequences

_TOKENIZER = SimpleNamespace(pad_token_id=0, bos_token_id=1)


@dataclass(frozen=True)
class Measured:
    """Bytes of tensors alive at the peak of each phase, weights and optimizer states included."""

    phases: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.phases.values())


def random_backbone(model: Any, job: Job) -> Backbone:
    """A frozen base without a tokenizer, of a transformers model with whatever weights it has."""
    frozen = model.to(TYPES[job.dtype]).eval().requires_grad_(False)
    return Backbone("random", None, frozen, _TOKENIZER, _TOKENIZER, (2,), False, GenerationConfig())


def measure(model: Any, job: Job) -> Measured:
    """Run two steps of a stage and count the second.

    Args:
        model: from ``random_model``; it becomes the base.
        job: stage and settings, for the device that the model is on.
    """
    roles = Roles(random_backbone(model, job), job.config.lora, tuning=job.config.tuning)
    if job.config.checkpointing:
        roles.recompute()
    graphs = dict(update_graphs(job.config.ppo)) if job.stage == "ppo" else {}
    if job.stage == "sft":
        roles.add("sft")
    elif job.stage == "rm":
        roles.add("reward", head="reward")
    else:
        for member in range(rewards_here(job)):
            roles.add(f"reward-{member}", head="reward")
        roles.add("policy")
        if "value" in graphs:
            roles.add("value", head="value")
        elif job.config.ppo.value_kind == "policy_head":
            roles.add_head_on("value", "policy")
    trained = [name for name in ("sft", "reward", "policy", "value") if name in roles.names]
    roles.train_only(*trained)
    parameters = {id(p): p for name in trained for p in roles.parameters(name).values() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-6)
    run = _Run(roles, job, optimizer)
    run.step(None)
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    models = {id(roles.role(name).model): roles.role(name).model for name in roles.names}
    heads = [head for name in roles.names if (head := roles.role(name).head) is not None]
    held = [value for module in (*models.values(), *heads) for value in _tensors(module)]
    with LiveBytes([*held, *states]) as live:
        return Measured(run.step(live))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@dataclass(frozen=True)
class _Run:
    roles: Roles
    job: Job
    optimizer: torch.optim.Optimizer

    def step(self, live: LiveBytes | None) -> dict[str, int]:
        """One step; the peak of each phase."""
        found: dict[str, int] = {}

        def mark(phase: str) -> None:
            if live is not None:
                found[phase] = live.peak
                live.since()

        job = self.job
        batch = job.batch(job.micro)
        if job.stage == "ppo":
            if not job.served:
                self._rollout(job.batch(job.micro * job.config.ppo.minibatches))
                mark("rollout")
            self._score(batch)
            mark("scoring")
        for _ in range(min(2, job.own.accumulate)):
            self._learn(batch)
        mark("update" if job.stage == "ppo" else "micro-batch")
        self.optimizer.step()
        mark("optimizer step")
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def _learn(self, batch: Batch) -> None:
        sequences = self._sequences(batch)
        if self.job.stage == "rm":
            scores = self.roles.raw_scores("reward", sequences, training=True)[:, 0]
            bradley_terry(*scores.chunk(2), denominator=float(batch.prompts)).backward()
            return
        if self.job.stage == "sft":
            out = self.roles.logprobs("sft", sequences, training=True, entropy_gradient=False)
            (-masked_sum(out.logprobs, sequences.response_mask)).backward()
            return
        zeros = torch.zeros(batch.sequences, batch.response, device=sequences.input_ids.device)
        measured: Any = SimpleNamespace(**dict.fromkeys((field.name for field in fields(Scored)), zeros))
        experience: Any = SimpleNamespace(
            rollout=SimpleNamespace(sequences=sequences), rows=range(batch.sequences), measured=measured,
            advantages=zeros, returns=zeros,
        )  # fmt: skip
        stage: Any = SimpleNamespace(config=self.job.config, roles=self.roles)
        learn(stage, experience, range(batch.sequences), 1.0, 0.1)

    @torch.no_grad()
    def _score(self, batch: Batch) -> None:
        sequences = self._sequences(batch)
        for role, reads in scoring_passes(self.job.config.ppo, rewards_here(self.job)):
            if reads == "scores":
                self.roles.raw_scores(role, sequences)
            elif reads == "values":
                self.roles.values(role, sequences)
            else:
                head = "value" if reads == "logprobs+values" else None
                self.roles.logprobs(REFERENCE if role == "reference" else role, sequences, value_head=head)

    def _rollout(self, batch: Batch) -> None:
        prompts = self._sequences(batch, responses=False)
        limit = batch.response
        decode(self.roles, "policy", prompts, max_new_tokens=limit, min_new_tokens=limit)

    def _sequences(self, batch: Batch, *, responses: bool = True) -> Sequences:
        """Random tokens; one prompt is shorter than the others, as in any batch."""
        device, rows, width = self.roles.backbone.device, batch.sequences, batch.response if responses else 0
        vocabulary = int(self.roles.backbone.model.config.get_text_config().vocab_size)
        ids = torch.randint(IMAGE_TOKEN + 1, vocabulary, (rows, batch.prompt + width))
        owner = [row % batch.prompts for row in range(rows)]
        ids[:, : batch.prompt] = ids[owner, : batch.prompt]
        mask = torch.ones_like(ids)
        extras: dict[str, Tensor] = {}
        if batch.image_tokens:
            seen = random_pictures(self.roles.backbone.model, batch.prompts)
            extras = {name: value[owner] for name, value in seen.items()}
            ids[:, 8 : 8 + batch.image_tokens] = IMAGE_TOKEN
        mask[[row for row in range(rows) if owner[row] == 0], 0] = 0
        return Sequences(
            ids.to(device), mask.to(device), torch.ones(rows, width, dtype=torch.bool, device=device),
            {name: value.to(device) for name, value in extras.items()}, (int(bool(extras)),) * rows,
            {name: (len(value) // rows,) * rows for name, value in extras.items()}, tuple(owner),
        )  # fmt: skip
