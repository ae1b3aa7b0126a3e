"""What is asked of the planner, and the batch that follows from it. Torch is imported only where a batch is asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from perl_vlm.cli_settings import UsageError
from perl_vlm.config import OptimizerConfig, RunConfig
from perl_vlm.plan.gpus import Gpu

StageName = Literal["sft", "rm", "ppo"]
Strategy = Literal["ddp", "fsdp", "zero2", "zero3"]


@dataclass(frozen=True)
class PlanSettings:
    """Flags of ``plan`` besides those of a run."""

    stage: Literal["sft", "rm", "ppo"] | None = None
    """Which stage is planned."""
    gpu: str | None = None
    """What is planned for: memory such as 24GB, or a GPU by name, such as H100, A100, L4 or RTX4090."""
    gpus: int = 1
    """How many of them; every batch size is that of all of them together."""
    strategy: Literal["ddp", "fsdp", "zero2", "zero3"] = "ddp"
    """How they share the work, as docs/scale.md has it. perl-vlm runs zero2 as ddp and zero3 as fsdp."""
    rollout: Literal["local", "served"] | None = None
    """Where answers are sampled: here, or on a separate engine with a GPU of its own; as ppo.engine when not given."""
    image_tokens: int | None = None
    """Tokens of a prompt that are pictures; when not given, one picture of the model's own size."""
    json: bool = False
    """Print the plan as JSON."""


@dataclass(frozen=True)
class Batch:
    """What goes through the model at once, every sequence as long as the settings allow."""

    prompts: int
    """N."""
    group: int
    """Responses of each prompt."""
    prompt: int
    """P, tokens, pictures included."""
    response: int
    """R, tokens of each response."""
    image_tokens: int = 0
    """Of a prompt."""
    at_most: float = 0.9
    """How long packed rows may be, of separate ones, to be worth it; 1 where attention works in blocks (on a CPU)."""

    @property
    def sequences(self) -> int:
        """B."""
        return self.prompts * self.group

    @property
    def shared(self) -> bool:
        """Whether a prompt is read once for all its responses, as ``models.trunk`` decides."""
        return self.response > 0 and _pays(self.group, self.prompt, self.response, self.at_most)

    @property
    def rows(self) -> int:
        """M, rows of tokens."""
        return self.prompts if self.shared else self.sequences

    @property
    def length(self) -> int:
        """L, tokens of a row."""
        return self.prompt + self.response * (self.group if self.shared else 1)

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def response_tokens(self) -> int:
        return self.sequences * self.response

    @property
    def seen_pairs(self) -> float:
        """Pairs of query and key that a causal model needs, over all rows."""
        responses = self.group if self.shared else 1
        own = responses * (self.prompt * self.response + self.response**2 / 2)
        return self.rows * (self.prompt**2 / 2 + own)

    @property
    def read_prompts(self) -> int:
        """Prompts that are read, pictures included."""
        return self.rows

    def of(self, sequences: int) -> Batch:
        """A batch of as many sequences, rounded up to whole prompts."""
        group = min(self.group, sequences)
        return replace(self, group=group, prompts=-(-sequences // group))


@lru_cache(maxsize=64)
def _pays(group: int, prompt: int, response: int, at_most: float) -> bool:
    import torch

    from perl_vlm.models.shared_prefix import pays
    from perl_vlm.types import Sequences

    ones = torch.ones(group, prompt + response, dtype=torch.long)
    mask = torch.ones(group, response, dtype=torch.bool)
    return pays(Sequences(ones, ones, mask, {}, (0,) * group, prompt_of=(0,) * group), at_most)


@dataclass(frozen=True)
class Job:
    """Everything that a plan depends on."""

    config: RunConfig
    plan: PlanSettings
    gpu: Gpu
    image_tokens: int = 0

    @property
    def stage(self) -> StageName:
        assert self.plan.stage is not None  # the command line sees to it
        return self.plan.stage

    @property
    def own(self) -> OptimizerConfig:
        """The stage's section."""
        return {"sft": self.config.sft, "rm": self.config.rm, "ppo": self.config.ppo}[self.stage]

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Of the base."""
        if self.config.dtype != "auto":
            return self.config.dtype
        narrow = self.config.model != "tiny" and self.device == "cuda" and self.gpu.bf16 is not None
        return "bfloat16" if narrow else "float32"

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        return "cpu" if self.config.device == "cpu" else "cuda"

    @property
    def served(self) -> bool:
        """Whether another engine samples."""
        return (self.plan.rollout or self.config.ppo.engine) == "served"

    @property
    def sharded(self) -> bool:
        """Whether every GPU holds a part of the base only."""
        return self.plan.strategy in ("fsdp", "zero3") and self.plan.gpus > 1

    @property
    def records(self) -> int:
        """Records (pairs, demonstrations, episodes) of one GPU's step, or of its minibatch in ppo."""
        minibatches = self.config.ppo.minibatches if self.stage == "ppo" else 1
        return max(1, self.own.batch_size // (minibatches * self.plan.gpus))

    @property
    def micro(self) -> int:
        """Records of one GPU's micro-batch."""
        return max(1, self.records // self.own.accumulate)

    def batch(self, records: int) -> Batch:
        """So many records as the model reads them."""
        config, stage = self.config, self.stage
        group = {"sft": 1, "rm": 2, "ppo": config.ppo.group_size}[stage]
        response = config.ppo.max_new_tokens if stage == "ppo" else config.max_response_tokens
        at_most = 1.0 if self.device == "cpu" and config.model != "tiny" else 0.9
        made = Batch(records, group, config.max_prompt_tokens, response, self.image_tokens, at_most)
        return made.of(records) if stage == "ppo" else made

    def check(self) -> None:
        """Raise UsageError for what no run would start with."""
        plan, config = self.plan, self.config
        if plan.gpus < 1:
            raise UsageError(f"--gpus is {plan.gpus}; it must be at least 1")
        parts = plan.gpus * self.own.accumulate * (config.ppo.minibatches if self.stage == "ppo" else 1)
        if self.own.batch_size % parts:
            raise UsageError(
                f"--{self.stage}.batch_size is {self.own.batch_size}; it must be a multiple of {parts}, "
                f"{'gpus x minibatches x accumulate' if self.stage == 'ppo' else 'gpus x accumulate'}"
            )
        if self.sharded:
            refused = {
                "--tuning full": config.tuning == "full", "--load_in_4bit": config.load_in_4bit,
                "--lora.dora": config.lora.dora,
            }  # fmt: skip
            for flag in (flag for flag, given in refused.items() if given):
                raise UsageError(f"{flag} does not go with a sharded base; use --strategy ddp")
        if self.image_tokens > config.max_prompt_tokens:
            raise UsageError(
                f"--max_prompt_tokens is {config.max_prompt_tokens}, but {self.image_tokens} tokens of a prompt are "
                "pictures: it must be larger"
            )

    def with_config(self, **changes: Any) -> Job:
        return replace(self, config=replace(self.config, **changes))

    def with_own(self, **changes: Any) -> Job:
        """With other settings of the stage's section."""
        return self.with_config(**{self.stage: replace(self.own, **changes)})

    def with_plan(self, **changes: Any) -> Job:
        return replace(self, plan=replace(self.plan, **changes))
