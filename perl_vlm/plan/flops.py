"""The accounting: floating-point operations that a stage needs, from shapes alone.

A product of [T, n] with a weight of [n, m] takes 2 T n m. With N the parameters of linear layers:

- a forward pass takes 2N for each token, and attention 4 A D for each pair of query and key, forwards, in each layer;
- backward, LoRA needs the gradient of the activations alone, another 2N, so 4N in all; full tuning that of the weights
  too, 6N; attention takes twice its forward pass, and an adapter of a parameters 4a, as everything that trains;
- recomputing activations (checkpointing) adds a forward pass;
- the LM head, V H parameters, is met at response tokens only. In training a frozen head takes twice as much,
  one with weights that train four times, since its chunks are computed again (chunks.py);
- decoding takes 2N for each token, and one read of the weights for each step of the whole batch.

Shape letters: A attention heads, D head size, V vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from perl_vlm.config import PpoConfig
from perl_vlm.plan.settings import Batch
from perl_vlm.plan.shapes import Shapes

Reads = Literal["scores", "logprobs", "values", "logprobs+values"]


@dataclass(frozen=True)
class Trains:
    """What trains in a role."""

    full: bool = False
    """The weights themselves."""
    language: int = 0
    """Parameters of the adapter on the language tower."""
    vision: int = 0
    """On the vision tower; of full tuning, what of that tower trains."""
    projector: int = 0
    checkpointing: bool = False


@dataclass(frozen=True)
class Accounting:
    """Operations of one GPU's step (of ppo: round), by what they are for."""

    parts: dict[str, float] = field(default_factory=dict)
    decode_steps: int = 0
    """Forward passes of one token a row."""
    decode_bytes: float = 0.0
    """Read in all of them."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def attention(shapes: Shapes, pairs: float) -> float:
    """Of the language tower, forwards, over so many pairs of query and key."""
    return 4.0 * pairs * shapes.heads * shapes.head_size * shapes.layers


def vision_attention(shapes: Shapes, prompts: int, patches: float) -> float:
    """Of the vision tower, forwards: every patch of a tile sees every other."""
    if shapes.picture is None:
        return 0.0
    tile = min(patches, float(shapes.picture.patches)) if shapes.picture.fixed else patches
    return 4.0 * prompts * patches * tile * shapes.vision_hidden * shapes.vision_layers


def trunk_forward(shapes: Shapes, batch: Batch, adapters: Trains | None = None) -> float:
    """A forward pass of both towers, the LM head left out."""
    extra = adapters or Trains()
    low = 0 if extra.full else extra.language
    found = 2.0 * batch.tokens * (shapes.matmul["language"] + low) + attention(shapes, batch.seen_pairs)
    patches = _patches(shapes, batch)
    if patches:
        low = 0 if extra.full else extra.vision
        found += 2.0 * batch.read_prompts * patches * (shapes.matmul["vision"] + low)
        found += vision_attention(shapes, batch.read_prompts, patches)
        found += 2.0 * batch.read_prompts * batch.image_tokens * shapes.matmul["projector"]
    return found


def trunk_training(shapes: Shapes, batch: Batch, trains: Trains) -> float:
    """Forward and backward passes of both towers, the LM head left out."""
    own = 6.0 if trains.full else 4.0
    found = batch.tokens * (own * shapes.matmul["language"] + (0.0 if trains.full else 6.0 * trains.language))
    found += 3.0 * attention(shapes, batch.seen_pairs)
    patches = _patches(shapes, batch)
    if patches:
        rows, seen = float(batch.read_prompts), vision_attention(shapes, batch.read_prompts, patches)
        if trains.vision:
            low = 0.0 if trains.full else 6.0 * trains.vision
            found += rows * patches * (own * shapes.matmul["vision"] + low) + 3.0 * seen
        else:
            found += rows * patches * 2.0 * shapes.matmul["vision"] + seen
        back = 2.0 if trains.projector or trains.vision else 0.0
        weights = 2.0 if trains.projector and trains.full else 0.0
        found += rows * batch.image_tokens * (2.0 + back + weights) * shapes.matmul["projector"]
    if trains.checkpointing:
        found += trunk_forward(shapes, batch, trains)
    return found


def head(shapes: Shapes, tokens: int, *, training: bool = False, full: bool = False) -> float:
    """The LM head at so many tokens."""
    times = 1 + (1 + 2 * int(full) if training else 0)
    return 2.0 * times * tokens * shapes.head


def _patches(shapes: Shapes, batch: Batch) -> float:
    return batch.image_tokens * shapes.picture.per_token if shapes.picture is not None else 0.0


def read(shapes: Shapes, batch: Batch, reads: Reads, adapters: Trains | None) -> float:
    """A scoring pass of one role."""
    tokens = batch.response_tokens if "logprobs" in reads else 0
    return trunk_forward(shapes, batch, adapters) + head(shapes, tokens)


def trained(shapes: Shapes, batch: Batch, reads: Reads, trains: Trains) -> float:
    """Forward and backward passes of one role."""
    tokens = batch.response_tokens if "logprobs" in reads else 0
    return trunk_training(shapes, batch, trains) + head(shapes, tokens, training=True, full=trains.full)


# -- ppo -----------------------------------------------------------------------------------------------------------


def scoring_passes(config: PpoConfig, rewards: int) -> list[tuple[str, Reads]]:
    """Roles that score a round's episodes and what is read of each; ``rewards`` of them are reward models."""
    found: list[tuple[str, Reads]] = [(f"reward-{member}", "scores") for member in range(rewards)]
    if config.recomputes:
        found.append(("policy", "logprobs+values" if config.value_kind == "policy_head" else "logprobs"))
    found.append(("reference", "logprobs"))
    if config.value_kind in ("reward", "zero"):
        found.append(("value", "values"))
    return found


def update_graphs(config: PpoConfig) -> list[tuple[str, Reads]]:
    """Roles that an update trains and what is read of each."""
    if config.value_kind == "policy_head":
        return [("policy", "logprobs+values")]
    own: list[tuple[str, Reads]] = [("policy", "logprobs")]
    return [*own, ("value", "values")] if config.value_kind in ("reward", "zero") else own


def decode(shapes: Shapes, rows: int, prompt: int, response: int, trains: Trains) -> float:
    """Operations of sampling ``response`` tokens in each of so many rows, the prompts already read."""
    low = 0 if trains.full else trains.language
    each = 2.0 * (shapes.matmul["language"] + low + shapes.head)
    return rows * (response * each + attention(shapes, prompt * response + response**2 / 2))


def decode_bytes(shapes: Shapes, rows: int, prompt: int, response: int, weights: float, size: int) -> float:
    """Bytes that the same reads: at each step the language tower's and the head's weights, and every row's cache."""
    mean = prompt + response // 2
    return response * (weights + rows * shapes.cache_bytes(mean, size))
