"""Frozen records that cross boundaries between the packages of perl-vlm.

Shape letters: B sequences, P prompt tokens, R response tokens, T = P + R, H hidden size, V vocabulary, K reward
models, N images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@runtime_checkable
class ImageSource(Protocol):
    """A picture that is decoded or drawn when it is needed, never before."""

    def load(self) -> Image.Image:
        """Return the picture as RGB. Raises BadRecord where it cannot be read safely."""
        ...


@dataclass(frozen=True)
class ImageSlot:
    """The place of the next image inside a message. Slots come from structure, never from text."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """``system``, ``user`` or ``assistant``."""
    content: tuple[str | ImageSlot, ...]
    """Texts and image slots in order."""

    @property
    def text(self) -> str:
        """The texts of the turn without its image slots."""
        return "".join(part for part in self.content if isinstance(part, str))


@dataclass(frozen=True)
class Example:
    """A prompt, with a reference answer where there is one: for SFT, RL and evaluation."""

    id: str
    """Unique within its split and the same at every load."""
    messages: tuple[Message, ...]
    """The prompt, ending in a user turn."""
    images: tuple[ImageSource, ...] = ()
    """One picture for each image slot of the messages, in order."""
    reference: str | None = None
    """The right answer, if known."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the task wants to remember of the record, JSON values only. ``kind`` gives figures by kind; records of one
    ``group`` (a document, a conversation) are drawn together where intervals are resampled, without it those of one
    picture or prompt."""
    origin: str = ""
    """Where the record stands, for error messages: ``train.jsonl row 12``."""
    choices: tuple[str, ...] = ()
    """Answers to choose from. Evaluation then compares their log-probs instead of decoding, and ``judge_choices``
    says what they are worth."""


@dataclass(frozen=True)
class Step:
    """What a live environment makes of one response."""

    reward: float = 0.0
    """Earned by this response; an episode's return is the plain sum over its steps."""
    next: Example | None = None
    """The prompt of the next turn; None where the episode is over."""


@dataclass(frozen=True)
class Comparison:
    """A prompt and two responses, the first preferred."""

    id: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    images: tuple[ImageSource, ...] = ()
    margin: float | None = None
    """By how much the chosen one is better, in units of reward."""
    objective: str = ""
    """Which objective of the reward head this comparison speaks of; its only one when empty."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""


@dataclass(frozen=True)
class Rating:
    """A prompt and one response, labelled good or bad."""

    id: str
    messages: tuple[Message, ...]
    response: str
    label: bool
    images: tuple[ImageSource, ...] = ()
    objective: str = ""
    """Which objective of the reward head this label speaks of; its only one when empty."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""


@dataclass(frozen=True)
class RewardHead:
    """What a task's reward model predicts."""

    kind: Literal["pairs", "labels"] = "pairs"
    """``pairs``: a scalar trained by Bradley-Terry on Comparisons; ``labels``: the logit of a probability trained by
    binary cross-entropy on Ratings."""
    objectives: Mapping[str, float] = field(default_factory=lambda: {"": 1.0})
    """The head's outputs by name, each with its weight in the reward: ``{"helpful": 1.0, "harmless": 1.0}``. Every
    record names the one it speaks of."""

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError("a reward head needs at least one objective")

    def index(self, objective: str) -> int:
        """The output that an objective is read from. Raises ValueError for one that the head does not have."""
        if objective not in self.objectives:
            known = ", ".join(repr(name) for name in self.objectives)
            raise ValueError(f"the reward head has no objective {objective!r}; it has {known}")
        return list(self.objectives).index(objective)


@dataclass(frozen=True)
class Sequences:
    """Prompts and responses as the model reads them.

    One padding convention everywhere: prompts are padded on the left to width P, responses on the right to width R,
    so that response token t of every row stands in column P + t. Which tokens are real is told by the masks alone,
    never by comparing ids with the padding token.
    """

    input_ids: Tensor
    """[B, T] token ids."""
    attention_mask: Tensor
    """[B, T] 1 on real tokens."""
    response_mask: Tensor
    """[B, R] bool, true on real response tokens (the end-of-sequence token included). R may be 0."""
    extras: Mapping[str, Tensor]
    """What else the processor made for the prompts: pixel values, image grids, token types."""
    image_counts: tuple[int, ...]
    """Images of each sequence, B numbers."""
    extra_rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """For every extra that is not laid out by token: how many of its rows (patches, tiles or images, as the family has
    it) are each sequence's, B numbers. Without it rows cannot be taken."""
    prompt_of: tuple[int, ...] | None = None
    """B numbers, equal where rows have the same prompt with the same pictures. None where nobody said."""

    @property
    def prompt_width(self) -> int:
        """P, the padded width of the prompts."""
        return self.input_ids.shape[1] - self.response_mask.shape[1]

    def __len__(self) -> int:
        return self.input_ids.shape[0]


@dataclass(frozen=True)
class Rollout:
    """Sampled responses and all that PPO needs to know about them; every tensor is detached."""

    sequences: Sequences
    """Prompts with the sampled responses, B rows."""
    sampled_logprobs: Tensor
    """[B, R] log-prob of each sampled token as the sampler saw it (same temperature as training)."""
    ended: Tensor
    """[B] bool, true where the response ended by itself rather than at the length limit."""
    texts: tuple[str, ...]
    """The responses as text, B of them."""
    example_ids: tuple[str, ...]
    """Which example each row answers."""
