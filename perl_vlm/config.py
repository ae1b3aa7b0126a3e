"""The settings of a run: nested frozen dataclasses, their attribute docstrings the help texts of the command line.

Nothing here imports torch. Checks across fields sit in ``__post_init__`` and raise ValueError with the remedy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, alike for every role."""

    language_rank: int = 8
    """Rank on the language tower."""
    vision_rank: int = 8
    """Rank on the vision tower; 0 leaves that tower frozen."""
    alpha: float | None = None
    """LoRA alpha; twice the rank of each tower when not given."""
    dropout: float = 0.0
    """Dropout on the adapters' input while training."""
    targets: Literal["attention", "all-linear"] = "attention"
    """Which linear layers get an adapter: the attention projections, as in PE-RLHF, or all of them."""
    projector: Literal["frozen", "adapted"] = "frozen"
    """Whether the projector between the towers gets an adapter too (of the language rank)."""

    def __post_init__(self) -> None:
        _require(self.language_rank >= 1, f"lora.language_rank is {self.language_rank}; it must be at least 1")
        _require(self.vision_rank >= 0, f"lora.vision_rank is {self.vision_rank}; it must be 0 (frozen) or more")
        _require(self.alpha is None or self.alpha > 0, f"lora.alpha is {self.alpha}; it must be positive")
        _require(0 <= self.dropout < 1, f"lora.dropout is {self.dropout}; it must lie in [0, 1)")


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
    warmup: int = 10
    """Optimizer steps of linear warm-up (for ppo too, where a round holds epochs x minibatches of them)."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm, and the norm before clipping is logged."""
    save_every: int = 50
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        name = type(self).__name__.removesuffix("Config").lower()
        _require(self.steps >= 1, f"{name}.steps is {self.steps}; it must be at least 1")
        _require(self.batch_size >= 1, f"{name}.batch_size is {self.batch_size}; it must be at least 1")
        _require(self.warmup >= 0, f"{name}.warmup is {self.warmup}; it must be 0 or more")
        _require(self.weight_decay >= 0, f"{name}.weight_decay is {self.weight_decay}; it must be 0 or more")
        _require(
            self.vision_lr is None or self.vision_lr > 0,
            f"{name}.vision_lr is {self.vision_lr}; it must be positive. lora.vision_rank 0 freezes the vision tower",
        )
        _require(self.lr > 0, f"{name}.lr is {self.lr}; it must be positive")
        _require(self.max_grad_norm > 0, f"{name}.max_grad_norm is {self.max_grad_norm}; it must be positive")
        _require(self.save_every >= 1, f"{name}.save_every is {self.save_every}; it must be at least 1")
        _require(
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
    """The reward model."""

    lr: float = 2e-4
    """Peak learning rate of adapter and head. PE-RLHF's LoRA reward models use 1e-4 to 2e-4."""
    eval_pairs: int = 1024
    """Held-out records that the accuracy is measured on at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.eval_pairs >= 2, f"rm.eval_pairs is {self.eval_pairs}; it must be at least 2")


@dataclass(frozen=True)
class PpoConfig(OptimizerConfig):
    """Proximal policy optimisation with generalised advantage estimation."""

    lr: float = 1e-5
    """Peak learning rate of the policy's adapter."""
    value_lr: float | None = None
    """Learning rate of the value adapter and head; the same as lr when not given."""
    batch_size: int = 128
    """Episodes in a round of rollouts."""
    epochs: int = 2
    """Passes over each round's episodes."""
    minibatches: int = 2
    """Optimizer steps in each pass."""
    max_new_tokens: int = 32
    """Length limit of a response in tokens."""
    min_new_tokens: int = 1
    """The end of the response is not sampled before this many tokens."""
    temperature: float = 1.0
    """Sampling temperature, the same in rollout and recomputation."""
    advantage: Literal["gae"] = "gae"
    """The advantage estimator."""
    gamma: float = 1.0
    """Discount factor."""
    lam: float = 0.95
    """GAE's lambda."""
    clip_range: float = 0.2
    """Clip range of the probability ratio."""
    value_clip_range: float = 0.2
    """Clip range of the value prediction."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    kl_coef: float = 0.05
    """Weight of the per-token penalty log pi - log pi_ref in the reward (beta)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    whiten_rewards: bool = False
    """Whether token rewards are brought to variance 1 (their mean is kept)."""
    whiten_advantages: bool = True
    """Whether advantages are brought to mean 0 and variance 1 over the whole round."""
    reward_model: str = "learned"
    """``learned`` (the reward stage's model), ``verify`` (the task's programmatic reward), ``untrained`` (a random
    head: the control), or the folder of another run's reward model on the same base."""
    value_init: Literal["reward", "zero"] = "reward"
    """Start the value function from the reward model's adapter and head, or from a fresh adapter and a zero head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.epochs >= 1 and self.minibatches >= 1, "ppo.epochs and ppo.minibatches must be at least 1")
        _require(
            self.batch_size % (self.minibatches * self.accumulate) == 0,
            f"ppo.batch_size ({self.batch_size}) must be a multiple of ppo.minibatches x ppo.accumulate "
            f"({self.minibatches} x {self.accumulate})",
        )
        _require(self.temperature > 0, f"ppo.temperature is {self.temperature}; it must be positive")
        _require(
            1 <= self.min_new_tokens <= self.max_new_tokens,
            f"ppo.min_new_tokens ({self.min_new_tokens}) must lie between 1 and ppo.max_new_tokens "
            f"({self.max_new_tokens})",
        )
        _require(self.kl_coef >= 0, f"ppo.kl_coef is {self.kl_coef}; it must be 0 or more")
        for name in ("clip_range", "value_clip_range"):
            _require(getattr(self, name) > 0, f"ppo.{name} is {getattr(self, name)}; it must be positive")
        for name in ("gamma", "lam"):
            _require(0 <= getattr(self, name) <= 1, f"ppo.{name} is {getattr(self, name)}; it must lie in [0, 1]")
        for name in ("vf_coef", "entropy_coef"):
            _require(getattr(self, name) >= 0, f"ppo.{name} is {getattr(self, name)}; it must be 0 or more")
        _require(
            self.value_lr is None or self.value_lr > 0,
            f"ppo.value_lr is {self.value_lr}; it must be positive",
        )


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation by greedy decoding."""

    split: Literal["train", "validation", "test"] = "test"
    """Which split; no stage trains on or chooses by ``test``."""
    limit: int = 2048
    """At most this many examples."""
    batch_size: int = 128
    """Prompts decoded at once."""
    bootstrap: int = 10_000
    """Resamples behind the 95 % intervals."""
    policy: str | None = None
    """For the eval verb: folder of a finished ppo run to compare with its anchor."""

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "bootstrap"):
            _require(getattr(self, name) >= 1, f"eval.{name} is {getattr(self, name)}; it must be at least 1")


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
        _require(self.seed >= 0, f"seed is {self.seed}; it must be 0 or more")
        for name in ("max_prompt_tokens", "max_response_tokens"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
