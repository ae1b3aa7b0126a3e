"""Pictures reach the model whole, and nothing but a picture is taken for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perl_vlm.config import LoraConfig, PpoConfig, RunConfig
from perl_vlm.data.images import BlankImage
from perl_vlm.data.render import Renderer
from perl_vlm.data.sequences import with_responses
from perl_vlm.errors import BadRecord
from perl_vlm.models.backbone import Backbone
from perl_vlm.train.experience import make_experience
from perl_vlm.train.pipeline import open_session
from perl_vlm.train.ppo import add_roles
from perl_vlm.train.rewards import Rewards
from perl_vlm.train.rundir import RunDir
from perl_vlm.train.signals import StopOnSignal
from perl_vlm.train.update import learn
from perl_vlm.types import Example, ImageSlot, Message
from perl_vlm_vqa import VQA


def test_a_blank_picture_changes_logprobs_all_the_way_through_ppo(tmp_path: Path) -> None:
    """The mistake: pixels are dropped on the way into PPO, and training reads image tokens without an image."""
    config = RunConfig(
        device="cpu", dtype="float32", lora=LoraConfig(language_rank=4, vision_rank=4),
        ppo=PpoConfig(batch_size=8, minibatches=2, max_new_tokens=4, min_new_tokens=4, temperature=2.0, value="zero",
                      reward_model="verify", kl="none"),
        task=VQA.Config(train_size=8, validation_size=2, test_size=2),
    )  # fmt: skip
    task = VQA(config.task)
    session = open_session(task, config, StopOnSignal())
    stage = session.stage("ppo", RunDir.create(tmp_path / "run", {}, resume=False))
    rewards = Rewards(stage)
    stage.roles.train_only(*add_roles(stage, rewards))
    prompts = list(stage.examples("train"))
    experience = make_experience(stage, prompts, rewards, 0, 0.0)
    sequences = experience.rollout.sequences
    responses = [
        ids[mask].tolist()
        for ids, mask in zip(sequences.input_ids[:, sequences.prompt_width :], sequences.response_mask, strict=True)
    ]

    @torch.no_grad()
    def logprobs(examples: list[Example]) -> torch.Tensor:
        fresh = with_responses(stage.renderer.prompts(examples), responses, stage.roles.backbone.pad_id)
        return stage.roles.logprobs("policy", fresh, temperature=2.0, min_new_tokens=4).logprobs

    blank = [replace(each, images=tuple(BlankImage(image) for image in each.images)) for each in prompts]
    seen, unseen = logprobs(prompts), logprobs(blank)
    assert (seen - unseen).abs().max(dim=1).values.min() > 1e-3, "the bundled model does not look at some picture"
    # What sampled, what scored and what trains all saw the pictures, each row its own.
    torch.testing.assert_close(experience.rollout.sampled_logprobs, seen, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(experience.measured.logprobs, seen, atol=1e-4, rtol=1e-4)
    for rows in ([5, 2], [7]):
        _, diagnostics = learn(stage, experience, rows, torch.tensor(4 * len(rows)), 0.0)
        assert diagnostics["val/ratio"].item() == pytest.approx(1.0, abs=1e-4)
        assert diagnostics["policy/approxkl_avg"].item() == pytest.approx(0.0, abs=1e-6)


def test_a_long_prompt_is_refused_by_name_and_no_image_token_is_cut(
    backbone: Backbone, make_examples: Callable[[int], list[Example]]
) -> None:
    """The mistake: a prompt is truncated, and the cut falls among its image tokens."""
    example = replace(make_examples(1)[0], origin="train.jsonl row 12")
    length = Renderer(backbone).prompts([example]).input_ids.shape[1]
    fits = Renderer(backbone, max_prompt_tokens=length).prompts([example])
    assert fits.input_ids.shape[1] == length
    with pytest.raises(BadRecord, match=rf"train\.jsonl row 12.*{length} tokens.*--max_prompt_tokens {length - 1}"):
        Renderer(backbone, max_prompt_tokens=length - 1).prompts([example])


def test_a_literal_image_token_in_a_text_is_text(
    backbone: Backbone, make_examples: Callable[[int], list[Example]]
) -> None:
    """The mistake: ``<image>`` in what a user wrote is read as the place of a picture."""
    renderer, slot = Renderer(backbone), backbone.processor.image_token
    assert slot == "<image>"
    example = make_examples(1)[0]
    image_id = backbone.tokenizer.convert_tokens_to_ids(slot)

    def image_tokens(*content: str | ImageSlot) -> int:
        asked = replace(example, messages=(Message("user", content),))
        return int((renderer.prompts([asked]).input_ids == image_id).sum())

    one_picture = image_tokens(ImageSlot(), "what does the tag do?")
    assert one_picture > 0
    assert image_tokens(ImageSlot(), "what does the <image> tag do?") == one_picture
    # Not even when it is spelled out across two parts of a turn.
    assert image_tokens(ImageSlot(), "what does the <ima", "ge> tag do?") == one_picture
    plain = replace(example, images=(), messages=(Message("user", ("what does the <image> tag do?",)),))
    assert int((renderer.prompts([plain]).input_ids == image_id).sum()) == 0
    # Nor in a response, where it would be an image token without an image.
    assert image_id not in renderer.response_ids("write <image> there")
