"""Positions in generation are those of the recomputation, under padding, for the ways of counting that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from perl_vlm.config import LoraConfig
from perl_vlm.data.render import Renderer
from perl_vlm.models.backbone import load_backbone
from perl_vlm.models.forward import response_logprobs
from perl_vlm.models.roles import REFERENCE, Roles
from perl_vlm.models.shared_prefix import refuse
from perl_vlm.rollout.sampler import sample_rollout
from perl_vlm.testing.families import make_family
from perl_vlm.types import Example, ImageSlot, Message, Rollout

MULTIMODAL = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


class Plain:
    """A picture of one colour."""

    def __init__(self, color: str, size: tuple[int, int]) -> None:
        self.color, self.size = color, size

    def load(self) -> Image.Image:
        return Image.new("RGB", self.size, self.color)


@pytest.fixture
def roles(request: pytest.FixtureRequest, tmp_path: Path) -> Roles:
    folder = make_family(request.param, tmp_path / "model")
    return Roles(load_backbone(str(folder), device="cpu", dtype="float32"), LoraConfig(language_rank=2, vision_rank=2))


def examples_for(roles: Roles, *, images: bool) -> list[Example]:
    """Prompts of different lengths, with pictures of different shapes where the model sees any."""
    asked = [
        ("what?", "red", (32, 32)),
        ("which color is the left one, please?", "blue", (64, 32)),
        ("a left right", "green", (40, 56)),
    ]
    return [
        Example(
            f"e{n}",
            (Message("user", (ImageSlot(), question) if images else (question,)),),
            (Plain(color, size),) if images else (),
        )
        for n, (question, color, size) in enumerate(asked)
    ]  # fmt: skip


def rollout_of(roles: Roles, examples: list[Example], seeds: list[int]) -> Rollout:
    renderer = Renderer(roles.backbone)
    return sample_rollout(
        roles, REFERENCE, renderer.prompts(examples), renderer, [example.id for example in examples],
        max_new_tokens=5, min_new_tokens=5, temperature=1.0, seeds=seeds,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("roles", "images"), [("gpt2", False), *((name, seen) for name in MULTIMODAL for seen in (True, False))],
    indirect=["roles"],
)  # fmt: skip
def test_padding_on_the_left_moves_no_position_in_generation(roles: Roles, images: bool) -> None:
    examples = examples_for(roles, images=images)
    together = rollout_of(roles, examples, [1, 2, 3])
    sequences = together.sequences
    assert len(sequences.attention_mask.sum(dim=1).unique()) == 3, "nothing is padded"
    with torch.no_grad():
        again = response_logprobs(roles.backbone.model, roles.backbone, sequences, min_new_tokens=5).logprobs
    torch.testing.assert_close(together.sampled_logprobs, again, atol=2e-5, rtol=1e-5)
    for row, example in enumerate(examples):
        alone = rollout_of(roles, [example], [row + 1])
        assert alone.texts[0] == together.texts[row]
        torch.testing.assert_close(alone.sampled_logprobs[0], together.sampled_logprobs[row], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("roles", MULTIMODAL, indirect=True)
def test_multimodal_positions_are_counted_alike_in_generation_and_recomputation(roles: Roles) -> None:
    """PITFALLS: M-RoPE positions wrong after padding. After a picture, text goes on from its longest side, not from its
    number of tokens; a stale offset from another batch would go unnoticed in the text."""
    model = roles.backbone.model
    seen: list[Tensor] = []

    def note(module: Any, arguments: Any, given: dict[str, Any]) -> None:
        seen.append(given["position_ids"][-3:])

    rollout_of(roles, examples_for(roles, images=True)[:1], [0])  # leaves its offset behind in the model
    refuse(model, "rows of their own are wanted")
    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    rollout = rollout_of(roles, examples_for(roles, images=True), [1, 2, 3])
    in_generation = torch.cat(seen, dim=-1)
    seen.clear()
    with torch.no_grad():
        response_logprobs(model, roles.backbone, rollout.sequences)
    handle.remove()
    (recomputed,) = seen
    width = in_generation.shape[-1]
    assert width == rollout.sequences.input_ids.shape[1] - 1, "the last token was never read"
    real = rollout.sequences.attention_mask[:, :width].bool().expand(3, -1, -1)
    assert torch.equal(in_generation[real], recomputed[..., :width][real])
    tokens = rollout.sequences.attention_mask.sum(dim=1)
    assert (recomputed.amax(dim=(0, 2)) + 1 < tokens).all(), "no picture takes fewer positions than tokens"
    assert torch.equal(recomputed[0, :, -5:], recomputed[2, :, -5:])
    assert (recomputed[:, :, -4:] - recomputed[:, :, -5:-1] == 1).all()
