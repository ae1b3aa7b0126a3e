"""The plugin contract: everything a task is.

A task is a class that names its data, what its reward model predicts and how a response is judged. It is registered
by an entry point of the group ``perl_vlm.tasks`` and needs nothing else of the library::

    class Captions(Task):
        name = "captions"
        modality = "image+text"
        primary_metric = "accuracy"
        Config = CaptionsConfig            # a frozen dataclass, its fields become --task.* flags

        def examples(self, split): ...
        def preferences(self, split): ...
        def evaluate(self, example, response): ...

``perl_vlm.testing.check_task(Captions())`` says whether it is sound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from perl_vlm.types import Comparison, Example, Rating, RewardHead, Split, Step

if TYPE_CHECKING:
    from perl_vlm.data.collate import Collator
    from perl_vlm.data.rendering import PromptRenderer

Modality = Literal["text", "image+text"]


@dataclass(frozen=True)
class NoConfig:
    """The configuration of a task that has no knobs."""


class Environment(Protocol):
    """A world that responses act on, such as a browser with a page in it.

    A prompt says all about where its episode stands (its metadata may hold a seed and the actions so far), so that an
    environment may bring the world there again after a crash, and what a response earns depends on nothing else.

    It may have ``counts``, numbers by name of whatever happened in it so far, which every training round logs, and
    ``truncated_reward``, earned at the end of an episode whose next prompt is longer than the model is given: what
    failing earns, lest a policy learns to write until nobody can read on. 0 where it says nothing.
    """

    max_turns: int
    """No episode is longer; the last step ends it whatever it was."""

    def step(self, prompts: Sequence[Example], responses: Sequence[str]) -> Sequence[Step]:
        """Act on B episodes, each where its prompt stands, and say what came of it."""
        ...

    def close(self) -> None:
        """Let go of whatever it holds. It may be used again afterwards."""
        ...


class Task:
    """One task: its data, its reward head and its judgement.

    Subclasses set the four class attributes and implement ``examples``, ``preferences`` and ``evaluate``. Importing a
    task must not import torch, so that listing tasks stays instant.
    """

    name: ClassVar[str]
    """What the command line calls it: ``perl-vlm <name> run``."""
    modality: ClassVar[Modality]
    """``text`` for tasks whose examples have no images."""
    primary_metric: ClassVar[str]
    """The key of ``evaluate``'s answer that decides."""
    Config: ClassVar[type] = NoConfig
    """A frozen dataclass; its fields are the ``--task.*`` flags and its attribute docstrings their help."""

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config

    def examples(self, split: Split) -> Sequence[Example]:
        """Prompts with reference answers, for SFT, RL and evaluation. The same ids in the same order at each call."""
        raise NotImplementedError(f"{type(self).__name__} has no examples(split)")

    def preferences(self, split: Split) -> Sequence[Comparison] | Sequence[Rating]:
        """Human feedback for the reward model: Comparisons for a ``pairs`` head, Ratings for a ``labels`` head."""
        raise NotImplementedError(f"{type(self).__name__} has no preferences(split)")

    def evaluate(self, example: Example, response: str) -> dict[str, float]:
        """Judge one response; holds ``primary_metric`` and whatever else is worth a mean."""
        raise NotImplementedError(f"{type(self).__name__} has no evaluate(example, response)")

    def totals(self, judged: Sequence[tuple[Example, dict[str, float]]]) -> dict[str, float]:
        """Figures of a whole set that are no means of single ones, such as an F1: from every example with what
        ``evaluate`` said of its response. Means are taken without it."""
        return {}

    def verify(self, example: Example, response: str) -> float | None:
        """A programmatic reward where one exists. It can replace the learned reward, and it is the gold standard
        against which reward hacking is measured."""
        return None

    def demonstrations(self, split: Split) -> Sequence[Example]:
        """What supervised fine-tuning learns from: the examples, unless prompts and demonstrations differ."""
        return self.examples(split)

    def environment(self) -> Environment | None:
        """The world that responses act on, where there is one: the same object at each call, which opens nothing before
        it is used. Examples are then the first prompts of episodes, the
        reward ``verify`` is what an episode returns, and ``evaluate`` is given examples whose metadata hold
        ``episode_return`` and ``episode_turns``."""
        return None

    def judge_choices(self, example: Example, logprobs: Sequence[float]) -> dict[str, float]:
        """Judge an example with choices by the log-prob of each as a response, in nats, its end left out; holds
        ``primary_metric``."""
        raise NotImplementedError(f"{type(self).__name__} gives examples with choices and has no judge_choices")

    def reward_head(self) -> RewardHead:
        """What the reward model predicts."""
        return RewardHead("pairs")

    def collator(self, renderer: PromptRenderer) -> Collator:
        """Turns records into tensors. The library's collator serves text and image+text alike."""
        from perl_vlm.data.collate import Collator

        return Collator(renderer)
