"""All settings of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from perl_vlm.config.adapters import LoraConfig
from perl_vlm.config.checks import require
from perl_vlm.config.ppo import PpoConfig
from perl_vlm.config.stages import EvalConfig, RmConfig, SftConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on."""

    model: str = "tiny"
    """``tiny`` (bundled), a local folder, or a hub name: any image-text-to-text or causal language model."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off unless you ask for it."""
    out: str | None = None
    """The run's folder; a fresh one under runs/ when not given."""
    seed: int = 0
    """Seeds initialisation, data order and sampling."""
    resume: bool = False
    """Continue the run in --out from its last good checkpoint."""
    steps: int | None = None
    """Short for --<stage>.steps of the stage being run."""
    batch_size: int | None = None
    """Short for --<stage>.batch_size."""
    lr: float | None = None
    """Short for --<stage>.lr."""
    tuning: Literal["lora", "full"] = "lora"
    """LoRA on one frozen base, or full fine-tuning of separate copies (the control group)."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:1``."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the frozen base: bfloat16 on a GPU that has it, else float32. Adapters and heads are float32."""
    load_in_4bit: bool = False
    """Hold the frozen base in 4 bits (NF4, through bitsandbytes). Needs CUDA and tuning lora."""
    checkpointing: bool = False
    """Compute each layer's activations again for backward: much less memory, a quarter to a third more time. Switched
    on by itself where memory runs out with a single record."""
    max_prompt_tokens: int = 2048
    """Longer prompts are refused: image tokens are never cut."""
    max_response_tokens: int = 512
    """Longer responses in training data are refused or, with --task.on_bad_record skip, skipped and counted."""
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """A tracker beside the metrics.jsonl that is always written."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters."""
    sft: SftConfig = field(default_factory=SftConfig)
    """Supervised fine-tuning."""
    rm: RmConfig = field(default_factory=RmConfig)
    """Reward model."""
    ppo: PpoConfig = field(default_factory=PpoConfig)
    """Reinforcement learning."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    task: Any = None
    """The task's own knobs (its Config)."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed is {self.seed}; it must be 0 or more")
        for name in ("max_prompt_tokens", "max_response_tokens"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        require(
            not (self.lora.dora and (self.sft.enabled or self.sft.adapter)),
            "lora.dora cannot stand on a supervised adapter: the directions of two of them do not add up. Leave out "
            "lora.dora, or merge the supervised model first (perl-vlm models export --as merged)",
        )
        require(
            not (self.sft.enabled and self.sft.adapter),
            f"sft.enabled trains a supervised adapter and sft.adapter ({self.sft.adapter}) brings one: give one",
        )
        require(
            not (self.load_in_4bit and self.tuning == "full"),
            "load_in_4bit freezes the base for good; it goes with tuning lora",
        )
