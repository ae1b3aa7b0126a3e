"""Settings of the supervised stage, the reward model and the evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from perl_vlm.config.checks import require


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings that every training stage shares."""

    steps: int = 200
    """Optimizer steps (for ppo: rounds of rollout and update)."""
    batch_size: int = 32
    """Records a step."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into; the gradient is the same."""
    lr: float = 1e-4
    """Peak learning rate of adapters and heads."""
    vision_lr: float | None = None
    """Learning rate of the vision tower's adapters; the same as lr when not given."""
    projector_lr: float | None = None
    """Learning rate of the projector, where it trains; the same as lr when not given."""
    warmup: int = 10
    """Optimizer steps of linear warm-up (for ppo too, where a round holds epochs x minibatches of them)."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Each role's gradient is clipped to this norm, and the norm before clipping is logged."""
    save_every: int = 50
    """Steps between checkpoints."""
    save_total_limit: int | None = 2
    """How many checkpoints are kept, the latest ones; all of them where null, so that `perl-vlm eval` can follow a
    policy from one to the next."""

    def __post_init__(self) -> None:
        name = type(self).__name__.removesuffix("Config").lower()
        require(self.steps >= 1, f"{name}.steps is {self.steps}; it must be at least 1")
        require(self.batch_size >= 1, f"{name}.batch_size is {self.batch_size}; it must be at least 1")
        require(self.warmup >= 0, f"{name}.warmup is {self.warmup}; it must be 0 or more")
        require(self.weight_decay >= 0, f"{name}.weight_decay is {self.weight_decay}; it must be 0 or more")
        require(
            self.vision_lr is None or self.vision_lr > 0,
            f"{name}.vision_lr is {self.vision_lr}; it must be positive. lora.vision_rank 0 freezes the vision tower",
        )
        require(
            self.projector_lr is None or self.projector_lr > 0,
            f"{name}.projector_lr is {self.projector_lr}; it must be positive. lora.projector frozen freezes it",
        )
        require(self.lr > 0, f"{name}.lr is {self.lr}; it must be positive")
        require(self.max_grad_norm > 0, f"{name}.max_grad_norm is {self.max_grad_norm}; it must be positive")
        require(self.save_every >= 1, f"{name}.save_every is {self.save_every}; it must be at least 1")
        limit = self.save_total_limit
        require(limit is None or limit >= 1, f"{name}.save_total_limit is {limit}; it must be at least 1, or null")
        require(
            self.accumulate >= 1 and self.batch_size % self.accumulate == 0,
            f"{name}.accumulate is {self.accumulate}; it must divide {name}.batch_size ({self.batch_size})",
        )


@dataclass(frozen=True)
class SftConfig(OptimizerConfig):
    """Supervised fine-tuning on the examples' reference answers."""

    enabled: bool = False
    """Whether ``run`` begins with this stage."""
    adapter: str | None = None
    """Folder of a finished sft run whose adapter is put under every role instead of training one."""


@dataclass(frozen=True)
class RmConfig(OptimizerConfig):
    """The reward model, or an ensemble of them at the price of adapters."""

    lr: float = 2e-4
    """Peak learning rate of adapter and head. PE-RLHF's LoRA reward models use 1e-4 to 2e-4."""
    members: int = 1
    """K, how many reward adapters are trained on the one base, each from its own start in its own data order."""
    bagging: bool = False
    """Whether each member of an ensemble draws its own records with replacement instead of seeing all of them."""
    use_margin: bool = True
    """Whether the margins of comparisons that have one enter the loss."""
    centering_coef: float = 0.0
    """Weight of the penalty on (reward chosen + reward rejected)^2, which keeps rewards around zero (2312.09244)."""
    positive_weight: float | Literal["balanced"] = 1.0
    """Weight of good labels against bad ones; balanced takes their ratio in the training labels."""
    eval_every: int | None = None
    """Steps between measurements on validation preferences; the best weights are kept. Never when not given."""
    select_by: Literal["accuracy", "loss"] = "accuracy"
    """What the best weights are best at; equal accuracies are told apart by the loss."""
    patience: int | None = None
    """Stop after this many measurements in a row without a better one; never when not given."""
    normalise: Literal["anchor", "responses", "none"] = "anchor"
    """Bring rewards to mean 0 and standard deviation 1 on answers sampled from the anchor, on the validation
    preferences' own responses, or not at all. The constants are saved in the head."""
    eval_pairs: int = 1024
    """At most this many held-out records are measured on; intervals have eval.bootstrap resamples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.eval_pairs >= 2, f"rm.eval_pairs is {self.eval_pairs}; it must be at least 2")
        require(self.members >= 1, f"rm.members is {self.members}; it must be at least 1")
        require(not self.bagging or self.members > 1, "rm.bagging needs an ensemble: give rm.members 2 or more")
        require(self.centering_coef >= 0, f"rm.centering_coef is {self.centering_coef}; it must be 0 or more")
        require(
            self.positive_weight == "balanced" or self.positive_weight > 0,
            f"rm.positive_weight is {self.positive_weight}; it must be positive, or balanced",
        )
        for name in ("eval_every", "patience"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"rm.{name} is {value}; it must be at least 1, or null for never")
        require(
            self.patience is None or self.eval_every is not None, "rm.patience counts measurements: give rm.eval_every"
        )


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation by greedy decoding, or by log-probs where there are answers to choose from."""

    split: Literal["train", "validation", "test"] = "test"
    """Which split; no stage trains on or chooses by ``test``."""
    limit: int = 2048
    """At most this many examples."""
    batch_size: int = 128
    """Prompts decoded, or choices compared, at once."""
    bootstrap: int = 10_000
    """Resamples behind the 95 % intervals."""
    policy: str | None = None
    """For the eval verb: folder of a finished ppo run to compare with its anchor."""
    judge: str | None = None
    """Who scores the answers of anchor and policy besides the task: any reward that ppo.reward_model takes, such as the
    folder of an rm run that the policy was not trained on; learned is the run's own reward model. No one when not
    given."""

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "bootstrap"):
            require(getattr(self, name) >= 1, f"eval.{name} is {getattr(self, name)}; it must be at least 1")
