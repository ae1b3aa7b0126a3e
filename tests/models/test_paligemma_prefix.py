"""PaliGemma, whose prompt is read in both directions and whose response must not be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    GenerationConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessor,
)

from perl_vlm.data.render import Renderer
from perl_vlm.data.sequences import with_responses
from perl_vlm.models.backbone import TINY, Backbone
from perl_vlm.models.forward import response_hidden, response_logprobs
from perl_vlm.types import Example, ImageSlot, Message


class Red:
    def load(self) -> Image.Image:
        return Image.new("RGB", (32, 32), "red")


@pytest.fixture
def paligemma() -> Backbone:
    """A random PaliGemma of a few thousand weights with the bundled tokenizer; like the real one it has no template."""
    tokenizer = AutoProcessor.from_pretrained(TINY).tokenizer
    tokenizer.chat_template = None
    pixels = SiglipImageProcessor(size={"height": 32, "width": 32})
    pixels.image_seq_length = 4
    processor = PaliGemmaProcessor(pixels, tokenizer)
    torch.manual_seed(0)
    config = PaliGemmaConfig(
        text_config={
            "model_type": "gemma", "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        },
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=16,
    )  # fmt: skip
    model = PaliGemmaForConditionalGeneration(config).eval().requires_grad_(False)
    return Backbone(
        name="random PaliGemma", revision=None, model=model, processor=processor, tokenizer=tokenizer,
        eos_ids=(tokenizer.eos_token_id,), sees_images=True, generation_config=GenerationConfig(),
    )  # fmt: skip


def test_a_response_does_not_see_its_own_next_token(paligemma: Backbone) -> None:
    example = Example("a", (Message("user", (ImageSlot(), "which color?")),), (Red(),))
    prompts = Renderer(paligemma).prompts([example, replace(example, id="b")])
    assert set(prompts.extras) == {"pixel_values", "token_type_ids"}
    image = paligemma.tokenizer.convert_tokens_to_ids("<image>")
    assert (prompts.input_ids == image).sum(dim=1).tolist() == [4, 4]
    assert (prompts.input_ids == paligemma.tokenizer.bos_token_id).sum(dim=1).tolist() == [1, 1]
    sequences = with_responses(prompts, [[70, 71, 72], [70, 71, 80]], paligemma.pad_id)
    logprobs = response_logprobs(paligemma.model, paligemma, sequences).logprobs
    torch.testing.assert_close(logprobs[0, :2], logprobs[1, :2])
    assert (logprobs[0, 2] - logprobs[1, 2]).abs() > 1e-4
    hidden = response_hidden(paligemma.model, paligemma, sequences)
    torch.testing.assert_close(hidden[0, :3], hidden[1, :3])
    assert (hidden[0, 3] - hidden[1, 3]).abs().max() > 1e-4
