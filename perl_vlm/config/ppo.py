"""Settings of reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from perl_vlm.config.checks import require
from perl_vlm.config.stages import OptimizerConfig

Regularizer = Literal["none", "k1", "clamped_k1", "k2", "k3", "js_proxy", "reverse_kl", "forward_kl", "js"]
EXACT_REGULARIZERS = ("reverse_kl", "forward_kl", "js")


@dataclass(frozen=True)
class PpoConfig(OptimizerConfig):
    """Reinforcement learning: clipped policy updates with one of four advantage estimators."""

    lr: float = 1e-5
    """Peak learning rate of the policy's adapter."""
    value_lr: float | None = None
    """Learning rate of the value adapter and head; the same as lr when not given."""
    batch_size: int = 128
    """Episodes in a round of rollouts, over all processes."""
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
    top_p: float = 1.0
    """Sample from the smallest set of tokens that has this probability; recomputed log-probs use the same filter."""
    advantage: Literal["gae", "reinforce", "rloo", "grpo"] = "gae"
    """gae: PPO's generalised advantage estimation; reinforce: PE-RLHF's, the return minus a learned baseline; rloo:
    the return minus the mean of the prompt's other answers; grpo: standardised within the prompt's answers."""
    group_size: int = 1
    """G, answers sampled for each prompt; rloo and grpo need 2 or more. batch_size counts answers."""
    gamma: float = 1.0
    """Discount factor."""
    lam: float = 0.95
    """GAE's lambda."""
    clip_range: float = 0.2
    """Clip range of the probability ratio."""
    value: Literal["auto", "reward", "zero", "policy_head", "none"] = "auto"
    """The value function: its own adapter and head started from the reward model's (reward) or from nothing (zero), a
    head on the policy's own trunk (policy_head), or none. auto: reward for gae and reinforce, none for rloo and grpo;
    zero where the reward has no adapter of this run."""
    value_clip_range: float | None = 0.2
    """Clip range of the value prediction; null for no clipping."""
    vf_coef: float = 0.1
    """Weight of the value loss. AdamW makes up for it where the value function has weights of its own; it matters for
    policy_head, and where gradients are clipped."""
    kl: Regularizer = "k1"
    """What keeps the policy near the reference. On sampled tokens: k1 (log pi - log pi_ref), clamped_k1, k2, k3,
    js_proxy (2309.09055's); over the whole vocabulary: reverse_kl (KL of policy from reference), forward_kl (of
    reference from policy), js; or none."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether it is subtracted from each token's reward or added to the loss. The exact ones do not depend on the token
    that was drawn: in the reward, their gradient is in the loss as well, and an answer also pays for the divergence
    that later tokens meet."""
    kl_coef: float = 0.05
    """Weight of the regulariser (beta)."""
    kl_control: Literal["fixed", "adaptive"] = "fixed"
    """Whether beta stays, or is moved towards kl_target (Ziegler et al., 1909.08593)."""
    kl_target: float = 6.0
    """KL of whole answers from the reference that the adaptive beta aims at, in nats."""
    kl_horizon: int = 10_000
    """Episodes over which the adaptive beta reacts."""
    reward_mix: bool = False
    """Maximise (1 - beta) r - beta KL, as PE-RLHF writes it, instead of r - beta KL."""
    stop_kl: float | None = None
    """End a round's updates once the policy has moved this far from the one that sampled (approximate KL a token,
    in nats); never when not given."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    reward_clip: float | None = None
    """Scores are clipped to [-reward_clip, reward_clip]; not at all when not given."""
    missing_eos_penalty: float = 0.0
    """Taken off the score of a response that did not end by itself."""
    length_penalty: float = 0.0
    """Taken off the score for each token of the response."""
    whiten_rewards: bool = False
    """Whether token rewards are brought to variance 1 (their mean is kept)."""
    whiten_advantages: bool | None = None
    """Whether advantages are brought to mean 0 and variance 1 over the whole round, all processes together; when not
    given, for gae alone."""
    reward_model: str = "learned"
    """Where rewards come from: learned (the reward stage's model), verify (the task's programmatic reward), untrained
    (a random head: the control), the folder of another run, classifier:NAME, python:FILE.py:FUNCTION, http://..., or
    a weighted sum such as 0.7*learned + 0.3*verify. docs/rewards.md has them all."""
    ensemble: Literal["mean", "min", "uncertainty", "weight_average"] = "mean"
    """How several reward members give one reward: their mean, their minimum, mean - ensemble_penalty x their standard
    deviation (uncertainty-weighted), or one model with their averaged weights (WARM, 2401.12187)."""
    ensemble_penalty: float = 0.5
    """Lambda of the uncertainty-weighted reward."""
    eval_every: int | None = None
    """Rounds between measurements of the reward on validation prompts; the best policy is kept. Never if not given."""
    eval_prompts: int = 256
    """Validation prompts of that measurement."""
    engine: Literal["local", "served"] = "local"
    """Who samples: this process, or a vLLM server that gets the policy's adapter before each round. Needs tuning lora.
    docs/served-rollouts.md has the server's flags."""
    engine_url: str | None = None
    """The server's root, such as http://127.0.0.1:8000. Its key, if it wants one, goes into the environment variable
    PERL_VLM_ENGINE_TOKEN."""
    engine_adapters: str | None = None
    """The folder in which the server finds the adapters, under this same path; engine/ in the run's folder when not
    given."""
    engine_timeout: float = 600.0
    """Seconds that the server has for one answer, the wait for its turn included."""
    engine_requests: int = 64
    """Requests under way at once, from each process."""
    canary_every: int = 50
    """Adapters pushed between two looks at whether the server applies them, every tower's, besides the look before the
    first round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epochs >= 1 and self.minibatches >= 1, "ppo.epochs and ppo.minibatches must be at least 1")
        require(
            self.batch_size % (self.minibatches * self.accumulate) == 0,
            f"ppo.batch_size ({self.batch_size}) must be a multiple of ppo.minibatches x ppo.accumulate "
            f"({self.minibatches} x {self.accumulate})",
        )
        require(
            1 <= self.min_new_tokens <= self.max_new_tokens,
            f"ppo.min_new_tokens ({self.min_new_tokens}) must lie between 1 and ppo.max_new_tokens "
            f"({self.max_new_tokens})",
        )
        require(0 < self.top_p <= 1, f"ppo.top_p is {self.top_p}; it must lie in (0, 1]")
        for name in (
            "temperature", "clip_range", "kl_target", "kl_horizon", "eval_prompts", "engine_timeout", "engine_requests",
            "canary_every",
        ):  # fmt: skip
            require(getattr(self, name) > 0, f"ppo.{name} is {getattr(self, name)}; it must be positive")
        for name in ("gamma", "lam"):
            require(0 <= getattr(self, name) <= 1, f"ppo.{name} is {getattr(self, name)}; it must lie in [0, 1]")
        for name in ("kl_coef", "vf_coef", "entropy_coef", "missing_eos_penalty", "length_penalty", "ensemble_penalty"):
            require(getattr(self, name) >= 0, f"ppo.{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("value_lr", "value_clip_range", "stop_kl", "reward_clip", "eval_every"):
            value = getattr(self, name)
            require(value is None or value > 0, f"ppo.{name} is {value}; it must be positive, or null")
        self._check_groups()
        self._check_regularizer()
        self._check_engine()

    def _check_groups(self) -> None:
        require(
            self.group_size >= 1 and self.batch_size % self.group_size == 0,
            f"ppo.group_size is {self.group_size}; it must divide ppo.batch_size ({self.batch_size})",
        )
        grouped = self.advantage in ("rloo", "grpo")
        require(
            not grouped or self.group_size >= 2,
            f"ppo.advantage {self.advantage} compares the answers to one prompt: give ppo.group_size 2 or more",
        )
        require(
            not grouped or self.value in ("auto", "none"),
            f"ppo.advantage {self.advantage} has no value function; leave ppo.value at auto",
        )
        require(
            not grouped or not self.whiten_rewards,
            f"ppo.whiten_rewards moves every token's reward, and ppo.advantage {self.advantage} sums them over an "
            "answer: long answers would be paid for their length",
        )
        require(
            self.advantage != "gae" or self.value != "none",
            "ppo.advantage gae needs a value function; ppo.value none goes with reinforce, rloo and grpo",
        )
        require(
            self.advantage == "gae" or self.gamma == 1.0,
            f"ppo.gamma is {self.gamma}, but ppo.advantage {self.advantage} does not discount; leave it at 1",
        )

    def _check_regularizer(self) -> None:
        require(
            not self.reward_mix or self.kl != "none",
            "ppo.reward_mix weighs the reward against a divergence: give a ppo.kl other than none",
        )
        require(
            self.top_p == 1 or self.kl not in EXACT_REGULARIZERS,
            f"ppo.kl {self.kl} compares whole distributions, and ppo.top_p {self.top_p} cuts the sampled one off; use "
            "a regulariser of sampled tokens, or ppo.top_p 1",
        )
        require(
            not self.reward_mix or self.kl_coef <= 1,
            f"ppo.kl_coef is {self.kl_coef}; with ppo.reward_mix it is a share and must lie in [0, 1]",
        )
        require(
            self.kl_control == "fixed" or (self.kl != "none" and self.kl_coef > 0),
            "ppo.kl_control adaptive moves ppo.kl_coef: give it a positive start and a ppo.kl other than none",
        )
        require(
            self.kl_control == "fixed" or self.batch_size < 5 * self.kl_horizon,
            f"ppo.kl_horizon ({self.kl_horizon}) must be more than a fifth of ppo.batch_size ({self.batch_size})",
        )
        require(
            not (self.kl == "k1" and self.kl_in == "loss"),
            "ppo.kl k1 in the loss has a gradient of zero on average and adds noise alone; use k2 or reverse_kl there, "
            "or ppo.kl_in reward",
        )

    def _check_engine(self) -> None:
        require(
            self.engine == "local" or self.engine_url is not None,
            "ppo.engine served needs ppo.engine_url, the address of a vLLM server, such as http://127.0.0.1:8000",
        )
        if self.engine_url is None:
            return
        try:
            url = urlsplit(self.engine_url)
            usable = url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 1) > 0
        except ValueError:
            usable = False
        printable = self.engine_url.isascii() and self.engine_url.isprintable() and " " not in self.engine_url
        # Told apart without repeating it: the settings are written down, and so is what is said here.
        require(usable and printable, "ppo.engine_url cannot be used; write it as http://HOST:PORT in plain ASCII")
        require(
            "@" not in url.netloc and not url.query and not url.fragment,
            "ppo.engine_url carries more than an address. Take the rest out; the server's key goes into the "
            "environment variable PERL_VLM_ENGINE_TOKEN",
        )
        require(
            not url.path.rstrip("/").endswith("/v1"),
            "ppo.engine_url ends in /v1; give the server's root, such as http://127.0.0.1:8000",
        )

    @property
    def value_kind(self) -> Literal["reward", "zero", "policy_head", "none"]:
        """What ``auto`` means for this advantage estimator."""
        if self.value != "auto":
            return self.value
        return "none" if self.advantage in ("rloo", "grpo") else "reward"

    @property
    def recomputes(self) -> bool:
        """Whether the log-probs that the update compares with come from a pass of their own before it. Where every
        episode is learned from once, in one step, the update's own pass gives them; but a served engine's are another
        program's, values and exact divergences in the reward are wanted before, and of the sampled ones all but k1 turn
        the sampler's rounding into a divergence."""
        once = self.epochs == 1 and self.minibatches == 1 and self.engine == "local"
        early = self.kl_in == "reward" and self.kl not in ("none", "k1")
        return not once or early or self.value_kind == "policy_head"

    @property
    def whitens_advantages(self) -> bool:
        """Whether advantages are whitened, the default resolved."""
        return self.advantage == "gae" if self.whiten_advantages is None else self.whiten_advantages
